"""One new token's attention over the cache, as Triton kernels.

The columns of a head are divided among blocks; the last block to finish combines the partial
results of all. With one row each head of queries has blocks of its own. With more, where the reads
of a cache take longer than waiting for them, those that share a head of keys are in one block.
 Launch and wait follow `ops.early_launch`.

Shapes: B rows of a batch, N heads of queries, M of keys and values, D head size, K columns of the
cache.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from glmtune.ops.early_launch import await_last, launches_early, let_next_begin

_SPLITS, _BLOCK_K, _WARPS = 16, 32, 2
_MOST_BLOCKS = {False: 1024, True: 256}


@triton.jit
def turn(cos, sin, row, d, D: tl.constexpr, PAIRS: tl.constexpr):
    """How elements of a head are rotated: with which others, and the factors of both.

    Element d is rotated together with its neighbour, or else, within a half, with the one a quarter
    of a head away.
    """
    Q: tl.constexpr = D // 4
    APART: tl.constexpr = 1 if PAIRS else Q
    angle = row * 2 * Q + (d // 2 if PAIRS else d // (2 * Q) * Q + d % Q)
    sign = tl.where((d & APART) == 0, -1.0, 1.0)
    return (
        d ^ APART,
        tl.load(cos + angle).to(tl.float32),
        sign * tl.load(sin + angle).to(tl.float32),
    )


@triton.jit
def _attend(
    query, key, value, cos, sin, keys, values, column, partial, counts, y, scale,
    query_b, query_n, key_b, key_m, stride_b, stride_m, stride_k,
    N: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, PAIRS: tl.constexpr,
    EARLY: tl.constexpr, SPLITS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One head's share of the columns; the last share to finish combines all of them.

    GROUP heads of queries share a head of keys, which the first of them writes.
    """
    let_next_begin(EARLY)
    at_head, split = tl.program_id(0), tl.program_id(1)
    row, head = at_head // N, at_head % N
    d, newest = tl.arange(0, D), tl.load(column + row)
    kind = keys.dtype.element_ty
    share = tl.cdiv(newest, SPLITS * BLOCK_K) * BLOCK_K
    start = split * share
    end = tl.minimum(start + share, newest)
    cache = row.to(tl.int64) * stride_b + (head // GROUP).to(tl.int64) * stride_m
    at_key, at_value = keys + cache + d[None, :], values + cache + d[None, :]
    # None of these reads needs the wait: the columns before the newest were written in earlier
    # steps, and the position and its angles by ordinary kernels, before the first that is launched
    # early.
    first_k = start + tl.arange(0, BLOCK_K)
    key_block = tl.load(at_key + first_k[:, None] * stride_k, (first_k < end)[:, None], 0.0)
    value_block = tl.load(at_value + first_k[:, None] * stride_k, (first_k < end)[:, None], 0.0)

    at_query, at_new = query + row * query_b + head * query_n, row * key_b + head // GROUP * key_m
    partner, c, s = turn(cos, sin, row, d, D, PAIRS)
    await_last(EARLY)
    turned = tl.load(at_query + d).to(tl.float32) * c
    turned += tl.load(at_query + partner).to(tl.float32) * s
    turned = turned.to(kind).to(tl.float32) * scale
    largest, total, sums = -1e30, 0.0, tl.zeros([D], tl.float32)
    if split == 0:
        new_key = tl.load(key + at_new + d).to(tl.float32) * c
        new_key += tl.load(key + at_new + partner).to(tl.float32) * s
        new_key, new_value = new_key.to(kind), tl.load(value + at_new + d).to(kind)
        if head % GROUP == 0:
            tl.store(keys + cache + newest * stride_k + d, new_key)
            tl.store(values + cache + newest * stride_k + d, new_value)
        largest, total = tl.sum(turned * new_key.to(tl.float32), 0), 1.0
        sums = new_value.to(tl.float32)

    for first in range(start, end, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        score = tl.sum(key_block.to(tl.float32) * turned[None, :], 1)
        score = tl.where(k < end, score, -1e30)
        larger = tl.maximum(largest, tl.max(score, 0))
        share_k = tl.where(k < end, tl.exp(score - larger), 0.0)
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
    tl.debug_barrier()  # everything is written before this block is counted as done
    if tl.atomic_add(counts + at_head, 1, sem="acq_rel") == SPLITS - 1:
        part = partial + (at_head * SPLITS + tl.arange(0, SPLITS)) * (D + 2)
        largest_S = tl.load(part + D, cache_modifier=".cg")
        total_S = tl.load(part + D + 1, cache_modifier=".cg")
        sums_SD = tl.load(part[:, None] + d[None, :], cache_modifier=".cg")
        weight_S = tl.exp(largest_S - tl.max(largest_S, 0))
        sums = tl.sum(sums_SD * weight_S[:, None], 0) / tl.sum(total_S * weight_S, 0)
        tl.store(y + at_head * D + d, sums.to(y.dtype.element_ty))
        tl.store(counts + at_head, 0)


@triton.jit
def _attend_together(
    query, key, value, cos, sin, keys, values, column, partial, counts, y, scale,
    query_b, query_n, key_b, key_m, stride_b, stride_m, stride_k,
    M: tl.constexpr, GROUP: tl.constexpr, PADDED: tl.constexpr, D: tl.constexpr,
    PAIRS: tl.constexpr, EARLY: tl.constexpr, SPLITS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """`_attend` of all heads of queries that share a head of keys, on the tensor cores."""
    let_next_begin(EARLY)
    at_head, split = tl.program_id(0), tl.program_id(1)
    row, head = at_head // M, at_head % M
    d, g, newest = tl.arange(0, D), tl.arange(0, PADDED), tl.load(column + row)
    kind = keys.dtype.element_ty
    share = tl.cdiv(newest, SPLITS * BLOCK_K) * BLOCK_K
    start = split * share
    end = tl.minimum(start + share, newest)
    cache = row.to(tl.int64) * stride_b + head.to(tl.int64) * stride_m
    at_key, at_value = keys + cache + d[None, :], values + cache + d[None, :]

    partner, c, s = turn(cos, sin, row, d, D, PAIRS)
    await_last(EARLY)
    in_group = (g < GROUP)[:, None]
    at_query = query + row * query_b + (head * GROUP + g)[:, None] * query_n
    turned = tl.load(at_query + d[None, :], in_group, 0.0).to(tl.float32) * c[None, :]
    turned += tl.load(at_query + partner[None, :], in_group, 0.0).to(tl.float32) * s[None, :]
    turned_GD = turned.to(kind)
    largest_G = tl.full([PADDED], -1e30, tl.float32)
    total_G, sums_GD = tl.zeros([PADDED], tl.float32), tl.zeros([PADDED, D], tl.float32)
    if split == 0:
        at_new = row * key_b + head * key_m
        new_key = tl.load(key + at_new + d).to(tl.float32) * c
        new_key += tl.load(key + at_new + partner).to(tl.float32) * s
        new_key, new_value = new_key.to(kind), tl.load(value + at_new + d).to(kind)
        tl.store(keys + cache + newest * stride_k + d, new_key)
        tl.store(values + cache + newest * stride_k + d, new_value)
        product = turned_GD.to(tl.float32) * new_key.to(tl.float32)[None, :]
        largest_G, total_G = tl.sum(product, 1) * scale, total_G + 1.0
        sums_GD += new_value.to(tl.float32)[None, :]

    for first in range(start, end, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        inside = (k < end)[:, None]
        key_KD = tl.load(at_key + k[:, None] * stride_k, inside, 0.0)
        value_KD = tl.load(at_value + k[:, None] * stride_k, inside, 0.0)
        score = tl.dot(turned_GD, tl.trans(key_KD), input_precision="ieee") * scale
        score = tl.where((k < end)[None, :], score, -1e30)
        larger_G = tl.maximum(largest_G, tl.max(score, 1))
        share_GK = tl.where((k < end)[None, :], tl.exp(score - larger_G[:, None]), 0.0)
        shrink_G = tl.exp(largest_G - larger_G)
        sums_GD = tl.dot(
            share_GK.to(kind), value_KD, sums_GD * shrink_G[:, None], input_precision="ieee"
        )
        total_G = total_G * shrink_G + tl.sum(share_GK, 1)
        largest_G = larger_G

    at_part = partial + (at_head * GROUP + g) * SPLITS * (D + 2)
    mine = at_part + split * (D + 2)
    tl.store(mine[:, None] + d[None, :], sums_GD, in_group)
    tl.store(mine + D, largest_G, g < GROUP)
    tl.store(mine + D + 1, total_G, g < GROUP)
    tl.debug_barrier()  # everything is written before this block is counted as done
    if tl.atomic_add(counts + at_head, 1, sem="acq_rel") == SPLITS - 1:
        part = at_part[:, None] + tl.arange(0, SPLITS)[None, :] * (D + 2)
        largest_GS = tl.load(part + D, in_group, 0.0, cache_modifier=".cg")
        total_GS = tl.load(part + D + 1, in_group, 1.0, cache_modifier=".cg")
        largest_G = tl.max(largest_GS, 1)
        total_G = tl.sum(total_GS * tl.exp(largest_GS - largest_G[:, None]), 1)
        sums_GD = tl.zeros([PADDED, D], tl.float32)
        for other in tl.static_range(SPLITS):
            mine = at_part + other * (D + 2)
            weight_G = tl.exp(tl.load(mine + D, g < GROUP, 0.0, cache_modifier=".cg") - largest_G)
            found_GD = tl.load(mine[:, None] + d[None, :], in_group, 0.0, cache_modifier=".cg")
            sums_GD += weight_G[:, None] * found_GD
        at_y = y + (at_head * GROUP + g)[:, None] * D + d[None, :]
        tl.store(at_y, (sums_GD / total_G[:, None]).to(y.dtype.element_ty), in_group)
        tl.store(counts + at_head, 0)


@lru_cache(maxsize=8)
def _counts(num_heads: int, device: torch.device) -> Tensor:
    # The counters are zero between kernels: the last block of each resets them.
    return torch.zeros(num_heads, dtype=torch.int32, device=device)


def attend(
    query_BND: Tensor,
    key_BMD: Tensor,
    value_BMD: Tensor,
    keys_BMKD: Tensor,
    values_BMKD: Tensor,
    column_B: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
) -> Tensor:
    """Rotate a new token's query and key, write key and value to the cache, and attend to it.

    Args:
        query_BND: output of the projection, which may be a view of a fused output. Where there are
            more query heads than key heads, neighbouring query heads share a key head.
        key_BMD: keys of the new token; same strides as `value_BMD`.
        value_BMD: values of the new token.
        keys_BMKD: cached keys of a layer; same strides as `values_BMKD`.
        values_BMKD: cached values of a layer.
        column_B: the new token's column in each row. All columns before it are attended to.
        cos: cosines of the new token's position, ``(B, 1, 2, D / 4)``, or ``(B, 1, D / 2)`` of the
            pairs of a head in their order; contiguous.
        sin: sines, same shape.
        interleaved: see `ops.rotary.rotate`.

    Returns:
        ``(B, 1, N D)``, in the query's type.
    """
    num_rows, num_heads, head_dim = query_BND.shape
    assert key_BMD.stride() == value_BMD.stride()
    assert keys_BMKD.stride() == values_BMKD.stride()
    assert query_BND.stride(-1) == key_BMD.stride(-1) == keys_BMKD.stride(-1) == 1
    assert all(tensor.is_contiguous() for tensor in (column_B, cos, sin))
    num_kv_heads, group = key_BMD.shape[1], num_heads // key_BMD.shape[1]
    together = group > 1 and num_rows > 1
    blocks = num_rows * (num_kv_heads if together else num_heads)
    # Fill the GPU a few times; with one row as often as pays off, so that each block waits little.
    splits = max(1, min(_SPLITS, triton.next_power_of_2(_MOST_BLOCKS[together] // blocks)))
    y = query_BND.new_empty(num_rows, 1, num_heads * head_dim)
    partial = y.new_empty(num_rows * num_heads, splits, head_dim + 2, dtype=torch.float32)
    tensors = query_BND, key_BMD, value_BMD, cos, sin, keys_BMKD, values_BMKD, column_B, partial
    strides = *query_BND.stride()[:2], *key_BMD.stride()[:2], *keys_BMKD.stride()[:3]
    early = launches_early(y.device)
    kernel, warps = (_attend_together, 4) if together else (_attend, _WARPS)
    # A product on tensor cores is at least 16 wide.
    padded = (max(16, triton.next_power_of_2(group)),) if together else ()
    sizes = num_kv_heads if together else num_heads, group, *padded, head_dim
    kernel[(blocks, splits)](
        *tensors, _counts(blocks, y.device), y, head_dim**-0.5, *strides, *sizes, interleaved,
        early, splits, _BLOCK_K, num_warps=warps, launch_pdl=early,
    )  # fmt: skip
    return y
