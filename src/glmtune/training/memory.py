"""What a packed pass takes in memory, and how many tokens of it a device has room for."""

from dataclasses import dataclass

import torch

from glmtune.hardware import GIB
from glmtune.models.chatglm.configuration import ChatGLMConfig
from glmtune.ops.loss import CHUNK

# Lengths to choose from. Beyond the first a GPU is busy anyway; below the last it is not.
PACK_LENGTHS = (8192, 4096, 2048, 1024)
PACK_LENGTH_ON_CPU = 2048
# What the library, the allocator and everything of no great size take, and the share of a device
# that other programs leave.
_REST_GIB, _USABLE = 0.75, 0.93


def pass_gib(
    config: ChatGLMConfig,
    num_tokens: int,
    dtype: torch.dtype,
    *,
    recompute: bool = False,
    more_adapters: bool = False,
) -> float:
    """GiB that a compiled pass over a pack takes beside the weights, where the memory peaks.

    Kept for the way back are, of each layer and token: what enters it and its second norm, queries,
    keys and values, the attention's output, the inner activation, and one bit in eight for dropout.
    With `recompute` it is what enters each layer, and all of one layer. The way back through a
    layer holds three gradients of the inner activation. With `more_adapters` than those of the
    fused projection the inputs of the other linears are kept as well (how much: as measured).
    """
    ratio = config.inner_hidden_size / config.hidden_size
    layer = 6.5 + ratio + 6.5 * more_adapters
    kept = config.num_layers + layer if recompute else config.num_layers * layer
    values = (kept + 3 * ratio) * config.hidden_size * num_tokens
    values += CHUNK * config.vocab_size + 4 * num_tokens * config.hidden_size
    return values * dtype.itemsize / GIB


@dataclass(frozen=True)
class Room:
    """A device's memory for passes of a model."""

    config: ChatGLMConfig
    free_gib: float
    """What the device has beside the weights."""
    dtype: torch.dtype
    more_adapters: bool = False
    """See `pass_gib`."""

    def holds(self, num_tokens: int, *, recompute: bool) -> bool:
        """Whether a pass over so many tokens fits."""
        needed = pass_gib(
            self.config,
            num_tokens,
            self.dtype,
            recompute=recompute,
            more_adapters=self.more_adapters,
        )
        return needed <= _USABLE * self.free_gib - _REST_GIB

    def longest_pack(self, recompute: bool | None = None) -> int:
        """Tokens of the longest pack that fits.

        Recomputing activations costs a third of the speed, so it is counted on only where otherwise
        not even packs of 2,048 tokens fit.

        Args:
            recompute: what the user wants, or None.
        """
        choices = [(length, False) for length in PACK_LENGTHS[:3]]
        choices += [(length, True) for length in PACK_LENGTHS]
        for length, does_recompute in choices:
            wanted = recompute in (None, does_recompute)
            if wanted and self.holds(length, recompute=does_recompute):
                return length
        return PACK_LENGTHS[-1]
