"""Checks of the base model: is it whole, and do weights, config and vocabulary agree."""

from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.constants import HF_HUB_OFFLINE
from transformers import PreTrainedConfig

from glmtune.config.groups import DeviceSettings
from glmtune.data.files import read_json_object
from glmtune.doctor.findings import OK, PROBLEM, WARNING, CheckLine
from glmtune.hardware import FLOAT16, GIB, Card, pick_device, pick_dtype
from glmtune.models.families import DEFAULT, family_of, published_names
from glmtune.models.folders import are_there
from glmtune.models.hubs import download_command
from glmtune.models.loading import (
    check_ends,
    hub_config,
    load_config,
    load_tokenizer,
)
from glmtune.models.resolve import GLM_TINY, base_name, resolve_base
from glmtune.models.shape import bits_of


def find_base(named: str | None, run_folder: str | None = None) -> Path | str:
    """The folder of the base that a run would use, or its hub id if it is not on this machine yet.

    If none is named or found, that is the published model's.

    Raises:
        UserError: a path that does not exist.
    """
    base = resolve_base(named, run_folder, needs_weights=False)
    if Path(base).is_dir():
        return Path(base)
    config = try_to_load_from_cache(base, "config.json")
    if isinstance(config, str) and are_there(Path(config).parent):
        return Path(config).parent
    return base  # the run completes its download


def check_hub_base(base: str, is_named: bool) -> Iterator[CheckLine]:
    """Whether a base that is not on this machine yet can be downloaded and loaded.

    Raises:
        UserError: the base cannot be loaded, or its hub has none of that name.
    """
    if not is_named:
        yield (
            WARNING,
            (
                f"none is named or found, so this is of {base}; where no hub answers a run takes "
                "glm-tiny, the toy model: name one with --base FOLDER"
            ),
        )
    elif hub_config(base) is None:
        yield (
            PROBLEM,
            (
                f"{base} is not on this machine, and "
                + ("HF_HUB_OFFLINE forbids to ask for it" if HF_HUB_OFFLINE else "no hub answers")
                + ": name a folder with --base"
            ),
        )


def check_base(base: Path | str) -> Iterator[CheckLine]:
    """Whether config and weights belong to one model."""
    if not isinstance(base, Path):
        size = ""
        if base in published_names():
            config = load_config(base)
            shape = family_of(config).shape(config)._replace(tied_head=False)  # as files have it
            size = f" ({shape.weight_bytes(FLOAT16) / 1e9:.1f} GB)"
        text = f"{base} would be downloaded first{size}"
        yield WARNING, f"{text}: {download_command(base)}, or name a folder with --base"
        return
    config = load_config(str(base))
    family = family_of(config)
    native = family.native()
    native.check_folder(base, config, native.model_class)
    shape = family.shape(config)
    text = f"{base_name(str(base))}: {shape.num_layers} layers, vocabulary {shape.vocab_size}"
    if str(base) == GLM_TINY:
        text += " (the toy model: name the real one with --base FOLDER)"
    yield OK, text


def check_memory(base: Path | str, device: DeviceSettings) -> Iterator[CheckLine]:
    """Whether a base's weights fit into memory for answering."""
    config, card = config_of(base), Card.of(pick_device(device.use_cpu))
    bits = bits_of(config)
    dtype, _ = pick_dtype(pick_device(device.use_cpu), device.bf16, device.fp16)
    needed = family_of(config).shape(config).weight_bytes(dtype, bits) / GIB
    held = f"{bits} bits" if bits else str(dtype).removeprefix("torch.")
    text = f"the base's weights take {needed:.2f} GiB in {held}"
    if card.gib and needed > card.gib:
        # If no base is named, a machine set up for other models is not at fault.
        status = PROBLEM if isinstance(base, Path) or card.on_gpu else WARNING
        yield status, f"{text}, {card.name} has {card.gib:.1f}: take --quantization_bit 4 or 8"
    else:
        yield OK, text


def check_tokenizer(base: Path | str) -> Iterator[CheckLine]:
    """Whether vocabulary and model are of the same revision, with the same ids."""
    if not isinstance(base, Path):
        return
    config, tokenizer = load_config(str(base)), load_tokenizer(str(base))
    family_of(config).check_pair(config, tokenizer)
    rule = tokenizer.row_rule
    shown = (*rule.before_prompt, *rule.after_prompt)
    specials = ", ".join(f"{special.text} {special.id}" for special in shown)
    yield OK, f"revision {tokenizer.revision}, {tokenizer.vocab_size} ids, {specials}"
    yield from ((WARNING, text) for text in family_of(config).check_tokenizer(tokenizer))


def check_stop_ids(base: Path | str) -> Iterator[CheckLine]:
    """Whether all files of the base stop an answer at the same id."""
    if not isinstance(base, Path):
        return
    tokenizer, generation = load_tokenizer(str(base)), base / "generation_config.json"
    config = load_config(str(base))
    family_of(config).check_pair(config, tokenizer)
    if generation.is_file():
        check_ends(read_json_object(generation).get("eos_token_id"), tokenizer)
    yield OK, f"tokenizer and configs end an answer at {tokenizer.row_rule.end_ids[-1]}"


def config_of(base: Path | str) -> PreTrainedConfig:
    """The config of a base; if that is not on this machine, its hub's, or the published one."""
    if isinstance(base, Path):
        return load_config(str(base))
    if base in published_names():
        return load_config(base)
    return hub_config(base) or DEFAULT.native().config_class()
