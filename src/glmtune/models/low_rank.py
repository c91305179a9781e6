"""What PEFT's LoRA adds to a linear, as tensors.

Shapes: I inputs and O outputs of a linear, R rank.
"""

import sys
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, TypeGuard

import torch
from torch import nn

from glmtune.ops.lora import LowRank


def has_lora(linear: nn.Module) -> TypeGuard[Any]:
    """Whether a linear is one of PEFT's, which imports much: where it is not, nothing is."""
    if "peft" not in sys.modules:
        return False
    from peft.tuners.lora import LoraLayer

    return isinstance(linear, LoraLayer)


def split_lora(linear: nn.Module) -> tuple[nn.Module, tuple[LowRank, ...]]:
    """A linear without its adapter, and the updates that are in effect on it now.

    There are none where the adapter is disabled, or merged into the weight already. The linear may
    be of any kind, also quantised; one with an adapter other than plain LoRA is returned unchanged.
    """
    if not has_lora(linear):
        return linear, ()
    if linear.merged or linear.disable_adapters:
        return linear.get_base_layer(), ()
    names = [name for name in linear.active_adapters if name in linear.lora_A]
    if any(name in linear.lora_variant for name in names):  # DoRA and the like
        return linear, ()
    a, b = (
        {name: linear.get_parameter(f"{side}.{name}.weight") for name in names}
        for side in ("lora_A", "lora_B")
    )
    updates = tuple(LowRank(a[name], b[name], linear.scaling[name]) for name in names)
    return linear.get_base_layer(), updates


def cut_update(update: LowRank, rows: Sequence[int]) -> list[LowRank]:
    """The updates of linears whose outputs lie one after another in those of a fused one.

    All share A; a part keeps only those rows of it that its own rows of B use.

    Args:
        update: of the fused linear.
        rows: outputs of each part; together O.
    """
    parts = []
    for b_OR in update.b_OR.split(list(rows)):
        used_R = b_OR.any(0)
        if not used_R.any():
            used_R[:] = True  # an update of zeros stays one, and its rank the others'
        # Copies, because files cannot hold tensors that share memory.
        parts.append(LowRank(update.a_RI[used_R], b_OR[:, used_R], update.scale))
    return parts


def join_updates(parts: Sequence[LowRank | None], rows: Sequence[int]) -> LowRank:
    """The update of a fused linear whose outputs are those of several, one after another.

    Parts with the same A share it; each other A adds its rank, and B is block diagonal::

               A of q   A of v
            q   B of q     0
            k     0        0     (no update)
            v     0      B of v

    Args:
        parts: the updates, None for a part without; not all of them.
        rows: outputs of each part.
    """
    given = [part for part in parts if part is not None]
    scale = max((part.scale for part in given), key=abs) or 1.0
    factors: list[torch.Tensor] = []
    places = []
    for part in given:
        same = (i for i, a_RI in enumerate(factors) if torch.equal(a_RI, part.a_RI))
        places.append(next(same, len(factors)))
        if places[-1] == len(factors):
            factors.append(part.a_RI)
    first_column = [0, *accumulate(len(a_RI) for a_RI in factors)]
    b_OR = given[0].b_OR.new_zeros(sum(rows), first_column[-1])
    place = iter(places)
    for each, end, count in zip(parts, accumulate(rows), rows, strict=True):
        if each is not None:
            first = first_column[next(place)]
            block = b_OR[end - count : end, first : first + len(each.a_RI)]
            block.copy_(each.b_OR * (each.scale / scale))
    return LowRank(torch.cat(factors), b_OR, scale)
