"""transformers' `from_pretrained`, but strict: the files are checked against the model first."""

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME

from glmtune.data.files import read_json_object
from glmtune.errors import UserError
from glmtune.hardware import pick_device, pick_dtype
from glmtune.models import folders, weights
from glmtune.models.integer_weights import SCALE, IntegerModule
from glmtune.models.quantised import as_floats, check_quantising, finish_loading
from glmtune.models.shape import bits_of
from glmtune.run_files import ADAPTER_CONFIG_FILE

# What transformers' loader offers and a strict one does not.
_NOT_OFFERED = {
    "variant": "is not looked for, only model.safetensors, pytorch_model.bin and their indexes; "
    "leave it out, and rename the files",
    "subfolder": "is not looked into; leave it out, and join it to the folder's path",
    "gguf_file": "is of a format that is not read; pass a folder of safetensors or .bin files",
}
# What P-Tuning v2 trains, in THUDM's scripts.
_PREFIX = "prefix_encoder."
# Arguments of from_pretrained that a configuration has, too, but that are not meant for it.
_OF_LOADING = {"dtype", "torch_dtype", "quantization_config", "name_or_path"}


def read_strictly(
    model_class: Any,
    check_folder: Callable[..., None],
    name_or_path: Any,
    *args,
    config: Any = None,
    read: Callable[[Path, Any], dict[str, Tensor] | None] = lambda folder, config: None,
    **kwargs,
) -> Any:
    """Call `model_class.from_pretrained` after checking the folder; none of its code is run.

    Like transformers' own, but strict (no tensor is missing, extra or of another shape) and in the
    compute type of the machine: bfloat16 on a GPU that has it, float32 on a CPU. `dtype="auto"`
    keeps the type of the files. The weights of a published int8 or int4 folder stay packed. With
    transformers' `quantization_config` for bitsandbytes a float folder is quantised while it loads;
    one saved in quantised form is loaded unchanged. With `tie_word_embeddings=False` a tied head
    becomes a copy of the embedding.

    Args:
        model_class: a model class of transformers or of ours.
        check_folder: the folder check of its family.
        name_or_path: a published folder, one written by `save_pretrained`, or a hub id.
        args: see transformers.
        config: configuration of the model; by default the folder's.
        read: gives the tensors of a folder whose layout transformers does not read; None for
            others.
        kwargs: see transformers.

    Raises:
        UserError: one line that names what does not fit.
    """

    def load(*args, **kwargs) -> Any:
        return vars(PreTrainedModel)["from_pretrained"].__func__(model_class, *args, **kwargs)

    if name_or_path is None:  # the weights are given as a state_dict
        return load(None, *args, config=config, **kwargs)
    for name, reason in _NOT_OFFERED.items():
        if kwargs.get(name):
            raise UserError(f"from_pretrained({name}={kwargs[name]!r}): {reason}")
    hub = {key: kwargs[key] for key in folders.HUB_ARGUMENTS if key in kwargs}
    folder = folders.fetch(name_or_path, **hub)
    wish = kwargs.get("tie_word_embeddings")
    if not isinstance(config, model_class.config_class):
        names = vars(model_class.config_class()).keys() - _OF_LOADING
        changes = {name: kwargs.pop(name) for name in [*kwargs] if name in names}
        config = model_class.config_class.from_pretrained(config or folder, **changes)
    if bits := bits_of(config):
        check_quantising(f"{folder}: its quantization_config", bits, None)
    is_to_copy = not config.tie_word_embeddings
    try:
        check_folder(folder, config, model_class, must_tie=bool(wish))
    except UserError as error:
        if not kwargs.get("ignore_mismatched_sizes"):
            raise
        raise UserError(f"{error} (ignore_mismatched_sizes=True is not obeyed here)") from error
    is_to_copy = is_to_copy and config.tie_word_embeddings
    if kwargs.get("dtype", kwargs.get("torch_dtype")) is None:
        kwargs["dtype"], caution = pick_dtype(pick_device(), bf16=None, fp16=False)
        if caution:
            warnings.warn(caution, stacklevel=2)
    if (tensors := read(folder, config)) is not None:
        loaded = load(None, *args, config=config, state_dict=tensors, **kwargs)
    else:
        with weights.indexed(folder) as place:
            loaded = load(place, *args, config=config, **kwargs)
    model = loaded[0] if isinstance(loaded, tuple) else loaded
    if tensors is not None and (folder / GENERATION_CONFIG_NAME).is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    if model.get_output_embeddings() is not None and config.tie_word_embeddings:
        _finish_head(model, is_to_copy)
    if bits_of(model.config):
        dtype = kwargs.get("dtype", kwargs.get("torch_dtype"))
        finish_loading(model, dtype if isinstance(dtype, torch.dtype) else model.dtype)
    model.name_or_path = model.config.name_or_path = str(name_or_path)
    return loaded


def _finish_head(model: Any, is_to_copy: bool) -> None:
    """Finish a head that was loaded as the embedding: either tie all of it, or copy it."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if isinstance(head, IntegerModule):
        # In a packed head transformers ties the integers, a parameter, but not the scales, a
        # buffer.
        setattr(head, SCALE, getattr(embedding, SCALE))
    if is_to_copy:
        model.config.tie_word_embeddings = False
        head.weight = copy.deepcopy(embedding.weight)
        if isinstance(head, IntegerModule):
            setattr(head, SCALE, getattr(embedding, SCALE).clone())


def refuse_prefix(folder: Path, found: weights.Outline) -> None:
    """Refuse a checkpoint of P-Tuning v2, whose trained prefix no model here can use.

    Raises:
        UserError: tensors of a prefix are among those found.
    """
    of_prefix = [name for name in found if _PREFIX in name]
    if not of_prefix:
        return
    base = read_json_object(folder / CONFIG_NAME).get("_name_or_path")
    named = f" (config.json names {base})" if isinstance(base, str) and base else ""
    what = "no base model" if len(of_prefix) == len(found) else "a base model and a prefix in one"
    raise UserError(
        f"{folder}: is a P-Tuning v2 checkpoint, {what} ({of_prefix[0]}); glmtune trains LoRA "
        f"and cannot use the prefix: pass the base it was trained on{named} as --base "
        "and train an adapter on the same rows"
    )


def check_plain_folder(
    folder: Path,
    config: PreTrainedConfig,
    model_class: type[PreTrainedModel],
    *,
    must_tie: bool = False,
    rename: Callable[[weights.Outline], weights.Outline] = dict,
) -> None:
    """Check a folder's tensors against the model, for a family without its own check.

    Args:
        folder: folder of a checkpoint.
        config: configuration of that folder.
        model_class: class of the model that the weights are for.
        must_tie: embedding and head must be equal in the files.
        rename: gives an outline the model's names, and drops what is not read.

    Raises:
        UserError: one line that names what does not fit.
    """
    if (folder / ADAPTER_CONFIG_FILE).is_file():
        # transformers would load the base that this file names, wherever that lies.
        raise UserError(
            f"{folder / ADAPTER_CONFIG_FILE}: an adapter's file in a base model's folder; name the "
            "base with --base and the adapter apart, or take this file away"
        )
    found = weights.read_outline(folders.weight_files(folder))
    refuse_prefix(folder, found)
    found = rename(found)
    with torch.device("meta"):
        model = model_class(config)
    if bits_of(config):
        found = as_floats(found, model)
    tied = getattr(model, "_tied_weights_keys", None) if config.tie_word_embeddings else None
    if must_tie and not config.tie_word_embeddings:
        raise UserError(
            f"{folder}: tie_word_embeddings=True, but by its config.json head and embedding are "
            "two tensors; leave tie_word_embeddings out"
        )
    weights.check_outline(
        found,
        model.state_dict(),
        folder,
        optional=set(tied or ()),
        exact=[
            f"{name}.{key}"
            for name, module in model.named_modules()
            if isinstance(module, IntegerModule)
            for key in ("weight", SCALE)
        ],
    )
