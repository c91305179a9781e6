"""Weights of 8 or 4 bits, rounded in groups and packed for a matrix-vector product on a GPU.

A 32-bit word holds P = 32 / bits weights of a row that lie W = I / P inputs apart: number n of word
j belongs to input ``n W + j``. Words next to each other are then multiplied by inputs next to each
other, whichever number of them is at hand.

Shapes: O outputs, I inputs, W words of a row, G groups of inputs that share a scale and a middle.
"""

from typing import NamedTuple

import torch
from torch import Tensor

GROUP_SIZE = 128
"""Inputs of a group."""


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
        most, half = 2**bits - 1, 2 ** (bits - 1)
        groups_OGI = weight_OI.float().unflatten(1, (-1, GROUP_SIZE))
        low, high = groups_OGI.amin(-1), groups_OGI.amax(-1)
        scale = ((high - low).clamp(min=1e-6) / most).bfloat16()
        middle = (low + half * scale).bfloat16()
        # By what is stored, not by what was computed: the rounding of a scale then costs nothing.
        steps = (groups_OGI - middle.float()[..., None]) / scale.float()[..., None]
        numbers_OI = (steps.round() + half).clamp(0, most).flatten(1).to(torch.int32)
        words_OW = torch.zeros_like(numbers_OI[:, : numbers_OI.shape[1] * bits // 32])
        for n, numbers_OW in enumerate(numbers_OI.chunk(32 // bits, 1)):
            words_OW |= numbers_OW << (n * bits)
        return cls(words_OW, torch.stack((scale, middle), -1), bits)

    def unpack(self, dtype: torch.dtype) -> Tensor:
        """The weights that the numbers stand for, ``(O, I)``."""
        mask, half = 2**self.bits - 1, 2 ** (self.bits - 1)
        numbers = [self.words_OW >> shift & mask for shift in range(0, 32, self.bits)]
        steps_OGI = (torch.cat(numbers, 1) - half).float().unflatten(1, (-1, GROUP_SIZE))
        scale, middle = self.scale_middle_OG2.float().unsqueeze(-2).unbind(-1)
        return (steps_OGI * scale + middle).flatten(1).to(dtype)
