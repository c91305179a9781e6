"""What one layer computes for one new token of a few rows, as Triton kernels.

Such a step reads every weight once and does next to nothing with it: it is as fast as memory, if
enough reads are under way at any time and little else is between them. So each product takes along
what follows it (bias, adapter, GELU, residual), each block of it reads a few whole rows of the
matrix, and numbers of 8 or 4 bits become floats by putting them into a float's fraction.

Shapes: B rows of a batch, I inputs, O outputs, R rank of an adapter, N heads, D head size,
K columns of the cache; W and G as in `ops.words`.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from glmtune.ops.norm import Norm
from glmtune.ops.words import GROUP_SIZE, Words

_SPLITS, _BLOCK_K = 8, 32


class LowRank(NamedTuple):
    """What an adapter adds to a product: ``low @ up.T * scale``."""

    low_BR: Tensor
    up_OR: Tensor
    scale: float


@triton.jit
def _number(words, N: tl.constexpr, BITS: tl.constexpr):
    """Number N of each word, as a float that is larger by 2^BITS (8 bits) or 2^7 (4 bits)."""
    # 256 + q has q at bit 15 of its float, 128 + q has it at bit 16.
    PLACE: tl.constexpr = 15 if BITS == 8 else 16
    ONE: tl.constexpr = 0x43800000 if BITS == 8 else 0x43000000
    MASK: tl.constexpr = ((1 << BITS) - 1) << PLACE
    UP: tl.constexpr = PLACE - N * BITS
    moved = words << UP if UP >= 0 else words >> -UP
    return ((moved & MASK) | ONE).to(tl.float32, bitcast=True)


@triton.jit
def _scale_and_middle(scales, BITS: tl.constexpr):
    """Of each row, from two bfloat16 in one word; the middle is that of `_number`'s floats."""
    OFFSET: tl.constexpr = 384.0 if BITS == 8 else 136.0
    pair = tl.load(scales)
    scale = (pair << 16).to(tl.float32, bitcast=True)
    middle = (pair & -65536).to(tl.float32, bitcast=True)
    return scale[:, None], (middle - OFFSET * scale)[:, None]


@triton.jit
def _project(
    x, weight, scales, bias, low, up, residual, y, NUM_OUTPUTS, num_rows, low_scale, alpha,
    NUM_INPUTS: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, HAS_BIAS: tl.constexpr,
    R: tl.constexpr, R_PADDED: tl.constexpr, GELU: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """``gelu(x @ weight.T + bias + low @ up.T) + alpha * residual`` for a few outputs."""
    output = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    is_output, row = output < NUM_OUTPUTS, tl.arange(0, ROWS)
    is_row, column = row < num_rows, tl.arange(0, BLOCK_I)
    total = tl.zeros([ROWS, BLOCK_O, BLOCK_I], tl.float32)
    at_x = x + row[:, None] * NUM_INPUTS + column[None, :]
    PER_WORD: tl.constexpr = 1 if BITS == 16 else 32 // BITS
    W: tl.constexpr = NUM_INPUTS // PER_WORD
    at_weight = weight + output.to(tl.int64)[:, None] * W + column[None, :]
    for start in range(0, W, BLOCK_I):
        is_weight = is_output[:, None] & (start + column < W)[None, :]
        words = tl.load(at_weight + start, is_weight, 0, eviction_policy="evict_first")
        if BITS == 16:
            is_x = is_row[:, None] & (start + column < W)[None, :]
            value = tl.load(at_x + start, is_x, 0.0).to(tl.float32)
            total += value[:, None, :] * words.to(tl.float32)[None, :, :]
        else:
            for n in tl.static_range(PER_WORD):
                group = output * (NUM_INPUTS // GROUP) + (n * W + start) // GROUP
                scale, middle = _scale_and_middle(scales + group, BITS)
                number = _number(words, n, BITS) * scale + middle
                value = tl.load(at_x + n * W + start, is_row[:, None], 0.0).to(tl.float32)
                total += value[:, None, :] * number[None, :, :]
    sums = tl.sum(total, 2)
    if HAS_BIAS:
        sums += tl.load(bias + output, is_output, 0.0).to(tl.float32)[None, :]
    if R > 0:
        inner = tl.arange(0, R_PADDED)
        is_inner = (inner < R)[None, :]
        low_BR = tl.load(low + row[:, None] * R + inner[None, :], is_row[:, None] & is_inner, 0.0)
        is_up = is_output[:, None] & is_inner
        up_OR = tl.load(up + output[:, None] * R + inner[None, :], is_up, 0.0)
        product = low_BR.to(tl.float32)[:, None, :] * up_OR.to(tl.float32)[None, :, :]
        sums += low_scale * tl.sum(product, 2)
    if GELU:
        sums *= tl.sigmoid(1.5957691216057308 * (sums + 0.044715 * sums * sums * sums))
    at = row[:, None] * NUM_OUTPUTS + output[None, :]
    is_real = is_row[:, None] & is_output[None, :]
    if HAS_RESIDUAL:
        sums += alpha * tl.load(residual + at, is_real, 0.0).to(tl.float32)
    tl.store(y + at, sums.to(y.dtype.element_ty), is_real)


def project(
    x: Tensor,
    weight: Tensor | Words,
    bias_O: Tensor | None = None,
    *,
    update: LowRank | None = None,
    gelu: bool = False,
    residual: Tensor | None = None,
    alpha: float = 1.0,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """``gelu(x @ weight.T + bias + update) + alpha * residual``, in float32 until it is stored.

    Args:
        x: ``(..., I)`` of a few rows, contiguous.
        weight: ``(O, I)``, floats or packed.
        bias_O: is added.
        update: of an adapter, is added.
        gelu: whether to apply GELU, in its tanh form.
        residual: ``(..., O)``, contiguous.
        alpha: is multiplied with the residual.
        dtype: of the result; by default that of x.

    Returns:
        ``(..., O)``.
    """
    packed = weight if isinstance(weight, Words) else None
    matrix = weight.words_OW if isinstance(weight, Words) else weight
    bits = packed.bits if packed else 16
    num_outputs, num_inputs = len(matrix), x.shape[-1]
    num_rows = x.numel() // num_inputs
    assert x.is_contiguous()
    assert matrix.is_contiguous()
    y = x.new_empty(*x.shape[:-1], num_outputs, dtype=dtype)
    scales = packed.scale_middle_OG2.view(torch.int32) if packed else None
    rank = update.low_BR.shape[-1] if update else 0
    block_o, block_i, warps = _blocks(num_outputs, num_inputs, bits)
    _project[(triton.cdiv(num_outputs, block_o),)](
        x, matrix, scales, bias_O, update and update.low_BR, update and update.up_OR, residual, y,
        num_outputs, num_rows, update.scale if update else 0.0, alpha, num_inputs, bits,
        GROUP_SIZE, bias_O is not None,
        rank, triton.next_power_of_2(rank) if rank else 0, gelu, residual is not None,
        triton.next_power_of_2(num_rows), block_o, block_i, num_warps=warps,
    )  # fmt: skip
    return y


def _blocks(num_outputs: int, num_inputs: int, bits: int) -> tuple[int, int, int]:
    """Outputs and inputs (or words) of a block, and warps that work on it."""
    if bits < 16:
        return 8, GROUP_SIZE, 4
    return 4, min(512, triton.next_power_of_2(num_inputs)), 4


@triton.jit
def _unpack(words, scales, y, NUM_INPUTS: tl.constexpr, BITS: tl.constexpr,
            GROUP: tl.constexpr, BLOCK_O: tl.constexpr):  # fmt: skip
    """The weights of one group of words of some rows, with the inputs that far apart."""
    W: tl.constexpr = NUM_INPUTS * BITS // 32
    output, start = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O), tl.program_id(1) * GROUP
    column = start + tl.arange(0, GROUP)
    packed = tl.load(words + output.to(tl.int64)[:, None] * W + column[None, :])
    for n in tl.static_range(32 // BITS):
        scale, middle = _scale_and_middle(
            scales + output * (NUM_INPUTS // GROUP) + (n * W + start) // GROUP, BITS
        )
        at = output.to(tl.int64)[:, None] * NUM_INPUTS + n * W + column[None, :]
        number = _number(packed, n, BITS) * scale + middle
        tl.store(y + at, number.to(y.dtype.element_ty))


def unpack(weight: Words, dtype: torch.dtype) -> Tensor:
    """What `Words.unpack` does, in one kernel; outputs must be a multiple of 16."""
    num_outputs, num_words = weight.words_OW.shape
    num_inputs = num_words * 32 // weight.bits
    y = weight.words_OW.new_empty(num_outputs, num_inputs, dtype=dtype)
    block_o = 16
    assert num_outputs % block_o == 0
    assert num_words % GROUP_SIZE == 0
    _unpack[(num_outputs // block_o, num_words // GROUP_SIZE)](
        weight.words_OW, weight.scale_middle_OG2.view(torch.int32), y,
        num_inputs, weight.bits, GROUP_SIZE, block_o,
    )  # fmt: skip
    return y


@triton.jit
def _normalise(x, weight, bias, y, epsilon, H, BLOCK: tl.constexpr):
    row, column = tl.program_id(0), tl.arange(0, BLOCK)
    inside = column < H
    value = tl.load(x + row * H + column, inside, 0.0).to(tl.float32)
    scale = tl.load(weight + column, inside, 0.0).to(tl.float32)
    shift = tl.load(bias + column, inside, 0.0).to(tl.float32)
    centred = tl.where(inside, value - tl.sum(value, 0) / H, 0.0)
    variance = tl.sum(centred * centred, 0) / H
    result = centred * tl.rsqrt(variance + epsilon) * scale + shift
    tl.store(y + row * H + column, result.to(y.dtype.element_ty), inside)


def normalise(x: Tensor, norm: Norm) -> Tensor:
    """What `Norm` does, ``(..., H)``, for a few rows."""
    y = torch.empty_like(x)
    width = x.shape[-1]
    block = triton.next_power_of_2(width)
    _normalise[(x.numel() // width,)](
        x, norm.weight, norm.bias, y, norm.epsilon, width, block, num_warps=min(8, block // 256 + 1)
    )
    return y


@triton.jit
def _attend(
    qkv, cos, sin, keys, values, mask, column, partial, counts, y, scale,
    stride_b, stride_n, stride_k, stride_mask,
    N: tl.constexpr, D: tl.constexpr, SPLITS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One head's share of the columns; the last share to be done adds all of them up."""
    at_head, split = tl.program_id(0), tl.program_id(1)
    row, head = at_head // N, at_head % N
    Q: tl.constexpr = D // 4
    d, newest = tl.arange(0, D), tl.load(column)
    kind = keys.dtype.element_ty

    # Element d of a half turns with the one a quarter away from it.
    at, partner = qkv + at_head * 3 * D, d ^ Q
    angle = row * 2 * Q + d // (2 * Q) * Q + d % Q
    c = tl.load(cos + angle).to(tl.float32)
    s = tl.where((d & Q) == 0, -1.0, 1.0) * tl.load(sin + angle).to(tl.float32)
    query = tl.load(at + d).to(tl.float32) * c + tl.load(at + partner).to(tl.float32) * s
    query = query.to(kind).to(tl.float32) * scale
    cache = row.to(tl.int64) * stride_b + head.to(tl.int64) * stride_n
    largest, total, sums = -1e30, 0.0, tl.zeros([D], tl.float32)
    if split == 0:
        key = tl.load(at + D + d).to(tl.float32) * c + tl.load(at + D + partner).to(tl.float32) * s
        key, value = key.to(kind), tl.load(at + 2 * D + d)
        tl.store(keys + cache + newest * stride_k + d, key)
        tl.store(values + cache + newest * stride_k + d, value)
        largest, total = tl.sum(query * key.to(tl.float32), 0), 1.0
        sums = value.to(tl.float32)

    share = tl.cdiv(newest, SPLITS * BLOCK_K) * BLOCK_K
    start = split * share
    end = tl.minimum(start + share, newest)
    for first in range(start, end, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        seen = (k < end) & (tl.load(mask + row * stride_mask + k, k < end, 0) != 0)
        at_k = cache + k[:, None] * stride_k + d[None, :]
        block = tl.load(keys + at_k, (k < end)[:, None], 0.0).to(tl.float32)
        score = tl.where(seen, tl.sum(block * query[None, :], 1), -1e30)
        larger = tl.maximum(largest, tl.max(score, 0))
        share_k = tl.where(seen, tl.exp(score - larger), 0.0)
        shrink = tl.exp(largest - larger)
        block = tl.load(values + at_k, (k < end)[:, None], 0.0).to(tl.float32)
        sums = sums * shrink + tl.sum(share_k[:, None] * block, 0)
        total = total * shrink + tl.sum(share_k, 0)
        largest = larger

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
        tl.store(y + at_head * D + d, sums.to(kind))
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
        ``(B, 1, N D)``.
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
        num_heads, head_dim, _SPLITS, _BLOCK_K,
    )  # fmt: skip
    return y
