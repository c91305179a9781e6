"""An adapter in its family's own names and shapes, whatever those it was saved in; and back.

A family says what its linears are called elsewhere (`models.family.AdapterNames`); here tensors and
settings become updates by module, which those functions rename, cut and join, and become an adapter
again: plain LoRA with a rank and an alpha for each module.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import fields, replace
from typing import Any

from peft import LoraConfig, TaskType
from peft.utils.other import get_pattern_key

from glmtune.adapters.biases import BASE_BIAS
from glmtune.adapters.formats import KEY_PREFIX, SUFFIX_A, SUFFIX_B, Adapter
from glmtune.errors import UserError
from glmtune.models.families import FAMILIES, Family
from glmtune.models.family import AdapterNames
from glmtune.ops.lora import LowRank

# Settings that say how an adapter was trained, or that the updates have in them.
_CARRIED = {
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
    "inference_mode", "r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules",
    "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "use_rslora",
    "fan_in_fan_out", "bias", "init_lora_weights", "megatron_config", "megatron_core",
    "loftq_config", "eva_config", "runtime_config",
}  # fmt: skip
# Other ways to begin change the base's weights as well.
_PLAIN_BEGINNINGS = (True, False, None, "gaussian", "orthogonal", "eva")


def in_own_names(adapter: Adapter, names: AdapterNames | None, config: Any = None) -> Adapter:
    """The same update in the names of the family's model class; `adapter` itself where it is.

    Args:
        adapter: in any naming; what no naming knows keeps its name.
        names: the family's.
        config: the base's; None where it is not known.

    Raises:
        UserError: it is no plain LoRA adapter, or its tensors contradict each other or the base.
    """
    if names is None or not any(map(names.is_foreign, adapter.modules)):
        return adapter
    if adapter.config.bias != "lora_only":
        return in_names(adapter, names.to_own, config)
    biases, plain = _biases_apart(adapter)
    renamed = in_names(plain, names.to_own, config)
    with_biases = copy(renamed.config)
    with_biases.bias = "lora_only"
    parts = {
        f"{KEY_PREFIX}{module}{BASE_BIAS}": update.b_OR[:, 0]
        for module, update in names.to_own(biases, config).items()
    }
    return replace(renamed, config=with_biases, weights=renamed.weights | parts)


def _biases_apart(adapter: Adapter) -> tuple[dict[str, LowRank], Adapter]:
    """The biases of adapted linears, and the adapter without them.

    A bias is written as a matrix of one column, so that it is renamed and cut as its linear is.
    """
    biases, weights = {}, dict(adapter.weights)
    for module in adapter.modules:
        bias = weights.pop(f"{KEY_PREFIX}{module}{BASE_BIAS}", None)
        if bias is not None:
            a_RI = weights[KEY_PREFIX + module + SUFFIX_A]
            biases[module] = LowRank(a_RI[:1], bias[:, None], 1.0)
    config = copy(adapter.config)
    config.bias = "none"
    return biases, replace(adapter, config=config, weights=weights)


def in_published_names(adapter: Adapter, family: Family, config: Any = None) -> Adapter:
    """The same update in the names of the publisher's own code.

    Args:
        adapter: in the names of the family's model class.
        family: the family.
        config: the base's; None where it is not known.

    Raises:
        UserError: the family has no other names, or the adapter cannot be written in them.
    """
    names = family.adapter_names
    if names is None or names.to_published is None:
        raise UserError(
            f"{adapter.path}: is of {family.name}, whose published code has no names but these; "
            "leave --to out"
        )
    if others := [module for module in adapter.modules if not names.is_own(module)]:
        raise UserError(
            f"{adapter.path}: adapts {others[0]}, which the publisher's code has no linear for; "
            "train on linears of the layers, or leave --to out"
        )
    return in_names(adapter, names.to_published, config)


def family_of_adapter(adapter: Adapter) -> Family | None:
    """The family that an adapter is of: by the published base that it names, or by its linears.

    Of several with the same linears it is one that has published names of its own.
    """
    name = adapter.config.base_model_name_or_path
    if by_name := next((family for family in FAMILIES if name in family.published), None):
        return by_name
    fitting = families_with(adapter)
    with_names = (f for f in fitting if f.adapter_names and f.adapter_names.to_published)
    return next(with_names, fitting[0] if fitting else None)


def families_with(adapter: Adapter) -> list[Family]:
    """The families that have linears of the names that an adapter adapts."""
    return [family for family in FAMILIES if _has_any(family.adapter_names, adapter.modules)]


def _has_any(names: AdapterNames | None, modules: list[str]) -> bool:
    return names is not None and any(names.is_own(m) or names.is_foreign(m) for m in modules)


def in_names(
    adapter: Adapter,
    rename: Callable[[Mapping[str, LowRank], Any], dict[str, LowRank]],
    config: Any,
) -> Adapter:
    """The same update in the names and shapes that a family's function gives.

    Raises:
        UserError: it is no plain LoRA adapter, or its tensors contradict each other or the base.
    """
    _check_plain(adapter)
    try:
        updates = rename(updates_of(adapter), config)
    except UserError as error:
        raise UserError(f"{adapter.path}: {error}") from error
    weights = {}
    for module, update in updates.items():
        weights[KEY_PREFIX + module + SUFFIX_A] = update.a_RI
        weights[KEY_PREFIX + module + SUFFIX_B] = update.b_OR
    return replace(adapter, config=_config(adapter.config, updates), weights=weights)


def _check_plain(adapter: Adapter) -> None:
    """Refuse what is more than a product of two matrices for each linear.

    Raises:
        UserError: it is, such as DoRA, biases and modules trained whole.
    """
    if odd := beyond_plain(adapter):
        raise UserError(
            f"{adapter.path}: has {', '.join(odd[:3])}, but only plain LoRA on linears can be "
            "written in other names; use it with the code that it was trained with, or merge it "
            "there"
        )


def beyond_plain(adapter: Adapter) -> list[str]:
    """What an adapter has besides a product of two matrices for each linear, by name."""
    defaults = LoraConfig()
    odd = [
        field.name
        for field in fields(LoraConfig)
        if field.name not in _CARRIED
        and getattr(adapter.config, field.name) != getattr(defaults, field.name)
    ]
    if adapter.config.bias != "none":
        odd.append("bias")
    if adapter.config.init_lora_weights not in _PLAIN_BEGINNINGS:
        odd.append(f"init_lora_weights {adapter.config.init_lora_weights!r:.40}")
    return odd + [key for key in adapter.weights if not key.endswith((SUFFIX_A, SUFFIX_B))][:1]


def check_plain(adapter: Adapter, told: str, instead: str) -> None:
    """Refuse what is more than a product of two matrices for each linear.

    Args:
        adapter: the adapter.
        told: the setting that asks for it, for the message.
        instead: what to do, for the message.

    Raises:
        UserError: it is, such as DoRA, biases and modules trained whole.
    """
    if odd := beyond_plain(adapter):
        raise UserError(
            f"{told}: {adapter.path} has {', '.join(odd[:3])}, and only plain LoRA on linears can "
            f"be written so; {instead}"
        )


def updates_of(adapter: Adapter) -> dict[str, LowRank]:
    """What the adapter adds to each module, scaled as PEFT does.

    Raises:
        UserError: a tensor is missing, or is not of the rank that the settings say.
    """
    config, updates = adapter.config, {}
    for module in adapter.modules:
        keys = KEY_PREFIX + module + SUFFIX_A, KEY_PREFIX + module + SUFFIX_B
        if missing := [key for key in keys if key not in adapter.weights]:
            raise UserError(f"{missing[0]} is missing; get the whole file again")
        a_RI, b_OR = (adapter.weights[key] for key in keys)
        rank, alpha = (
            pattern.get(get_pattern_key([*pattern], module), default)
            for pattern, default in (
                (config.rank_pattern or {}, config.r),
                (config.alpha_pattern or {}, config.lora_alpha),
            )
        )
        for key, shape, fits in (
            (keys[0], list(a_RI.shape), a_RI.ndim == 2 and len(a_RI) == rank),
            (keys[1], list(b_OR.shape), b_OR.ndim == 2 and b_OR.shape[1] == rank),
        ):
            if not fits:
                raise UserError(
                    f"{key} has shape {shape}, but adapter_config.json says rank {rank!r:.99}; the "
                    "config is of another adapter"
                )
        if (
            isinstance(alpha, bool)
            or not isinstance(alpha, int | float)
            or not math.isfinite(alpha)
        ):
            raise UserError(f"alpha_pattern: {alpha!r:.99} of {module} is no number; correct it")
        scale = alpha / (math.sqrt(rank) if config.use_rslora else rank)
        updates[module] = LowRank(a_RI, b_OR, scale)
    # A lora_B without lora_A is of no module.
    if orphans := adapter.weights.keys() - {
        KEY_PREFIX + module + suffix for module in updates for suffix in (SUFFIX_A, SUFFIX_B)
    }:
        raise UserError(f"{min(orphans)} is there without its lora_A; get the whole file again")
    return updates


def _config(old: LoraConfig, updates: Mapping[str, LowRank]) -> LoraConfig:
    """Settings with which PEFT gives each module its rank and its scale.

    The same key stands in both patterns, as versions of PEFT that look for one in both want it.
    """
    sizes = {module: (len(u.a_RI), _whole(u.scale * len(u.a_RI))) for module, u in updates.items()}
    ((rank, alpha), _), *_ = Counter(sizes.values()).most_common(1)
    by_name = defaultdict(set)
    for module, size in sizes.items():
        by_name[module.rpartition(".")[2]].add(size)
    patterns = {}
    for module, size in sizes.items():
        name = module.rpartition(".")[2]
        if by_name[name] != {(rank, alpha)}:
            patterns[name if len(by_name[name]) == 1 else module] = size
    # Whole names where the adapter leaves out layers on purpose; else a missing one is noticed.
    targets = old.target_modules or ()
    is_partial = old.layers_to_transform is not None or any("." in name for name in targets)
    return LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]
        lora_dropout=old.lora_dropout,
        target_modules=sorted(sizes if is_partial else by_name),
        rank_pattern={key: size[0] for key, size in patterns.items()},
        alpha_pattern={key: size[1] for key, size in patterns.items()},
        base_model_name_or_path=old.base_model_name_or_path,
    )


def _whole(alpha: float) -> int | float:
    """An integer where it is one but for rounding."""
    return round(alpha) if math.isclose(alpha, round(alpha), rel_tol=1e-12) else alpha
