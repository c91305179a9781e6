"""The inner products of adapters whose inputs are dropped out, as Triton kernels.

No dropped input is ever written, nor its mask kept: each kernel computes the mask where it reads
the input, and linears that read the same input share the reading and most of the hash. Twelve
integer instructions a number take about as long as reading it.

Shapes: T tokens, I inputs, N linears, R rank of their adapters; S shares of a sum.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from glmtune.ops.lora import padded_rank

_FORWARD = {"BLOCK_T": 32, "BLOCK_I": 64, "num_warps": 4, "num_stages": 4}
_BACKWARD = {"BLOCK_T": 32, "BLOCK_I": 64, "num_warps": 4, "num_stages": 2}
# Inputs whose share of the products one program sums up, and tokens whose share of the gradients of
# weights: many programs, since each waits much.
_SHARE_I, _SHARE_T = 1024, 256


@triton.jit
def _hash(seed, token, column, WIDTH):
    """`ops.lora.hash_int32` of each place."""
    x = ((token[:, None] * WIDTH + column[None, :]) ^ seed).to(tl.uint32, bitcast=True)
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _is_kept(hashed, factors, below, LINEAR: tl.constexpr):
    """The mask of a linear, see `ops.lora.Dropout`."""
    if factors is not None:
        hashed *= (tl.load(factors + LINEAR) | 1).to(tl.uint32, bitcast=True)
    return hashed.to(tl.int32, bitcast=True) >= below


@triton.jit
def _of_tokens(x, token, is_token, R: tl.constexpr, R_PADDED: tl.constexpr):
    """Some rows of ``(T, R)``, padded to ``(BLOCK_T, R_PADDED)``."""
    inner = tl.arange(0, R_PADDED)
    is_inner = is_token[:, None] & (inner < R)[None, :]
    return tl.load(x + token[:, None] * R + inner[None, :], is_inner, 0.0)


@triton.jit
def _of_inputs(a, column, is_column, R: tl.constexpr, R_PADDED: tl.constexpr, WIDTH: tl.constexpr):
    """Some columns of ``(R, I)``, padded to ``(R_PADDED, BLOCK_I)``."""
    inner = tl.arange(0, R_PADDED)
    is_inner = (inner < R)[:, None] & is_column[None, :]
    return tl.load(a + inner[:, None] * WIDTH + column[None, :], is_inner, 0.0)


@triton.jit
def _products(
    x, a, seed, factors, below, scale, y, T, WIDTH: tl.constexpr, N: tl.constexpr,
    R: tl.constexpr, R_PADDED: tl.constexpr, SHARE: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_I: tl.constexpr,
):  # fmt: skip
    """What a share of the inputs of some tokens adds to the products."""
    share = tl.program_id(1)
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    is_token, limit, first = token < T, tl.load(below), tl.load(seed)
    sum_0 = tl.zeros([BLOCK_T, R_PADDED], tl.float32)
    sum_1 = tl.zeros([BLOCK_T, R_PADDED], tl.float32)
    sum_2 = tl.zeros([BLOCK_T, R_PADDED], tl.float32)
    for start in range(share * SHARE, tl.minimum(share * SHARE + SHARE, WIDTH), BLOCK_I):
        column = start + tl.arange(0, BLOCK_I)
        is_column = column < WIDTH
        at = x + token[:, None] * WIDTH + column[None, :]
        x_TI = tl.load(at, is_token[:, None] & is_column[None, :], 0.0)
        hashed = _hash(first, token, column, WIDTH)
        a_RI = _of_inputs(a, column, is_column, R, R_PADDED, WIDTH)
        kept = tl.where(_is_kept(hashed, factors, limit, 0), x_TI, 0.0)
        sum_0 = tl.dot(kept, tl.trans(a_RI), sum_0, input_precision="ieee")
        if N > 1:
            a_RI = _of_inputs(a + R * WIDTH, column, is_column, R, R_PADDED, WIDTH)
            kept = tl.where(_is_kept(hashed, factors, limit, 1), x_TI, 0.0)
            sum_1 = tl.dot(kept, tl.trans(a_RI), sum_1, input_precision="ieee")
        if N > 2:
            a_RI = _of_inputs(a + 2 * R * WIDTH, column, is_column, R, R_PADDED, WIDTH)
            kept = tl.where(_is_kept(hashed, factors, limit, 2), x_TI, 0.0)
            sum_2 = tl.dot(kept, tl.trans(a_RI), sum_2, input_precision="ieee")
    inner, factor = tl.arange(0, R_PADDED), tl.load(scale)
    at = y + (share * N * T + token[:, None]) * R + inner[None, :]
    is_inner = is_token[:, None] & (inner < R)[None, :]
    tl.store(at, sum_0 * factor, is_inner)
    if N > 1:
        tl.store(at + T * R, sum_1 * factor, is_inner)
    if N > 2:
        tl.store(at + 2 * T * R, sum_2 * factor, is_inner)


@triton.jit
def _products_back(
    grad_x, grad_y, x, a, seed, factors, below, scale, to_x, to_a, T, WIDTH: tl.constexpr,
    N: tl.constexpr, R: tl.constexpr, R_PADDED: tl.constexpr, SHARE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """Gradients of some inputs of a share of the tokens, and that share's of the weights."""
    column, share = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I), tl.program_id(1)
    is_column, factor = column < WIDTH, tl.load(scale)
    limit, first = tl.load(below), tl.load(seed)
    a_0 = _of_inputs(a, column, is_column, R, R_PADDED, WIDTH)
    sum_0 = tl.zeros([R_PADDED, BLOCK_I], tl.float32)
    a_1, a_2 = a_0, a_0
    sum_1 = tl.zeros([R_PADDED, BLOCK_I], tl.float32)
    sum_2 = tl.zeros([R_PADDED, BLOCK_I], tl.float32)
    if N > 1:
        a_1 = _of_inputs(a + R * WIDTH, column, is_column, R, R_PADDED, WIDTH)
    if N > 2:
        a_2 = _of_inputs(a + 2 * R * WIDTH, column, is_column, R, R_PADDED, WIDTH)
    for start in range(share * SHARE, tl.minimum(share * SHARE + SHARE, T), BLOCK_T):
        token = start + tl.arange(0, BLOCK_T)
        is_token = token < T
        at, inside = (
            token[:, None] * WIDTH + column[None, :],
            is_token[:, None] & is_column[None, :],
        )
        x_TI = tl.load(x + at, inside, 0.0)
        hashed = _hash(first, token, column, WIDTH)
        keeps = _is_kept(hashed, factors, limit, 0)
        g_TR = _of_tokens(grad_y, token, is_token, R, R_PADDED)
        total = tl.where(keeps, tl.dot(g_TR, a_0, input_precision="ieee"), 0.0)
        kept = tl.where(keeps, x_TI, 0.0)
        sum_0 = tl.dot(tl.trans(g_TR), kept, sum_0, input_precision="ieee")
        if N > 1:
            keeps = _is_kept(hashed, factors, limit, 1)
            g_TR = _of_tokens(grad_y + T * R, token, is_token, R, R_PADDED)
            total += tl.where(keeps, tl.dot(g_TR, a_1, input_precision="ieee"), 0.0)
            kept = tl.where(keeps, x_TI, 0.0)
            sum_1 = tl.dot(tl.trans(g_TR), kept, sum_1, input_precision="ieee")
        if N > 2:
            keeps = _is_kept(hashed, factors, limit, 2)
            g_TR = _of_tokens(grad_y + 2 * T * R, token, is_token, R, R_PADDED)
            total += tl.where(keeps, tl.dot(g_TR, a_2, input_precision="ieee"), 0.0)
            kept = tl.where(keeps, x_TI, 0.0)
            sum_2 = tl.dot(tl.trans(g_TR), kept, sum_2, input_precision="ieee")
        total = total * factor + tl.load(grad_x + at, inside, 0.0).to(tl.float32)
        tl.store(to_x + at, total.to(to_x.dtype.element_ty), inside)
    inner = tl.arange(0, R_PADDED)
    at = to_a + ((share * N * R) + inner[:, None]) * WIDTH + column[None, :]
    is_inner = (inner < R)[:, None] & is_column[None, :]
    tl.store(at, sum_0 * factor, is_inner)
    if N > 1:
        tl.store(at + R * WIDTH, sum_1 * factor, is_inner)
    if N > 2:
        tl.store(at + 2 * R * WIDTH, sum_2 * factor, is_inner)


@torch.library.custom_op("glmtune::dropped_products", mutates_args=())
def dropped_products(
    x_TI: Tensor,
    a_NRI: Tensor,
    seed: Tensor,
    factors_N: Tensor | None,
    below: Tensor,
    scale: Tensor,
) -> Tensor:
    """``dropout_n(x) @ a_n^T`` for each of N linears, yet to be summed: float32 ``(S, N, T, R)``.

    Args:
        x_TI: contiguous, as all others.
        a_NRI: in the type of x.
        seed: see `ops.lora.Dropout`.
        factors_N: see `ops.lora.Dropout`; None for none.
        below: see `ops.lora.Dropout`.
        scale: see `ops.lora.Dropout`.
    """
    (num_tokens, width), (num_linears, rank, _) = x_TI.shape, a_NRI.shape
    assert x_TI.is_contiguous()
    assert a_NRI.is_contiguous()
    assert num_linears <= 3
    assert x_TI.numel() < 2**31  # offsets are 32-bit numbers
    shares = triton.cdiv(width, _SHARE_I)
    y_SNTR = x_TI.new_empty(shares, num_linears, num_tokens, rank, dtype=torch.float32)
    _products[(triton.cdiv(num_tokens, _FORWARD["BLOCK_T"]), shares)](
        x_TI, a_NRI, seed, factors_N, below, scale, y_SNTR, num_tokens, width, num_linears, rank,
        padded_rank(rank), _SHARE_I, **_how(_FORWARD, x_TI, rank),
    )  # fmt: skip
    return y_SNTR


@torch.library.custom_op("glmtune::dropped_products_back", mutates_args=())
def dropped_products_back(
    grad_TI: Tensor,
    grad_NTR: Tensor,
    x_TI: Tensor,
    a_NRI: Tensor,
    seed: Tensor,
    factors_N: Tensor | None,
    below: Tensor,
    scale: Tensor,
) -> tuple[Tensor, Tensor]:
    """The gradient of x, added to another that it has, and of a, which is yet to be summed.

    Returns:
        ``(T, I)`` in the type of x, and float32 ``(S, N, R, I)``.
    """
    (num_tokens, width), (num_linears, rank, _) = x_TI.shape, a_NRI.shape
    assert all(x.is_contiguous() for x in (grad_TI, grad_NTR, x_TI, a_NRI))
    to_x = torch.empty_like(x_TI)
    shares = triton.cdiv(num_tokens, _SHARE_T)
    to_a = x_TI.new_empty(shares, num_linears, rank, width, dtype=torch.float32)
    _products_back[(triton.cdiv(width, _BACKWARD["BLOCK_I"]), shares)](
        grad_TI, grad_NTR, x_TI, a_NRI, seed, factors_N, below, scale, to_x, to_a, num_tokens,
        width, num_linears, rank, padded_rank(rank), _SHARE_T, **_how(_BACKWARD, x_TI, rank),
    )  # fmt: skip
    return to_x, to_a


def _how(sizes: dict[str, int], x_TI: Tensor, rank: int) -> dict[str, int]:
    """Blocks and stages: smaller with large ranks or in float32, for want of shared memory."""
    if x_TI.element_size() == 4:
        return sizes | {"BLOCK_I": 64, "num_stages": 1}
    return sizes if padded_rank(rank) == 16 else sizes | {"BLOCK_I": 64, "num_stages": 2}


@dropped_products.register_fake
def _(x_TI, a_NRI, seed, factors_N, below, scale):
    num_linears, rank, width = a_NRI.shape
    shares = (width + _SHARE_I - 1) // _SHARE_I
    return x_TI.new_empty(shares, num_linears, x_TI.shape[0], rank, dtype=torch.float32)


@dropped_products_back.register_fake
def _(grad_TI, grad_NTR, x_TI, a_NRI, seed, factors_N, below, scale):
    shares = (x_TI.shape[0] + _SHARE_T - 1) // _SHARE_T
    return torch.empty_like(x_TI), x_TI.new_empty(shares, *a_NRI.shape, dtype=torch.float32)


class _Fork(torch.autograd.Function):
    """An input as it is, and its inner products: one kernel adds up what comes back from both."""

    @staticmethod
    def forward(ctx, x_TI, a_NRI, seed, factors_N, below, scale):
        ctx.save_for_backward(x_TI, a_NRI, seed, factors_N, below, scale)
        y_SNTR = dropped_products(x_TI, a_NRI, seed, factors_N, below, scale)
        return x_TI.view_as(x_TI), y_SNTR.sum(0).to(x_TI.dtype)

    @staticmethod
    def backward(ctx, grad_TI, grad_NTR):
        to_x, to_a = dropped_products_back(
            grad_TI.contiguous(), grad_NTR.contiguous(), *ctx.saved_tensors
        )
        return to_x, to_a.sum(0).to(to_x.dtype), *(None,) * 4


def fork(
    x_TI: Tensor,
    a: Sequence[Tensor],
    seed: Tensor,
    factors: Sequence[Tensor],
    below: Tensor,
    scale: Tensor,
) -> tuple[Tensor, Sequence[Tensor]]:
    """An input for other use, and its products with the first factors of some adapters.

    Args:
        x_TI: the input.
        a: ``(R, I)`` of each adapter, of one rank; at most three.
        seed: see `ops.lora.Dropout`, as the rest.
        factors: one for each adapter, or none at all.
        below: a scalar.
        scale: a scalar.

    Returns:
        The input, and ``(T, R)`` for each adapter.
    """
    x_TI = x_TI.contiguous()
    a_NRI = torch.stack([a_RI.to(x_TI.dtype) for a_RI in a])
    factors_N = torch.stack(list(factors)) if factors else None
    same_TI, y_NTR = _Fork.apply(x_TI, a_NRI, seed, factors_N, below, scale)
    return same_TI, y_NTR.unbind(0)
