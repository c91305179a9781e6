"""Weights of four bits to floats, as a Triton kernel.

bitsandbytes takes three kernels where scales have scales of their own, and its largest reaches half
of an H200's memory bandwidth.

Shapes: V values, C scales.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

# Blocks that one program converts.
_ROWS = 64


@triton.jit
def _dequantise(
    packed, scale, group_scale, code, mean, values, y, NUM_BLOCKS,
    GROUP: tl.constexpr, BYTES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Some blocks of values that share a scale; each byte holds two, the first in its high bits."""
    block = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    is_block, byte = block < NUM_BLOCKS, tl.arange(0, BYTES)
    factor = tl.load(scale + block, is_block, 0)
    if group_scale is not None:
        group = tl.load(group_scale + block // GROUP, is_block, 0.0)
        factor = tl.load(code + factor.to(tl.int32)) * group + tl.load(mean)
    at = block[:, None] * BYTES + byte[None, :]
    pair = tl.load(packed + at, is_block[:, None], 0).to(tl.int32)
    first = tl.load(values + (pair >> 4)) * factor[:, None]
    second = tl.load(values + (pair & 15)) * factor[:, None]
    at = block[:, None] * (2 * BYTES) + tl.arange(0, 2 * BYTES)[None, :]
    both = tl.interleave(first, second).to(y.dtype.element_ty)
    tl.store(y + at, both, is_block[:, None])


def dequantise_four_bits(
    packed: Tensor,
    scale_C: Tensor,
    nested: Sequence[Tensor],
    values_16: Tensor,
    block: int,
    group: int,
    shape: tuple[int, int],
    dtype: torch.dtype,
) -> Tensor:
    """A weight ``(N, K)`` as floats.

    Args:
        packed: uint8, two values a byte, row after row.
        scale_C: float32, or uint8 with `nested`.
        nested: float32 scales of groups of scales, the float32 meaning of a scale's byte, and what
            is added to each scale; empty where scales are floats.
        values_16: float32 meaning of each four bits.
        block: values that share a scale; a power of two.
        group: scales that share a scale.
        shape: N and K; N K is a multiple of `block`.
        dtype: of the result.
    """
    y = packed.new_empty(shape, dtype=dtype)
    num_blocks = y.numel() // block
    assert num_blocks * block == y.numel() == 2 * packed.numel()
    group_scale, code, mean = nested or (None, None, None)
    _dequantise[(triton.cdiv(num_blocks, _ROWS),)](
        packed, scale_C, group_scale, code, mean, values_16, y, num_blocks, group, block // 2,
        _ROWS, num_warps=4,
    )  # fmt: skip
    return y


@lru_cache(maxsize=8)
def meanings(kind: str, device: torch.device) -> Tensor:
    """What each of the 16 numbers of a kind means, as bitsandbytes has it: float32 ``(16,)``."""
    from bitsandbytes.functional import get_4bit_type

    return get_4bit_type(kind, device=device).float()
