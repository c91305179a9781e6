"""Frozen linears in 8 or 4 bits, dequantised to the compute type whenever they are used.

Forward and backward pass each dequantise the weight again and keep nothing of it, so that only one
weight at a time exists as floats. The compiler sees one opaque operator: it can neither merge the
two dequantisations, which would keep every weight until the backward pass, nor trace into
bitsandbytes.

Shapes: T tokens, K inputs, N outputs.
"""

from collections.abc import Iterator, Sequence
from functools import cache
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from glmtune.ops.integers import dequantise

INTEGER_BITS = {"int8": 8, "int4": 4}
# Rows of a head that exist as floats at a time: 0.125 GiB in bfloat16 for ChatGLM-6B. No other
# linear has more rows.
PIECE = 16_384
# Blocks whose scales share a scale in double quantisation; bitsandbytes has no other size.
_GROUP = 256


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


class Quantised(NamedTuple):
    """A linear whose weight ``(N, K)`` is in 8 or 4 bits."""

    parts: tuple[Tensor, ...]
    """For the integer kinds, packed integers and a scale a row, see `ops.integers`. For the others,
    as in bitsandbytes, packed values and a float32 scale a block; with double quantisation, the
    scales in bytes and those scales' own scales, code and mean."""
    kind: str
    """"int8", "int4", "nf4" or "fp4"."""
    block: int
    """Values that share a scale; 0 for the integer kinds, where a row shares one."""
    num_inputs: int
    """Inputs of the linear, K."""
    bias_N: Tensor | None

    def weight(self, dtype: torch.dtype) -> Tensor:
        """``(N, K)`` as floats, without a gradient."""
        packed, scale, *nested = self.parts
        if self.kind in INTEGER_BITS:
            return dequantise(packed, scale, INTEGER_BITS[self.kind], dtype)
        packed = packed.view(torch.uint8)
        shape = 2 * packed.numel() // self.num_inputs, self.num_inputs
        if packed.is_cuda and _has_triton():
            from glmtune.ops.four_bit_kernels import dequantise_four_bits, meanings

            values_16 = meanings(self.kind, packed.device)
            return dequantise_four_bits(
                packed, scale, nested, values_16, self.block, _GROUP, shape, dtype
            )
        bitsandbytes = torch.ops.bitsandbytes
        if nested:
            group_scale, code, mean = nested
            scale = mean + bitsandbytes.dequantize_blockwise(
                scale, group_scale, code, _GROUP, torch.float32
            )
        return bitsandbytes.dequantize_4bit(
            packed, scale, self.block, self.kind, list(shape), dtype
        )

    def pieces(self, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """The weight as floats, a head in several pieces: which rows, and their weights."""
        if self.kind not in INTEGER_BITS:
            yield slice(None), self.weight(dtype)
            return
        for start in range(0, len(self.parts[0]), PIECE):
            rows = slice(start, start + PIECE)
            some = self._replace(parts=tuple(part[rows] for part in self.parts))
            yield rows, some.weight(dtype)


@torch.library.custom_op("glmtune::quantised_linear", mutates_args=())
def quantised_linear(
    x_TK: Tensor, parts: Sequence[Tensor], kind: str, block: int, bias_N: Tensor | None
) -> Tensor:
    """``x @ W^T + bias``: ``(T, N)`` in x's type; see `Quantised`. The input gets a gradient."""
    linear = Quantised(tuple(parts), kind, block, x_TK.shape[1], bias_N)
    products = [
        F.linear(x_TK, weight, None if bias_N is None else bias_N[rows])
        for rows, weight in linear.pieces(x_TK.dtype)
    ]
    return products[0] if len(products) == 1 else torch.cat(products, 1)


@torch.library.custom_op("glmtune::quantised_linear_back", mutates_args=())
def quantised_linear_back(
    grad_TN: Tensor, parts: Sequence[Tensor], kind: str, block: int, num_inputs: int
) -> Tensor:
    """``grad @ W``: ``(T, K)``, the gradient of the input."""
    linear = Quantised(tuple(parts), kind, block, num_inputs, None)
    grad_TK = grad_TN.new_empty(grad_TN.shape[0], num_inputs)
    for rows, weight in linear.pieces(grad_TN.dtype):
        # With beta 0, the previous content of the memory does not matter.
        torch.addmm(grad_TK, grad_TN[:, rows], weight, beta=1.0 if rows.start else 0.0, out=grad_TK)
    return grad_TK


@quantised_linear.register_fake
def _(x_TK, parts, kind, block, bias_N):
    packed = parts[0]
    if kind in INTEGER_BITS:
        return x_TK.new_empty(x_TK.shape[0], packed.shape[0])
    num_values = 2 * packed.numel() * packed.element_size()
    return x_TK.new_empty(x_TK.shape[0], num_values // x_TK.shape[1])


@quantised_linear_back.register_fake
def _(grad_TN, parts, kind, block, num_inputs):
    return grad_TN.new_empty(grad_TN.shape[0], num_inputs)


def _remember(ctx, inputs, output):
    x_TK, parts, ctx.kind, ctx.block, _ = inputs
    ctx.num_inputs = x_TK.shape[1]
    ctx.save_for_backward(*parts)


def _back(ctx, grad_TN):
    """The gradient of the input alone: all else is frozen."""
    parts = list(ctx.saved_tensors)
    grad_TK = quantised_linear_back(grad_TN, parts, ctx.kind, ctx.block, ctx.num_inputs)
    return grad_TK, [None] * len(parts), None, None, None


quantised_linear.register_autograd(_back, setup_context=_remember)
