"""Log-probabilities of answers under a model as it is now: nothing is sampled.

Prompts and answers are laid end to end as in training, many in one pass.

Shapes: R rows, one for each answer; T tokens of all rows; L supervised tokens.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

from glmtune.data.packing import lay_out, plan_packs
from glmtune.data.row_rule import RowRule
from glmtune.data.token_rows import IGNORED, TokenRows
from glmtune.models.families import family_of
from glmtune.models.low_rank import has_lora, split_lora
from glmtune.models.packed import PackedModel, base_of, move
from glmtune.models.prefixed import prefix_of

PACK_LENGTH = 4096
"""Tokens of a pass; a longer row is one by itself."""


class Probe(NamedTuple):
    """A question and its answer as the model reads them."""

    prompt_ids: list[int]
    """The prompt's ids, with the special ids before an answer."""
    answer_ids: list[int]
    """The answer's ids, with the end token unless the answer was cut."""


class Likelihood(NamedTuple):
    """How likely a side finds a reference, its end included."""

    log_prob: float
    """Sum over its tokens, in nats."""
    num_tokens: int


def packed_layers(model: Any) -> PackedModel | None:
    """A model as it is now, adapter on or off, on packed rows; None for adapters besides LoRA.

    A prefix is one, too: packed rows have no place for its columns.
    """
    if prefix_of(model) is not None:
        return None
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


def plan_choices(
    rows: TokenRows, num_choices: int, pack_length: int = PACK_LENGTH
) -> list[np.ndarray]:
    """Items of each pass, whose prompt is computed once: see `choice_sums`."""
    lengths_N = _shared_lengths(rows, num_choices) + _choice_labels(rows, num_choices).sum(1)
    length = max(pack_length, int(lengths_N.max()))
    return plan_packs(lengths_N, np.arange(len(lengths_N)), length)


@torch.inference_mode()
def choice_sums(
    packed: PackedModel, rows: TokenRows, num_choices: int, items_N: np.ndarray
) -> np.ndarray:
    """Summed log-probability of each choice of some items, in one pass over one prompt each.

    `packed_sums` of the same rows is the reference.

    Args:
        packed: not compiled, see `packed_layers`.
        rows: the choices of an item follow each other; what is before their labels is the same.
        num_choices: C.
        items_N: numbers of the items, see `plan_choices`.

    Returns:
        ``(N, C)`` float64.
    """
    row_ids = (items_N[:, None] * num_choices + np.arange(num_choices)).ravel()
    pack = lay_out(rows, row_ids, int(rows.lengths_R[row_ids].sum()))
    shared_N = _shared_lengths(rows, num_choices)[items_N]
    is_kept_T, place_T = _share_prompts(rows.lengths_R[row_ids], shared_N, num_choices)
    tensors = packed.to_tensors(pack)
    kept_T, moved_T = move(tuple(map(torch.from_numpy, (is_kept_T, place_T))), packed.device)
    shared = tensors._replace(
        input_ids_T=tensors.input_ids_T[kept_T],
        position_ids_XT=tensors.position_ids_XT[:, kept_T],
        attention=tensors.attention.sharing(kept_T, moved_T),
        supervised_at_L=moved_T[tensors.supervised_at_L],
    )
    log_probs_L = packed.log_probs(shared).double().cpu().numpy()
    place_L = np.repeat(np.arange(len(row_ids)), rows.num_labels_R[row_ids])
    sums_R = np.bincount(place_L, log_probs_L[: len(place_L)], minlength=len(row_ids))
    return sums_R.reshape(-1, num_choices)


def _choice_labels(rows: TokenRows, num_choices: int) -> np.ndarray:
    return rows.num_labels_R.reshape(-1, num_choices)


def _shared_lengths(rows: TokenRows, num_choices: int) -> np.ndarray:
    """Tokens before the labels of each item's choices, ``(N,)``."""
    return (rows.lengths_R - rows.num_labels_R)[::num_choices]


def _share_prompts(
    lengths_R: np.ndarray, shared_N: np.ndarray, num_choices: int
) -> tuple[np.ndarray, np.ndarray]:
    """Which tokens of a pack stay where each prompt is kept once, and the place of every token."""
    starts_R = np.cumsum(lengths_R) - lengths_R
    column_T = np.arange(lengths_R.sum()) - np.repeat(starts_R, lengths_R)
    shared_T = np.repeat(np.repeat(shared_N, num_choices), lengths_R)
    first_T = np.repeat(np.repeat(starts_R[::num_choices], num_choices), lengths_R)
    is_first_T = np.repeat(np.arange(len(lengths_R)) % num_choices == 0, lengths_R)
    is_kept_T = is_first_T | (column_T >= shared_T)
    place_T = np.cumsum(is_kept_T) - 1
    return is_kept_T, np.where(is_kept_T, place_T, place_T[first_T + column_T])


@torch.inference_mode()
def padded_sums(model: Any, rows: TokenRows, row_ids: np.ndarray) -> np.ndarray:
    """The reference of `packed_sums`: the model's own forward, one row at a time."""
    sums_R = np.zeros(len(rows))
    for row in row_ids:
        taken = rows.take(np.array([row]))
        ids_1S, labels_1S = (
            torch.from_numpy(np.asarray(a, dtype=np.int64)[None]).to(model.device)
            for a in (taken.ids_T, taken.targets_T)
        )
        logits_SV = model(input_ids=ids_1S, use_cache=False).logits[0, :-1].float()
        of_labels = F.cross_entropy(
            logits_SV, labels_1S[0, 1:], ignore_index=IGNORED, reduction="none"
        )
        sums_R[row] = -of_labels.double().sum().item()
    return sums_R
