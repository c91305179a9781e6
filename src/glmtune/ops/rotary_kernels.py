"""Rotary positions of packed rows as Triton kernels, which also add an adapter's update.

Shapes: T tokens, N heads of queries, G heads of keys and values, D head size, Q = D / 4 columns of
a quarter of a head, P = D / 2 pairs, R rank of an adapter; Q_ROW and KV_ROW are the strides in
elements from one token to the next, HEAD the stride between heads.
"""

import triton
import triton.language as tl


@triton.jit
def store_rotated(x, stride, place, is_real, cos, sin, value, BACK: tl.constexpr,
                  BLOCK: tl.constexpr, Q: tl.constexpr, PAIRS: tl.constexpr):  # fmt: skip
    """Rotate queries or keys, or their gradients back, by either kind of rotation; store them."""
    if PAIRS:
        _store_rotated_pairs(x, stride, place, is_real, cos, sin, value, BACK, BLOCK, 2 * Q)
    else:
        _store_rotated_halves(x, stride, place, is_real, cos, sin, value, BACK, BLOCK, Q)


@triton.jit
def _store_rotated_pairs(x, stride, place, is_real, cos, sin, value, BACK: tl.constexpr,
                         BLOCK: tl.constexpr, P: tl.constexpr):  # fmt: skip
    """Rotate P pairs of neighbours, each by an angle of its own.

    Rotated heads are stored as all first elements, then all second ones: a permutation that queries
    and keys share does not change their products, and both halves are stored as they lie. Gradients
    of such heads become pairs of neighbours again.
    """
    if BACK:
        first, second = tl.split(tl.permute(tl.reshape(value, (BLOCK, 2, P)), (0, 2, 1)))
    else:
        first, second = tl.split(tl.reshape(value, (BLOCK, P, 2)))
    pair, mask = tl.arange(0, P), is_real[:, None]
    angle = place[:, None] * P + pair[None, :]
    c, s = tl.load(cos + angle, mask, 0.0), tl.load(sin + angle, mask, 0.0)
    kind = x.dtype.element_ty
    if BACK:
        together = tl.join(first * c + second * s, second * c - first * s)
        column = tl.arange(0, 2 * P)
        at = place[:, None] * stride + column[None, :]
        tl.store(x + at, tl.reshape(together, (BLOCK, 2 * P)).to(kind), mask)
    else:
        at = place[:, None] * stride + pair[None, :]
        tl.store(x + at, (first * c - second * s).to(kind), mask)
        tl.store(x + at + P, (second * c + first * s).to(kind), mask)


@triton.jit
def _store_rotated_halves(x, stride, place, is_real, cos, sin, value, BACK: tl.constexpr,
                          BLOCK: tl.constexpr, Q: tl.constexpr):  # fmt: skip
    """Rotate each half of a head by its own stream: element i is paired with i + Q."""
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
def _add_update(x, a, b, place, is_real, column, R, R_PADDED: tl.constexpr):
    """``x + a @ b^T`` for a block of tokens and the columns of one head."""
    if R_PADDED > 0:
        inner = tl.arange(0, R_PADDED)
        is_inner = (inner < R)[None, :]
        a_MR = tl.load(a + place[:, None] * R + inner[None, :], is_real[:, None] & is_inner, 0.0)
        b_DR = tl.load(b + column[:, None] * R + inner[None, :], is_inner, 0.0)
        x = tl.dot(a_MR, tl.trans(b_DR), x, input_precision="ieee")
    return x


@triton.jit
def rotate(
    q, k, v, a_q, b_q, a_k, b_k, a_v, b_v, cos, sin, to_q, to_k, to_v, T, R_q, R_k, R_v,
    N: tl.constexpr, G: tl.constexpr, D: tl.constexpr, Q_ROW: tl.constexpr, KV_ROW: tl.constexpr,
    HEAD: tl.constexpr, PAIRS: tl.constexpr, P_q: tl.constexpr, P_k: tl.constexpr,
    P_v: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``rotate(x + a @ b^T)`` for one head of queries, keys or values; values are not rotated."""
    head = tl.program_id(0)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_real = place < T
    column = tl.arange(0, D)
    if head < N:
        first = head * HEAD
        at = place[:, None] * Q_ROW + first + column[None, :]
        x = tl.load(q + at, is_real[:, None], 0.0).to(tl.float32)
        x = _add_update(x, a_q, b_q, place, is_real, first + column, R_q, P_q)
        to = to_q + first
        store_rotated(to, Q_ROW, place, is_real, cos, sin, x, False, BLOCK, D // 4, PAIRS)
    elif head < N + G:
        first = (head - N) * HEAD
        at = place[:, None] * KV_ROW + first + column[None, :]
        x = tl.load(k + at, is_real[:, None], 0.0).to(tl.float32)
        x = _add_update(x, a_k, b_k, place, is_real, first + column, R_k, P_k)
        to = to_k + first
        store_rotated(to, KV_ROW, place, is_real, cos, sin, x, False, BLOCK, D // 4, PAIRS)
    else:
        first = (head - N - G) * HEAD
        at = place[:, None] * KV_ROW + first + column[None, :]
        x = tl.load(v + at, is_real[:, None], 0.0).to(tl.float32)
        x = _add_update(x, a_v, b_v, place, is_real, first + column, R_v, P_v)
        tl.store(to_v + at, x.to(to_v.dtype.element_ty), is_real[:, None])
