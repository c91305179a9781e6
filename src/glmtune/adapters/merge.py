"""Merge an adapter into its base: a folder that loads as a plain model with the same logits."""

import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from glmtune.adapters.find import find_adapter, refuse_existing
from glmtune.adapters.lora import load_adapter
from glmtune.config.settings import MergeSettings
from glmtune.data.files import new_folder
from glmtune.errors import UserError, note
from glmtune.models.families import family_of
from glmtune.models.folders import fetch
from glmtune.models.loading import load_base_model, load_config
from glmtune.models.precision import dequantise, integer_bits_of
from glmtune.models.resolve import resolve_base
from glmtune.models.shape import bits_of
from glmtune.models.shim import write_shim

TOKENIZER_FILES = (
    "*.model", "tokenizer*.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja",
)  # fmt: skip
# Adding the adapter to the weights rounds differently from adding it to the activations, in float32
# by less than this share of the largest logit; a wrong merge differs by far more.
TOLERANCE = 1e-3


def merge_adapter(settings: MergeSettings) -> float:
    """Write base and adapter as one plain model, after checking its logits.

    The merge is done in float32 on the CPU, with some 25 GB of memory for 6B. Merged weights are
    stored in float32, because float16 would round off part of the adapter's update; all others in
    the base's own type; those of a published int8 or int4 folder are dequantised to float16.
    Tokenizer files are copied byte for byte, except an `auto_map` of code that is not copied; a
    one-line file that imports this package replaces that code (models/shim.py). Before the folder
    gets its final name it is loaded again, and its logits are compared with those of base and
    adapter.

    Returns:
        The largest difference of a logit.

    Raises:
        UserError: `save_path` is not empty, base or adapter cannot be loaded or do not fit, the
            adapter changes nothing, or the merged folder gives other logits.
    """
    refuse_existing(settings.save_path)
    adapter_folder = find_adapter(settings.adapter)
    base = resolve_base(settings.base, settings.adapter)
    merged = merge_in_memory(base, adapter_folder)
    num_modules, expected = merged.num_modules, merged.expected
    base_folder = fetch(base)
    with new_folder(settings.save_path) as folder:
        print(f"writing {settings.save_path}")
        save_lossless(merged.model, merged.base_config, folder)
        if not copy_tokenizer(base_folder, folder):
            note(f"{base} has no tokenizer files to copy")
        write_shim(folder, family_of(merged.base_config))
        del merged  # one model in memory at a time
        difference = _largest_difference(folder, expected)
    print(
        f"merged {num_modules} modules: the new folder's logits differ from those of base and "
        f"adapter by {difference:.1e} at most"
    )
    return difference


class Merged(NamedTuple):
    """Base and adapter as one model in float32, and what it has to give when it is read again."""

    model: Any
    expected: Tensor
    """Logits of `probe` with base and adapter apart."""
    base_config: Any
    num_modules: int
    """Modules that the adapter adapts; 0 without one."""


def merge_in_memory(base: str, adapter_folder: Path | None) -> Merged:
    """Load a base, with an adapter or without, and merge the adapter into it.

    Args:
        base: as `resolve_base` gives it.
        adapter_folder: as `find_adapter` gives it; None for the base alone.

    Raises:
        UserError: base or adapter cannot be loaded or do not fit, or the adapter changes nothing.
    """
    print(f"loading {base}" + (f" with the adapter of {adapter_folder}" if adapter_folder else ""))
    base_config = load_config(base)
    # Round dequantised weights as they will be stored, so that the expected logits match them.
    is_quantised = integer_bits_of(base_config) or bits_of(base_config)
    dtype = torch.float16 if is_quantised else torch.float32
    model = dequantise(load_base_model(base, dtype=dtype))
    if bits_of(base_config):
        note(f"they are dequantised to {str(dtype).removeprefix('torch.')} for the merge")
    model = model.float()
    if adapter_folder is None:
        return Merged(model, probe(model), base_config, 0)
    peft_model = load_adapter(model, adapter_folder)
    num_modules = len(peft_model.targeted_module_names)
    expected = probe(peft_model)
    with peft_model.disable_adapter():
        if torch.equal(expected, probe(peft_model)):
            raise UserError(f"{adapter_folder}: this adapter changes no logit; pass a trained one")
    return Merged(peft_model.merge_and_unload(), expected, base_config, num_modules)


def save_lossless(model: Any, base_config: Any, folder: Path) -> None:
    """Save a model with each weight in the base's own type where that loses nothing of it."""
    stored = base_config.dtype
    downcast_lossless(model, stored if isinstance(stored, torch.dtype) else torch.float32)
    model.save_pretrained(folder)


def probe(model: PreTrainedModel | PeftModel) -> Tensor:
    """Logits ``(1, S, V)`` of a short row with ids spread over the vocabulary."""
    ids = family_of(model.config).probe_row(model.config)
    with torch.inference_mode():
        return model(input_ids=torch.tensor([ids], device=model.device)).logits


def downcast_lossless(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Convert each parameter to `dtype` in place if that is lossless; the others stay."""
    for parameter in model.parameters():
        small = parameter.data.to(dtype)
        if torch.equal(small.to(parameter.dtype), parameter.data):
            parameter.data = small


def copy_tokenizer(source: Path, target: Path) -> list[str]:
    """Copy the tokenizer's files byte for byte; returns their names.

    Tokenizers of 2023 do not survive being loaded and saved again.
    """
    files = sorted({file for pattern in TOKENIZER_FILES for file in source.glob(pattern)})
    for file in files:
        shutil.copyfile(file, target / file.name)
    return [file.name for file in files]


def _largest_difference(folder: Path, expected: Tensor) -> float:
    """The difference of a merged folder's logits from the expected ones, which must be small."""
    difference, is_same = compare_logits(
        probe(load_base_model(str(folder), dtype=torch.float32)), expected
    )
    if not is_same:
        raise UserError(
            f"the merged model's logits differ from those of base and adapter by {difference:.1e}: "
            "nothing was written; the adapter may adapt weights that the base uses twice"
        )
    return difference


def compare_logits(found: Tensor, expected: Tensor) -> tuple[float, bool]:
    """The largest difference of a logit, and whether it is no more than rounding."""
    difference = (found - expected).abs().max().item()
    return difference, difference <= TOLERANCE * expected.abs().max().item()
