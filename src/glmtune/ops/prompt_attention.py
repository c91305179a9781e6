"""Attention of whole prompts that are read into slots of a cache: rotated and written at once.

Shapes: B rows of a pass, S columns of the longest prompt, N heads of queries, M of keys and values,
D head size, K columns of the cache.
"""

import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from glmtune.ops.decoding_attention import turn

_HEADS = 16
"""Heads of a token that a block takes."""


@triton.jit
def _turned(x, d, partner, c, s, inside):
    """Some heads of a token, rotated: see `turn`."""
    value = tl.load(x + d[None, :], inside, 0.0).to(tl.float32) * c[None, :]
    return value + tl.load(x + partner[None, :], inside, 0.0).to(tl.float32) * s[None, :]


@triton.jit
def _put(
    query, key, value, cos, sin, slot, turned_query, turned_key, keys, values,
    query_t, query_n, key_t, key_m, stride_b, stride_m, stride_k, S,
    N: tl.constexpr, M: tl.constexpr, D: tl.constexpr, PAIRS: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """Some heads of one token: queries, or else keys, or else values."""
    token, part, d = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.arange(0, D)
    row, column = token // S, token % S
    partner, c, s = turn(cos, sin, token, d, D, PAIRS)
    kind = keys.dtype.element_ty
    num_of_queries: tl.constexpr = (N + HEADS - 1) // HEADS
    num_of_keys: tl.constexpr = (M + HEADS - 1) // HEADS
    if part < num_of_queries:
        query_head = (part * HEADS + tl.arange(0, HEADS))[:, None]
        is_query, at_query = query_head < N, query + token * query_t + query_head * query_n
        turned = _turned(at_query, d, partner, c, s, is_query).to(kind)
        tl.store(turned_query + (token * N + query_head) * D + d[None, :], turned, is_query)
    else:
        is_key = part < num_of_queries + num_of_keys
        first = (part - num_of_queries - tl.where(is_key, 0, num_of_keys)) * HEADS
        head = (first + tl.arange(0, HEADS))[:, None]
        inside, at = head < M, token * key_t + head * key_m
        cached = tl.load(slot + row) * stride_b + head * stride_m + column * stride_k + d[None, :]
        if is_key:
            turned_k = _turned(key + at, d, partner, c, s, inside).to(kind)
            tl.store(turned_key + (token * M + head) * D + d[None, :], turned_k, inside)
            tl.store(keys + cached, turned_k, inside)
        else:
            found = tl.load(value + at + d[None, :], inside, 0.0)
            tl.store(values + cached, found.to(kind), inside)


def attend(
    query_BSND: Tensor,
    key_BSMD: Tensor,
    value_BSMD: Tensor,
    keys_BMKD: Tensor,
    values_BMKD: Tensor,
    slot_B: Tensor,
    cos: Tensor,
    sin: Tensor,
    mask_B1SS: Tensor | None,
    interleaved: bool = False,
) -> Tensor:
    """Rotate queries and keys of prompts, write keys and values to the cache, and attend.

    Args:
        query_BSND: output of the projection, which may be a view of a fused output. Where there are
            more query heads than key heads, neighbouring query heads share a key head.
        key_BSMD: keys; same strides as `value_BSMD`.
        value_BSMD: values.
        keys_BMKD: cached keys of a layer, of all slots; same strides as `values_BMKD`.
        values_BMKD: cached values of a layer.
        slot_B: the slot of each row, of which the first S columns are written. Rows of one slot
            must be equal.
        cos: cosines of the positions, ``(B, S, 2, D / 4)``, or ``(B, S, D / 2)`` of the pairs of a
            head in their order; contiguous.
        sin: sines, same shape.
        mask_B1SS: `additive_mask`; None for causal rows.
        interleaved: see `ops.rotary.rotate`.

    Returns:
        ``(B, S, N D)``, in the query's type.
    """
    num_rows, width, num_heads, head_dim = query_BSND.shape
    num_kv_heads = key_BSMD.shape[2]
    assert key_BSMD.stride() == value_BSMD.stride()
    assert keys_BMKD.stride() == values_BMKD.stride()
    assert query_BSND.stride(-1) == key_BSMD.stride(-1) == keys_BMKD.stride(-1) == 1
    assert all(x.stride(0) == width * x.stride(1) for x in (query_BSND, key_BSMD))
    assert all(tensor.is_contiguous() for tensor in (slot_B, cos, sin))
    turned_query = keys_BMKD.new_empty(query_BSND.shape)
    turned_key = keys_BMKD.new_empty(key_BSMD.shape)
    blocks = triton.cdiv(num_heads, _HEADS) + 2 * triton.cdiv(num_kv_heads, _HEADS)
    _put[(num_rows * width, blocks)](
        query_BSND, key_BSMD, value_BSMD, cos, sin, slot_B, turned_query, turned_key, keys_BMKD,
        values_BMKD, *query_BSND.stride()[1:3], *key_BSMD.stride()[1:3], *keys_BMKD.stride()[:3],
        width, num_heads, num_kv_heads, head_dim, interleaved, _HEADS,
    )  # fmt: skip
    query, key, value = (x.transpose(1, 2) for x in (turned_query, turned_key, value_BSMD))
    is_causal, enable_gqa = mask_B1SS is None, num_heads > num_kv_heads
    context_BNSD = F.scaled_dot_product_attention(
        query, key, value, mask_B1SS, is_causal=is_causal, enable_gqa=enable_gqa
    )
    return context_BNSD.transpose(1, 2).flatten(2)
