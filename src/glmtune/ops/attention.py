"""The prefix-LM mask rule, in one place, and attention over packed rows that follows it.

Shapes: B rows of a batch, S query tokens, K key tokens; T tokens of a pack, N heads of queries, G
heads of keys and values, each of which N / G heads of queries share, D head size.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from glmtune.ops.rotary import rotate

KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""Those of torch's attention kernels that are right for every row; see `right_kernels`."""
_GROUPS = 4  # groups of rows of similar length, see `PaddedRows`
Update = tuple[Tensor, Tensor] | None
"""Two factors of what an adapter adds to a linear's output: see `ops.lora.lora_factors`."""


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
        prefix_end_B: column of the first token of each row that its prefix does not see; 0 makes
            the row causal. Shape ``(B,)``, or ``(1,)`` for all rows alike.
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


def right_kernels() -> AbstractContextManager[None]:
    """Exclude cuDNN from torch's attention; every attention call in this package is made inside.

    On Hopper torch prefers cuDNN's. Their backward pass gives NaN for the gradient of the queries
    where the number of keys is 64 more than a multiple of 128 and a query's scores are so low that
    exp(-logsumexp) overflows float32 (logsumexp below about -88.7); docs/log.md has a short
    reproduction. They also build a plan for each new length, which takes the host some 60 ms. The
    remaining kernels are as fast for the rows of this model.

    The forward pass decides for both, so the backward pass need not be inside.
    """
    return sdpa_kernel(KERNELS)


def additive_mask(mask_B1SK: Tensor, dtype: torch.dtype) -> Tensor:
    """A boolean mask as the term added to the scores, 0 or -inf, as torch's attention wants it.

    It is computed once for all layers that share a mask (torch would convert it in each). Its rows
    begin at multiples of 16 elements; otherwise the memory-efficient kernels would copy it.
    """
    num_keys = mask_B1SK.shape[-1]
    whole = mask_B1SK.new_zeros((*mask_B1SK.shape[:-1], num_keys + -num_keys % 16), dtype=dtype)
    return whole[..., :num_keys].masked_fill_(~mask_B1SK, -torch.inf)


def dense_mask(start_T: Tensor, prefix_end_T: Tensor) -> Tensor:
    """The same rule for rows that lie end to end in a pack: each sees nothing of another.

    It is computed for every pair of tokens, which no fast path does: this is the reference for
    `PaddedRows` and `ops.attention_kernels`.

    Args:
        start_T: place in the pack of the first token of each token's row.
        prefix_end_T: place of the first answer token of each token's row.

    Returns:
        Boolean ``(T, T)``, queries down, true where the query sees the key.
    """
    key_T = torch.arange(len(start_T), device=start_T.device)
    query_T1 = key_T[:, None]
    in_same_row_TT = start_T[:, None] == start_T
    return in_same_row_TT & ((key_T <= query_T1) | (key_T < prefix_end_T[:, None]))


class PaddedRows(NamedTuple):
    """A pack spread over padded rows during attention, where there are no kernels.

    Rows of similar length are padded together: one row of 300 tokens among rows of 60 would make
    five times the work.
    """

    groups: tuple["PaddedGroup", ...]
    back_T: Tensor
    """Index of each token of the pack in the padded rows of all groups, end to end."""

    @classmethod
    def of(cls, start_T: Tensor, prefix_end_T: Tensor, end_T: Tensor) -> "PaddedRows":
        """Lay the rows of a pack beside each other, padded at the right to the longest of a group.

        Args:
            start_T: place in the pack of the first token of each token's row.
            prefix_end_T: place of the first answer token of that row.
            end_T: place after its last token.
        """
        place_T = torch.arange(len(start_T), device=start_T.device)
        start_R = start_T[place_T == start_T]
        length_R, prefix_R = (end_T - start_T)[start_R], (prefix_end_T - start_T)[start_R]
        groups, back_T, num_before = [], torch.empty_like(place_T), 0
        for rows_B in length_R.argsort().chunk(_GROUPS):
            column_S = torch.arange(int(length_R[rows_B].max()), device=start_T.device)
            valid_BS = column_S < length_R[rows_B][:, None]
            # Padding points to the row's first token.
            place_BS = start_R[rows_B][:, None] + column_S * valid_BS
            mask_B1SS = prefix_lm_mask(prefix_R[rows_B], valid_BS)
            groups.append(PaddedGroup(place_BS, mask_B1SS))
            back_T[place_BS[valid_BS]] = num_before + valid_BS.flatten().nonzero()[:, 0]
            num_before += valid_BS.numel()
        return cls(tuple(groups), back_T)

    def sharing(self, is_kept_T: Tensor, place_T: Tensor) -> "PaddedRows":
        """The same rows where some of their tokens are one: the same ones before them, as prompts.

        Args:
            is_kept_T: which tokens of the pack stay.
            place_T: the place of every token among those that stay; of one that does not, that of
                its equal.
        """
        groups = (PaddedGroup(place_T[place_BS], mask) for place_BS, mask in self.groups)
        return PaddedRows(tuple(groups), self.back_T[is_kept_T])

    def attend_fused(self, y_TN3D: Tensor, update: Update, cos: Tensor, sin: Tensor) -> Tensor:
        """`attend` for a fused projection: queries, keys and values of each head side by side.

        Args:
            y_TN3D: output of the projection.
            update: the factors ``(T, R)`` and ``(3 N D, R)`` of its adapter; None without one.
            cos: see `attend`.
            sin: see `attend`.
        """
        parts = _add(y_TN3D, update).chunk(3, dim=-1)
        return self.attend(torch.cat(parts, 1), y_TN3D.shape[1], (None,) * 3, cos, sin)

    def attend(
        self,
        heads_TXD: Tensor,
        num_kv_heads: int,
        updates: Sequence[Update],
        cos: Tensor,
        sin: Tensor,
        interleaved: bool = False,
    ) -> Tensor:
        """Attention of a pack: ``(T, N, D)``.

        Args:
            heads_TXD: the N heads of queries, then the G of keys, then those of values, not
                rotated: ``(T, N + 2 G, D)``.
            num_kv_heads: G.
            updates: what the adapter of each adds: two factors ``(T, R)`` and ``(N D, R)`` or
                ``(G D, R)``; None without an adapter.
            cos: ``(T, 2, D / 4)``, as `rotary_angles` gives it for one row.
            sin: of the same shape.
            interleaved: see `ops.rotary.rotate`.
        """
        sizes = heads_TXD.shape[1] - 2 * num_kv_heads, num_kv_heads, num_kv_heads
        query, key, value = (
            _add(x, update).transpose(0, 1)[None]
            for x, update in zip(heads_TXD.split(sizes, 1), updates, strict=True)
        )
        query, key = (rotate(x, cos[None], sin[None], interleaved) for x in (query, key))
        turned = query, key, value
        group = query.shape[1] // key.shape[1]
        contexts = []
        for place_BS, mask_B1SS in self.groups:
            query, key, value = (x[0, :, place_BS].transpose(0, 1) for x in turned)
            if group > 1:
                key, value = (x.repeat_interleave(group, dim=1) for x in (key, value))
            with right_kernels():
                context_BNSD = F.scaled_dot_product_attention(
                    query, key, value, attn_mask=mask_B1SS
                )
            contexts.append(context_BNSD.transpose(1, 2).flatten(0, 1))
        return torch.cat(contexts)[self.back_T]


def _add(x: Tensor, update: Update) -> Tensor:
    return x if update is None else x + (update[0] @ update[1].T).view_as(x)


class PaddedGroup(NamedTuple):
    """Some rows of a pack: the place of each token in the pack, and which tokens it sees."""

    place_BS: Tensor
    mask_B1SS: Tensor
