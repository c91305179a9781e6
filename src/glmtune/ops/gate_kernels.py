"""The gate of an MLP as Triton kernels, which also add an adapter's update to what it reads.

``silu(y + a @ b^T)`` of the first half of the columns times the second half. The gradient of both
halves is written in one reading. What the compiler makes of its own derivation reads all of it
twice. An update that is added here is never written: it would be as large as the widest
activation of the model.

Shapes: T tokens, I outputs, R rank of an adapter.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from glmtune.ops.dropped_kernels import dropped_products, dropped_products_back
from glmtune.ops.lora import padded_rank

_BLOCKS = {"BLOCK_T": 32, "BLOCK_I": 64, "num_warps": 4}


@triton.jit
def _updated(y, low_TR, up, place, inside, column, is_column, R: tl.constexpr,
             R_PADDED: tl.constexpr):  # fmt: skip
    """``y + a @ b^T`` for some tokens and columns, in float32."""
    value = tl.load(y + place, inside, 0.0).to(tl.float32)
    if R > 0:
        inner = tl.arange(0, R_PADDED)
        is_inner = is_column[:, None] & (inner < R)[None, :]
        up_IR = tl.load(up + column[:, None] * R + inner[None, :], is_inner, 0.0)
        value = tl.dot(low_TR, tl.trans(up_IR), value, input_precision="ieee")
    return value


@triton.jit
def _places(low, T, WIDTH: tl.constexpr, R: tl.constexpr, R_PADDED: tl.constexpr,
            BLOCK_T: tl.constexpr, BLOCK_I: tl.constexpr):  # fmt: skip
    token = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    column = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)
    is_token, is_column = token < T, column < WIDTH
    inside = is_token[:, None] & is_column[None, :]
    low_TR = 0.0
    if R > 0:
        inner = tl.arange(0, R_PADDED)
        is_inner = is_token[:, None] & (inner < R)[None, :]
        low_TR = tl.load(low + token[:, None] * R + inner[None, :], is_inner, 0.0)
    return token, column, is_column, inside, low_TR


@triton.jit
def _gate(
    y, low, up, z, T, WIDTH: tl.constexpr, R: tl.constexpr, R_PADDED: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    token, column, is_column, inside, low_TR = _places(low, T, WIDTH, R, R_PADDED, BLOCK_T, BLOCK_I)
    at = token[:, None] * (2 * WIDTH) + column[None, :]
    gate = _updated(y, low_TR, up, at, inside, column, is_column, R, R_PADDED)
    value = _updated(y, low_TR, up, at + WIDTH, inside, column + WIDTH, is_column, R, R_PADDED)
    at = z + token[:, None] * WIDTH + column[None, :]
    tl.store(at, (gate * tl.sigmoid(gate) * value).to(z.dtype.element_ty), inside)


@triton.jit
def _gate_back(
    grad_z, y, low, up, grad_y, T, WIDTH: tl.constexpr, R: tl.constexpr, R_PADDED: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    token, column, is_column, inside, low_TR = _places(low, T, WIDTH, R, R_PADDED, BLOCK_T, BLOCK_I)
    at = token[:, None] * (2 * WIDTH) + column[None, :]
    gate = _updated(y, low_TR, up, at, inside, column, is_column, R, R_PADDED)
    value = _updated(y, low_TR, up, at + WIDTH, inside, column + WIDTH, is_column, R, R_PADDED)
    g = tl.load(grad_z + token[:, None] * WIDTH + column[None, :], inside, 0.0).to(tl.float32)
    share = tl.sigmoid(gate)
    to_gate = g * value * share * (1.0 + gate * (1.0 - share))
    tl.store(grad_y + at, to_gate.to(grad_y.dtype.element_ty), inside)
    tl.store(grad_y + at + WIDTH, (g * gate * share).to(grad_y.dtype.element_ty), inside)


@torch.library.custom_op("glmtune::gate", mutates_args=())
def gate(
    y_TI2: Tensor, low_TR: Tensor | None, up_I2R: Tensor | None, again: bool = False
) -> Tensor:
    """``silu(first half) * second half`` of ``y + low @ up^T``: ``(T, I)`` in the type of y.

    Args:
        y_TI2: ``(T, 2 I)``, contiguous, as all others.
        low_TR: in the type of y; None without an adapter.
        up_I2R: ``(2 I, R)``, in the type of y; None without an adapter.
        again: whether it is computed again in a backward pass. Nothing depends on it: the compiler
            would keep the result of an equal call for so long.
    """
    num_tokens, width = y_TI2.shape
    z_TI = y_TI2.new_empty(num_tokens, width // 2)
    _gate[_grid(num_tokens, width // 2)](
        y_TI2, low_TR, up_I2R, z_TI, num_tokens, width // 2, *_ranks(y_TI2, low_TR, up_I2R),
        **_BLOCKS,
    )  # fmt: skip
    return z_TI


@torch.library.custom_op("glmtune::gate_back", mutates_args=())
def gate_back(
    grad_TI: Tensor, y_TI2: Tensor, low_TR: Tensor | None, up_I2R: Tensor | None
) -> Tensor:
    """The gradient of `gate` for the sum that it reads, ``(T, 2 I)``."""
    num_tokens, width = y_TI2.shape
    assert grad_TI.is_contiguous()
    grad_TI2 = torch.empty_like(y_TI2)
    _gate_back[_grid(num_tokens, width // 2)](
        grad_TI, y_TI2, low_TR, up_I2R, grad_TI2, num_tokens, width // 2,
        *_ranks(y_TI2, low_TR, up_I2R), **_BLOCKS,
    )  # fmt: skip
    return grad_TI2


def _grid(num_tokens: int, width: int) -> tuple[int, int]:
    return triton.cdiv(width, _BLOCKS["BLOCK_I"]), triton.cdiv(num_tokens, _BLOCKS["BLOCK_T"])


def _ranks(y_TI2: Tensor, low_TR: Tensor | None, up_I2R: Tensor | None) -> tuple[int, int]:
    assert y_TI2.is_contiguous()
    assert y_TI2.numel() < 2**31  # offsets are 32-bit numbers
    if low_TR is None or up_I2R is None:
        return 0, 16
    assert low_TR.is_contiguous()
    assert up_I2R.is_contiguous()
    rank = low_TR.shape[1]
    return rank, padded_rank(rank)


@gate.register_fake
def _(y_TI2, low_TR, up_I2R, again=False):
    return y_TI2.new_empty(y_TI2.shape[0], y_TI2.shape[1] // 2)


@gate_back.register_fake
def _(grad_TI, y_TI2, low_TR, up_I2R):
    return torch.empty_like(y_TI2)


class Gate(torch.autograd.Function):
    """The gate without an update: the compiler fuses its forward pass with what follows."""

    @staticmethod
    def forward(ctx, y_TI2):
        """``(T, 2 I)`` to ``(T, I)``."""
        ctx.save_for_backward(y_TI2)
        first, second = y_TI2.chunk(2, -1)
        return F.silu(first) * second

    @staticmethod
    def backward(ctx, grad_TI):
        """The gradient of both halves."""
        (y_TI2,) = ctx.saved_tensors
        return gate_back(grad_TI.contiguous(), y_TI2, None, None)


class UpdatedGate(torch.autograd.Function):
    """The gate of a sum of a linear's output and an adapter's update."""

    @staticmethod
    def forward(ctx, y_TI2, low_TR, up_I2R):
        """See `gate`."""
        ctx.save_for_backward(y_TI2, low_TR, up_I2R)
        return gate(y_TI2, low_TR, up_I2R)

    @staticmethod
    def backward(ctx, grad_TI):
        """The gradients of the linear's output and of the update's factors."""
        y_TI2, low_TR, up_I2R = ctx.saved_tensors
        grad_TI2 = gate_back(grad_TI.contiguous(), y_TI2, low_TR, up_I2R)
        return grad_TI2, grad_TI2 @ up_I2R, grad_TI2.T @ low_TR


class GateFork(torch.autograd.Function):
    """The gate, and the inner products of the next linear's adapter: see `dropped_kernels.fork`.

    What the gate gives is computed again in the backward pass: kept, it would be the second widest
    activation of a layer.
    """

    @staticmethod
    def forward(ctx, y_TI2, low_TR, up_I2R, a_1RI, seed, below, scale):
        """``(T, I)`` and ``(T, R)``."""
        ctx.save_for_backward(y_TI2, low_TR, up_I2R, a_1RI, seed, below, scale)
        z_TI = gate(y_TI2, low_TR, up_I2R)
        sums_S1TR = dropped_products(z_TI, a_1RI, seed, None, below, scale)
        return z_TI, sums_S1TR.sum(0)[0].to(z_TI.dtype)

    @staticmethod
    def backward(ctx, grad_TI, grad_TR):
        """The gradients of the linear's output, the update's factors and the next adapter."""
        y_TI2, low_TR, up_I2R, a_1RI, seed, below, scale = ctx.saved_tensors
        z_TI = gate(y_TI2, low_TR, up_I2R, again=True)
        grad_TI, to_a = dropped_products_back(
            grad_TI.contiguous(), grad_TR[None].contiguous(), z_TI, a_1RI, seed, None, below, scale
        )
        grad_TI2 = gate_back(grad_TI, y_TI2, low_TR, up_I2R)
        of_update = (None, None) if low_TR is None else (grad_TI2 @ up_I2R, grad_TI2.T @ low_TR)
        return grad_TI2, *of_update, to_a.sum(0).to(a_1RI.dtype), None, None, None
