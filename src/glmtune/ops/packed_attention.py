"""Attention of packed rows on a GPU, as operators that autograd and the compiler know.

What they compute is `ops.attention.PaddedRows`'s; the kernels are in `ops.attention_kernels`.

Shapes: T tokens, N heads of queries, G heads of keys and values, X all of them, D head size, R rank
of an adapter.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from glmtune.ops.attention import Update
from glmtune.ops.attention_kernels import Factors, Parts, run_backward, run_forward


@torch.library.custom_op("glmtune::fused_attention", mutates_args=())
def fused_attention(
    y_TN3D: Tensor,
    a_TR: Tensor | None,
    b_NR: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    start_T: Tensor,
    prefix_end_T: Tensor,
    end_T: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of packed rows, from the outputs of a fused projection and its adapter.

    One tensor goes in and one gradient comes out: gradients of three views would be three tensors
    of the full size.

    Args:
        y_TN3D: queries, keys and values of each head side by side, not rotated, without the
            adapter's update.
        a_TR: the adapter's update is ``a @ b^T``; None without an adapter.
        b_NR: ``(3 N D, R)``.
        cos: float32 ``(T, 2, D / 4)``, both position streams; contiguous, as `sin`.
        sin: of the same shape.
        start_T: int32 place of the first token of each token's row.
        prefix_end_T: int32 place of the first answer token of each token's row.
        end_T: int32 place after the last token of each token's row.

    Returns:
        ``(T, N, D)`` in the type of `y_TN3D`; and, for the backward pass, rotated queries and keys,
        the values, and the base-2 logarithm of each query's softmax sum, float32 ``(N, T)``.
    """
    assert y_TN3D.is_contiguous()
    turned = torch.empty_like(y_TN3D)
    # Views of b, as of y: a row of b is a column of y.
    b: Factors = [None] * 3 if b_NR is None else _thirds(b_NR, y_TN3D.shape[2] // 3)
    out_TND, lse_NT = run_forward(
        Parts.of_fused(y_TN3D), Parts.of_fused(turned), [a_TR] * 3, b, cos, sin, start_T,
        prefix_end_T,
    )  # fmt: skip
    return out_TND, turned, lse_NT


def _thirds(b_NR: Tensor, head_dim: int) -> Factors:
    return [b_NR[first:] for first in (0, head_dim, 2 * head_dim)]


@torch.library.custom_op("glmtune::fused_attention_backward", mutates_args=())
def fused_attention_backward(
    grad_TND: Tensor,
    out_TND: Tensor,
    turned_TN3D: Tensor,
    lse_NT: Tensor,
    cos: Tensor,
    sin: Tensor,
    start_T: Tensor,
    prefix_end_T: Tensor,
    end_T: Tensor,
) -> Tensor:
    """The gradient of `fused_attention` for its first argument, of the same shape."""
    grad = torch.empty_like(turned_TN3D)
    run_backward(
        Parts.of_fused(grad), Parts.of_fused(turned_TN3D), grad_TND, out_TND, lse_NT, cos, sin,
        start_T, prefix_end_T, end_T,
    )  # fmt: skip
    return grad


@fused_attention.register_fake
def _(y_TN3D, a_TR, b_NR, cos, sin, start_T, prefix_end_T, end_T):
    num_tokens, num_heads, width = y_TN3D.shape
    out_TND = y_TN3D.new_empty(num_tokens, num_heads, width // 3)
    return out_TND, torch.empty_like(y_TN3D), cos.new_empty(num_heads, num_tokens)


@fused_attention_backward.register_fake
def _(grad_TND, out_TND, turned_TN3D, lse_NT, cos, sin, start_T, prefix_end_T, end_T):
    return torch.empty_like(turned_TN3D)


def _keep_fused(ctx, inputs, output):
    ctx.save_for_backward(*output, *inputs[1:])


def _backward_fused(ctx, grad_TND, *_):
    *kept, a_TR, b_NR, cos, sin, start_T, prefix_end_T, end_T = ctx.saved_tensors
    grad = fused_attention_backward(grad_TND, *kept, cos, sin, start_T, prefix_end_T, end_T)
    if a_TR is None:
        return grad, *(None,) * 7
    flat = grad.flatten(1)
    return grad, flat @ b_NR, flat.T @ a_TR, *(None,) * 5


fused_attention.register_autograd(_backward_fused, setup_context=_keep_fused)


@torch.library.custom_op("glmtune::stacked_attention", mutates_args=())
def stacked_attention(
    y_TXD: Tensor,
    num_kv_heads: int,
    a_q: Tensor | None,
    b_q: Tensor | None,
    a_k: Tensor | None,
    b_k: Tensor | None,
    a_v: Tensor | None,
    b_v: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    start_T: Tensor,
    prefix_end_T: Tensor,
    end_T: Tensor,
    interleaved: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`fused_attention` of heads that lie one after another, fewer of keys and values.

    Args:
        y_TXD: N heads of queries, G of keys, G of values, contiguous; N / G heads of queries share
            a head of keys.
        num_kv_heads: G.
        a_q: ``(T, R)``: the queries' update is ``a_q @ b_q^T``; None without an adapter.
        b_q: ``(N D, R)``.
        a_k: the same for the keys.
        b_k: ``(G D, R)``.
        a_v: the same for the values.
        b_v: ``(G D, R)``.
        cos: see `fused_attention`.
        sin: see `fused_attention`.
        start_T: see `fused_attention`.
        prefix_end_T: see `fused_attention`.
        end_T: see `fused_attention`.
        interleaved: see `ops.rotary.rotate`.

    Returns:
        ``(T, N, D)``; the heads as `run_forward` rotates them, with their updates; the logarithms.
    """
    assert y_TXD.is_contiguous()
    turned = torch.empty_like(y_TXD)
    out_TND, lse_NT = run_forward(
        Parts.of_stacked(y_TXD, num_kv_heads), Parts.of_stacked(turned, num_kv_heads),
        [a_q, a_k, a_v], [b_q, b_k, b_v], cos, sin, start_T, prefix_end_T, interleaved,
    )  # fmt: skip
    return out_TND, turned, lse_NT


@torch.library.custom_op("glmtune::stacked_attention_backward", mutates_args=())
def stacked_attention_backward(
    grad_TND: Tensor,
    out_TND: Tensor,
    turned_TXD: Tensor,
    lse_NT: Tensor,
    num_kv_heads: int,
    cos: Tensor,
    sin: Tensor,
    start_T: Tensor,
    prefix_end_T: Tensor,
    end_T: Tensor,
    interleaved: bool,
) -> Tensor:
    """The gradient of `stacked_attention` for its first argument, of the same shape."""
    grad = torch.empty_like(turned_TXD)
    run_backward(
        Parts.of_stacked(grad, num_kv_heads), Parts.of_stacked(turned_TXD, num_kv_heads), grad_TND,
        out_TND, lse_NT, cos, sin, start_T, prefix_end_T, end_T, interleaved,
    )  # fmt: skip
    return grad


@stacked_attention.register_fake
def _(y_TXD, num_kv_heads, a_q, b_q, a_k, b_k, a_v, b_v, cos, sin, start_T, prefix_end_T, end_T,
      interleaved):  # fmt: skip
    num_tokens, num_all, head_dim = y_TXD.shape
    num_heads = num_all - 2 * num_kv_heads
    out_TND = y_TXD.new_empty(num_tokens, num_heads, head_dim)
    return out_TND, torch.empty_like(y_TXD), cos.new_empty(num_heads, num_tokens)


@stacked_attention_backward.register_fake
def _(grad_TND, out_TND, turned_TXD, lse_NT, num_kv_heads, cos, sin, start_T, prefix_end_T, end_T,
      interleaved):  # fmt: skip
    return torch.empty_like(turned_TXD)


def _keep_stacked(ctx, inputs, output):
    _, ctx.num_kv_heads, *others, ctx.interleaved = inputs
    ctx.save_for_backward(*output, *others)


def _backward_stacked(ctx, grad_TND, *_):
    kept, factors, others = ctx.saved_tensors[:3], ctx.saved_tensors[3:9], ctx.saved_tensors[9:]
    num_kv_heads = ctx.num_kv_heads
    grad = stacked_attention_backward(grad_TND, *kept, num_kv_heads, *others, ctx.interleaved)
    of_factors: list[Tensor | None] = []
    parts = Parts.of_stacked(grad, num_kv_heads)
    for part, a_TR, b_NR in zip(parts, factors[::2], factors[1::2], strict=True):
        flat = part.flatten(1)
        of_factors += [None, None] if a_TR is None else [flat @ b_NR, flat.T @ a_TR]
    return grad, None, *of_factors, *(None,) * 6


stacked_attention.register_autograd(_backward_stacked, setup_context=_keep_stacked)


class RowSpans(NamedTuple):
    """Where the rows of a pack begin and end, for each of its tokens: int32 places ``(T,)``."""

    start_T: Tensor
    prefix_end_T: Tensor
    end_T: Tensor

    @classmethod
    def of(cls, start_T: Tensor, prefix_end_T: Tensor, end_T: Tensor) -> "RowSpans":
        """Take the places as a pack has them."""
        return cls(start_T, prefix_end_T, end_T)

    def attend_fused(self, y_TN3D: Tensor, update: Update, cos: Tensor, sin: Tensor) -> Tensor:
        """Compute what `ops.attention.PaddedRows.attend_fused` computes."""
        a_TR, b_NR = update or (None, None)
        return fused_attention(y_TN3D, a_TR, b_NR, cos, sin, *self)[0]

    def attend(
        self,
        heads_TXD: Tensor,
        num_kv_heads: int,
        updates: Sequence[Update],
        cos: Tensor,
        sin: Tensor,
        interleaved: bool = False,
    ) -> Tensor:
        """Compute what `ops.attention.PaddedRows.attend` computes."""
        factors = [factor for update in updates for factor in update or (None, None)]
        return stacked_attention(heads_TXD, num_kv_heads, *factors, cos, sin, *self, interleaved)[0]
