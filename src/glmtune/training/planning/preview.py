"""`glmtune plan`: memory and time of a run, here or on another card. Loads no weights."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from glmtune.config.settings import PlanSettings, TrainSettings
from glmtune.data.dataset import load_dataset
from glmtune.data.eval_sets import name_folders, with_eval_sets
from glmtune.data.jsonlines import append_json, check_appendable
from glmtune.data.packing import check_lengths
from glmtune.data.token_rows import TokenRows
from glmtune.errors import note
from glmtune.hardware import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    Card,
    NumberFormat,
    has_gpu,
    pick_device,
    pick_dtype,
    pick_format,
)
from glmtune.models.base_files import check_targets, read_settings
from glmtune.models.families import DEFAULT, family_of
from glmtune.models.resolve import HUB_IDS, base_name, resolve_base
from glmtune.runlog import print_pairs
from glmtune.training.plan import Lengths, Plan, make_plan
from glmtune.training.planning.advice import find_remedies, print_forecast
from glmtune.training.planning.forecast import EqualRows, Forecast, forecast
from glmtune.training.planning.power import describe_power, smallest_difference
from glmtune.training.planning.ranks import World
from glmtune.training.planning.scaling import (
    MOST_PLANNED,
    check_fits_each,
    check_shared_out,
    run_time,
    why_no_time,
    world_of,
)
from glmtune.training.planning.scaling_words import (
    describe_price,
    describe_time,
    describe_world,
    name_world,
)


def plan(settings: PlanSettings) -> dict[str, Any]:
    """Estimate, print, and return the record, which is also appended to a file if requested.

    Raises:
        UserError: a card or a base model that is not known, a JSON file that cannot be written; or
            of several cards, a base that does not fit on one, or more cards than passes.
    """
    base = resolve_base(settings.base, settings.adapter, needs_weights=False)
    check_targets(settings.lora_target, base)
    check_appendable(settings.json_path)
    card, dtype = _card_and_dtype(settings)
    if base == HUB_IDS[0] and not settings.base:
        note(f"no base model is named or found, so this is of {DEFAULT.name} (--base)")
    config = read_settings(base)
    rows = _rows(settings, config)
    scale = settings.num_rows / len(rows.lengths_R) if isinstance(rows, EqualRows) else 1.0
    world = world_of(settings, card)
    forecast_on = partial(
        forecast, config=config, dtype=dtype, rows=rows, num_processes=world.num_ranks
    )
    forecaster = partial(forecast_on, card=card)
    training = train_settings(settings)
    if training.adapter:
        from glmtune.training.beginning import begin_with  # which imports torch

        training, _ = begin_with(training, config)
    now = forecaster(training)
    if world.num_ranks > 1:
        check_fits_each(now, training, forecast_on, world)
    if now.pack_length:
        row_ids = np.arange(len(rows.lengths_R))
        named = training.dataset_path
        if isinstance(rows, EqualRows):
            named = f"--row_length {settings.row_length}"
        check_lengths(rows, row_ids, now.pack_length, named)
    of_one = make_plan(training, rows, now.pack_length, 1)
    plans = of_one, of_one
    if world.num_ranks > 1:
        plans = make_plan(training, rows, now.pack_length, world.num_ranks), of_one
    check_shared_out(plans[0], training, world, scale)
    print_forecast(now, training, base_name(base))
    record = now.as_record() | {"base": base_name(base)}
    record |= {"gpus": settings.gpus, "nodes": settings.nodes}
    if not now.cannot_fit:
        record["time"] = tell_time(now, plans, rows, training, settings, world, scale)
    note(*_without_effect(settings, isinstance(rows, EqualRows), bool(record.get("time"))))
    held_out = rows.split(training.eval_ratio, training.seed)[1]
    num_held_out = round(len(held_out) * scale)
    print(f"Verdict: {describe_power(num_held_out)}")
    points = smallest_difference(num_held_out) if num_held_out else None
    record["held_out"] = {"rows": num_held_out, "smallest_difference": points}
    if not now.fits:
        remedies = find_remedies(training, forecaster)
        print("\n".join(["Changes that make it fit:", *(f"  {remedy}" for remedy in remedies)])
              if remedies else "No setting makes it fit: take a larger card.")  # fmt: skip
        record["remedies"] = [vars(remedy) for remedy in remedies]
    if settings.json_path:
        append_json(record, settings.json_path)
    return record


def tell_time(
    now: Forecast,
    plans: tuple[Plan, Plan],
    rows: Lengths,
    training: TrainSettings,
    settings: PlanSettings,
    world: World,
    scale: float,
) -> dict[str, Any]:
    """Print the time of a run and what it costs, and return them; empty if they are unknown.

    Args:
        now: forecast of a process.
        plans: which rows make up which step, in these processes and in one.
        rows: every row, held-out ones included.
        training: the run's settings.
        settings: the plan's: speed and price.
        world: the processes.
        scale: how many times as many rows there are as in `rows`.
    """
    speed = settings.tokens_per_second
    if reason := why_no_time(now, speed):
        print(f"Time: {reason}")
        return {}
    time = run_time(now, plans, rows, training, world, scale, speed)
    if speed:
        basis = f"by --tokens_per_second {speed:g} of one"
    else:
        basis = f"measured on an {now.card.name}" if time.measured else "computed"
    print_pairs("Time of the training steps", describe_time(time, basis))
    if world.num_ranks > 1:
        print_pairs(name_world(now.card, world), describe_world(time, now, world, settings))
    record = time.as_record()
    if settings.price_per_hour:
        record["price"] = price = time.whole_hours * world.num_ranks * settings.price_per_hour
        print(f"Price: {describe_price(price, time, world, settings.price_per_hour)}")
    return record


def _without_effect(settings: PlanSettings, are_equal: bool, has_time: bool) -> list[str]:
    """A line for each setting that was given and changes nothing in this plan.

    Args:
        settings: the plan's.
        are_equal: whether the rows are made up, by `row_length` and `num_rows`.
        has_time: whether the time of the run is known.
    """
    reasons = {}
    if settings.gpus * settings.nodes == 1:
        reasons["shard_base"] = "of one card, which holds the whole base (--gpus)"
    if settings.gpus == 1:
        reasons["link_gbit"] = "of one card in each node (--gpus)"
    if settings.nodes == 1:
        reasons["network_gbit"] = "of one node (--nodes)"
    if not has_time:
        told = "where no time is computed"
        reasons |= dict.fromkeys(("link_gbit", "network_gbit", "price_per_hour"), told)
    if not are_equal:
        told = f"beside dataset_path {settings.dataset_path}, whose rows have their own"
        reasons |= dict.fromkeys(("row_length", "num_rows"), told)
    given = settings.model_fields_set
    return [f"{name} has no effect {why}" for name, why in reasons.items() if name in given]


def train_settings(settings: PlanSettings) -> TrainSettings:
    """The settings of the planned run: those given, so that the others are resolved as in a run."""
    given = settings.model_fields_set & TrainSettings.model_fields.keys()
    required = {"dataset_path", "output_dir"}
    return TrainSettings(**settings.model_dump(include=given | required))


def _card_and_dtype(settings: PlanSettings) -> tuple[Card, NumberFormat]:
    if settings.card is None and settings.memory_gib is None:
        if settings.use_cpu or not has_gpu():
            card = Card.of_cpu()
            if settings.gpus > 1:  # its processes share the machine's memory
                share = card.gib / settings.gpus
                card = Card(f"CPU, shared by {settings.gpus} processes", share, share, None)
            return card, pick_format(card.name, False, True, settings.bf16, settings.fp16)[0]
        device = pick_device()
        return Card.of(device), pick_dtype(device, settings.bf16, settings.fp16)[0]
    card = Card.named(settings.card) if settings.card else Card.sized(settings.memory_gib or 0)
    has_bf16 = card.capability is not None and card.capability >= (8, 0)
    if settings.fp16 or (settings.bf16 is None and not has_bf16):
        return card, FLOAT16
    return card, FLOAT32 if settings.bf16 is False else BFLOAT16


def _rows(settings: PlanSettings, config: Any) -> Lengths:
    """The rows of the data set, or equal ones if it does not exist yet."""
    if Path(settings.dataset_path).is_dir():
        rule = family_of(config).row_rule(config)
        rows = TokenRows.from_table(load_dataset(settings.dataset_path, rule)[0], rule)
        named = name_folders(settings.eval_dataset_path or ())
        sets = {name: load_dataset(folder, rule)[0] for name, folder in named.items()}
        return with_eval_sets(
            rows, {name: TokenRows.from_table(table, rule) for name, table in sets.items()}
        )
    missing = "dataset_path" in settings.model_fields_set
    note(
        f"{f'{settings.dataset_path} is not there' if missing else 'no dataset_path'}, so "
        f"{settings.num_rows:,} rows count as {settings.row_length} tokens each, all supervised "
        "(--num_rows, --row_length)"
    )
    if settings.num_rows > MOST_PLANNED:
        note(f"{MOST_PLANNED:,} of these rows are packed, and the figures scaled up to all")
    return EqualRows(np.full(min(settings.num_rows, MOST_PLANNED), settings.row_length))
