"""A frozen linear with a LoRA adapter beside it, and its dropout.

Shapes: T tokens, K inputs and N outputs of the linear, R rank.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from glmtune.ops.linear import Frozen, frozen_linear


class Adapter(NamedTuple):
    """The update ``scale * B @ A`` of a weight; A and B are float32, and nothing else trains."""

    a_RK: Tensor
    b_NR: Tensor
    scale: float


class Dropout(NamedTuple):
    """Dropout whose mask is a function of the seed and the place, and is never stored.

    The way back computes it again; so does a resumed run, and a recomputed layer. The rate is a
    tensor: what is compiled serves for training and, at rate 0, for evaluation.
    """

    seed: Tensor
    """An int32 scalar."""
    below: Tensor
    """An int32 scalar: what is dropped are the places whose hash is below it."""
    scale: Tensor
    """A float32 scalar, ``1 / (1 - rate)``."""

    def __call__(self, x_TK: Tensor) -> Tensor:
        """Drop elements of ``(T, K)``."""
        num_tokens, width = x_TK.shape
        token_T = torch.arange(num_tokens, dtype=torch.int32, device=x_TK.device)
        column_K = torch.arange(width, dtype=torch.int32, device=x_TK.device)
        is_kept = hash_int32((token_T[:, None] * width + column_K) ^ self.seed) >= self.below
        return torch.where(is_kept, x_TK * self.scale.to(x_TK.dtype), 0)


def hash_int32(x: Tensor) -> Tensor:
    """Spread int32 numbers evenly over all int32 numbers, one to one.

    The 32-bit mixer "lowbias32" of C. Wellons (nullprogram.com, "Prospecting for Hash Functions",
    2018), whose logical shifts are written with masks, as torch's int32 is signed.
    """
    x = (x ^ ((x >> 16) & 0xFFFF)) * 0x7FEB352D
    x = (x ^ ((x >> 15) & 0x1FFFF)) * (0x846CA68B - 2**32)
    return x ^ ((x >> 16) & 0xFFFF)


def lora_factors(
    x_TK: Tensor, adapter: Adapter, dropout: Dropout | None = None
) -> tuple[Tensor, Tensor]:
    """Two factors of what an adapter adds: ``(T, R)`` and ``(N, R)``, in the type of x."""
    a_RK, b_NR = adapter.a_RK.to(x_TK.dtype), (adapter.scale * adapter.b_NR).to(x_TK.dtype)
    return (x_TK if dropout is None else dropout(x_TK)) @ a_RK.T, b_NR


def lora_linear(
    x_TK: Tensor, frozen: Frozen, adapter: Adapter | None, dropout: Dropout | None = None
) -> Tensor:
    """``x @ W^T + bias + scale * dropout(x) @ A^T @ B^T``: ``(T, N)``.

    Args:
        x_TK: in the compute type, in which the adapter computes, too.
        frozen: the linear.
        adapter: None where the linear has none.
        dropout: of the adapter's input; None for none.
    """
    y_TN = frozen_linear(x_TK, frozen)
    if adapter is None:
        return y_TN
    inner_TR, b_NR = lora_factors(x_TK, adapter, dropout)
    # In float32, where the compiler joins the sum to what follows. Of a sum in the type of the
    # products it would make one more product that copies y first, at twice the traffic.
    return (y_TN.float() + (inner_TR @ b_NR.T).float()).to(y_TN.dtype)
