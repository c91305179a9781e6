"""Log-probabilities of references: how likely each side would give the right answer, token by token.

Nothing is sampled, so base and tuned differ by the adapter alone. References are laid end to end as
in training, many in one pass.

Shapes: R rows, one for each reference; T tokens of all rows; L supervised tokens.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from peft import PeftModel

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


class Likelihood(NamedTuple):
    """How likely a side finds a reference, its end included."""

    log_prob: float
    """Sum over its tokens, in nats."""
    num_tokens: int


def score_references(model: PeftModel, probes: Sequence[Probe]) -> list[Likelihood | None]:
    """The likelihood of each reference under a model as it is now, adapter on or off.

    The ids of an answer count, its end included, and none before them.

    Args:
        model: in evaluation mode.
        probes: prompts with their references; None of those longer than the model's positions.

    Returns:
        One for each probe; None where the row has more tokens than the model has positions, or the
        reference has none.
    """
    base = base_of(model)
    limit = base.config.max_position_embeddings
    rows = rows_of(probes, family_of(base.config).row_rule(base.config))
    asked = np.flatnonzero((rows.lengths_R <= limit) & (rows.num_labels_R > 0))
    found: list[Likelihood | None] = [None] * len(probes)
    if not len(asked):
        return found
    sums_R = packed_sums(model, rows, asked) if _is_packable(model) else padded_sums(model, rows)
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


def packed_sums(model: PeftModel, rows: TokenRows, row_ids: np.ndarray) -> np.ndarray:
    """Summed log-probability of each row's labels, rows laid end to end, ``(R,)`` float64."""
    native = family_of(base_of(model).config).native()
    packed = PackedModel(model, native.packed, compiled=False)
    length = max(PACK_LENGTH, int(rows.lengths_R[row_ids].max()))
    sums_R = np.zeros(len(rows))
    with torch.inference_mode():
        for part in plan_packs(rows.lengths_R, row_ids, length):
            pack = lay_out(rows, part, int(rows.lengths_R[part].sum()))
            log_probs_L = packed.log_probs(packed.to_tensors(pack)).double().cpu().numpy()
            row_L = np.repeat(part, rows.num_labels_R[part])
            sums_R += np.bincount(row_L, log_probs_L[: len(row_L)], minlength=len(rows))
    return sums_R


@torch.inference_mode()
def padded_sums(model: PeftModel, rows: TokenRows) -> np.ndarray:
    """What `packed_sums` computes, by the model's own forward on one row at a time: its reference."""
    sums_R = np.zeros(len(rows))
    for row in range(len(rows)):
        batch = collate(rows, np.array([row]))
        ids_1S, labels_1S = (batch[name].to(model.device) for name in ("input_ids", "labels"))
        logits_SV = model(input_ids=ids_1S, use_cache=False).logits[0, :-1].float()
        targets_S = labels_1S[0, 1:]
        of_labels = torch.nn.functional.cross_entropy(
            logits_SV, targets_S, ignore_index=IGNORED, reduction="none"
        )
        sums_R[row] = -of_labels.double().sum().item()
    return sums_R


def _is_packable(model: Any) -> bool:
    """Whether all adapters are plain LoRA, which packed layers apply themselves."""
    modules = (module for module in model.modules() if has_lora(module))
    return all(split_lora(module)[0] is not module for module in modules)
