"""Weights of 8 or 4 bits, rounded in groups and packed for a matrix-vector product on a GPU.

A 32-bit word holds P = 32 / bits weights of a row that lie W = I / P inputs apart: number n of word
j belongs to input ``n W + j``. For every n, adjacent words are then multiplied by adjacent inputs.
The numbers of 128 / P adjacent words form a group, so that a scale belongs to whole words.

Shapes: O outputs, I inputs, W words of a row, G groups of inputs that share a scale and a middle.
"""

from typing import NamedTuple

import torch
from torch import Tensor

GROUP_SIZE = 128
"""Inputs of a group."""


def round_groups(
    grouped: Tensor, dims: int | tuple[int, ...], bits: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Round each group to 2^bits steps between its smallest and its largest element.

    Args:
        grouped: weights, reshaped so that a group's elements lie along `dims`.
        dims: dimensions of a group's elements.
        bits: 8 or 4.

    Returns:
        Numbers q as int32, and each group's scale and middle as bfloat16, in dimensions of one:
        q means ``(q - 2^(bits - 1)) * scale + middle``.
    """
    most, half, grouped = 2**bits - 1, 2 ** (bits - 1), grouped.float()
    low, high = grouped.amin(dims, keepdim=True), grouped.amax(dims, keepdim=True)
    scale = ((high - low).clamp(min=1e-6) / most).bfloat16()
    middle = (low + half * scale).bfloat16()
    # Quantise with the bfloat16-rounded scale and middle that are stored, so that their rounding
    # error does not enter q.
    steps = (grouped - middle.float()) / scale.float()
    return (steps.round() + half).clamp(0, most).to(torch.int32), scale, middle


class Words(NamedTuple):
    """A packed matrix: q of 0 to 2^bits - 1 means ``(q - 2^(bits - 1)) * scale + middle``."""

    words_OW: Tensor
    """int32."""
    scale_middle_OG2: Tensor
    """bfloat16."""
    bits: int

    @classmethod
    def pack(cls, weight_OI: Tensor, bits: int) -> "Words":
        """Round each group of inputs to 2^bits steps between its smallest and largest element.

        The inputs must be a multiple of `GROUP_SIZE`.
        """
        assert weight_OI.shape[1] % GROUP_SIZE == 0
        per_word = 32 // bits
        # ``(O, P, G, words of a group)``
        grouped = weight_OI.unflatten(1, (per_word, -1, GROUP_SIZE // per_word))
        numbers, scale, middle = round_groups(grouped, (1, 3), bits)
        words_OW = torch.zeros_like(numbers[:, 0].flatten(1))
        for n in range(per_word):
            words_OW |= numbers[:, n].flatten(1) << (n * bits)
        return cls(words_OW, torch.stack((scale, middle), -1)[:, 0, :, 0].contiguous(), bits)

    def unpack(self, dtype: torch.dtype) -> Tensor:
        """The dequantised weights, ``(O, I)``."""
        mask, half = 2**self.bits - 1, 2 ** (self.bits - 1)
        numbers = [self.words_OW >> shift & mask for shift in range(0, 32, self.bits)]
        words_of_group = GROUP_SIZE * self.bits // 32
        steps = (torch.stack(numbers, 1) - half).float().unflatten(2, (-1, words_of_group))
        scale, middle = self.scale_middle_OG2.float()[:, None, :, None].unbind(-1)
        return (steps * scale + middle).flatten(1).to(dtype)
