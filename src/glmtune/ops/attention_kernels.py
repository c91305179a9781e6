"""The packed attention of `ops.attention` as Triton kernels, rotary positions and adapter included.

One kernel adds the adapter's update to the fused projection's output and turns queries and keys;
the attention then meets only the keys of the rows at hand, at whatever place those begin: rows of
some sixty tokens leave little to blocks that are aligned. The way back turns the gradients back
while they are written. The method is that of FlashAttention-2 (Dao, 2023, arXiv 2307.08691),
algorithms 1 and 2.

Shapes: T tokens, N heads, D head size, Q = D / 4 columns of a quarter of a head, R rank of the
adapter; in the kernels M queries and K keys of a block.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = 1.4426950408889634


@triton.jit
def _store_turned(x, stride, place, is_real, cos, sin, value, BACK: tl.constexpr,
                  BLOCK: tl.constexpr, Q: tl.constexpr):  # fmt: skip
    """Turn each half of queries or keys by its own stream, or their gradients back; write them."""
    # ``(BLOCK, 4 Q)`` as two tensors ``(BLOCK, 2, Q)``: first and second quarter of each half.
    quarters = tl.permute(tl.reshape(value, (BLOCK, 2, 2, Q)), (0, 1, 3, 2))
    first, second = tl.split(quarters)
    half, column = tl.arange(0, 2), tl.arange(0, Q)
    mask = is_real[:, None, None]
    angle = place[:, None, None] * (2 * Q) + half[None, :, None] * Q + column[None, None, :]
    c, s = tl.load(cos + angle, mask, 0.0), tl.load(sin + angle, mask, 0.0)
    if BACK:
        s = -s
    at = place[:, None, None] * stride + half[None, :, None] * (2 * Q) + column[None, None, :]
    kind = x.dtype.element_ty
    tl.store(x + at, (first * c - second * s).to(kind), mask)
    tl.store(x + at + Q, (second * c + first * s).to(kind), mask)


@triton.jit
def _turn(
    y, a, b, cos, sin, qkv, T, R,
    N: tl.constexpr, D: tl.constexpr, R_PADDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``turn(y + a @ b^T)`` for one third of a head: query, key or value, which is not turned."""
    third = tl.program_id(0)
    Q: tl.constexpr = D // 4
    stride: tl.constexpr = 3 * N * D
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_real = place < T
    column = third * D + tl.arange(0, D)
    at = place[:, None] * stride + column[None, :]
    x = tl.load(y + at, is_real[:, None], 0.0).to(tl.float32)
    if R_PADDED > 0:
        inner = tl.arange(0, R_PADDED)
        is_inner = (inner < R)[None, :]
        at_a = place[:, None] * R + inner[None, :]
        a_MR = tl.load(a + at_a, is_real[:, None] & is_inner, 0.0)
        b_DR = tl.load(b + column[:, None] * R + inner[None, :], is_inner, 0.0)
        x = tl.dot(a_MR, tl.trans(b_DR), x, input_precision="ieee")
    if third % 3 == 2:
        tl.store(qkv + at, x.to(qkv.dtype.element_ty), is_real[:, None])
    else:
        _store_turned(qkv + third * D, stride, place, is_real, cos, sin, x, False, BLOCK, Q)


@triton.jit
def _seen(query, first_q, prefix_q, key, first_k):
    """The rule of `ops.attention.dense_mask`; the arguments broadcast."""
    return (first_k == first_q) & ((key <= query) | (key < prefix_q))


@triton.jit
def _stretch(start, prefix_end, query, is_query, T):
    """First token and prefix end of each query's row, and the stretch of keys that all see."""
    first = tl.load(start + query, is_query, T)
    prefix = tl.load(prefix_end + query, is_query, 0)
    low = tl.min(first, 0)
    high = tl.minimum(tl.max(tl.maximum(prefix, query + 1), 0), T)
    return first, prefix, low, high


@triton.jit
def _meet(x, stride, q, query, first, prefix, start, key, is_key, scale_log2, D: tl.constexpr):
    """A block of keys, its scores with a block of queries, and which of them each query sees."""
    k = tl.load(x + D + key[:, None] * stride, is_key[:, None], 0.0)
    first_k = tl.load(start + key, is_key, -1)
    score = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2
    seen = _seen(query[:, None], first[:, None], prefix[:, None], key[None, :], first_k[None, :])
    return k, score, seen


@triton.jit
def _forward(
    qkv, start, prefix_end, out, lse, T, scale_log2,
    N: tl.constexpr, D: tl.constexpr, M: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    stride: tl.constexpr = 3 * N * D
    query = tl.program_id(0) * M + tl.arange(0, M)
    is_query = query < T
    first, prefix, low, high = _stretch(start, prefix_end, query, is_query, T)
    column = tl.arange(0, D)
    x = qkv + head * 3 * D + column[None, :]
    q = tl.load(x + query[:, None] * stride, is_query[:, None], 0.0)
    largest = tl.full([M], -1e30, tl.float32)
    total = tl.zeros([M], tl.float32)
    context = tl.zeros([M, D], tl.float32)
    for place in range(low, high, K):
        key = place + tl.arange(0, K)
        is_key = key < high
        _, score, seen = _meet(
            x, stride, q, query, first, prefix, start, key, is_key, scale_log2, D
        )
        score = tl.where(seen, score, -1e30)
        # A block in which a query sees nothing leaves sums that the next factor sets to zero:
        # each query sees itself at the latest.
        larger = tl.maximum(largest, tl.max(score, 1))
        factor = tl.exp2(largest - larger)
        weight = tl.exp2(score - larger[:, None])
        total = total * factor + tl.sum(weight, 1)
        v = tl.load(x + 2 * D + key[:, None] * stride, is_key[:, None], 0.0)
        context = tl.dot(weight.to(v.dtype), v, context * factor[:, None], input_precision="ieee")
        largest = larger
    at = out + query[:, None] * (N * D) + head * D + column[None, :]
    tl.store(at, (context / total[:, None]).to(out.dtype.element_ty), is_query[:, None])
    tl.store(lse + head * T + query, largest + tl.log2(total), is_query)


@triton.jit
def _backward_query(
    qkv, cos, sin, start, prefix_end, out, lse, grad_out, grad, delta, T, scale, scale_log2,
    N: tl.constexpr, D: tl.constexpr, M: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    stride: tl.constexpr = 3 * N * D
    query = tl.program_id(0) * M + tl.arange(0, M)
    is_query = query < T
    first, prefix, low, high = _stretch(start, prefix_end, query, is_query, T)
    column = tl.arange(0, D)
    x = qkv + head * 3 * D + column[None, :]
    q = tl.load(x + query[:, None] * stride, is_query[:, None], 0.0)
    at = query[:, None] * (N * D) + head * D + column[None, :]
    g = tl.load(grad_out + at, is_query[:, None], 0.0)
    o = tl.load(out + at, is_query[:, None], 0.0)
    delta_M = tl.sum(g.to(tl.float32) * o.to(tl.float32), 1)
    tl.store(delta + head * T + query, delta_M, is_query)
    lse_M = tl.load(lse + head * T + query, is_query, 0.0)
    d_q = tl.zeros([M, D], tl.float32)
    for place in range(low, high, K):
        key = place + tl.arange(0, K)
        is_key = key < high
        k, score, seen = _meet(
            x, stride, q, query, first, prefix, start, key, is_key, scale_log2, D
        )
        weight = tl.where(seen, tl.exp2(score - lse_M[:, None]), 0.0)
        v = tl.load(x + 2 * D + key[:, None] * stride, is_key[:, None], 0.0)
        d_weight = tl.dot(g, tl.trans(v), input_precision="ieee")
        d_score = (weight * (d_weight - delta_M[:, None])).to(k.dtype)
        d_q = tl.dot(d_score, k, d_q, input_precision="ieee")
    at = grad + head * 3 * D
    _store_turned(at, stride, query, is_query, cos, sin, d_q * scale, True, M, D // 4)


@triton.jit
def _backward_key(
    qkv, cos, sin, start, prefix_end, end, lse, grad_out, grad, delta, T, scale, scale_log2,
    N: tl.constexpr, D: tl.constexpr, M: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    stride: tl.constexpr = 3 * N * D
    key = tl.program_id(0) * K + tl.arange(0, K)
    is_key = key < T
    first_k = tl.load(start + key, is_key, T)
    prefix = tl.load(prefix_end + key, is_key, 0)
    # A key of the prefix is seen by all of its row, one of the answer from itself on.
    low = tl.min(tl.where(key < prefix, first_k, key), 0)
    high = tl.max(tl.load(end + key, is_key, 0), 0)
    column = tl.arange(0, D)
    x = qkv + head * 3 * D + column[None, :]
    k = tl.load(x + D + key[:, None] * stride, is_key[:, None], 0.0)
    v = tl.load(x + 2 * D + key[:, None] * stride, is_key[:, None], 0.0)
    d_k = tl.zeros([K, D], tl.float32)
    d_v = tl.zeros([K, D], tl.float32)
    for place in range(low, high, M):
        query = place + tl.arange(0, M)
        is_query = query < high
        q = tl.load(x + query[:, None] * stride, is_query[:, None], 0.0)
        first = tl.load(start + query, is_query, -1)
        at = query[:, None] * (N * D) + head * D + column[None, :]
        g = tl.load(grad_out + at, is_query[:, None], 0.0)
        lse_M = tl.load(lse + head * T + query, is_query, 0.0)
        delta_M = tl.load(delta + head * T + query, is_query, 0.0)
        score = tl.dot(k, tl.trans(q), input_precision="ieee") * scale_log2  # keys down
        # A key and a query of one row have one prefix, so the key's will do.
        seen = _seen(
            query[None, :], first[None, :], prefix[:, None], key[:, None], first_k[:, None]
        )
        weight = tl.where(seen, tl.exp2(score - lse_M[None, :]), 0.0)
        d_v = tl.dot(weight.to(v.dtype), g, d_v, input_precision="ieee")
        d_weight = tl.dot(v, tl.trans(g), input_precision="ieee")
        d_score = (weight * (d_weight - delta_M[None, :])).to(v.dtype)
        d_k = tl.dot(d_score, q, d_k, input_precision="ieee")
    at = grad + head * 3 * D + 2 * D + key[:, None] * stride + column[None, :]
    tl.store(at, d_v.to(grad.dtype.element_ty), is_key[:, None])
    at = grad + head * 3 * D + D
    _store_turned(at, stride, key, is_key, cos, sin, d_k * scale, True, K, D // 4)


# Blocks of queries and keys, and how a kernel runs, for 2-byte numbers on Hopper.
FORWARD = {"M": 64, "K": 32, "num_warps": 4, "num_stages": 3}
BACKWARD_QUERY = {"M": 64, "K": 32, "num_warps": 4, "num_stages": 2}
BACKWARD_KEY = {"M": 32, "K": 64, "num_warps": 4, "num_stages": 2}
TURN = {"BLOCK": 32, "num_warps": 4, "num_stages": 1}


def _sizes(x_TN3D: Tensor, how: dict[str, int]) -> dict[str, int]:
    """Sizes for a kernel; blocks of float32 numbers of the same number would not fit."""
    if x_TN3D.element_size() == 4:
        how = how | {"M": 32, "K": 32}
    return {"N": x_TN3D.shape[1], "D": x_TN3D.shape[2] // 3, **how}


@torch.library.custom_op("glmtune::packed_attention", mutates_args=())
def packed_attention(
    y_TN3D: Tensor,
    a_TR: Tensor | None,
    b_NR: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    start_T: Tensor,
    prefix_end_T: Tensor,
    end_T: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of packed rows, from what the fused projection and its adapter give.

    Args:
        y_TN3D: queries, keys and values of each head side by side, not turned, without the
            adapter's update.
        a_TR: that update is ``a @ b^T``; None for none.
        b_NR: ``(3 N D, R)``.
        cos: float32 ``(T, 2, D / 4)``, both position streams; contiguous, as `sin`.
        sin: likewise.
        start_T: int32 place of the first token of each token's row.
        prefix_end_T: int32 place of the first answer token of each token's row.
        end_T: int32 place after the last token of each token's row.

    Returns:
        ``(T, N, D)`` in the type of `y_TN3D`; and, for the way back, queries, keys and values,
        turned, and the base-2 logarithm of each query's softmax sum, float32 ``(N, T)``.
    """
    num_tokens, num_heads, width = y_TN3D.shape
    assert all(tensor.is_contiguous() for tensor in (y_TN3D, cos, sin))
    assert y_TN3D.numel() < 2**31  # places are 32-bit numbers
    head_dim, rank = width // 3, 0 if a_TR is None else a_TR.shape[1]
    qkv = torch.empty_like(y_TN3D)
    out_TND = y_TN3D.new_empty(num_tokens, num_heads, head_dim)
    lse_NT = torch.empty(num_heads, num_tokens, device=y_TN3D.device)
    grid = 3 * num_heads, triton.cdiv(num_tokens, TURN["BLOCK"])
    _turn[grid](
        y_TN3D, a_TR, b_NR, cos, sin, qkv, num_tokens, rank, N=num_heads, D=head_dim,
        R_PADDED=max(16, triton.next_power_of_2(rank)) if rank else 0, **TURN,
    )  # fmt: skip
    sizes = _sizes(qkv, FORWARD)
    grid = triton.cdiv(num_tokens, sizes["M"]), num_heads
    scale_log2 = head_dim**-0.5 * LOG2_E
    _forward[grid](qkv, start_T, prefix_end_T, out_TND, lse_NT, num_tokens, scale_log2, **sizes)
    return out_TND, qkv, lse_NT


@torch.library.custom_op("glmtune::packed_attention_backward", mutates_args=())
def packed_attention_backward(
    grad_TND: Tensor,
    out_TND: Tensor,
    qkv_TN3D: Tensor,
    lse_NT: Tensor,
    cos: Tensor,
    sin: Tensor,
    start_T: Tensor,
    prefix_end_T: Tensor,
    end_T: Tensor,
) -> Tensor:
    """The gradient of `packed_attention` for its first argument, of the same shape."""
    grad_TND = grad_TND.contiguous()
    grad, delta_NT = torch.empty_like(qkv_TN3D), torch.empty_like(lse_NT)
    num_tokens, num_heads, width = qkv_TN3D.shape
    scale = (width // 3) ** -0.5
    common = lse_NT, grad_TND, grad, delta_NT, num_tokens, scale, scale * LOG2_E
    sizes = _sizes(qkv_TN3D, BACKWARD_QUERY)
    grid = triton.cdiv(num_tokens, sizes["M"]), num_heads
    _backward_query[grid](
        qkv_TN3D, cos, sin, start_T, prefix_end_T, out_TND, *common, **sizes
    )  # fmt: skip
    sizes = _sizes(qkv_TN3D, BACKWARD_KEY)
    grid = triton.cdiv(num_tokens, sizes["K"]), num_heads
    _backward_key[grid](qkv_TN3D, cos, sin, start_T, prefix_end_T, end_T, *common, **sizes)
    return grad


@packed_attention.register_fake
def _(y_TN3D, a_TR, b_NR, cos, sin, start_T, prefix_end_T, end_T):
    num_tokens, num_heads, width = y_TN3D.shape
    out_TND = y_TN3D.new_empty(num_tokens, num_heads, width // 3)
    return out_TND, torch.empty_like(y_TN3D), cos.new_empty(num_heads, num_tokens)


@packed_attention_backward.register_fake
def _(grad_TND, out_TND, qkv_TN3D, lse_NT, cos, sin, start_T, prefix_end_T, end_T):
    return torch.empty_like(qkv_TN3D)


def _keep_for_backward(ctx, inputs, output):
    ctx.save_for_backward(*output, *inputs[1:])


def _backward(ctx, grad_TND, *_):
    *kept, a_TR, b_NR, cos, sin, start_T, prefix_end_T, end_T = ctx.saved_tensors
    grad = packed_attention_backward(grad_TND, *kept, cos, sin, start_T, prefix_end_T, end_T)
    if a_TR is None:
        return grad, *(None,) * 7
    flat = grad.flatten(1)
    return grad, flat @ b_NR, flat.T @ a_TR, *(None,) * 5


packed_attention.register_autograd(_backward, setup_context=_keep_for_backward)


class RowSpans(NamedTuple):
    """Where the rows of a pack begin and end, for each of its tokens: int32 places ``(T,)``."""

    start_T: Tensor
    prefix_end_T: Tensor
    end_T: Tensor

    @classmethod
    def of(cls, start_T: Tensor, prefix_end_T: Tensor, end_T: Tensor) -> "RowSpans":
        """As a pack has them."""
        return cls(start_T, prefix_end_T, end_T)

    def attend(
        self, y_TN3D: Tensor, update: tuple[Tensor, Tensor] | None, cos: Tensor, sin: Tensor
    ) -> Tensor:
        """What `ops.attention.PaddedRows.attend` gives."""
        a_TR, b_NR = update or (None, None)
        return packed_attention(y_TN3D, a_TR, b_NR, cos, sin, *self)[0]
