"""Rows of a padded batch as tensors: the plain way, beside `data.packing`.

Shapes: B rows of a batch, S tokens.
"""

import numpy as np
import torch
from torch import Tensor

from glmtune.data.token_rows import TokenRows
from glmtune.ops.loss import IGNORED


def collate(rows: TokenRows, row_ids: np.ndarray, pad_token_id: int) -> dict[str, Tensor]:
    """Put rows into one batch, padded at the right.

    Labels are the ids, but `IGNORED` for the first ``seq_len - 1`` of a row and for padding: <sop>
    itself is learned, from [gMASK]. The model shifts them. (The original's rule.)

    Returns:
        `input_ids` and `labels`, int64 ``(B, S)`` on the CPU.
    """
    shape = len(row_ids), int(rows.lengths_R[row_ids].max())
    input_ids = np.full(shape, pad_token_id, dtype=np.int64)
    labels = np.full(shape, IGNORED, dtype=np.int64)
    for place, row in enumerate(row_ids):
        ids = rows[row]
        input_ids[place, : len(ids)] = ids
        start = rows.prompt_lengths_R[row] - 1
        labels[place, start : len(ids)] = ids[start:]
    return {"input_ids": torch.from_numpy(input_ids), "labels": torch.from_numpy(labels)}
