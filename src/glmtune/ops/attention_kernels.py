"""The packed attention of `ops.attention` as Triton kernels, rotary positions and adapter included.

One kernel adds the adapters' updates to the projections' outputs and rotates queries and keys
(`ops.rotary_kernels`); the attention then reads only the keys of the rows at hand, wherever they
begin: aligned blocks would be mostly masked for rows of about sixty tokens. The backward pass
rotates gradients back while it writes them. `packed_attention` has the operators that autograd and
the compiler know. The method is that of FlashAttention-2 (Dao, 2023, arXiv 2307.08691), algorithms
1 and 2.

Shapes: T tokens, N heads of queries, G heads of keys and values, D head size, R rank of an adapter;
in the kernels M queries and K keys of a block, Q_ROW and KV_ROW the strides in elements from one
token to the next, HEAD the stride between heads.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from glmtune.ops.lora import padded_rank
from glmtune.ops.rotary_kernels import rotate, store_rotated

LOG2_E = 1.4426950408889634


@triton.jit
def _seen(query, first_q, prefix_q, key, first_k):
    """The rule of `ops.attention.dense_mask`; the arguments broadcast."""
    return (first_k == first_q) & ((key <= query) | (key < prefix_q))


@triton.jit
def _key_range(start, prefix_end, query, is_query, T):
    """First token and prefix end of each query's row, and the range of keys that any sees."""
    first = tl.load(start + query, is_query, T)
    prefix = tl.load(prefix_end + query, is_query, 0)
    low = tl.min(first, 0)
    high = tl.minimum(tl.max(tl.maximum(prefix, query + 1), 0), T)
    return first, prefix, low, high


@triton.jit
def _scores(at_k, KV_ROW, q, query, first, prefix, start, key, is_key, scale_log2):
    """A block of keys, its scores with a block of queries, and which of them each query sees."""
    k = tl.load(at_k + key[:, None] * KV_ROW, is_key[:, None], 0.0)
    first_k = tl.load(start + key, is_key, -1)
    score = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2
    seen = _seen(query[:, None], first[:, None], prefix[:, None], key[None, :], first_k[None, :])
    return k, score, seen


@triton.jit
def _forward(
    q, k, v, start, prefix_end, out, lse, T, scale_log2,
    N: tl.constexpr, G: tl.constexpr, D: tl.constexpr, Q_ROW: tl.constexpr, KV_ROW: tl.constexpr,
    HEAD: tl.constexpr, M: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    query = tl.program_id(0) * M + tl.arange(0, M)
    is_query = query < T
    first, prefix, low, high = _key_range(start, prefix_end, query, is_query, T)
    column = tl.arange(0, D)
    of_kv = head // (N // G) * HEAD + column[None, :]
    at_k, at_v = k + of_kv, v + of_kv
    at = q + head * HEAD + query[:, None] * Q_ROW + column[None, :]
    q_MD = tl.load(at, is_query[:, None], 0.0)
    largest = tl.full([M], -1e30, tl.float32)
    total = tl.zeros([M], tl.float32)
    context = tl.zeros([M, D], tl.float32)
    for place in range(low, high, K):
        key = place + tl.arange(0, K)
        is_key = key < high
        _, score, seen = _scores(
            at_k, KV_ROW, q_MD, query, first, prefix, start, key, is_key, scale_log2
        )
        score = tl.where(seen, score, -1e30)
        # If no key of this block is visible, the sums are garbage until `factor` zeroes them, as
        # it will: every query sees itself.
        larger = tl.maximum(largest, tl.max(score, 1))
        factor = tl.exp2(largest - larger)
        weight = tl.exp2(score - larger[:, None])
        total = total * factor + tl.sum(weight, 1)
        v_KD = tl.load(at_v + key[:, None] * KV_ROW, is_key[:, None], 0.0)
        weight = weight.to(v_KD.dtype)
        context = tl.dot(weight, v_KD, context * factor[:, None], input_precision="ieee")
        largest = larger
    at = out + query[:, None] * (N * D) + head * D + column[None, :]
    tl.store(at, (context / total[:, None]).to(out.dtype.element_ty), is_query[:, None])
    tl.store(lse + head * T + query, largest + tl.log2(total), is_query)


@triton.jit
def _backward_query(
    q, k, v, cos, sin, start, prefix_end, out, lse, grad_out, grad_q, delta, T, scale, scale_log2,
    N: tl.constexpr, G: tl.constexpr, D: tl.constexpr, Q_ROW: tl.constexpr, KV_ROW: tl.constexpr,
    HEAD: tl.constexpr, PAIRS: tl.constexpr, M: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    query = tl.program_id(0) * M + tl.arange(0, M)
    is_query = query < T
    first, prefix, low, high = _key_range(start, prefix_end, query, is_query, T)
    column = tl.arange(0, D)
    of_kv = head // (N // G) * HEAD + column[None, :]
    at_k, at_v = k + of_kv, v + of_kv
    at = q + head * HEAD + query[:, None] * Q_ROW + column[None, :]
    q_MD = tl.load(at, is_query[:, None], 0.0)
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
        k_KD, score, seen = _scores(
            at_k, KV_ROW, q_MD, query, first, prefix, start, key, is_key, scale_log2
        )
        weight = tl.where(seen, tl.exp2(score - lse_M[:, None]), 0.0)
        v_KD = tl.load(at_v + key[:, None] * KV_ROW, is_key[:, None], 0.0)
        d_weight = tl.dot(g, tl.trans(v_KD), input_precision="ieee")
        d_score = (weight * (d_weight - delta_M[:, None])).to(k_KD.dtype)
        d_q = tl.dot(d_score, k_KD, d_q, input_precision="ieee")
    at = grad_q + head * HEAD
    store_rotated(at, Q_ROW, query, is_query, cos, sin, d_q * scale, True, M, D // 4, PAIRS)


@triton.jit
def _backward_key(
    q, k, v, cos, sin, start, prefix_end, end, lse, grad_out, grad_k, grad_v, shares, delta, T,
    scale, scale_log2, N: tl.constexpr, G: tl.constexpr, D: tl.constexpr, Q_ROW: tl.constexpr,
    KV_ROW: tl.constexpr, HEAD: tl.constexpr, PAIRS: tl.constexpr, SHARES: tl.constexpr,
    M: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """Gradients of one head of keys and values, summed over the heads of queries that share it.

    Where those are divided among several programs, each stores its sums for `_add_shares`.
    """
    kv_head, share = tl.program_id(1) // SHARES, tl.program_id(1) % SHARES
    key = tl.program_id(0) * K + tl.arange(0, K)
    is_key = key < T
    first_k = tl.load(start + key, is_key, T)
    prefix = tl.load(prefix_end + key, is_key, 0)
    # A key of the prefix is visible to its whole row, a key of the answer from itself on.
    low = tl.min(tl.where(key < prefix, first_k, key), 0)
    high = tl.max(tl.load(end + key, is_key, 0), 0)
    column = tl.arange(0, D)
    at_kv = kv_head * HEAD + key[:, None] * KV_ROW + column[None, :]
    k_KD = tl.load(k + at_kv, is_key[:, None], 0.0)
    v_KD = tl.load(v + at_kv, is_key[:, None], 0.0)
    d_k = tl.zeros([K, D], tl.float32)
    d_v = tl.zeros([K, D], tl.float32)
    first_head = kv_head * (N // G) + share * (N // G // SHARES)
    for head in range(first_head, first_head + N // G // SHARES):
        for place in range(low, high, M):
            query = place + tl.arange(0, M)
            is_query = query < high
            at = q + head * HEAD + query[:, None] * Q_ROW + column[None, :]
            q_MD = tl.load(at, is_query[:, None], 0.0)
            first = tl.load(start + query, is_query, -1)
            at = query[:, None] * (N * D) + head * D + column[None, :]
            g = tl.load(grad_out + at, is_query[:, None], 0.0)
            lse_M = tl.load(lse + head * T + query, is_query, 0.0)
            delta_M = tl.load(delta + head * T + query, is_query, 0.0)
            score = tl.dot(k_KD, tl.trans(q_MD), input_precision="ieee") * scale_log2  # keys down
            # A key and a query of the same row have the same prefix, so the key's is enough.
            seen = _seen(
                query[None, :], first[None, :], prefix[:, None], key[:, None], first_k[:, None]
            )
            weight = tl.where(seen, tl.exp2(score - lse_M[None, :]), 0.0)
            d_v = tl.dot(weight.to(v_KD.dtype), g, d_v, input_precision="ieee")
            d_weight = tl.dot(v_KD, tl.trans(g), input_precision="ieee")
            d_score = (weight * (d_weight - delta_M[None, :])).to(v_KD.dtype)
            d_k = tl.dot(d_score, q_MD, d_k, input_precision="ieee")
    if SHARES == 1:
        tl.store(grad_v + at_kv, d_v.to(grad_v.dtype.element_ty), is_key[:, None])
        at = grad_k + kv_head * HEAD
        store_rotated(at, KV_ROW, key, is_key, cos, sin, d_k * scale, True, K, D // 4, PAIRS)
    else:
        at = ((share * 2 * G + kv_head) * T + key[:, None]) * D + column[None, :]
        tl.store(shares + at, d_k * scale, is_key[:, None])
        tl.store(shares + at + G * T * D, d_v, is_key[:, None])


@triton.jit
def _add_shares(
    shares, grad_k, grad_v, cos, sin, T, G: tl.constexpr, D: tl.constexpr, KV_ROW: tl.constexpr,
    HEAD: tl.constexpr, PAIRS: tl.constexpr, SHARES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sum what the programs of `_backward_key` found for some keys of a head, or their values."""
    head = tl.program_id(0)  # of keys, then of values
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_real, column = place < T, tl.arange(0, D)
    at = (head * T + place[:, None]) * D + column[None, :]
    total = tl.zeros([BLOCK, D], tl.float32)
    for share in tl.static_range(SHARES):
        total += tl.load(shares + share * (2 * G * T * D) + at, is_real[:, None], 0.0)
    if head < G:
        at_k = grad_k + head * HEAD
        store_rotated(at_k, KV_ROW, place, is_real, cos, sin, total, True, BLOCK, D // 4, PAIRS)
    else:
        at = place[:, None] * KV_ROW + (head - G) * HEAD + column[None, :]
        tl.store(grad_v + at, total.to(grad_v.dtype.element_ty), is_real[:, None])


# Blocks of queries and keys, and how a kernel runs, for 2-byte numbers on Hopper.
FORWARD = {"M": 64, "K": 32, "num_warps": 4, "num_stages": 3}
BACKWARD_QUERY = {"M": 64, "K": 32, "num_warps": 4, "num_stages": 2}
BACKWARD_KEY = {"M": 32, "K": 64, "num_warps": 4, "num_stages": 2}
TURN = {"BLOCK": 32, "num_warps": 4, "num_stages": 1}
# With fewer programs, heads of queries that share one of keys are divided among more of them.
_PROGRAMS = 1024


class Parts(NamedTuple):
    """Queries, keys and values as separate tensors or as views of one."""

    q_TND: Tensor
    k_TGD: Tensor
    v_TGD: Tensor

    @classmethod
    def of_fused(cls, y_TN3D: Tensor) -> "Parts":
        """Views of a fused projection's output, which has all three side by side for each head."""
        return cls(*y_TN3D.chunk(3, dim=-1))

    @classmethod
    def of_stacked(cls, y_TXD: Tensor, num_kv_heads: int) -> "Parts":
        """Views of heads that lie one after another, those of queries first."""
        sizes = y_TXD.shape[1] - 2 * num_kv_heads, num_kv_heads, num_kv_heads
        return cls(*y_TXD.split(sizes, 1))

    def sizes(self, how: dict[str, int]) -> dict[str, int]:
        """Sizes and strides for a kernel; float32 takes smaller blocks, as others would not fit."""
        if self.q_TND.element_size() == 4 and "M" in how:
            how = how | {"M": 32, "K": 32}
        _, num_heads, head_dim = self.q_TND.shape
        q_row, head, one = self.q_TND.stride()
        kv_row = self.k_TGD.stride(0)
        assert self.k_TGD.stride() == self.v_TGD.stride() == (kv_row, head, one)
        assert one == 1
        assert self.q_TND.shape[0] * max(q_row, kv_row) < 2**31  # offsets are 32-bit numbers
        return {
            "N": num_heads, "G": self.k_TGD.shape[1], "D": head_dim, "Q_ROW": q_row,
            "KV_ROW": kv_row, "HEAD": head, **how,
        }  # fmt: skip


Factors = list[Tensor | None]


def run_forward(
    parts: Parts, turned: Parts, a: Factors, b: Factors, cos: Tensor, sin: Tensor,
    start_T: Tensor, prefix_end_T: Tensor, interleaved: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Fill `turned`, and return the context ``(T, N, D)`` and the logarithms ``(N, T)``.

    Where pairs are interleaved, `turned` holds queries and keys with all first elements before all
    second ones, and `run_backward` takes them so.
    """
    num_tokens, num_heads, head_dim = parts.q_TND.shape
    assert all(x.is_contiguous() for x in (cos, sin, *a, *b) if x is not None)
    ranks = [0 if factor is None else factor.shape[1] for factor in a]
    padded = [padded_rank(rank) if rank else 0 for rank in ranks]
    out_TND = parts.q_TND.new_empty(num_tokens, num_heads, head_dim)
    lse_NT = torch.empty(num_heads, num_tokens, device=out_TND.device)
    grid = num_heads + 2 * parts.k_TGD.shape[1], triton.cdiv(num_tokens, TURN["BLOCK"])
    factors = [factor for pair in zip(a, b, strict=True) for factor in pair]
    rotate[grid](
        *parts, *factors, cos, sin, *turned, num_tokens, *ranks,
        **dict(zip(("P_q", "P_k", "P_v"), padded, strict=True)), PAIRS=interleaved,
        **parts.sizes(TURN),
    )  # fmt: skip
    sizes = turned.sizes(FORWARD)
    grid = triton.cdiv(num_tokens, sizes["M"]), num_heads
    scale_log2 = head_dim**-0.5 * LOG2_E
    _forward[grid](*turned, start_T, prefix_end_T, out_TND, lse_NT, num_tokens, scale_log2, **sizes)
    return out_TND, lse_NT


def run_backward(
    grads: Parts, turned: Parts, grad_TND: Tensor, out_TND: Tensor, lse_NT: Tensor,
    cos: Tensor, sin: Tensor, start_T: Tensor, prefix_end_T: Tensor, end_T: Tensor,
    interleaved: bool = False,
) -> None:  # fmt: skip
    """Fill `grads`, the gradients with respect to the inputs before rotation."""
    grad_TND, delta_NT = grad_TND.contiguous(), torch.empty_like(lse_NT)
    num_tokens, num_heads, head_dim = turned.q_TND.shape
    scale = head_dim**-0.5
    scales = num_tokens, scale, scale * LOG2_E
    sizes = turned.sizes(BACKWARD_QUERY)
    grid = triton.cdiv(num_tokens, sizes["M"]), num_heads
    _backward_query[grid](
        *turned, cos, sin, start_T, prefix_end_T, out_TND, lse_NT, grad_TND, grads.q_TND,
        delta_NT, *scales, PAIRS=interleaved, **sizes,
    )  # fmt: skip
    sizes, num_kv_heads = turned.sizes(BACKWARD_KEY), turned.k_TGD.shape[1]
    blocks = triton.cdiv(num_tokens, sizes["K"])
    num_shares = _num_shares(num_heads // num_kv_heads, blocks * num_kv_heads)
    shares = None
    if num_shares > 1:
        shares = lse_NT.new_empty(num_shares, 2, num_kv_heads, num_tokens, head_dim)
        assert shares.numel() < 2**31
    _backward_key[(blocks, num_kv_heads * num_shares)](
        *turned, cos, sin, start_T, prefix_end_T, end_T, lse_NT, grad_TND, grads.k_TGD,
        grads.v_TGD, shares, delta_NT, *scales, PAIRS=interleaved, SHARES=num_shares, **sizes,
    )  # fmt: skip
    if shares is not None:
        sizes = grads.sizes(TURN)
        del sizes["N"], sizes["Q_ROW"]
        _add_shares[(2 * num_kv_heads, triton.cdiv(num_tokens, TURN["BLOCK"]))](
            shares, grads.k_TGD, grads.v_TGD, cos, sin, num_tokens, PAIRS=interleaved,
            SHARES=num_shares, **sizes,
        )  # fmt: skip


def _num_shares(group: int, programs: int) -> int:
    """Into how many equal parts `group` heads of queries are divided, for enough programs."""
    divisors = [n for n in range(1, group + 1) if group % n == 0]
    return next((n for n in divisors if n * programs >= _PROGRAMS), group)
