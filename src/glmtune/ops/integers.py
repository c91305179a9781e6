"""Unpack the integer weights of the published ChatGLM-6B folders.

The format is that of chatglm-6b-int8, chatglm-6b-int4 and chatglm-6b-int4-qe: signed integers and
one float16 scale a row, ``w = q * scale``. In 8 bits a byte is a value. In 4 bits it is two
neighbours along the row: the one of even index in the high half, the one of odd index in the low.

Shapes: R rows (outputs of a linear, ids of an embedding), C columns.
"""

import torch
from torch import Tensor

# Rows rounded at a time.
_PIECE = 2048
# No scale is smaller: a float16 above 0.
_SMALLEST = 2.0**-24


def unpack_int4(packed: Tensor) -> Tensor:
    """Two signed values, -8 to 7, out of every byte: int8 ``(..., C / 2)`` to int8 ``(..., C)``."""
    high = packed >> 4  # keeps the sign
    low = (packed << 4) >> 4  # moves the low half's sign bit up; the right shift extends it
    return torch.stack((high, low), dim=-1).flatten(-2)


@torch.no_grad()
def dequantise(packed: Tensor, scale: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """The weights that packed integers stand for: ``q * scale``, rounded once, to `dtype`.

    In float32 the product is exact: 8 and 11 significant bits.

    Args:
        packed: int8, ``(..., C * bits / 8)``.
        scale: float16, one a row, ``(...)``.
        bits: bits of a value, 8 or 4.
        dtype: type of the result.

    Returns:
        ``(..., C)``, without a gradient.
    """
    assert bits in (8, 4)
    values = packed if bits == 8 else unpack_int4(packed)
    # With `out` the float32 product is never stored, whatever the type of the result.
    out = torch.empty_like(values, dtype=dtype)
    return torch.mul(values, scale.float()[..., None], out=out)


@torch.no_grad()
def quantise_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round each row of ``(R, C)`` to whole numbers up to 127 times a scale of its own.

    Works on some rows at a time, so that little memory is needed beside the result.

    Returns:
        int8 ``(R, C)`` and float16 scales ``(R,)``, for `dequantise`.
    """
    packed = torch.empty_like(weight, dtype=torch.int8)
    scale = torch.empty_like(weight[:, 0], dtype=torch.float16)
    for start in range(0, len(weight), _PIECE):
        rows = slice(start, start + _PIECE)
        piece = weight[rows].float()
        scale[rows] = (piece.abs().amax(1) / 127).clamp(min=_SMALLEST)
        packed[rows] = (piece / scale[rows, None]).round().clamp(-127, 127)
    return packed, scale
