"""What PEFT's LoRA adds to a linear, as tensors."""

import sys
from typing import Any, TypeGuard

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
