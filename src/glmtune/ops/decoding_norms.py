"""Norms of one new token a row, as a Triton kernel; see `ops.decoding_kernels`.

Shapes: H width.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from glmtune.ops.early_launch import await_last, launches_early, let_next_begin
from glmtune.ops.norm import Norm, RmsNorm


@triton.jit
def _normalised(value, inside, weight, bias, epsilon, H, CENTRED: tl.constexpr):
    """`Norm` of a row if it is centred, else `RmsNorm`; padding is 0 before and after."""
    if CENTRED:
        value = tl.where(inside, value - tl.sum(value, 0) / H, 0.0)
    value *= tl.rsqrt(tl.sum(value * value, 0) / H + epsilon)
    return value * weight + bias if CENTRED else value * weight


@triton.jit
def _normalise(
    x, weight, bias, residual, y, epsilon, H, EARLY: tl.constexpr, CENTRED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    let_next_begin(EARLY)
    row, column = tl.program_id(0), tl.arange(0, BLOCK)
    inside = column < H
    scale = tl.load(weight + column, inside, 0.0).to(tl.float32)
    shift = 0.0
    if CENTRED:
        shift = tl.load(bias + column, inside, 0.0).to(tl.float32)
    await_last(EARLY)
    value = tl.load(x + row * H + column, inside, 0.0).to(tl.float32)
    result = _normalised(value, inside, scale, shift, epsilon, H, CENTRED)
    if residual is not None:
        result += tl.load(residual + row * H + column, inside, 0.0).to(tl.float32)
    tl.store(y + row * H + column, result.to(y.dtype.element_ty), inside)


def normalise(
    x: Tensor, norm: Norm | RmsNorm, dtype: torch.dtype, residual: Tensor | None = None
) -> Tensor:
    """``norm(x) + residual`` of some rows, ``(..., H)``, in one kernel."""
    assert x.is_contiguous()
    y = torch.empty_like(x, dtype=dtype)
    width = x.shape[-1]
    block = triton.next_power_of_2(width)
    warps = 8 if block > 1024 else 2
    bias = norm.bias if isinstance(norm, Norm) else None
    _normalise[(x.numel() // width,)](
        x, norm.weight, bias, residual, y, norm.epsilon, width, launches_early(x.device),
        bias is not None, block, num_warps=warps, launch_pdl=launches_early(x.device),
    )  # fmt: skip
    return y
