"""How the rows of a pass lie, and which rows make up which step."""

from typing import Literal

import numpy as np
import torch

from glmtune.config import TrainSettings
from glmtune.training.plan import PackPlan, Plan, RowPlan, split_rows

# How the rows of a pass lie: padded to the longest, end to end, or so in packs of one length.
Layout = Literal["padded", "exact", "packed"]


def choose_layout(settings: TrainSettings, device: torch.device) -> Layout:
    """How the rows of a pass lie; on a GPU, where nothing else is said, in packs.

    Who gives both the rows of a pass and the number of steps, as the original's command does, has
    chosen them for each other: packs would go through the data twenty times as often.
    """
    on_gpu = device.type == "cuda"
    packing = settings.packing
    if packing is None:
        chosen = {"per_device_train_batch_size", "max_steps"} <= settings.model_fields_set
        packing = (
            on_gpu and not settings.exact_batch and (not chosen or bool(settings.tokens_per_step))
        )
    if packing:
        return "packed"
    exact = on_gpu if settings.exact_batch is None else settings.exact_batch
    return "exact" if exact else "padded"


def make_plan(
    settings: TrainSettings, lengths_R: np.ndarray, pack_length: int | None, num_processes: int
) -> Plan:
    """Which rows make up which step.

    Args:
        settings: the settings.
        lengths_R: tokens of every row, those held out among them.
        pack_length: tokens of a pack; None where a pass takes so many rows.
        num_processes: that share a step.
    """
    train_rows, _ = split_rows(len(lengths_R), settings.eval_ratio, settings.seed)
    seed = settings.seed if settings.data_seed is None else settings.data_seed
    shuffle = settings.train_sampling_strategy == "random"
    passes = num_processes * settings.gradient_accumulation_steps
    if pack_length:
        return PackPlan(train_rows, seed, shuffle, lengths_R, pack_length, passes)
    batch_size = settings.per_device_train_batch_size
    return RowPlan(train_rows, seed, shuffle, lengths_R, batch_size * passes, batch_size)


def count_steps(settings: TrainSettings, plan: Plan) -> int:
    """Optimiser steps of the whole run."""
    return (
        settings.max_steps if settings.max_steps > 0 else plan.num_steps(settings.num_train_epochs)
    )
