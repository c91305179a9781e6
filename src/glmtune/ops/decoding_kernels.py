"""What one layer computes for one new token of a few rows, as Triton kernels.

Such a step reads every weight once and computes little with it: it is bound by memory bandwidth, as
long as enough reads are in flight and little else stands between them. So each product is fused
with what follows it (bias, adapter, GELU or gate, residual), each block reads a few whole rows of
the matrix, and numbers of 8 or 4 bits become floats by placing their bits in a float's fraction. A
norm is a kernel of its own: within each block of the product that follows, it took longer. Each
kernel is launched while the one before it ends, see `ops.early_launch`.

Shapes: I inputs, O outputs, R rank of an adapter; W and G as in `ops.words`.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from glmtune.ops.early_launch import await_last, launches_early, let_next_begin
from glmtune.ops.words import GROUP_SIZE, Words

# Registers a thread: 128 allow sixteen warps an SM, so that 16,384 outputs fit in one wave.
_REGISTERS = 128
Update = tuple[Tensor, Tensor, float]
"""What an adapter adds to a linear: see `project`."""


@triton.jit
def _tile(matrix, output, start, NUM_OUTPUTS, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Load some columns of some rows of a matrix, each read once and not worth caching."""
    column = start + tl.arange(0, BLOCK)
    inside = (output < NUM_OUTPUTS)[:, None] & (column < WIDTH)[None, :]
    at = matrix + output.to(tl.int64)[:, None] * WIDTH + column[None, :]
    return tl.load(at, inside, 0, eviction_policy="evict_first")


@triton.jit
def _number(words, N: tl.constexpr, BITS: tl.constexpr):
    """Number q of each word as the subnormal float ``q * 2^(_place - 149)``."""
    PLACE: tl.constexpr = _place(N, BITS)
    MASK: tl.constexpr = ((1 << BITS) - 1) << PLACE
    return ((words >> (N * BITS - PLACE)) & MASK).to(tl.float32, bitcast=True)


@triton.constexpr_function
def _place(n: int, bits: int) -> int:
    """The bit of a float's fraction where number n of a word begins, so that few need a shift."""
    return n * bits if (n + 1) * bits <= 20 else n * bits - (12 if bits == 4 else 16)


@triton.constexpr_function
def _power(n: int, bits: int) -> float:
    """The factor of an input that makes its product with `_number` ``q x 2^-69``."""
    return 2.0 ** (80 - _place(n, bits))


@triton.jit
def _sums(
    x, weight, scales, output, row, NUM_OUTPUTS, NUM_INPUTS: tl.constexpr,
    EARLY: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, BLOCK_O: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Products of one row of inputs with some rows of a matrix: of BITS bits, or of floats if 0.

    The first weights load while the kernel waits for the inputs.
    """
    if BITS == 0:
        column = tl.arange(0, BLOCK)
        total = tl.zeros([BLOCK_O, BLOCK], tl.float32)
        tile = _tile(weight, output, 0, NUM_OUTPUTS, NUM_INPUTS, BLOCK)
        await_last(EARLY)
        for start in range(0, NUM_INPUTS, BLOCK):
            at_x = x + row * NUM_INPUTS + start + column[None, :]
            inside = (start + column < NUM_INPUTS)[None, :]
            value = tl.load(at_x, inside, 0.0).to(tl.float32)
            total += value * tile.to(tl.float32)
            tile = _tile(weight, output, start + BLOCK, NUM_OUTPUTS, NUM_INPUTS, BLOCK)
    else:
        # Words and inputs have four bytes each, four to a thread.
        column, four = tl.arange(0, BLOCK), 4 * tl.arange(0, BLOCK // 4)
        W: tl.constexpr = NUM_INPUTS * BITS // 32
        HALF: tl.constexpr = 2.0 ** (BITS - 1)
        total = tl.zeros([BLOCK_O, BLOCK // 4], tl.float32)
        at_scales = scales + output[:, None] * (NUM_INPUTS // GROUP)
        is_output = (output < NUM_OUTPUTS)[:, None]
        tile = _tile(weight, output, 0, NUM_OUTPUTS, W, BLOCK)
        await_last(EARLY)
        for start in range(0, W, BLOCK):
            inside = (start + column < W)[None, :]
            group = (start + four[None, :]) // (GROUP * BITS // 32)
            pair = tl.load(at_scales + group, is_output & (start + four < W)[None, :], 0)
            scale = (pair << 16).to(tl.float32, bitcast=True)  # two bfloat16
            middle = (pair & -65536).to(tl.float32, bitcast=True)
            products = tl.zeros_like(tile).to(tl.float32)
            inputs = tl.zeros([1, BLOCK], tl.float32)
            for n in tl.static_range(32 // BITS):
                at = n * W + start + column[None, :]
                value = tl.load(x + row * NUM_INPUTS + at, inside, 0.0).to(tl.float32)
                products += _number(tile, n, BITS) * (value * _power(n, BITS))
                inputs += value
            products = tl.sum(tl.reshape(products, [BLOCK_O, BLOCK // 4, 4]), 2)
            inputs = tl.sum(tl.reshape(inputs, [1, BLOCK // 4, 4]), 2)
            total += products * (scale * 2.0**69) + inputs * (middle - HALF * scale)
            tile = _tile(weight, output, start + BLOCK, NUM_OUTPUTS, W, BLOCK)
    return tl.sum(total, 1)


@triton.jit
def _add(sums, output, row, bias, low, up, low_scale, NUM_OUTPUTS, R: tl.constexpr,
         R_PADDED: tl.constexpr):  # fmt: skip
    """Add the bias and an adapter's update to some outputs of one row."""
    is_output = output < NUM_OUTPUTS
    if bias is not None:
        sums += tl.load(bias + output, is_output, 0.0).to(tl.float32)
    if R > 0:
        inner = tl.arange(0, R_PADDED)
        low_R = tl.load(low + row * R + inner, inner < R, 0.0).to(tl.float32)
        is_up = is_output[:, None] & (inner < R)[None, :]
        up_OR = tl.load(up + output[:, None] * R + inner[None, :], is_up, 0.0).to(tl.float32)
        sums += low_scale * tl.sum(low_R[None, :] * up_OR, 1)
    return sums


@triton.jit
def _project(
    x, weight, scales, bias, low, up, residual, y, low_scale, alpha, NUM_OUTPUTS,
    R: tl.constexpr, R_PADDED: tl.constexpr, GELU: tl.constexpr, GATED: tl.constexpr,
    NUM_INPUTS: tl.constexpr, EARLY: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One block of a product, and what follows it."""
    let_next_begin(EARLY)
    column, row = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O), tl.program_id(1)
    num_columns, output = NUM_OUTPUTS, column
    if GATED:  # each gate beside what it multiplies, half of the outputs away
        output = column // 2 + column % 2 * (NUM_OUTPUTS // 2)
    sums = _sums(
        x, weight, scales, output, row, NUM_OUTPUTS, NUM_INPUTS, EARLY, BITS, GROUP, BLOCK_O, BLOCK,
    )  # fmt: skip
    sums = _add(sums, output, row, bias, low, up, low_scale, NUM_OUTPUTS, R, R_PADDED)
    if GELU:
        sums *= tl.sigmoid(1.5957691216057308 * (sums + 0.044715 * sums * sums * sums))
    if GATED:
        gate, value = tl.split(tl.reshape(sums, [BLOCK_O // 2, 2]))
        sums, num_columns = gate * tl.sigmoid(gate) * value, NUM_OUTPUTS // 2
        column = tl.program_id(0) * (BLOCK_O // 2) + tl.arange(0, BLOCK_O // 2)
    at, is_column = row * num_columns + column, column < num_columns
    if residual is not None:
        sums += alpha * tl.load(residual + at, is_column, 0.0).to(tl.float32)
    tl.store(y + at, sums.to(y.dtype.element_ty), is_column)


@triton.jit
def _project_three(
    x, weight_0, scales_0, bias_0, low_0, up_0, weight_1, scales_1, bias_1, low_1, up_1,
    weight_2, scales_2, bias_2, low_2, up_2, y, scale_0, scale_1, scale_2,
    NUM_0, NUM_1, NUM_2, R_0: tl.constexpr, R_1: tl.constexpr, R_2: tl.constexpr,
    P_0: tl.constexpr, P_1: tl.constexpr, P_2: tl.constexpr,
    NUM_INPUTS: tl.constexpr, EARLY: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One block of three products of the same inputs, whose outputs lie side by side."""
    let_next_begin(EARLY)
    block, row = tl.program_id(0), tl.program_id(1)
    blocks_0, blocks_1 = tl.cdiv(NUM_0, BLOCK_O), tl.cdiv(NUM_1, BLOCK_O)
    at = y + row * (NUM_0 + NUM_1 + NUM_2)
    if block < blocks_0:
        output = block * BLOCK_O + tl.arange(0, BLOCK_O)
        sums = _sums(
            x, weight_0, scales_0, output, row, NUM_0, NUM_INPUTS, EARLY, BITS, GROUP, BLOCK_O,
            BLOCK,
        )  # fmt: skip
        sums = _add(sums, output, row, bias_0, low_0, up_0, scale_0, NUM_0, R_0, P_0)
        tl.store(at + output, sums.to(y.dtype.element_ty), output < NUM_0)
    elif block < blocks_0 + blocks_1:
        output = (block - blocks_0) * BLOCK_O + tl.arange(0, BLOCK_O)
        sums = _sums(
            x, weight_1, scales_1, output, row, NUM_1, NUM_INPUTS, EARLY, BITS, GROUP, BLOCK_O,
            BLOCK,
        )  # fmt: skip
        sums = _add(sums, output, row, bias_1, low_1, up_1, scale_1, NUM_1, R_1, P_1)
        tl.store(at + NUM_0 + output, sums.to(y.dtype.element_ty), output < NUM_1)
    else:
        output = (block - blocks_0 - blocks_1) * BLOCK_O + tl.arange(0, BLOCK_O)
        sums = _sums(
            x, weight_2, scales_2, output, row, NUM_2, NUM_INPUTS, EARLY, BITS, GROUP, BLOCK_O,
            BLOCK,
        )  # fmt: skip
        sums = _add(sums, output, row, bias_2, low_2, up_2, scale_2, NUM_2, R_2, P_2)
        tl.store(at + NUM_0 + NUM_1 + output, sums.to(y.dtype.element_ty), output < NUM_2)


class Factor(NamedTuple):
    """One linear of `project_three`."""

    weight: Tensor | Words
    """``(O, I)``, floats or packed."""
    bias_O: Tensor | None
    update: Update | None


def project(
    x: Tensor,
    weight: Tensor | Words,
    bias_O: Tensor | None = None,
    *,
    update: Update | None = None,
    gelu: bool = False,
    gated: bool = False,
    residual: Tensor | None = None,
    alpha: float = 1.0,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """``act(x @ weight.T + bias + update) + alpha * residual``, in float32 until it is stored.

    Args:
        x: ``(..., I)``, a few rows, contiguous; best in float32 where weights are packed, else in
            the weights' type, so that threads hold both in the same layout.
        weight: ``(O, I)``, floats or packed.
        bias_O: the bias; None without one.
        update: low ``(B, R)``, up ``(O, R)`` and a scale: an adapter adds ``low @ up.T * scale``.
        gelu: whether to apply GELU, in its tanh form.
        gated: whether the first half of the outputs, through SiLU, multiplies the second.
        residual: of the result's shape, contiguous.
        alpha: factor of the residual.
        dtype: type of the result; by default that of x.

    Returns:
        ``(..., O)``, or ``(..., O / 2)`` if gated.
    """
    matrix, scales, bits = _parts(weight)
    num_outputs, num_inputs = len(matrix), x.shape[-1]
    assert x.is_contiguous()
    y = x.new_empty(*x.shape[:-1], num_outputs // (2 if gated else 1), dtype=dtype)
    low, up, low_scale = update or (None, None, 0.0)
    rank, padded = _rank(low)
    block_o, block, how = _blocks(num_outputs, num_inputs, weight, x.device)
    _project[(triton.cdiv(num_outputs, block_o), x.numel() // num_inputs)](
        x, matrix, scales, bias_O, low, up, residual, y, low_scale, alpha, num_outputs, rank,
        padded, gelu, gated, num_inputs, launches_early(x.device), bits, GROUP_SIZE, block_o, block,
        **how,
    )  # fmt: skip
    return y


def project_three(x: Tensor, factors: Sequence[Factor]) -> Tensor:
    """Three linears of the same inputs in one kernel, in float32 until they are stored.

    Args:
        x: ``(..., I)``, see `project`.
        factors: the linears, of one kind.

    Returns:
        The outputs of all, one after another in the last dimension, in the type of x.
    """
    num_inputs = x.shape[-1]
    assert x.is_contiguous()
    parts = [_parts(factor.weight) for factor in factors]
    (bits,) = {bits for _, _, bits in parts}
    sizes = [len(matrix) for matrix, _, _ in parts]
    updates = [factor.update or (None, None, 0.0) for factor in factors]
    tensors = [
        tensor
        for (matrix, scales, _), (low, up, _), factor in zip(parts, updates, factors, strict=True)
        for tensor in (matrix, scales, factor.bias_O, low, up)
    ]
    ranks, padded = zip(*(_rank(low) for low, _, _ in updates), strict=True)
    block_o, block, how = _blocks(sum(sizes), num_inputs, factors[0].weight, x.device)
    y = x.new_empty(*x.shape[:-1], sum(sizes))
    num_blocks = sum(triton.cdiv(size, block_o) for size in sizes)
    _project_three[(num_blocks, x.numel() // num_inputs)](
        x, *tensors, y, *(scale for _, _, scale in updates), *sizes,
        *ranks, *padded, num_inputs, launches_early(x.device), bits, GROUP_SIZE, block_o, block,
        **how,
    )  # fmt: skip
    return y


def _parts(weight: Tensor | Words) -> tuple[Tensor, Tensor | None, int]:
    """A weight as kernels take it: floats or words, scales, and bits; 0 bits mean floats."""
    if isinstance(weight, Words):
        matrix, scales, bits = (
            weight.words_OW,
            weight.scale_middle_OG2.view(torch.int32),
            weight.bits,
        )
    else:
        matrix, scales, bits = weight, None, 0
    assert matrix.is_contiguous()
    return matrix, scales, bits


def _rank(low: Tensor | None) -> tuple[int, int]:
    """Rank of an update, and the power of two that holds it; 0 without one."""
    rank = 0 if low is None else low.shape[-1]
    return rank, triton.next_power_of_2(rank) if rank else 0


def _blocks(
    num_outputs: int, num_inputs: int, weight: Tensor | Words, device: torch.device
) -> tuple[int, int, dict[str, Any]]:
    """Outputs and inputs (or words) of a block, and how it runs, as measured fastest on an H200.

    A warp reads 128 words of 4 bytes at a time. With many outputs, one warp each keeps the GPU
    busy; with few, the long rows are divided among four warps.
    """
    how: dict[str, Any] = {"launch_pdl": launches_early(device)}
    if not isinstance(weight, Words):
        return 4, min(1024, triton.next_power_of_2(num_inputs)), how | {"num_warps": 2}
    how["maxnreg"] = _REGISTERS
    if num_outputs >= 8192:
        return 8, 128, how | {"num_warps": 1}
    return 32 // weight.bits, 512, how | {"num_warps": 4}


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
    """Do what `Words.unpack` does, in one kernel."""
    num_outputs, num_words = weight.words_OW.shape
    num_inputs, block = num_words * 32 // weight.bits, 512
    y = weight.words_OW.new_empty(num_outputs, num_inputs, dtype=dtype)
    scales = weight.scale_middle_OG2.view(torch.int32)
    _unpack[(num_outputs, triton.cdiv(num_words, block))](
        weight.words_OW, scales, y, num_inputs, weight.bits, GROUP_SIZE, block
    )
    return y
