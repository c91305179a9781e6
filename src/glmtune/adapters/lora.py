"""LoRA on a model in memory: attach it, load it, save it."""

import warnings
from collections import defaultdict
from collections.abc import Container, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from glmtune.adapters.biases import biases_in_effect, restore_when_disabled
from glmtune.adapters.formats import Adapter, read_adapter, write_adapter
from glmtune.adapters.naming import (
    beyond_plain,
    families_with,
    family_of_adapter,
    in_own_names,
)
from glmtune.errors import UserError, note
from glmtune.models.families import family_of, find_family
from glmtune.models.family import layers_of
from glmtune.models.shape import find_targets
from glmtune.run_files import ADAPTER_CONFIG_FILE


def attach_lora(
    model: PreTrainedModel,
    *,
    rank: int = 8,
    alpha: float = 32,
    dropout: float = 0.1,
    targets: str | Sequence[str] | None = None,
) -> PeftModel:
    """Put a new LoRA adapter on a model, in place; afterwards only the adapter trains.

    The adapter's weights are float32 whatever the base's type, and are initialised as in PEFT
    (lora_B zero, lora_A drawn from torch's generator).

    Args:
        model: the base model.
        rank: r, the inner size of the adapter.
        alpha: the adapter's output is scaled by alpha / r.
        dropout: share of the adapter's input that is dropped while training.
        targets: last names of the linears to adapt, as a list or separated by commas; "all" for
            every linear but the head. By default the family's own choice.

    Raises:
        UserError: the model, or a layer of it, lacks a target (the message lists those it has), or
            it already has an adapter.
    """
    family = find_family(model.config.to_dict())
    if targets is None:
        targets = family_of(model.config).lora_target
    names = targets.split(",") if isinstance(targets, str) else targets
    wanted = [name.strip() for name in names]
    other_names = family.other_names if family else {}
    adapted = find_targets(wanted, "this model", tuple(_linear_names(model)), other_names)
    if lacking := _layers_without(model, adapted):
        raise UserError(
            f"lora_target: {_in_some_layers(model, lacking)}; name linears that each layer has"
        )
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]
        lora_dropout=dropout,
        target_modules=sorted(adapted),
    )
    return _wrap(model, config)


def save_adapter(peft_model: PeftModel, folder: str | Path, base_name: str) -> None:
    """Write the adapter in today's PEFT format, as `PeftModel.from_pretrained` loads it.

    Args:
        peft_model: a model from `attach_lora` or `load_adapter`.
        folder: a new folder appears whole; in an existing one, the adapter's two files are
            replaced.
        base_name: hub id or bare name of the base; a path is cut to its last name.

    Raises:
        UserError: the folder cannot be written.
    """
    config = peft_model.peft_config["default"]
    assert isinstance(config, LoraConfig)
    write_adapter(config, adapter_weights(peft_model), folder, base_name)


def load_adapter(model: PreTrainedModel, folder: str | Path) -> PeftModel:
    """Put the adapter of a folder, of any format since 2023, on a base model, in place, for use.

    Linears may have other names there, those of the publisher's code for example, and be cut or
    fused otherwise: see `adapters.naming`. The adapter's weights stay float32 on a base of any
    type. What had to be assumed about an old folder is printed as a note on stderr, and so is that
    an adapter leaves out layers.

    Args:
        model: the base model.
        folder: an adapter folder, or a run folder, whose newest checkpoint is taken.

    Returns:
        The model in evaluation mode; nothing of it trains.

    Raises:
        UserError: there is no adapter, or it cannot be read, does not fit this base tensor by
            tensor, or has no effect. The base then has no adapter.
    """
    adapter = read_adapter(folder)
    adapter.check_effect()
    note(*adapter.notices)
    return _put_on(model, adapter).eval()


def continue_adapter(model: PreTrainedModel, adapter: Adapter, dropout: float) -> PeftModel:
    """Put an adapter on a base model, in place, to continue its training.

    Args:
        model: the base model.
        adapter: see `read_to_continue`.
        dropout: share of its input that is dropped while training, whatever it was before.

    Returns:
        The model, of which the adapter alone trains.

    Raises:
        UserError: it does not fit this base tensor by tensor. The base then has no adapter.
    """
    return _put_on(model, adapter, dropout)


def read_to_continue(folder: str | Path, config: PreTrainedConfig | Any) -> Adapter:
    """Read an adapter of any format since 2023 in a base's own names, to continue its training.

    Args:
        folder: an adapter folder, or a run folder, whose newest checkpoint is taken.
        config: of the base model.

    Raises:
        UserError: there is no adapter, it cannot be read or has no effect, or holds more than the
            weights that training moves.
    """
    adapter = read_adapter(folder)
    adapter.check_effect()
    note(*adapter.notices)
    if family := find_family(config.to_dict()):
        adapter = in_own_names(adapter, family.adapter_names, config)
    odd = beyond_plain(adapter)
    if odd and not adapter.config.use_dora:
        raise UserError(
            f"{adapter.path}: has {', '.join(odd[:3])}, and only plain LoRA and DoRA are trained "
            "here; merge it into its base, and train a new adapter on that (--base MERGED)"
        )
    return adapter


def _put_on(model: PreTrainedModel, adapter: Adapter, dropout: float | None = None) -> PeftModel:
    """Put an adapter on a base, in place: for use, or with a dropout to train on."""
    adapter = _for_model(adapter, model)
    trained_on = adapter.config.base_model_name_or_path
    adapter.config.inference_mode = dropout is None
    if dropout is not None:
        adapter.config.lora_dropout = dropout
    adapter.config.base_model_name_or_path = None  # PEFT would warn that the base has another path
    peft_model = _wrap(model, adapter.config)
    biases = {key: tensor.detach().clone() for key, tensor in biases_in_effect(peft_model).items()}
    try:
        restore_when_disabled(peft_model, biases)
        _fill(peft_model, adapter, trained_on)
    except UserError:
        peft_model.unload()
        raise
    adapted = set(adapter.modules)
    present = (name for name, _ in model.named_modules() if name in adapted)
    names = dict.fromkeys(name.rpartition(".")[2] for name in present)
    if lacking := _layers_without(model, names, adapted):
        note(f"{adapter.path}: adapts only {_in_some_layers(model, lacking)}")
    return peft_model


def restore_adapter(peft_model: PeftModel, folder: str | Path) -> None:
    """Copy a checkpoint's adapter into the one attached to a model, to resume training.

    Unlike `load_adapter` it accepts an adapter whose lora_B is still zero: a run may be resumed
    from a checkpoint within its warm-up.

    Raises:
        UserError: there is no adapter, or its tensors are not those of the attached adapter.
    """
    adapter = read_adapter(folder)
    note(*adapter.notices)
    _fill(peft_model, adapter)


def _for_model(adapter: Adapter, model: PreTrainedModel) -> Adapter:
    """The adapter in the model's own names.

    Raises:
        UserError: it adapts no module of this model, or is of another family by the base it names.
    """
    config = model.config
    family = find_family(config.to_dict())
    if family:
        known = family_of_adapter(adapter)
        name = adapter.config.base_model_name_or_path
        if known and name in known.published and name not in family.published:
            whose = f"{adapter.path}: was trained on {name}, the base is {family.name}"
            if known.model_type != family.model_type:
                raise UserError(f"{whose}; pass --base {name}, or an adapter of this base")
            note(f"{whose}, whose layers are the same but whose weights are others")
        adapter = in_own_names(adapter, family.adapter_names, config)
    present = {name for name, _ in model.named_modules()}
    if any(module in present for module in adapter.modules):
        return adapter
    if others := [other.name for other in families_with(adapter)]:
        raise UserError(
            f"{adapter.path}: is an adapter of {' or '.join(others)}, as it adapts "
            f"{adapter.modules[0]}; the base is {family.name if family else 'of another family'}: "
            "pass the base that it was trained on as --base, or an adapter of this one"
        )
    raise UserError(
        f"{adapter.path}: this adapter fits no module of this base: it adapts "
        f"{', '.join(adapter.modules[:2])}..., the base's linears are "
        f"{', '.join(_linear_names(model))}; pass an adapter of this base"
    )


def _layers_without(
    model: PreTrainedModel, names: Iterable[str], adapted: Container[str] | None = None
) -> dict[str, int]:
    """Names of linears that some layers lack, to the number of layers that have them.

    Args:
        model: the base, with an adapter or without.
        names: last names of linears.
        adapted: whole names of those modules that count; by default all do.
    """
    layers = layers_of(model)
    (begin,) = (name for name, module in model.named_modules() if module is layers)
    places = [
        {
            name.rpartition(".")[2]
            for name, module in layer.named_modules()
            if (
                isinstance(module, nn.Linear)
                if adapted is None
                else f"{begin}.{number}.{name}" in adapted
            )
        }
        for number, layer in enumerate(layers)
    ]
    counts = {name: sum(name in of_layer for of_layer in places) for name in names}
    return {name: count for name, count in counts.items() if count < len(layers)}


def _in_some_layers(model: PreTrainedModel, counts: Mapping[str, int]) -> str:
    """Text for `_layers_without`: the names, those in equally many layers together."""
    names = defaultdict(list)
    for name, count in counts.items():
        names[count].append(name)
    num_layers = len(layers_of(model))
    return "; ".join(
        f"{', '.join(some)} in {count} of {num_layers} layers" for count, some in names.items()
    )


def _linear_names(model: PreTrainedModel) -> list[str]:
    """Last names of the model's linears, without the head, which may be tied to the embedding."""
    head = model.get_output_embeddings()
    linears = (
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    )
    return list(dict.fromkeys(name.rpartition(".")[2] for name in linears))


def _wrap(model: PreTrainedModel, config: LoraConfig) -> PeftModel:
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise UserError(
            "the model has an adapter on it already; unload() it, or load the base anew"
        )
    before = [(module, dict(module.named_children())) for module in model.modules()]
    try:
        with warnings.catch_warnings():
            # PEFT reads an attribute that transformers renamed, which gives a warning on every
            # call.
            warnings.simplefilter("ignore", FutureWarning)
            return get_peft_model(model, config)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # PEFT raises many kinds of exceptions for settings
        for module, children in before:  # it may have stopped half way
            for name in dict(module.named_children()).keys() - children.keys():
                delattr(module, name)
            for name, child in children.items():
                setattr(module, name, child)
        raise UserError(f"the adapter cannot be put on this model: {error!s:.300}") from error


def adapter_weights(peft_model: PeftModel) -> dict[str, torch.Tensor]:
    """The attached adapter's tensors under the keys of today's files; not copies."""
    # The default, "auto", looks for the base's config on the hub.
    tensors = get_peft_model_state_dict(peft_model, save_embedding_layers=False)
    # PEFT no longer knows which biases belong to an adapter.
    weights = {key: tensor for key, tensor in tensors.items() if ".lora_" in key}
    return weights | biases_in_effect(peft_model)


def _fill(peft_model: PeftModel, adapter: Adapter, trained_on: str | None = None) -> None:
    """Copy weights into the attached adapter after checking that every name and shape agrees."""
    whose = f"; it was trained on {trained_on}" if trained_on else ""
    shapes = {key: list(tensor.shape) for key, tensor in adapter.weights.items()}
    wanted = {key: list(tensor.shape) for key, tensor in adapter_weights(peft_model).items()}
    for key in wanted:
        if key in shapes and shapes[key] != wanted[key]:
            raise UserError(
                f"{adapter.path}: {key} has shape {shapes[key]}, but {wanted[key]} is wanted here; "
                f"it belongs to a base of another hidden size or to another {ADAPTER_CONFIG_FILE}"
                f"{whose}"
            )
    for keys, fault in (
        (shapes.keys() - wanted.keys(), "tensors that this base has no place for"),
        (wanted.keys() - shapes.keys(), "tensors too few"),
    ):
        if keys:
            raise UserError(
                f"{adapter.path}: {len(keys)} {fault}, first {min(keys)} ({len(shapes)} there, "
                f"{len(wanted)} wanted); pass an adapter of this base with its "
                f"{ADAPTER_CONFIG_FILE}{whose}"
            )
    set_peft_model_state_dict(peft_model, adapter.weights)
