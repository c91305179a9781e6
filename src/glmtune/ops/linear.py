"""Frozen linears in more than one number format, behind one function.

Their weights get no gradient, so a backward pass is one product: the gradient of the input.

Shapes: T tokens, K inputs, N outputs.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from glmtune.ops.quantised import Quantised, quantised_linear

FP8 = torch.float8_e4m3fn
FP8_MAX = torch.finfo(FP8).max


class Dense(NamedTuple):
    """A linear as it is, in the compute type."""

    weight_NK: Tensor
    bias_N: Tensor | None


class Fp8(NamedTuple):
    """A linear in eight bits, quantised once in both layouts that training wants.

    ``weight[n, k] ~ by_row_NK[n, k] * row_scale_N[n]`` for ``x @ W^T``, and
    ``weight[n, k] ~ by_column_KN[k, n] * column_scale_K[k]`` for ``dy @ W``: in both
    products, all terms of a sum share one scale.
    """

    by_row_NK: Tensor
    row_scale_N: Tensor
    by_column_KN: Tensor
    column_scale_K: Tensor
    bias_N: Tensor | None


Frozen = Dense | Fp8 | Quantised


def quantise_rows(x_MK: Tensor) -> tuple[Tensor, Tensor]:
    """Round each row to float8 (e4m3) after scaling its largest magnitude to the format's own.

    Returns:
        The numbers ``(M, K)`` and their float32 scales ``(M, 1)``; ``numbers * scales ~ x``.
    """
    largest_M1 = x_MK.abs().amax(1, keepdim=True).float()
    scale_M1 = (largest_M1 / FP8_MAX).clamp(min=1e-12)
    return (x_MK.float() / scale_M1).to(FP8), scale_M1


def quantise(weight_NK: Tensor, bias_N: Tensor | None) -> Fp8:
    """A frozen linear in float8, in both layouts."""
    by_row, row_scale = quantise_rows(weight_NK)
    by_column, column_scale = quantise_rows(weight_NK.T.contiguous())
    return Fp8(by_row, row_scale[:, 0], by_column, column_scale[:, 0], bias_N)


def scaled_product(
    x_TK: Tensor, weight_NK: Tensor, scale_N: Tensor, bias_N: Tensor | None = None
) -> Tensor:
    """``x @ (weight * scale)^T + bias``, x rounded to float8 row by row: ``(T, N)`` in x's type.

    One float8 product on Hopper and newer GPUs, the same in float32 steps elsewhere.
    """
    x8_TK, x_scale_T1 = quantise_rows(x_TK)
    if x_TK.is_cuda:
        return torch._scaled_mm(
            x8_TK, weight_NK.T, x_scale_T1, scale_N[None], bias_N,
            out_dtype=x_TK.dtype, use_fast_accum=True,
        )  # fmt: skip
    y_TN = (x8_TK.float() @ weight_NK.float().T * x_scale_T1 * scale_N).to(x_TK.dtype)
    return y_TN if bias_N is None else y_TN + bias_N


class _Fp8Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TK, by_row_NK, row_scale_N, by_column_KN, column_scale_K, bias_N):
        ctx.save_for_backward(by_column_KN, column_scale_K)
        return scaled_product(x_TK, by_row_NK, row_scale_N, bias_N)

    @staticmethod
    def backward(ctx, grad_TN):
        return scaled_product(grad_TN, *ctx.saved_tensors), *(None,) * 5


def frozen_linear(x_TK: Tensor, linear: Frozen) -> Tensor:
    """``x @ W^T + bias``: ``(T, N)`` in x's type."""
    if isinstance(linear, Dense):
        return F.linear(x_TK, linear.weight_NK, linear.bias_N)
    if isinstance(linear, Quantised):
        parts, kind, block, _, bias_N = linear
        return quantised_linear(x_TK, list(parts), kind, block, bias_N)
    return _Fp8Linear.apply(x_TK, *linear)


def joined(parts: Sequence[Tensor], dim: int) -> Tensor | None:
    """The tensor whose neighbouring views along a dimension these are; None if they are not."""
    first, size = parts[0], 0
    for part in parts:
        after = first.storage_offset() + size * first.stride(dim)
        same = part.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not same or part.stride() != first.stride() or part.storage_offset() != after:
            return None
        size += part.shape[dim]
    shape = [*first.shape]
    shape[dim] = size
    return first.detach().as_strided(shape, first.stride(), first.storage_offset())


class Fp8Linear(nn.Module):
    """Replaces an `nn.Linear`: the same linear in float8."""

    def __init__(self, linear: nn.Linear, eight: Fp8 | None = None):
        """Quantise a linear, or take what its weight was quantised to."""
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        eight = eight or quantise(linear.weight.data, None)
        for name, tensor in zip(Fp8._fields[:-1], eight[:-1], strict=True):
            self.register_buffer(name, tensor, persistent=False)
        self.bias = linear.bias

    @property
    def frozen(self) -> Fp8:
        """The quantised weight, as `frozen_linear` takes it."""
        return Fp8._make([*(getattr(self, name) for name in Fp8._fields[:-1]), self.bias])

    def forward(self, x: Tensor) -> Tensor:
        """``(..., K)`` to ``(..., N)``."""
        return frozen_linear(x.reshape(-1, x.shape[-1]), self.frozen).unflatten(0, x.shape[:-1])

    @classmethod
    def together(cls, linears: Sequence[nn.Linear]) -> list["Fp8Linear"]:
        """Quantise linears of one input as one, whose parts each of them is."""
        sizes = [linear.out_features for linear in linears]
        eight = quantise(torch.cat([linear.weight.data for linear in linears]), None)
        parts = zip(
            linears,
            eight.by_row_NK.split(sizes),
            eight.row_scale_N.split(sizes),
            eight.by_column_KN.split(sizes, 1),
            strict=True,
        )
        return [
            cls(linear, Fp8(rows, scales, columns, eight.column_scale_K, None))
            for linear, rows, scales, columns in parts
        ]


def lay_together(linears: Sequence[nn.Linear]) -> Dense:
    """Linears of one input as one, of whose weight and bias theirs become views."""
    whole: list[Tensor | None] = []
    for name in ("weight", "bias"):
        parts = [getattr(linear, name) for linear in linears]
        if all(part is None for part in parts):
            whole.append(None)
            continue
        tensor = joined(parts, 0)
        if tensor is None:
            tensor = torch.cat([part.detach() for part in parts])
            for part, view in zip(parts, tensor.split([len(part) for part in parts]), strict=True):
                part.data = view
        whole.append(tensor)
    weight_NK, bias_N = whole
    assert weight_NK is not None
    return Dense(weight_NK, bias_N)


def products(x_TK: Tensor, linears: Sequence[Frozen]) -> Tensor:
    """`frozen_linear` of several linears of one input, their outputs side by side."""
    outputs = [frozen_linear(x_TK, linear) for linear in linears]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)
