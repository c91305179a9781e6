"""`glmtune plan`: what a run would take in memory, here or on another card. Loads no weights."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from glmtune.config.settings import PlanSettings, TrainSettings
from glmtune.data.dataset import load_dataset
from glmtune.data.jsonlines import append_json, check_appendable
from glmtune.data.token_rows import TokenRows
from glmtune.errors import note
from glmtune.hardware import Card, pick_device, pick_dtype
from glmtune.models.families import DEFAULT, check_targets, family_of
from glmtune.models.loading import load_config
from glmtune.models.resolve import HUB_IDS, base_name, resolve_base
from glmtune.training.planning.advice import find_remedies, print_forecast
from glmtune.training.planning.forecast import EqualRows, Lengths, forecast


def plan(settings: PlanSettings) -> dict[str, Any]:
    """Estimate, print, and return the record, which is also appended where asked for.

    Raises:
        UserError: a card or a base model that is not known, or a JSON file that cannot be written.
    """
    check_targets(settings.lora_target)
    check_appendable(settings.json_path)
    card, dtype = _card_and_dtype(settings)
    base = resolve_base(settings.base, needs_weights=False)
    if base == HUB_IDS[0] and not settings.base:
        note(f"no base model is named or found, so this is of {DEFAULT.name} (--base)")
    config = load_config(base)
    rows = _rows(settings, config)
    forecaster = partial(forecast, config=config, dtype=dtype, card=card, rows=rows)
    training = train_settings(settings)
    now = forecaster(training)
    print_forecast(now, training, base_name(base))
    record = now.as_record() | {"base": base_name(base)}
    if not now.fits:
        remedies = find_remedies(training, forecaster)
        print("\n".join(["Changes that make it fit:", *(f"  {remedy}" for remedy in remedies)])
              if remedies else "No setting makes it fit: take a larger card.")  # fmt: skip
        record["remedies"] = [vars(remedy) for remedy in remedies]
    if settings.json_path:
        append_json(record, settings.json_path)
    return record


def train_settings(settings: PlanSettings) -> TrainSettings:
    """The settings of the run that is planned: those given, so that the others are chosen alike."""
    given = settings.model_fields_set & TrainSettings.model_fields.keys()
    required = {"dataset_path", "output_dir"}
    return TrainSettings(**settings.model_dump(include=given | required))


def _card_and_dtype(settings: PlanSettings) -> tuple[Card, torch.dtype]:
    if settings.card is None and settings.memory_gib is None:
        device = pick_device(settings.use_cpu)
        return Card.of(device), pick_dtype(device, settings.bf16, settings.fp16)[0]
    card = Card.named(settings.card) if settings.card else Card.sized(settings.memory_gib or 0)
    has_bf16 = card.capability is not None and card.capability >= (8, 0)
    if settings.fp16 or (settings.bf16 is None and not has_bf16):
        return card, torch.float16
    return card, torch.float32 if settings.bf16 is False else torch.bfloat16


def _rows(settings: PlanSettings, config: PreTrainedConfig) -> Lengths:
    """The data set's, or, where it is not there yet, as many equal ones as a step takes."""
    if Path(settings.dataset_path).is_dir():
        rule = family_of(config).row_rule(config)
        return TokenRows.from_dataset(load_dataset(settings.dataset_path, rule)[0], rule)
    missing = "dataset_path" in settings.model_fields_set
    note(
        f"{f'{settings.dataset_path} is not there' if missing else 'no dataset_path'}, so "
        f"every row counts as {settings.row_length} tokens, all learned (--row_length)"
    )
    return EqualRows.of(settings, settings.row_length)
