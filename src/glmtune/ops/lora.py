"""A frozen linear with a LoRA adapter beside it, and its dropout.

Shapes: T tokens, I inputs and O outputs of the linear, R rank.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from glmtune.ops.linear import Frozen, frozen_linear


class LowRank(NamedTuple):
    """The update ``scale * B @ A`` of a weight: what an adapter adds to one linear."""

    a_RI: Tensor
    b_OR: Tensor
    scale: float


class Dropout(NamedTuple):
    """Dropout whose mask is a function of the seed and the position, and is never stored.

    The backward pass computes it again; so do a resumed run and a recomputed layer. The rate is a
    tensor, so that one compiled function serves for training and, at rate 0, for evaluation.
    """

    seed: Tensor
    """An int32 scalar."""
    below: Tensor
    """An int32 scalar: positions whose hash is below it are dropped."""
    scale: Tensor
    """A float32 scalar, ``1 / (1 - rate)``."""

    def __call__(self, x_TI: Tensor) -> Tensor:
        """Drop elements of ``(T, I)``."""
        num_tokens, width = x_TI.shape
        token_T = torch.arange(num_tokens, dtype=torch.int32, device=x_TI.device)
        column_I = torch.arange(width, dtype=torch.int32, device=x_TI.device)
        is_kept = hash_int32((token_T[:, None] * width + column_I) ^ self.seed) >= self.below
        return torch.where(is_kept, x_TI * self.scale.to(x_TI.dtype), 0)


def hash_int32(x: Tensor) -> Tensor:
    """Spread int32 numbers evenly over all int32 numbers, one to one.

    The 32-bit mixer "lowbias32" of C. Wellons (nullprogram.com, "Prospecting for Hash Functions",
    2018), whose logical shifts are written with masks, as torch's int32 is signed.
    """
    x = (x ^ ((x >> 16) & 0xFFFF)) * 0x7FEB352D
    x = (x ^ ((x >> 15) & 0x1FFFF)) * (0x846CA68B - 2**32)
    return x ^ ((x >> 16) & 0xFFFF)


def lora_factors(
    x_TI: Tensor, adapter: LowRank, dropout: Dropout | None = None
) -> tuple[Tensor, Tensor]:
    """The two factors of an adapter's update: ``(T, R)`` and ``(O, R)``, in the type of x."""
    a_RI, b_OR = adapter.a_RI.to(x_TI.dtype), (adapter.scale * adapter.b_OR).to(x_TI.dtype)
    return (x_TI if dropout is None else dropout(x_TI)) @ a_RI.T, b_OR


def lora_linear(
    x_TI: Tensor, frozen: Frozen, adapter: LowRank | None, dropout: Dropout | None = None
) -> Tensor:
    """``x @ W^T + bias + scale * dropout(x) @ A^T @ B^T``: ``(T, O)``.

    Args:
        x_TI: inputs in the compute type, in which the adapter computes, too.
        frozen: the linear.
        adapter: None where the linear has none.
        dropout: dropout of the adapter's input; None for none.
    """
    y_TO = frozen_linear(x_TI, frozen)
    if adapter is None:
        return y_TO
    inner_TR, b_OR = lora_factors(x_TI, adapter, dropout)
    # Add in float32: the compiler fuses that with what follows. A sum in the products' own type
    # becomes an addmm, which first copies y, at twice the traffic.
    return (y_TO.float() + (inner_TR @ b_OR.T).float()).to(y_TO.dtype)
