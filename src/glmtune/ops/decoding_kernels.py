"""What one layer computes for one new token of a few rows, as Triton kernels.

Such a step reads every weight once and does next to nothing with it: it is as fast as memory, if
enough reads are under way at any time and little else is between them. So each product takes along
what follows it (bias, adapter, GELU, residual), each block of it reads a few whole rows of the
matrix, and numbers of 8 or 4 bits become floats by putting them into a float's fraction. On Hopper
and newer GPUs a kernel is launched while the one before it ends, and waits for it by itself.

Shapes: B rows of a batch, I inputs, O outputs, R rank of an adapter, N heads, D head size,
K columns of the cache; W and G as in `ops.words`.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from glmtune.ops.norm import Norm
from glmtune.ops.words import GROUP_SIZE, Words

_SPLITS, _BLOCK_K = 16, 32


class LowRank(NamedTuple):
    """What an adapter adds to a product: ``low @ up.T * scale``."""

    low_BR: Tensor
    up_OR: Tensor
    scale: float


@triton.jit
def _begin(EARLY: tl.constexpr):
    """Let the next kernel be launched, and wait until the one before has written all it writes."""
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()


@lru_cache(maxsize=8)
def _early(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


@triton.jit
def _number(words, N: tl.constexpr, BITS: tl.constexpr):
    """Number q of each word as the float ``q * 2^(_place - 149)``, below the normal ones."""
    PLACE: tl.constexpr = _place(N, BITS)
    MASK: tl.constexpr = ((1 << BITS) - 1) << PLACE
    return ((words >> (N * BITS - PLACE)) & MASK).to(tl.float32, bitcast=True)


@triton.constexpr_function
def _place(n: int, bits: int) -> int:
    """The bit of a float's fraction that number n of a word begins at, so that few are shifted."""
    return n * bits if (n + 1) * bits <= 20 else n * bits - (12 if bits == 4 else 16)


@triton.constexpr_function
def _power(n: int, bits: int) -> float:
    """What an input is multiplied with, so that its product with `_number` is ``q x 2^-69``."""
    return 2.0 ** (80 - _place(n, bits))


@triton.jit
def _finish(
    sums, output, row, bias, low, up, residual, y, low_scale, alpha, NUM_OUTPUTS,
    HAS_BIAS: tl.constexpr, R: tl.constexpr, R_PADDED: tl.constexpr, GELU: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
):  # fmt: skip
    """What follows a product, for some outputs of one row."""
    is_output = output < NUM_OUTPUTS
    if HAS_BIAS:
        sums += tl.load(bias + output, is_output, 0.0).to(tl.float32)
    if R > 0:
        inner = tl.arange(0, R_PADDED)
        low_R = tl.load(low + row * R + inner, inner < R, 0.0).to(tl.float32)
        is_up = is_output[:, None] & (inner < R)[None, :]
        up_OR = tl.load(up + output[:, None] * R + inner[None, :], is_up, 0.0).to(tl.float32)
        sums += low_scale * tl.sum(low_R[None, :] * up_OR, 1)
    if GELU:
        sums *= tl.sigmoid(1.5957691216057308 * (sums + 0.044715 * sums * sums * sums))
    at = row * NUM_OUTPUTS + output
    if HAS_RESIDUAL:
        sums += alpha * tl.load(residual + at, is_output, 0.0).to(tl.float32)
    tl.store(y + at, sums.to(y.dtype.element_ty), is_output)


@triton.jit
def _project(
    x, weight, bias, low, up, residual, y, low_scale, alpha, NUM_OUTPUTS,
    HAS_BIAS: tl.constexpr, R: tl.constexpr, R_PADDED: tl.constexpr, GELU: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, NUM_INPUTS: tl.constexpr, EARLY: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    _begin(EARLY)
    output, row = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O), tl.program_id(1)
    column = tl.arange(0, BLOCK_I)
    total = tl.zeros([BLOCK_O, BLOCK_I], tl.float32)
    at_weight = weight + output.to(tl.int64)[:, None] * NUM_INPUTS + column[None, :]
    for start in range(0, NUM_INPUTS, BLOCK_I):
        inside = (start + column < NUM_INPUTS)[None, :]
        is_weight = (output < NUM_OUTPUTS)[:, None] & inside
        value = tl.load(at_weight + start, is_weight, 0.0, eviction_policy="evict_first")
        at_x = x + row * NUM_INPUTS + start + column[None, :]
        total += tl.load(at_x, inside, 0.0).to(tl.float32) * value.to(tl.float32)
    _finish(
        tl.sum(total, 1), output, row, bias, low, up, residual, y, low_scale, alpha, NUM_OUTPUTS,
        HAS_BIAS, R, R_PADDED, GELU, HAS_RESIDUAL,
    )  # fmt: skip


@triton.jit
def _project_words(
    x, words, scales, bias, low, up, residual, y, low_scale, alpha, NUM_OUTPUTS,
    HAS_BIAS: tl.constexpr, R: tl.constexpr, R_PADDED: tl.constexpr, GELU: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, NUM_INPUTS: tl.constexpr, EARLY: tl.constexpr,
    BITS: tl.constexpr, GROUP: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """As `_project`. Words and inputs, of four bytes each, lie in threads alike: four in each."""
    _begin(EARLY)
    output, row = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O), tl.program_id(1)
    column, four = tl.arange(0, BLOCK_W), 4 * tl.arange(0, BLOCK_W // 4)
    W: tl.constexpr = NUM_INPUTS * BITS // 32
    HALF: tl.constexpr = 2.0 ** (BITS - 1)
    total = tl.zeros([BLOCK_O, BLOCK_W // 4], tl.float32)
    at_words = words + output.to(tl.int64)[:, None] * W + column[None, :]
    at_scales = scales + output[:, None] * (NUM_INPUTS // GROUP)
    is_output = (output < NUM_OUTPUTS)[:, None]
    for start in range(0, W, BLOCK_W):
        inside = (start + column < W)[None, :]
        packed = tl.load(at_words + start, is_output & inside, 0, eviction_policy="evict_first")
        group = (start + four[None, :]) // (GROUP * BITS // 32)
        pair = tl.load(at_scales + group, is_output & (start + four < W)[None, :], 0)
        scale = (pair << 16).to(tl.float32, bitcast=True)  # two bfloat16
        middle = (pair & -65536).to(tl.float32, bitcast=True)
        products, inputs = tl.zeros_like(packed).to(tl.float32), tl.zeros([1, BLOCK_W], tl.float32)
        for n in tl.static_range(32 // BITS):
            at_x = x + row * NUM_INPUTS + n * W + start + column[None, :]
            value = tl.load(at_x, inside, 0.0).to(tl.float32)
            products += _number(packed, n, BITS) * (value * _power(n, BITS))
            inputs += value
        products = tl.sum(tl.reshape(products, [BLOCK_O, BLOCK_W // 4, 4]), 2)
        inputs = tl.sum(tl.reshape(inputs, [1, BLOCK_W // 4, 4]), 2)
        total += products * (scale * 2.0**69) + inputs * (middle - HALF * scale)
    _finish(
        tl.sum(total, 1), output, row, bias, low, up, residual, y, low_scale, alpha, NUM_OUTPUTS,
        HAS_BIAS, R, R_PADDED, GELU, HAS_RESIDUAL,
    )  # fmt: skip


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
        x: ``(..., I)`` of a few rows, contiguous; best in float32 where weights are
            packed and in their type where not: threads then hold both alike.
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
    matrix = weight.words_OW if isinstance(weight, Words) else weight
    num_outputs, num_inputs = len(matrix), x.shape[-1]
    assert x.is_contiguous()
    assert matrix.is_contiguous()
    y = x.new_empty(*x.shape[:-1], num_outputs, dtype=dtype)
    low, up, low_scale = update or (None, None, 0.0)
    rank = 0 if low is None else low.shape[-1]
    block_o, block_i, warps = _blocks(num_outputs, num_inputs, weight)
    grid = triton.cdiv(num_outputs, block_o), x.numel() // num_inputs
    after = (
        bias_O, low, up, residual, y, low_scale, alpha, num_outputs,
        bias_O is not None, rank, triton.next_power_of_2(rank) if rank else 0, gelu,
        residual is not None, num_inputs, _early(x.device),
    )  # fmt: skip
    if isinstance(weight, Words):
        scales, shape = weight.scale_middle_OG2.view(torch.int32), (block_o, block_i)
        _project_words[grid](
            x, matrix, scales, *after, weight.bits, GROUP_SIZE, *shape,
            num_warps=warps, launch_pdl=_early(x.device),
        )  # fmt: skip
    else:
        _project[grid](
            x, matrix, *after, block_o, block_i, num_warps=warps, launch_pdl=_early(x.device)
        )
    return y


def _blocks(num_outputs: int, num_inputs: int, weight: Tensor | Words) -> tuple[int, int, int]:
    """Outputs and inputs (or words) of a block, and warps that work on it: as measured on an H200.

    A warp reads 128 words of 4 bytes at a time. Many outputs keep all of a GPU busy with a warp
    each; of few ones, the long rows are divided among four.
    """
    if not isinstance(weight, Words):
        return 4, min(1024, triton.next_power_of_2(num_inputs)), 2
    return (8, 128, 1) if num_outputs >= 8192 else (32 // weight.bits, 512, 4)


@triton.jit
def _unpack(words, scales, y, NUM_INPUTS: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
            BLOCK: tl.constexpr):  # fmt: skip
    """The weights of some words of one output."""
    W: tl.constexpr = NUM_INPUTS * BITS // 32
    HALF: tl.constexpr = 2.0 ** (BITS - 1)
    output, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < W
    packed = tl.load(words + output * W + column, inside, 0)
    group = output * (NUM_INPUTS // GROUP) + column // (GROUP * BITS // 32)
    pair = tl.load(scales + group, inside, 0)
    scale = (pair << 16).to(tl.float32, bitcast=True)
    middle = (pair & -65536).to(tl.float32, bitcast=True)
    for n in tl.static_range(32 // BITS):
        number = _number(packed, n, BITS) * _power(n, BITS) * 2.0**69
        value = (number - HALF) * scale + middle
        at = output * NUM_INPUTS + n * W + column
        tl.store(y + at, value.to(y.dtype.element_ty), inside)


def unpack(weight: Words, dtype: torch.dtype) -> Tensor:
    """What `Words.unpack` does, in one kernel."""
    num_outputs, num_words = weight.words_OW.shape
    num_inputs, block = num_words * 32 // weight.bits, 512
    y = weight.words_OW.new_empty(num_outputs, num_inputs, dtype=dtype)
    scales = weight.scale_middle_OG2.view(torch.int32)
    _unpack[(num_outputs, triton.cdiv(num_words, block))](
        weight.words_OW, scales, y, num_inputs, weight.bits, GROUP_SIZE, block
    )
    return y


@triton.jit
def _normalise(x, weight, bias, y, epsilon, H, EARLY: tl.constexpr, BLOCK: tl.constexpr):
    _begin(EARLY)
    row, column = tl.program_id(0), tl.arange(0, BLOCK)
    inside = column < H
    value = tl.load(x + row * H + column, inside, 0.0).to(tl.float32)
    scale = tl.load(weight + column, inside, 0.0).to(tl.float32)
    shift = tl.load(bias + column, inside, 0.0).to(tl.float32)
    centred = tl.where(inside, value - tl.sum(value, 0) / H, 0.0)
    variance = tl.sum(centred * centred, 0) / H
    result = centred * tl.rsqrt(variance + epsilon) * scale + shift
    tl.store(y + row * H + column, result.to(y.dtype.element_ty), inside)


def normalise(x: Tensor, norm: Norm, dtype: torch.dtype) -> Tensor:
    """What `Norm` does, ``(..., H)``, for a few rows."""
    y = torch.empty_like(x, dtype=dtype)
    width = x.shape[-1]
    block = triton.next_power_of_2(width)
    warps = 8 if block > 1024 else 2
    _normalise[(x.numel() // width,)](
        x, norm.weight, norm.bias, y, norm.epsilon, width, _early(x.device), block,
        num_warps=warps, launch_pdl=_early(x.device),
    )  # fmt: skip
    return y


@triton.jit
def _attend(
    qkv, cos, sin, keys, values, mask, column, partial, counts, y, scale,
    stride_b, stride_n, stride_k, stride_mask,
    N: tl.constexpr, D: tl.constexpr, EARLY: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One head's share of the columns; the last share to be done adds all of them up."""
    _begin(EARLY)
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
        key, value = key.to(kind), tl.load(at + 2 * D + d).to(kind)
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
        at_k, is_k = cache + k[:, None] * stride_k + d[None, :], (k < end)[:, None]
        key_block = tl.load(keys + at_k, is_k, 0.0).to(tl.float32)
        value_block = tl.load(values + at_k, is_k, 0.0).to(tl.float32)
        score = tl.where(seen, tl.sum(key_block * query[None, :], 1), -1e30)
        larger = tl.maximum(largest, tl.max(score, 0))
        share_k = tl.where(seen, tl.exp(score - larger), 0.0)
        shrink = tl.exp(largest - larger)
        sums = sums * shrink + tl.sum(share_k[:, None] * value_block, 0)
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
        num_heads, head_dim, _early(mixed.device), _SPLITS, _BLOCK_K,
        launch_pdl=_early(mixed.device),
    )  # fmt: skip
    return y
