"""What one layer computes for one new token of each row, as Triton kernels.

Such a step reads every weight once and computes little with it: it is bound by memory bandwidth, as
long as enough reads are in flight and little else stands between them. So each product is fused
with what follows it (bias, adapter, GELU or gate, residual). A norm is a kernel of its own: within
each block of the product that follows, it took longer. Each kernel is launched while the one before
it ends, see `ops.early_launch`.

A product with few rows takes them one by one (`ops.decoding_vectors`). One with more is torch's,
and what follows it a kernel of its own: kernels on the tensor cores that did both took longer.

Shapes: I inputs, O outputs, R rank of an adapter; W and G as in `ops.words`.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from glmtune.ops.decoding_vectors import (
    gelu_of,
    number_at,
    power_at,
    project_three_vectors,
    project_vectors,
)
from glmtune.ops.early_launch import launches_early
from glmtune.ops.linear import joined
from glmtune.ops.words import GROUP_SIZE, Words

_FEW_ROWS, _FEW_ROWS_PACKED = 1, 4
# Registers a thread: 128 allow sixteen warps an SM, so that 16,384 outputs fit in one wave.
_REGISTERS = 128
Update = tuple[Tensor, Tensor, float]
"""What an adapter adds to a linear: see `project`."""


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
        x: ``(..., I)``, contiguous. For `few_rows` best in float32 where
            weights are packed; else in the weights' type, or that of the model.
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
    num_outputs, num_inputs, num_rows = len(matrix), x.shape[-1], _num_rows(x)
    y = x.new_empty(*x.shape[:-1], num_outputs // (2 if gated else 1), dtype=dtype)
    if num_rows > few_rows(weight):
        product = _multiply(x, weight, bias_O, update)
        if not (gelu or gated or residual is not None) and product.dtype == y.dtype:
            return product
        _finish[(triton.cdiv(y.shape[-1], 1024), num_rows)](
            product, residual, y, alpha, num_outputs, y.shape[-1], gelu, gated, 1024
        )
        return y
    low, up, low_scale = update or (None, None, 0.0)
    block_o, block, how = _blocks(num_outputs, num_inputs, weight, x.device)
    project_vectors[(triton.cdiv(num_outputs, block_o), num_rows)](
        x, matrix, scales, bias_O, low, up, residual, y, low_scale, alpha, num_outputs, *_rank(low),
        gelu, gated, num_inputs, launches_early(x.device), bits, GROUP_SIZE, block_o, block, **how,
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
    num_inputs, num_rows = x.shape[-1], _num_rows(x)
    parts = [_parts(factor.weight) for factor in factors]
    (bits,) = {bits for _, _, bits in parts}
    sizes = [len(matrix) for matrix, _, _ in parts]
    if num_rows > few_rows(factors[0].weight):
        return _multiply_three(x, factors)
    y = x.new_empty(*x.shape[:-1], sum(sizes))
    updates = [factor.update or (None, None, 0.0) for factor in factors]
    tensors = [
        tensor
        for (matrix, scales, _), (low, up, _), factor in zip(parts, updates, factors, strict=True)
        for tensor in (matrix, scales, factor.bias_O, low, up)
    ]
    ranks, padded = zip(*(_rank(low) for low, _, _ in updates), strict=True)
    block_o, block, how = _blocks(sum(sizes), num_inputs, factors[0].weight, x.device)
    num_blocks = sum(triton.cdiv(size, block_o) for size in sizes)
    project_three_vectors[(num_blocks, num_rows)](
        x, *tensors, y, *(scale for _, _, scale in updates), *sizes,
        *ranks, *padded, num_inputs, launches_early(x.device), bits, GROUP_SIZE, block_o, block,
        **how,
    )  # fmt: skip
    return y


def few_rows(weight: Tensor | Words) -> int:
    """The most rows that are multiplied one by one, each of which reads the weights again.

    For packed weights that is cheaper than unpacking them for a product of matrices; otherwise
    nothing is gained from a second row on.
    """
    return _FEW_ROWS_PACKED if isinstance(weight, Words) else _FEW_ROWS


def _num_rows(x: Tensor) -> int:
    assert x.is_contiguous()
    return x.numel() // x.shape[-1]


def _multiply(
    x: Tensor, weight: Tensor | Words, bias_O: Tensor | None, update: Update | None
) -> Tensor:
    """A product of matrices, with bias and update."""
    weight_OI = unpack(weight, x.dtype) if isinstance(weight, Words) else weight
    y = F.linear(x.to(weight_OI.dtype), weight_OI, bias_O)
    if update is not None:
        _add_update(y, update)
    return y


def _multiply_three(x: Tensor, factors: Sequence[Factor]) -> Tensor:
    """`_multiply` of three linears, as one product where their weights lie side by side."""
    weights = [factor.weight for factor in factors]
    biases = [factor.bias_O for factor in factors if factor.bias_O is not None]
    whole = None
    if not any(isinstance(weight, Words) for weight in weights) and len(biases) in (0, 3):
        whole = joined(cast("list[Tensor]", weights), 0)
    if whole is None:
        return torch.cat([_multiply(x, *factor) for factor in factors], -1)
    y = _multiply(x, whole, torch.cat(biases) if biases else None, None)
    for part, factor in zip(y.split([len(w) for w in weights], -1), factors, strict=True):
        if factor.update is not None:
            _add_update(part, factor.update)
    return y


def _add_update(y: Tensor, update: Update) -> None:
    low, up, scale = update
    y.flatten(0, -2).addmm_(low.to(y.dtype), up.to(y.dtype).T, alpha=scale)


@triton.jit
def _finish(
    product, residual, y, alpha, NUM_OUTPUTS, NUM_COLUMNS, GELU: tl.constexpr, GATED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """What follows a product, for some columns of a row."""
    row, column = tl.program_id(1), tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside, at = column < NUM_COLUMNS, row * NUM_COLUMNS + column
    value = tl.load(product + row * NUM_OUTPUTS + column, inside, 0.0).to(tl.float32)
    if GELU:
        value = gelu_of(value)
    if GATED:
        factor = tl.load(product + row * NUM_OUTPUTS + NUM_COLUMNS + column, inside, 0.0)
        value *= tl.sigmoid(value) * factor.to(tl.float32)
    if residual is not None:
        value += alpha * tl.load(residual + at, inside, 0.0).to(tl.float32)
    tl.store(y + at, value.to(y.dtype.element_ty), inside)


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

    A warp reads 128 words of 4 bytes at a time. With many outputs, one or two warps each keep the
    GPU busy; with few, the long rows are divided among more, or fewer outputs are in a block.
    """
    how: dict[str, Any] = {"launch_pdl": launches_early(device)}
    if not isinstance(weight, Words):
        return 4, min(1024, triton.next_power_of_2(num_inputs)), how | {"num_warps": 2}
    how["maxnreg"] = _REGISTERS
    if weight.bits == 8:
        return 8 if num_outputs >= 8192 else 4, 256, how | {"num_warps": 2}
    if num_outputs >= 8192:
        return 8, 128, how | {"num_warps": 1}
    return 8, 512, how | {"num_warps": 4}


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
        number = number_at(packed, n, BITS) * power_at(n, BITS) * 2.0**69
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
