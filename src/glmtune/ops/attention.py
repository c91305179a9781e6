"""The prefix-LM mask rule, in one place, and attention over packed rows that follows it.

Shapes: B rows of a batch, S query tokens, K key tokens; T tokens of a pack, N heads, D head size.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from glmtune.ops.rotary import rotate


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


def sees(start_T: Tensor, prefix_end_T: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """The same rule for rows that lie end to end in a pack: each sees nothing of another.

    Args:
        start_T: place in the pack of the first token of each token's row.
        prefix_end_T: place of the first answer token of each token's row.

    Returns:
        A function of places of queries and of keys, which broadcast: true where seen.
    """

    def rule(query: Tensor, key: Tensor) -> Tensor:
        in_same_row = start_T[query] == start_T[key]
        return in_same_row & ((key <= query) | (key < prefix_end_T[query]))

    return rule


def dense_mask(start_T: Tensor, prefix_end_T: Tensor) -> Tensor:
    """`sees` for every pair: boolean ``(T, T)``, queries down. The reference of the fast paths."""
    place_T = torch.arange(len(start_T), device=start_T.device)
    return sees(start_T, prefix_end_T)(place_T[:, None], place_T)


class PaddedRows(NamedTuple):
    """A pack spread over padded rows for the time of an attention, where there are no kernels."""

    place_BS: Tensor
    """Place in the pack of each token of each row; padding points to the row's first token."""
    mask_B1SS: Tensor
    back_T: Tensor
    """For each place of the pack its token's index in the flattened padded rows."""

    @classmethod
    def of(cls, start_T: Tensor, prefix_end_T: Tensor, end_T: Tensor) -> "PaddedRows":
        """Lay the rows of a pack beside each other, padded at the right to the longest."""
        is_first_T = torch.arange(len(start_T), device=start_T.device) == start_T
        start_B, lengths_B = start_T[is_first_T], (end_T - start_T)[is_first_T]
        column_S = torch.arange(int(lengths_B.max()), device=start_T.device)
        valid_BS = column_S < lengths_B[:, None]
        place_BS = start_B[:, None] + column_S * valid_BS
        mask_B1SS = prefix_lm_mask((prefix_end_T - start_T)[is_first_T], valid_BS)
        return cls(place_BS, mask_B1SS, valid_BS.flatten().nonzero()[:, 0])

    def attend(
        self, y_TN3D: Tensor, update: tuple[Tensor, Tensor] | None, cos: Tensor, sin: Tensor
    ) -> Tensor:
        """Attention of a pack: ``(T, N, D)``.

        Args:
            y_TN3D: output of the fused projection.
            update: two factors ``(T, R)`` and ``(3 N D, R)`` of what its adapter adds to it.
            cos: ``(T, 2, D / 4)``, as `rotary_angles` gives it for one row.
            sin: likewise.
        """
        if update is not None:
            y_TN3D = y_TN3D + (update[0] @ update[1].T).view_as(y_TN3D)
        spread_BNS3D = y_TN3D[self.place_BS].transpose(1, 2)
        query, key, value = spread_BNS3D.chunk(3, dim=-1)
        cos, sin = cos[self.place_BS], sin[self.place_BS]
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        context = F.scaled_dot_product_attention(query, key, value, attn_mask=self.mask_B1SS)
        return context.transpose(1, 2).flatten(0, 1)[self.back_T]
