"""Log-probabilities of references: how likely each side finds the right answer.

Nothing is sampled, so base and tuned differ by the adapter alone. References are laid end to end as
in training, many in one pass.

Shapes: R rows, one for each reference; T tokens of all rows; L supervised tokens.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

from glmtune.data.packing import lay_out, plan_packs
from glmtune.data.row_rule import RowRule
from glmtune.data.token_rows import IGNORED, TokenRows
from glmtune.evaluation.probes import Probe
from glmtune.models.families import family_of
from glmtune.models.low_rank import has_lora, split_lora
from glmtune.models.packed import PackedModel, base_of
from glmtune.training.batches import collate

PACK_LENGTH = 4096
"""Tokens of a pass; a longer row is one by itself."""
GROUP = 256
"""Records scored at a time."""


class Likelihood(NamedTuple):
    """How likely a side finds a reference, its end included."""

    log_prob: float
    """Sum over its tokens, in nats."""
    num_tokens: int


class References:
    """The references of records, scored on both sides when they are asked for.

    They are scored in groups that begin at fixed records, so that a resumed comparison computes on
    the same packs as one that was never interrupted, and gets the same numbers.

    Args:
        model: base and adapter, in evaluation mode. Build this before a decoder: packed layers may
            lay weights together, which a decoder would hold twice.
        probes: prompts with their references, one for each record.
        sides: name -> what the model is put into while that side is scored.
    """

    def __init__(
        self,
        model: Any,
        probes: Sequence[Probe],
        sides: Mapping[str, Callable[[], AbstractContextManager[Any]]],
    ):
        self._model, self._probes, self._sides = model, probes, sides
        self._packed: dict[str, PackedModel | None] = {}
        for name, enter in sides.items():
            with enter():
                self._packed[name] = packed_layers(model)
        self._first = 0
        self._group: list[dict[str, float | int] | None] = []

    def of(self, number: int) -> dict[str, float | int] | None:
        """A record's reference: its tokens, and its log-probability on each side.

        Args:
            number: the record's place, from 0.

        Returns:
            None where it cannot be scored, see `score_references`.
        """
        place = number - self._first
        if not 0 <= place < len(self._group):
            self._first, place = number - number % GROUP, number % GROUP
            probes = self._probes[self._first : self._first + GROUP]
            group: list[dict[str, float | int]] = [{} for _ in probes]
            for name, enter in self._sides.items():
                with enter():
                    scored = score_references(self._model, probes, self._packed[name])
                for of_record, found in zip(group, scored, strict=True):
                    if found:
                        of_record |= {"num_tokens": found.num_tokens, name: found.log_prob}
            self._group = [of_record or None for of_record in group]
        return self._group[place]


def packed_layers(model: Any) -> PackedModel | None:
    """A model as it is now, adapter on or off, on packed rows; None for adapters besides LoRA."""
    modules = (module for module in model.modules() if has_lora(module))
    if any(split_lora(module)[0] is module for module in modules):
        return None
    native = family_of(base_of(model).config).native()
    return PackedModel(model, native.packed, compiled=False)


def score_references(
    model: Any, probes: Sequence[Probe], packed: PackedModel | None
) -> list[Likelihood | None]:
    """The likelihood of each reference under a model as it is now, adapter on or off.

    The ids of an answer count, its end included, and none before them.

    Args:
        model: in evaluation mode.
        probes: prompts with their references.
        packed: see `packed_layers`; None for the model's own forward.

    Returns:
        One for each probe; None where the row has more tokens than the model has positions, or the
        reference has none.
    """
    config = base_of(model).config
    rows = rows_of(probes, family_of(config).row_rule(config))
    fits_R = rows.lengths_R <= config.max_position_embeddings
    asked = np.flatnonzero(fits_R & (rows.num_labels_R > 0))
    found: list[Likelihood | None] = [None] * len(probes)
    if len(asked):
        sums_R = packed_sums(packed, rows, asked) if packed else padded_sums(model, rows, asked)
        for row in asked:
            found[row] = Likelihood(float(sums_R[row]), int(rows.num_labels_R[row]))
    return found


def rows_of(probes: Sequence[Probe], rule: RowRule) -> TokenRows:
    """Prompts and answers as token rows of which the answers are supervised."""
    ids = [probe.prompt_ids + probe.answer_ids for probe in probes]
    labels = [[IGNORED] * len(probe.prompt_ids) + probe.answer_ids for probe in probes]
    ids_T, labels_T = (np.array([i for row in rows for i in row]) for rows in (ids, labels))
    return TokenRows(
        ids_T=ids_T,
        starts_R1=np.cumsum([0, *map(len, ids)]),
        prompt_lengths_R=np.array([len(probe.prompt_ids) for probe in probes]),
        rule=rule,
        labels_T=labels_T,
    )


@torch.inference_mode()
def packed_sums(packed: PackedModel, rows: TokenRows, row_ids: np.ndarray) -> np.ndarray:
    """Summed log-probability of each row's labels, rows laid end to end, ``(R,)`` float64."""
    length = max(PACK_LENGTH, int(rows.lengths_R[row_ids].max()))
    sums_R = np.zeros(len(rows))
    for part in plan_packs(rows.lengths_R, row_ids, length):
        pack = lay_out(rows, part, int(rows.lengths_R[part].sum()))
        log_probs_L = packed.log_probs(packed.to_tensors(pack)).double().cpu().numpy()
        row_L = np.repeat(part, rows.num_labels_R[part])
        sums_R += np.bincount(row_L, log_probs_L[: len(row_L)], minlength=len(rows))
    return sums_R


@torch.inference_mode()
def padded_sums(model: Any, rows: TokenRows, row_ids: np.ndarray) -> np.ndarray:
    """The reference of `packed_sums`: the model's own forward, one row at a time."""
    sums_R = np.zeros(len(rows))
    for row in row_ids:
        batch = collate(rows, np.array([row]))
        ids_1S, labels_1S = (batch[name].to(model.device) for name in ("input_ids", "labels"))
        logits_SV = model(input_ids=ids_1S, use_cache=False).logits[0, :-1].float()
        of_labels = F.cross_entropy(
            logits_SV, labels_1S[0, 1:], ignore_index=IGNORED, reduction="none"
        )
        sums_R[row] = -of_labels.double().sum().item()
    return sums_R
