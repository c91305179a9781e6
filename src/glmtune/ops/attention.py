"""The prefix-LM mask rule, in one place.

Shapes: B rows of a batch, S query tokens, K key tokens.
"""

import torch
from torch import Tensor


def prefix_lm_mask(
    prefix_end_B: Tensor, valid_BK: Tensor, num_queries: int | None = None
) -> Tensor:
    """Say which key each query may see: all of the prefix, and from there on only the past.

    A row of three prefix tokens and three answer tokens, queries down, keys across::

                 p0 p1 p2 a0 a1 a2
             p0   x  x  x  .  .  .
             p1   x  x  x  .  .  .
             p2   x  x  x  .  .  .
             a0   x  x  x  x  .  .
             a1   x  x  x  x  x  .
             a2   x  x  x  x  x  x

    Args:
        prefix_end_B: column of the first answer token (``<sop>``) of each row; 0 makes the row
            causal. Shape ``(B,)``, or ``(1,)`` for all rows alike.
        valid_BK: true where a column holds a real token, false for padding. Shape ``(B, K)``.
        num_queries: the queries are the last ``num_queries`` columns; all of them by default.

    Returns:
        Boolean ``(B, 1, S, K)``, true where the query sees the key. A padded query sees itself, so
        that its softmax is finite; no real query sees padding.
    """
    key_K = torch.arange(valid_BK.shape[1], device=valid_BK.device)
    query_S = key_K if num_queries is None else key_K[-num_queries:]
    in_past_SK = key_K <= query_S[:, None]
    in_prefix_BK = key_K < prefix_end_B[:, None]
    itself_SK = key_K == query_S[:, None]
    seen_BSK = (in_past_SK | in_prefix_BK[:, None, :]) & valid_BK[:, None, :] | itself_SK
    return seen_BSK[:, None]
