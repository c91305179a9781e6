"""Load a base model of any family: its configuration, its tokenizer, its weights."""

from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import GENERATION_CONFIG_NAME

from glmtune.data.files import read_json_object
from glmtune.data.row_rule import as_ids
from glmtune.errors import UserError, note
from glmtune.models import weights
from glmtune.models.base_files import (
    TOKENIZER_FILES,
    TOKENIZER_SETTINGS,
    built,
    family_by_settings,
    fetch_base,
    find_base,
    published_family,
    tell_differences,
)
from glmtune.models.families import DEFAULT, Family, family_not_loaded, family_of, register
from glmtune.models.hubs import CONFIG_FILE, hub_settings
from glmtune.models.precision import (
    dequantise,
    has_integer_tables,
    integer_bits_of,
    quantise_head,
    quantise_layers,
)
from glmtune.models.quantised import check_quantising, quantising
from glmtune.models.resolve import HUB_IDS, base_name
from glmtune.models.shape import bits_of
from glmtune.models.strict_loading import read_strictly

register()


def load_tokenizer(base: str) -> Any:
    """The tokenizer of a base model.

    Raises:
        UserError: no vocabulary there, or one of another family.
    """
    family, _ = _read_config(base, fetch_base(base, [CONFIG_FILE]))
    folder = fetch_base(base, TOKENIZER_FILES)
    for name in TOKENIZER_SETTINGS:
        if (folder / name).is_file():
            read_json_object(folder / name)
    tokenizer = built(folder, lambda: family.native().tokenizer_class.from_pretrained(folder))
    tell_differences(base, family, tokenizer)
    return tokenizer


def load_config(base: str) -> Any:
    """The configuration of a base model, as it lies there; no weights are fetched for it.

    That of the published model is known, and is not asked for at the hub.

    Raises:
        UserError: no model there, or one of another family.
    """
    if known := published_family(base):
        return known.native().config_class.from_dict(dict(known.published_settings))
    return _read_config(base, fetch_base(base, [CONFIG_FILE]))[1]


def load_base_model(
    base: str,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    keep_integers: bool = False,
    bits: int | None = None,
    quantize_head: bool = False,
) -> Any:
    """The base model, in evaluation mode.

    What becomes of weights that the folder holds quantised is printed as a note on stderr.

    Args:
        base: a folder or a hub id, as `resolve_base` gives it.
        dtype: by default bfloat16 on a GPU that has it, float32 on a CPU.
        device: by default the CPU.
        keep_integers: leave the weights of a published int8 or int4 folder packed, as is enough to
            answer with them; else they are dequantised to `dtype`, to train on or to merge into.
        bits: 8 or 4 to quantise the layers' linears with bitsandbytes, one by one while they load;
            those of a published int8 or int4 folder are requantised.
        quantize_head: round embedding and head to 8 bits.

    Raises:
        UserError: no model there, of another family, weights that do not fit, or a wish for bits
            that folder or device cannot grant.
    """
    family, config = _read_config(base, fetch_base(base, [CONFIG_FILE]))  # before gigabytes come
    folder = fetch_base(base)
    has, packed = bits_of(config), integer_bits_of(config)
    if bits and has:
        raise _quantised_already(f"quantization_bit {bits}", base, has)
    if quantize_head and packed and keep_integers and not bits:
        raise _quantised_already("quantize_head true", base, packed)
    loading: dict[str, Any] = {"dtype": dtype}
    if bits or has:
        wish = f"quantization_bit {bits}" if bits else f"{base_name(base)}, which is in {has} bits"
        check_quantising(wish, bits or has or 0, device)
        device = device or "cpu"  # left to itself, transformers would take a GPU
    if device:
        loading["device_map"] = str(device)
    if bits and not packed:
        loading["quantization_config"] = quantising(bits, dtype)
    native = family.native()
    with weights.bar_if_long(folder):
        model: Any = built(
            folder,
            lambda: read_strictly(
                native.model_class,
                native.check_folder,
                folder,
                config=config,
                read=native.read_tensors,
                **loading,
            ),
        )
    model.name_or_path = model.config.name_or_path = base
    if has or packed:
        done = "stay packed"
        if packed and bits:
            quantise_layers(model, bits)
            done = f"are requantised to {'LLM.int8' if bits == 8 else 'NF4'}"
        elif packed and not keep_integers:
            dequantise(model)
            done = f"are dequantised to {str(model.dtype).removeprefix('torch.')}"
        note(f"the int{has or packed} weights of {base_name(base)} {done}")
    if quantize_head and not has_integer_tables(config):
        quantise_head(model)
    return model.eval()


def load_outline(base: str) -> Any:
    """The base model without its weights: its configuration, and where its answers end.

    Raises:
        UserError: no model there, or one of another family.
    """
    folder = fetch_base(base, ["*.json"])
    family, config = _read_config(base, folder)
    with torch.device("meta"):
        model: Any = family.native().model_class(config)
    if (folder / GENERATION_CONFIG_NAME).is_file():
        model.generation_config = built(folder, lambda: GenerationConfig.from_pretrained(folder))
    return model


def _quantised_already(wish: str, base: str, bits: int) -> UserError:
    return UserError(
        f"{wish}: {base_name(base)} is in {bits} bits already; leave {wish.split()[0]} out, or "
        f"pass {DEFAULT.name} in float16"
    )


@cache
def hub_config(base: str) -> Any | None:
    """The configuration of a hub's model, of which nothing is kept here; None if no hub answers.

    Raises:
        UserError: it is of another family, by its config or, where no hub answers, by its name; or
            the hub has no such model.
    """
    settings = hub_settings(base)
    if settings is None:
        if other := family_not_loaded(base):
            raise UserError(
                f"{base}: is {other} by its name, which is not loaded here; pass {DEFAULT.name}, "
                f"such as {HUB_IDS[0]}"
            )
        return None
    family = family_by_settings(base, settings)
    if "pre_seq_len" in settings:
        raise UserError(
            f"{base}: config.json has pre_seq_len, so it is a P-Tuning v2 checkpoint, which is not "
            "loaded here; pass the base it was trained on"
        )
    try:
        return built(Path(base), lambda: family.native().config_class.from_dict(settings))
    except UserError as error:
        raise UserError(f"{base}: {error}") from error


def _read_config(base: str, folder: Path) -> tuple[Family, Any]:
    family, _ = find_base(base, folder)
    return family, built(folder, lambda: family.native().config_class.from_pretrained(folder))


def check_pair(model: PreTrainedModel, tokenizer: Any) -> None:
    """Make sure that a model and a tokenizer name the same ids.

    Answers end where generation_config.json or else config.json says, and rows teach the end that
    the tokenizer knows: were they not one, answers would never stop, or stop at once.

    Raises:
        UserError: they are of different revisions, or disagree on a special id.
    """
    family_of(model.config).check_pair(model.config, tokenizer)
    if model.generation_config:
        check_ends(model.generation_config.eos_token_id, tokenizer)


def check_ends(ends: int | list[int] | None, tokenizer: Any) -> None:
    """Make sure that generation_config.json names the end that a tokenizer teaches, or none.

    Raises:
        UserError: it names another.
    """
    rule = tokenizer.row_rule
    (end,) = rule.end
    if any(id_ not in (end.id, *rule.stops) for id_ in as_ids(ends)):
        raise UserError(
            f"generation_config.json: eos_token_id says {ends}, but answers are taught to end with "
            f"the tokenizer's {end.id} ({end.text}); set it to that in the model's folder, or "
            "remove the file"
        )
