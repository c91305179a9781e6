"""The packed integer weights of the published ChatGLM-6B folders, as numbers again.

The format is that of chatglm-6b-int8, chatglm-6b-int4 and chatglm-6b-int4-qe: signed integers and
one float16 scale a row, ``w = q * scale``. In 8 bits a byte is a value. In 4 bits it is two
neighbours along the row: the one of even index in the high half, the one of odd index in the low.

Shapes: R rows (outputs of a linear, ids of an embedding), C columns.
"""

import torch
from torch import Tensor

PACKED_BITS = (8, 4)


def unpack_int4(packed: Tensor) -> Tensor:
    """Two signed values, -8 to 7, out of every byte: int8 ``(..., C / 2)`` to int8 ``(..., C)``."""
    high = packed >> 4  # keeps the sign
    low = (packed << 4) >> 4  # the low half's own sign bit, moved up and spread on the way back
    return torch.stack((high, low), dim=-1).flatten(-2)


@torch.no_grad()
def dequantise(packed: Tensor, scale: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """The weights that packed integers stand for: ``q * scale``, rounded once, to `dtype`.

    In float32 the product is exact: 8 and 11 significant bits.

    Args:
        packed: int8, ``(..., C * bits / 8)``.
        scale: float16, one a row, ``(...)``.
        bits: of a value, 8 or 4.
        dtype: of the result.

    Returns:
        ``(..., C)``, without a gradient.
    """
    assert bits in PACKED_BITS
    values = packed if bits == 8 else unpack_int4(packed)
    # With `out` the float32 product is never stored, whatever the type of the result.
    out = torch.empty_like(values, dtype=dtype)
    return torch.mul(values, scale.float()[..., None], out=out)
