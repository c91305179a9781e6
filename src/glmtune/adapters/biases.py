"""Biases that belong to an adapter: values that replace the base's own.

PEFT trains them with `bias: "lora_only"` (of the adapted modules) or `"all"`. In files of 2023 an
adapted module's bias is called `<module>.bias`; today's PEFT has the module under `base_layer`,
loads the bias by that name only, and silently ignores any other.
"""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

from peft import LoraConfig, PeftModel
from torch import Tensor, nn

from glmtune.errors import UserError

_BIAS, BASE_BIAS, _LORA_A = ".bias", ".base_layer.bias", ".lora_A.weight"


def name_biases(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, with biases of adapted modules under the names of today's PEFT."""

    def name(key: str) -> str:
        stem = key.removesuffix(_BIAS)
        return stem + BASE_BIAS if key != stem and stem + _LORA_A in weights else key

    return {name(key): tensor for key, tensor in weights.items()}


def bias_setting(weights: Mapping[str, Tensor]) -> str:
    """The value of `bias` in adapter_config.json for an adapter with these tensors."""
    biases = [key for key in weights if _is_bias(key)]
    if all(key.endswith(BASE_BIAS) for key in biases):
        return "lora_only" if biases else "none"
    return "all"


def biases_in_effect(peft_model: PeftModel) -> dict[str, Tensor]:
    """The biases that belong to the attached adapter according to its settings; not copies."""
    config = peft_model.peft_config["default"]
    assert isinstance(config, LoraConfig)
    suffix = {"none": (), "lora_only": (BASE_BIAS,), "all": (_BIAS,)}[config.bias]
    tensors = {**dict(peft_model.named_parameters()), **dict(peft_model.named_buffers())}
    return {
        key: tensor for key, tensor in tensors.items() if _is_bias(key) and key.endswith(suffix)
    }


def restore_when_disabled(peft_model: PeftModel, of_base: Mapping[str, Tensor]) -> None:
    """Let `disable_adapter` restore the base's biases as well, which PEFT's does not.

    Both biases are separate parameters, so that tensors read from the model meanwhile stay valid.

    Args:
        peft_model: has the adapter's biases in place of the base's, or is about to get them.
        of_base: copies of the base's biases.

    Raises:
        UserError: a module cannot hold two biases, as in a quantised base.
    """
    if not of_base:
        return
    slots = []
    for key, tensor in of_base.items():
        module = peft_model.get_submodule(key.removesuffix(_BIAS))
        if not isinstance(module.bias, nn.Parameter) or type(module) not in (
            nn.Linear,
            nn.LayerNorm,
        ):
            raise UserError(
                "this adapter has biases, which a quantised base has no place for; put it on a "
                "base in 16 bits, or merge it (`glmtune merge`) and quantise that"
            )
        slots.append((module, nn.Parameter(tensor, requires_grad=False), module.bias))
    disable = peft_model.disable_adapter

    @contextmanager
    def disable_adapter() -> Iterator[None]:
        with ExitStack() as stack:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Careful, disabling adapter layers with bias")
                stack.enter_context(disable())
            for module, of_base, tuned in slots:
                stack.callback(setattr, module, "bias", tuned)
                module.bias = of_base
            yield

    peft_model.disable_adapter = disable_adapter  # type: ignore[method-assign]


def _is_bias(key: str) -> bool:
    return key.endswith(_BIAS) and ".lora_" not in key
