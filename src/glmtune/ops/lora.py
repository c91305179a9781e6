"""A frozen linear with a LoRA adapter beside it, and its dropout.

Shapes: T tokens, I inputs and O outputs of the linear, R rank.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from glmtune.ops import MOST_RANK
from glmtune.ops.linear import Frozen, frozen_linear

# Linears of one input whose products a kernel of compiled layers holds in registers.
_MOST_LINEARS = 3
Factors = tuple[Tensor, Tensor]
"""Two factors of what an adapter adds to a linear's output: see `lora_factors`."""


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
    factor: Tensor | None = None
    """An int32 scalar, taken as odd, for linears that read the same input: it spreads the hash of
    their one seed anew, so that each has a mask of its own for one more multiplication."""

    def __call__(self, x_TI: Tensor) -> Tensor:
        """Drop elements of ``(T, I)``."""
        num_tokens, width = x_TI.shape
        token_T = torch.arange(num_tokens, dtype=torch.int32, device=x_TI.device)
        column_I = torch.arange(width, dtype=torch.int32, device=x_TI.device)
        hashed = hash_int32((token_T[:, None] * width + column_I) ^ self.seed)
        if self.factor is not None:
            hashed = hashed * (self.factor | 1)
        return torch.where(hashed >= self.below, x_TI * self.scale.to(x_TI.dtype), 0)


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
    dropped_TI = x_TI if dropout is None else dropout(x_TI)
    return dropped_TI @ adapter.a_RI.to(x_TI.dtype).T, _scaled(adapter, x_TI)


def fork_factors(
    x_TI: Tensor, adapters: Sequence[LowRank | None], dropouts: Sequence[Dropout | None]
) -> tuple[Tensor, list[Factors | None]]:
    """The factors of several linears' adapters, and the input as the frozen linears should take it.

    In compiled layers on a GPU one kernel makes the inner products of all, and one of the backward
    pass adds up the gradients of the input from both. Elsewhere the input is returned as it came.

    Args:
        x_TI: inputs of all of them.
        adapters: None where a linear has none.
        dropouts: one for each linear; None for none.
    """
    found = [(adapter, drop) for adapter, drop in zip(adapters, dropouts, strict=True) if adapter]
    drops = [drop for _, drop in found if drop is not None]
    ranks = {len(adapter.a_RI) for adapter, _ in found}
    fits = len(ranks) == 1 and max(ranks) <= MOST_RANK and len(found) <= _MOST_LINEARS
    if not (fits and drops and has_kernels(x_TI)):
        return x_TI, [
            lora_factors(x_TI, adapter, drop) if adapter else None
            for adapter, drop in zip(adapters, dropouts, strict=True)
        ]
    from glmtune.ops.dropped_kernels import fork

    first = drops[0]
    factors = [drop.factor for drop in drops if drop.factor is not None]
    assert len(factors) == (0 if first.factor is None else len(found))
    assert factors or len(found) == 1
    a = [adapter.a_RI for adapter, _ in found]
    x_TI, lows = fork(x_TI, a, first.seed, factors, first.below, first.scale)
    rest = iter(lows)
    return x_TI, [(next(rest), _scaled(adapter, x_TI)) if adapter else None for adapter in adapters]


def has_kernels(x: Tensor) -> bool:
    """Whether the kernels of forks and gates serve these activations: 16 bits in compiled layers.

    In float32, where no kernel is needed for speed, torch 2.11 compiles `dropped_kernels.fork`
    without any gradient for the products of the adapters (docs/log.md).
    """
    return torch.compiler.is_compiling() and x.is_cuda and x.dtype.itemsize == 2


def padded_rank(rank: int) -> int:
    """Columns that the kernels of packed rows give a rank: a power of two, at least 16."""
    return max(16, 1 << (rank - 1).bit_length())


def _scaled(adapter: LowRank, like: Tensor) -> Tensor:
    return (adapter.scale * adapter.b_OR).to(like.dtype)


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
    x_TI, (update,) = fork_factors(x_TI, [adapter], [dropout])
    return add_update(frozen_linear(x_TI, frozen), update)


def add_update(y_TO: Tensor, update: Factors | None) -> Tensor:
    """A linear's output with what its adapter adds."""
    if update is None:
        return y_TO
    inner_TR, b_OR = update
    # Add in float32: the compiler fuses that with what follows. A sum in the products' own type
    # becomes an addmm, which first copies y, at twice the traffic.
    return (y_TO.float() + (inner_TR @ b_OR.T).float()).to(y_TO.dtype)


def gated_linears(
    x_TI: Tensor,
    wide: tuple[Frozen, LowRank | None],
    narrow: tuple[Frozen, LowRank | None],
    dropouts: tuple[Dropout | None, Dropout | None],
) -> Tensor:
    """Two linears with a gate between them: an MLP, ``(T, I)`` to ``(T, O)``.

    The first half of the first linear's outputs, through SiLU, times the second half is what the
    second linear takes.

    Args:
        x_TI: inputs in the compute type.
        wide: the first linear, with its adapter.
        narrow: the second.
        dropouts: of their adapters' inputs; None for none.
    """
    (frozen, adapter), (last, last_adapter), (drop, last_drop) = wide, narrow, dropouts
    x_TI, (update,) = fork_factors(x_TI, [adapter], [drop])
    y_TO = frozen_linear(x_TI, frozen)
    if not has_kernels(y_TO):
        first, second = add_update(y_TO, update).chunk(2, -1)
        return lora_linear(F.silu(first) * second, last, last_adapter, last_drop)
    from glmtune.ops.gate_kernels import Gate, GateFork, UpdatedGate

    if update is not None and update[0].shape[1] > MOST_RANK:
        y_TO, update = add_update(y_TO, update), None
    if last_drop is None or last_adapter is None or len(last_adapter.a_RI) > MOST_RANK:
        inner = Gate.apply(y_TO) if update is None else UpdatedGate.apply(y_TO, *update)
        return lora_linear(inner, last, last_adapter, last_drop)
    a_1RI = last_adapter.a_RI.to(y_TO.dtype)[None]
    inner, low_TR = GateFork.apply(
        y_TO, *(update or (None, None)), a_1RI, last_drop.seed, last_drop.below, last_drop.scale
    )
    return add_update(frozen_linear(inner, last), (low_TR, _scaled(last_adapter, inner)))
