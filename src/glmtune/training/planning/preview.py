"""`glmtune plan`: memory and time of a run, here or on another card. Loads no weights."""

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from glmtune.config.settings import PlanSettings, TrainSettings
from glmtune.data.dataset import load_dataset
from glmtune.data.jsonlines import append_json, check_appendable
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
from glmtune.training.plan import Lengths, count_steps, make_plan
from glmtune.training.planning.advice import find_remedies, print_forecast
from glmtune.training.planning.forecast import EqualRows, Forecast, forecast
from glmtune.training.planning.power import describe_power, smallest_difference
from glmtune.training.planning.speed import no_speed, run_speed


def plan(settings: PlanSettings) -> dict[str, Any]:
    """Estimate, print, and return the record, which is also appended to a file if requested.

    Raises:
        UserError: a card or a base model that is not known, or a JSON file that cannot be written.
    """
    base = resolve_base(settings.base, settings.adapter, needs_weights=False)
    check_targets(settings.lora_target, base)
    check_appendable(settings.json_path)
    card, dtype = _card_and_dtype(settings)
    if base == HUB_IDS[0] and not settings.base:
        note(f"no base model is named or found, so this is of {DEFAULT.name} (--base)")
    config = read_settings(base)
    rows = _rows(settings, config)
    forecaster = partial(forecast, config=config, dtype=dtype, card=card, rows=rows)
    training = train_settings(settings)
    if training.adapter:
        from glmtune.training.beginning import begin_with  # which imports torch

        training, _ = begin_with(training, config)
    now = forecaster(training)
    print_forecast(now, training, base_name(base))
    record = now.as_record() | {"base": base_name(base)}
    if not now.cannot_fit:
        record["time"] = tell_time(now, training, rows)
    held_out = rows.split(training.eval_ratio, training.seed)[1]
    print(f"Verdict: {describe_power(len(held_out))}")
    points = smallest_difference(len(held_out)) if len(held_out) else None
    record["held_out"] = {"rows": len(held_out), "smallest_difference": points}
    if not now.fits:
        remedies = find_remedies(training, forecaster)
        print("\n".join(["Changes that make it fit:", *(f"  {remedy}" for remedy in remedies)])
              if remedies else "No setting makes it fit: take a larger card.")  # fmt: skip
        record["remedies"] = [vars(remedy) for remedy in remedies]
    if settings.json_path:
        append_json(record, settings.json_path)
    return record


def tell_time(now: Forecast, settings: TrainSettings, rows: Lengths) -> dict[str, Any]:
    """Print the time of a run, and return it as plain values; empty if it is unknown."""
    if reason := no_speed(now):
        print(f"Time: {reason}")
        return {}
    plan = make_plan(settings, rows, now.pack_length, num_processes=1)
    speed = run_speed(now, plan)
    basis = f"measured on an {now.card.name}" if speed.measured else "computed"
    num_steps = count_steps(settings, plan)
    hours = num_steps * speed.hours_per_step
    span = f"{hours:,.1f} hours" if hours >= 1 else f"{60 * hours:.1f} minutes"
    pairs = {
        "speed": f"{speed.rows_per_second:,.1f} rows a second, "
        f"{speed.tokens_per_second:,.0f} tokens ({basis}; docs/cards.md)",
        "run": f"{span} for {num_steps:,} steps, {plan.epoch(num_steps):.2g} x "
        f"{len(plan.row_ids):,} rows",
    }
    print_pairs("Time of the training steps", pairs)
    return asdict(speed) | {"num_steps": num_steps, "hours": hours}


def train_settings(settings: PlanSettings) -> TrainSettings:
    """The settings of the planned run: those given, so that the others are resolved as in a run."""
    given = settings.model_fields_set & TrainSettings.model_fields.keys()
    required = {"dataset_path", "output_dir"}
    return TrainSettings(**settings.model_dump(include=given | required))


def _card_and_dtype(settings: PlanSettings) -> tuple[Card, NumberFormat]:
    if settings.card is None and settings.memory_gib is None:
        if settings.use_cpu or not has_gpu():
            card = Card.of_cpu()
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
        return TokenRows.from_table(load_dataset(settings.dataset_path, rule)[0], rule)
    missing = "dataset_path" in settings.model_fields_set
    note(
        f"{f'{settings.dataset_path} is not there' if missing else 'no dataset_path'}, so "
        f"{settings.num_rows:,} rows count as {settings.row_length} tokens each, all supervised "
        "(--num_rows, --row_length)"
    )
    return EqualRows(np.full(settings.num_rows, settings.row_length))
