"""Rows of a padded batch as tensors: the reference for `data.packing`.

Shapes: B rows of a batch, S tokens.
"""

import numpy as np
import torch
from torch import Tensor

from glmtune.data.token_rows import IGNORED, TokenRows


def collate(rows: TokenRows, row_ids: np.ndarray) -> dict[str, Tensor]:
    """Put rows into one batch, padded on the right.

    Returns:
        `input_ids` and `labels`, int64 ``(B, S)`` on the CPU. Labels are the ids of supervised
        tokens and `IGNORED` elsewhere; the model shifts them.
    """
    shape = len(row_ids), int(rows.lengths_R[row_ids].max())
    input_ids = np.full(shape, rows.rule.pad_id, dtype=np.int64)
    labels = np.full(shape, IGNORED, dtype=np.int64)
    for place, row in enumerate(row_ids):
        tokens = slice(0, rows.lengths_R[row])
        taken = rows.take(np.array([row]))
        input_ids[place, tokens], labels[place, tokens] = taken.ids_T, taken.targets_T
    return {"input_ids": torch.from_numpy(input_ids), "labels": torch.from_numpy(labels)}
