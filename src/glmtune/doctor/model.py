"""Checks of the base model: is it whole, and do weights, config and vocabulary agree."""

from collections.abc import Iterator
from pathlib import Path

import torch
from huggingface_hub import try_to_load_from_cache

from glmtune.data.files import read_json_object
from glmtune.doctor.findings import OK, PROBLEM, WARNING, Told
from glmtune.hardware import GIB, pick_device, pick_dtype, total_memory_gib
from glmtune.models.chatglm.configuration import ChatGLMConfig
from glmtune.models.chatglm.folder import check_folder
from glmtune.models.chatglm.modeling import ChatGLMForConditionalGeneration
from glmtune.models.checkpoints import (
    GLM_TINY,
    base_name,
    check_pair,
    load_config,
    load_tokenizer,
    resolve_base,
)

PUBLISHED_GB = 13.4
"""What the published float16 shards take on a disk."""


def find_base(chatglm_path: str | None, run_folder: str | None = None) -> Path | str:
    """The folder of the base that a run would use, or its hub id where it is not here yet.

    Raises:
        UserError: a path that does not exist.
    """
    base = resolve_base(chatglm_path, run_folder)
    if Path(base).is_dir():
        return Path(base)
    config = try_to_load_from_cache(base, "config.json")
    return Path(config).parent if isinstance(config, str) else base


def check_base(base: Path | str, use_cpu: bool) -> Iterator[Told]:
    """Whether config and weights make up one model, and whether it fits into memory."""
    if not isinstance(base, Path):
        text = f"{base} would be downloaded first ({PUBLISHED_GB} GB)"
        yield WARNING, f"{text}: hf download {base}, or name a folder with --chatglm_path"
        return
    config = load_config(str(base))
    check_folder(base, config, ChatGLMForConditionalGeneration)
    with torch.device("meta"):
        model = ChatGLMForConditionalGeneration(config)
    device = pick_device(use_cpu)
    dtype, _ = pick_dtype(device)
    needed = sum(p.numel() for p in model.parameters()) * dtype.itemsize / GIB
    text = f"{base_name(str(base))}: {config.num_layers} layers, vocabulary {config.vocab_size}"
    if str(base) == GLM_TINY:
        text += " (the toy model: name the real one with --chatglm_path FOLDER)"
    if (memory := total_memory_gib(device)) and needed > memory:
        needs = f"its weights take {needed:.1f} GiB in {str(dtype)[6:]}"
        yield PROBLEM, f"{text}; {needs}, the {device.type} has {memory:.1f}: take another machine"
    else:
        yield OK, f"{text}, {needed:.2f} GiB of weights"


def check_tokenizer(base: Path | str) -> Iterator[Told]:
    """Whether vocabulary and model are of one revision, and name the same ids."""
    if not isinstance(base, Path):
        return
    config, tokenizer = load_config(str(base)), load_tokenizer(str(base))
    check_pair(config, tokenizer)
    specials = f"[gMASK] {tokenizer.gmask_token_id}, <sop> {tokenizer.bos_token_id}"
    yield OK, f"revision {tokenizer.revision}, {tokenizer.vocab_size} ids, {specials}"


def check_stop_ids(base: Path | str) -> Iterator[Told]:
    """Whether all files of the base stop an answer at the same id."""
    if not isinstance(base, Path):
        return
    config, tokenizer = load_config(str(base)), load_tokenizer(str(base))
    stops = {"the tokenizer": tokenizer.eos_token_id, "config.json": config.eos_token_id}
    generation = base / "generation_config.json"
    if generation.is_file():
        named = read_json_object(generation).get("eos_token_id")
        stops |= {} if named is None else {"generation_config.json": named}
    ids = {str(sorted(stop) if isinstance(stop, list) else [stop]) for stop in stops.values()}
    told = ", ".join(f"{place} {stop}" for place, stop in stops.items())
    if len(ids) > 1:
        yield PROBLEM, f"answers would stop at different ids: {told}; take all from one download"
    else:
        yield OK, told


def config_of(base: Path | str) -> ChatGLMConfig:
    """The config of a base; of one that is not here yet, the published one's."""
    return load_config(str(base)) if isinstance(base, Path) else ChatGLMConfig()
