"""One new token's attention over the cache, for a few rows, as a Triton kernel.

The columns of a head are divided among blocks, of which the last to be done adds up what all came
to. Launched and awaited as `ops.decoding_kernels` says.

Shapes: B rows of a batch, N heads, D head size, K columns of the cache.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from glmtune.ops.decoding_kernels import await_last, launches_early, let_next_begin

_SPLITS, _BLOCK_K, _WARPS = 16, 32, 2


@triton.jit
def _attend(
    qkv, cos, sin, keys, values, mask, column, partial, counts, y, scale,
    stride_b, stride_n, stride_k, stride_mask,
    N: tl.constexpr, D: tl.constexpr, EARLY: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One head's share of the columns; the last share to be done adds all of them up."""
    let_next_begin(EARLY)
    at_head, split = tl.program_id(0), tl.program_id(1)
    row, head = at_head // N, at_head % N
    Q: tl.constexpr = D // 4
    d, newest = tl.arange(0, D), tl.load(column)
    kind = keys.dtype.element_ty
    share = tl.cdiv(newest, SPLITS * BLOCK_K) * BLOCK_K
    start = split * share
    end = tl.minimum(start + share, newest)
    cache = row.to(tl.int64) * stride_b + head.to(tl.int64) * stride_n
    at_key, at_value = keys + cache + d[None, :], values + cache + d[None, :]
    # Nothing here is waited for: columns before the newest are of earlier steps, and the place and
    # its angles come from ordinary kernels, before the first that is launched early.
    first_k = start + tl.arange(0, BLOCK_K)
    key_block = tl.load(at_key + first_k[:, None] * stride_k, (first_k < end)[:, None], 0.0)
    value_block = tl.load(at_value + first_k[:, None] * stride_k, (first_k < end)[:, None], 0.0)

    # Element d of a half turns with the one a quarter away from it.
    at, partner = qkv + at_head * 3 * D, d ^ Q
    angle = row * 2 * Q + d // (2 * Q) * Q + d % Q
    c = tl.load(cos + angle).to(tl.float32)
    s = tl.where((d & Q) == 0, -1.0, 1.0) * tl.load(sin + angle).to(tl.float32)
    await_last(EARLY)
    query = tl.load(at + d).to(tl.float32) * c + tl.load(at + partner).to(tl.float32) * s
    query = query.to(kind).to(tl.float32) * scale
    largest, total, sums = -1e30, 0.0, tl.zeros([D], tl.float32)
    if split == 0:
        key = tl.load(at + D + d).to(tl.float32) * c + tl.load(at + D + partner).to(tl.float32) * s
        key, value = key.to(kind), tl.load(at + 2 * D + d).to(kind)
        tl.store(keys + cache + newest * stride_k + d, key)
        tl.store(values + cache + newest * stride_k + d, value)
        largest, total = tl.sum(query * key.to(tl.float32), 0), 1.0
        sums = value.to(tl.float32)

    for first in range(start, end, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        seen = (k < end) & (tl.load(mask + row * stride_mask + k, k < end, 0) != 0)
        score = tl.where(seen, tl.sum(key_block.to(tl.float32) * query[None, :], 1), -1e30)
        larger = tl.maximum(largest, tl.max(score, 0))
        share_k = tl.where(seen, tl.exp(score - larger), 0.0)
        shrink = tl.exp(largest - larger)
        sums = sums * shrink + tl.sum(share_k[:, None] * value_block.to(tl.float32), 0)
        total = total * shrink + tl.sum(share_k, 0)
        largest = larger
        next_k = k + BLOCK_K
        key_block = tl.load(at_key + next_k[:, None] * stride_k, (next_k < end)[:, None], 0.0)
        value_block = tl.load(at_value + next_k[:, None] * stride_k, (next_k < end)[:, None], 0.0)

    mine = partial + (at_head * SPLITS + split) * (D + 2)
    tl.store(mine + d, sums)
    tl.store(mine + D, largest)
    tl.store(mine + D + 1, total)
    tl.debug_barrier()  # all of it is written before it is counted
    if tl.atomic_add(counts + at_head, 1, sem="acq_rel") == SPLITS - 1:
        part = partial + (at_head * SPLITS + tl.arange(0, SPLITS)) * (D + 2)
        largest_S = tl.load(part + D, cache_modifier=".cg")
        total_S = tl.load(part + D + 1, cache_modifier=".cg")
        sums_SD = tl.load(part[:, None] + d[None, :], cache_modifier=".cg")
        weight_S = tl.exp(largest_S - tl.max(largest_S, 0))
        sums = tl.sum(sums_SD * weight_S[:, None], 0) / tl.sum(total_S * weight_S, 0)
        tl.store(y + at_head * D + d, sums.to(y.dtype.element_ty))
        tl.store(counts + at_head, 0)


@lru_cache(maxsize=8)
def _counts(num_heads: int, device: torch.device) -> Tensor:
    # Zero between kernels, as each sets back what it counted.
    return torch.zeros(num_heads, dtype=torch.int32, device=device)


def attend(
    mixed: Tensor,
    keys_BNKD: Tensor,
    values_BNKD: Tensor,
    column_1: Tensor,
    mask: Tensor,
    cos: Tensor,
    sin: Tensor,
) -> Tensor:
    """Turn a new token's query and key, write key and value into the cache, and attend to it.

    Args:
        mixed: output of the fused projection, ``(B, 1, N 3 D)``.
        keys_BNKD: keys of a layer, each row and head alike in memory.
        values_BNKD: likewise.
        column_1: the new token's column. Columns from there on are not looked at.
        mask: true where a column holds a real token, ``(B, 1, 1, K)``.
        cos: of the new token's position, ``(B, 1, 2, D / 4)``.
        sin: likewise.

    Returns:
        ``(B, 1, N D)``, of the type of `mixed`.
    """
    num_rows, num_heads, _, head_dim = keys_BNKD.shape
    assert keys_BNKD.stride() == values_BNKD.stride()
    assert keys_BNKD.stride(-1) == 1
    y = mixed.new_empty(num_rows, 1, num_heads * head_dim)
    partial = mixed.new_empty(num_rows * num_heads, _SPLITS, head_dim + 2, dtype=torch.float32)
    counts = _counts(num_rows * num_heads, mixed.device)
    _attend[(num_rows * num_heads, _SPLITS)](
        mixed, cos, sin, keys_BNKD, values_BNKD, mask, column_1, partial, counts, y,
        head_dim**-0.5, *keys_BNKD.stride()[:3], mask.stride(0),
        num_heads, head_dim, launches_early(mixed.device), _SPLITS, _BLOCK_K,
        num_warps=_WARPS, launch_pdl=launches_early(mixed.device),
    )  # fmt: skip
    return y
