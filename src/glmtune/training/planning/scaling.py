"""The time and the price of a whole run on one card or many, and its data on disk and in memory."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from glmtune.cards import CARDS, link_of
from glmtune.config.settings import PlanSettings, TrainSettings
from glmtune.data.packing import PACK_MULTIPLE
from glmtune.data.split import MOST_COMPARED
from glmtune.errors import UserError
from glmtune.hardware import Card, num_cores
from glmtune.training.plan import Lengths, Plan, count_steps, evaluation_parts
from glmtune.training.planning.advice import find_remedies, verdict
from glmtune.training.planning.forecast import Forecast
from glmtune.training.planning.memory import base_bytes
from glmtune.training.planning.ranks import (
    EpochTime,
    Link,
    PassCost,
    StepTime,
    World,
    epoch_time,
    step_time,
)
from glmtune.training.planning.speed import (
    forward_share,
    is_measured,
    no_speed,
    pass_cost,
    tokens_of_pass,
)
from glmtune.training.saving.checkpoint_size import last_checkpoint_bytes

MOST_PLANNED = 100_000
"""Rows that a plan packs; where there are more equal ones, the figures of these are scaled up."""
# Assumed, not measured: shares of the rated bandwidth that a sum of some megabytes reaches, and the
# seconds of a message. With PCIe the bytes go through the memory of the host.
LINK_SHARES = {"NVLink": 0.5, "PCIe": 0.3, "given": 1.0}
NETWORK_SHARE = 0.7
LATENCY_INSIDE, LATENCY_BETWEEN = 10e-6, 30e-6
# Between two processes of one machine through gloo: benchmarks/2026-11-30-scaling.md.
GLOO = Link(1.0e9, 100e-6)
START_SECONDS = 60.0
"""Loading and compiling: about a minute on an H200 (docs/cards.md)."""
# Of one core before the first step: benchmarks/2026-12-01-rows.md.
LOOKING_SECONDS, PACKING_SECONDS, GROUPING_SECONDS = 1.1e-6, 1.0e-6, 11e-6
"""To check and count a row and to pack it in each epoch, both in every process; and to find those
that are nearly equal to it where some are held out, which they share for many rows."""
ROW_BYTES = 170
"""What a row takes in the memory of each process; its tokens stay in the files."""
DISK_BYTES_PER_SECOND = 5e8
"""Assumed, of checkpoints, which are flushed and read back."""


@dataclass(frozen=True)
class RunTime:
    """How long a run takes, part by part; the speed is that of all its processes together."""

    rows_per_second: float
    tokens_per_second: float
    """Tokens of the rows a second, filler not included."""
    hours_per_step: float
    measured: bool
    """Whether such a run was measured on this card; otherwise the figures are only computed."""
    num_steps: int
    hours: float
    """All steps."""
    num_epochs: float
    num_rows: int
    """Rows that are trained on."""
    step: StepTime
    speedup: float
    """How many times as many tokens a second as one process."""
    steps_of_one: int
    """Steps that one process would take."""
    num_evaluations: int
    evaluation_hours: float
    num_saves: int
    saving_hours: float
    start_hours: float
    """Loading, compiling, and what is done with every row before the first step."""
    whole_hours: float
    """Starting, steps, evaluations and checkpoints."""
    row_bytes: int
    """What all rows take in the memory of each process."""

    def as_record(self) -> dict[str, Any]:
        """All of it as plain numbers."""
        return asdict(self) | {"step": self.step._asdict()}


def world_of(settings: PlanSettings, card: Card) -> World:
    """The processes that a plan is for, and what joins them."""
    between = Link(NETWORK_SHARE * 1e9 / 8 * settings.network_gbit, LATENCY_BETWEEN)
    cores = None
    if card.capability is None:
        cores, inside = num_cores(), GLOO
    else:
        kind, rated = link_of(card.name, card.capability)
        inside = Link(LINK_SHARES[kind] * 1e9 * rated, LATENCY_INSIDE)
    if settings.link_gbit:
        inside = Link(LINK_SHARES["given"] * 1e9 / 8 * settings.link_gbit, inside.latency)
    return World(settings.gpus, settings.nodes, inside, between, cores)


def check_fits_each(
    forecast: Forecast,
    settings: TrainSettings,
    forecast_on: Callable[..., Forecast],
    world: World,
) -> None:
    """Refuse a base that does not fit on one card, where each of them holds all of it.

    Args:
        forecast: of one process.
        settings: the run's settings.
        forecast_on: the same for any settings on any `card`.
        world: the processes.

    Raises:
        UserError: it does not fit; the message names settings and a card with which it does.
    """
    if not forecast.cannot_fit:
        return
    forecaster = partial(forecast_on, card=forecast.card)
    remedies = find_remedies(settings, forecaster)
    held = "the whole base, so more of them do not help"
    if settings.shard_base:
        held = f"one of {world.num_ranks:,} shares of the base"
    advice = [str(remedy) for remedy in remedies[:3]]
    if card := _card_that_fits(settings, forecast_on, forecast.card.gib):
        advice.append(f"--card '{card.name}' has {card.gib:.0f} GiB")
    raise UserError(
        f"memory: {verdict(forecast)}, and each of {world.num_ranks:,} cards holds {held}; "
        f"{'; or '.join(advice) or 'take a smaller base model'}"
    )


def _card_that_fits(
    settings: TrainSettings, forecast_on: Callable[..., Forecast], least: float
) -> Card | None:
    """The smallest card on which a run fits, of those that compute in bfloat16."""
    sizes = sorted((gib, name) for name, (gib, of, _) in CARDS.items() if of >= (8, 0))
    cards = [Card.named(name) for gib, name in sizes if gib > least and "Laptop" not in name]
    return next((card for card in cards if forecast_on(settings, card=card).fits), None)


def check_shared_out(plan: Plan, settings: TrainSettings, world: World, scale: float) -> None:
    """Make sure that every process has something to do in an epoch.

    Args:
        plan: which rows make up which step.
        settings: the run's settings.
        world: the processes.
        scale: how many times as many rows there are as in the plan.

    Raises:
        UserError: an epoch has fewer passes than there are processes; the message says what helps.
    """
    num_ranks = world.num_ranks
    if num_ranks == 1 or (num_passes := round(plan.passes_in(0) * scale)) >= num_ranks:
        return
    most_nodes = num_passes // world.gpus
    most = f"--gpus {num_passes} --nodes 1" if not most_nodes else f"--nodes {most_nodes}"
    what = f"packs of {plan.step_size // _passes_per_step(settings, world):,} tokens"
    if plan.unit == "rows":
        what = f"passes of {settings.per_device_train_batch_size} rows"
    advice = [f"{most} at most", *_shorter_passes(plan, num_ranks, scale)]
    raise UserError(
        f"{num_ranks:,} cards: an epoch is {num_passes:,} {what}, so "
        f"{num_ranks - num_passes:,} would never have one; {', or '.join(advice)}"
    )


def _passes_per_step(settings: TrainSettings, world: World) -> int:
    return world.num_ranks * settings.gradient_accumulation_steps


def _shorter_passes(plan: Plan, num_ranks: int, scale: float) -> list[str]:
    """Settings with which an epoch has a pass for each process, if there are any."""
    lengths_R = plan.lengths_R[plan.row_ids]
    if plan.unit == "rows":
        rows = int(len(lengths_R) * scale) // num_ranks
        return [f"--per_device_train_batch_size {rows}"] if rows else []
    length = int(lengths_R.sum() * scale / num_ranks) // PACK_MULTIPLE * PACK_MULTIPLE
    return (
        [f"--tokens_per_step {length}"]
        if length >= max(PACK_MULTIPLE, int(lengths_R.max()))
        else []
    )


def run_time(
    forecast: Forecast,
    plans: tuple[Plan, Plan],
    rows: Lengths,
    settings: TrainSettings,
    world: World,
    scale: float = 1.0,
    measured_speed: float | None = None,
) -> RunTime:
    """The time of a run; `why_no_time` must have returned None.

    Args:
        forecast: of one of its processes.
        plans: which rows make up which step, in these processes and in one.
        rows: every row, held-out ones included.
        settings: the run's settings.
        world: the processes.
        scale: how many times as many rows there are as in `rows`.
        measured_speed: tokens a second of one process, where that was measured.
    """
    plan, plan_of_one = plans
    cost = _cost(forecast, plan_of_one, measured_speed)
    tokens_of = tokens_of_pass(forecast, rows.lengths_R)
    shared = replace(cost, gathering=gathering_seconds(forecast, world))
    epoch = epoch_time(plan, world.num_ranks, shared, tokens_of, scale)
    one = epoch_time(plan_of_one, 1, cost, tokens_of, scale)
    step = step_time(epoch, world, forecast.setup.parameters())
    num_steps = _count_steps(settings, plan, epoch, scale)
    lengths_R = plan.lengths_R[plan.row_ids]
    num_rows, num_tokens = round(len(lengths_R) * scale), float(lengths_R.sum()) * scale
    epoch_seconds = step.all * epoch.num_steps

    every = epoch.num_steps if settings.save_strategy == "epoch" else settings.save_steps
    num_saves = -(-num_steps // every)
    saved = num_saves * last_checkpoint_bytes(settings, forecast.setup, num_steps, world.num_ranks)
    eval_rows = rows.split(settings.eval_ratio, settings.seed)[1]
    if scale == 1:
        seconds = _heaviest_evaluation(forecast, rows, eval_rows, settings, world, cost)
    else:  # too few of them are in the plan to fill the passes of each process
        seconds = epoch.mean * len(eval_rows) / len(lengths_R)
    seconds *= world.sharing * forward_share(forecast.setup, forecast.recompute)
    num_evaluations = -(-num_steps // (settings.eval_steps or every)) if seconds else 0
    every_row = len(rows.lengths_R) * scale
    num_epochs = 1 if settings.max_steps > 0 else math.ceil(num_steps / epoch.num_steps)
    of_row = LOOKING_SECONDS + (PACKING_SECONDS * num_epochs if plan.unit == "tokens" else 0)
    if settings.eval_ratio or settings.eval_dataset_path:
        of_row += GROUPING_SECONDS / (world.num_ranks if every_row > MOST_COMPARED else 1)
    start = START_SECONDS + world.sharing * every_row * of_row
    parts = {
        "start_hours": start / 3600,
        "hours": num_steps * step.all / 3600,
        "evaluation_hours": num_evaluations * seconds / 3600,
        "saving_hours": saved / DISK_BYTES_PER_SECOND / 3600,
    }
    return RunTime(
        rows_per_second=num_rows / epoch_seconds,
        tokens_per_second=num_tokens / epoch_seconds,
        hours_per_step=step.all / 3600,
        measured=is_measured(forecast),
        num_steps=num_steps,
        num_epochs=plan.epoch(num_steps) if scale == 1 else num_steps / epoch.num_steps,
        num_rows=num_rows,
        step=step,
        speedup=one.heaviest / epoch_seconds,
        steps_of_one=_count_steps(settings, plan_of_one, one, scale),
        num_evaluations=num_evaluations,
        num_saves=num_saves,
        **parts,
        whole_hours=sum(parts.values()),
        row_bytes=round(ROW_BYTES * every_row),
    )


def gathering_seconds(forecast: Forecast, world: World) -> float:
    """Seconds in which the weights of a base that is shared out come, forward and backward."""
    setup = forecast.setup
    if setup.num_shares == 1:
        return 0.0
    return 2 * world.gather_seconds(base_bytes(setup), setup.shape.num_layers)


def _heaviest_evaluation(
    forecast: Forecast,
    rows: Lengths,
    eval_rows: np.ndarray,
    settings: TrainSettings,
    world: World,
    cost: PassCost,
) -> float:
    """Seconds that the heaviest process would train on its share of the passes of an evaluation."""
    size, tokens_of = settings.per_device_eval_batch_size, tokens_of_pass(forecast, rows.lengths_R)
    parts = evaluation_parts(rows.lengths_R, eval_rows, forecast.pack_length, size)
    of_ranks = (parts[rank :: world.num_ranks] for rank in range(world.num_ranks))
    return max(sum(cost.seconds(tokens_of(part)) for part in own) for own in of_ranks)


def why_no_time(forecast: Forecast, measured_speed: float | None = None) -> str | None:
    """Why the time of a run cannot be computed, or None where it can."""
    reason = None if measured_speed else no_speed(forecast)
    return f"{reason} (--tokens_per_second: as measured on one)" if reason else None


def _cost(forecast: Forecast, plan_of_one: Plan, measured_speed: float | None) -> PassCost:
    """What a pass takes: computed, or so that one process has the measured speed."""
    if not measured_speed:
        return pass_cost(forecast)
    fixed = 0.0 if no_speed(forecast) else pass_cost(forecast).fixed_tokens
    num_tokens = float(plan_of_one.lengths_R[plan_of_one.row_ids].sum())
    tokens_of = tokens_of_pass(forecast, plan_of_one.lengths_R)
    unit = epoch_time(plan_of_one, 1, PassCost(1.0, fixed), tokens_of).heaviest
    return PassCost(num_tokens / measured_speed / unit, fixed)


def _count_steps(settings: TrainSettings, plan: Plan, epoch: EpochTime, scale: float) -> int:
    """Steps of a run; of more rows than the plan has, all epochs are taken to be like the first."""
    if scale == 1 or settings.max_steps > 0:
        return count_steps(settings, plan)
    return math.ceil(settings.num_train_epochs * epoch.num_steps)


def spell_hours(hours: float) -> str:
    """A time in hours, in minutes where it is short, or in seconds."""
    if hours >= 1:
        return f"{hours:,.1f} hours"
    return f"{60 * hours:.1f} minutes" if hours >= 1 / 60 else f"{3600 * hours:.1f} seconds"
