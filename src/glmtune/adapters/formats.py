"""Adapter folders of every version, read into one form in memory and written in today's format.

Today: `adapter_config.json` beside `adapter_model.safetensors`, as PEFT writes them. In 2023 (PEFT
0.2 and 0.3-dev) the weights were `adapter_model.bin`, and six things could differ:

- the fused projection was adapted block by block (`enable_lora`, see `dense_pair`);
- training checkpoints held the weights alone, with no adapter_config.json;
- keys could carry the adapter's name (`lora_A.default.weight`) or lack `base_model.model.`;
- weights could be float16;
- they could lie in the Trainer's `pytorch_model.bin`, with the base's or without, or in a `.pt`;
- those of loralib have no `.weight` at the end of a key, and no config.
"""

import hashlib
import re
from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from glmtune.adapters.biases import bias_setting, name_biases
from glmtune.adapters.find import find_adapter, find_weights, refuse_prefix
from glmtune.adapters.settings import (
    enabled_parts,
    lora_config,
    public_name,
    read_settings,
    write_settings,
)
from glmtune.data.files import check_inside, new_folder
from glmtune.drafts import replacing_files, write_errors
from glmtune.errors import UserError
from glmtune.models.folders import is_lfs_pointer
from glmtune.models.weights import load_bin
from glmtune.run_files import (
    ADAPTER_CONFIG_FILE,
    WEIGHTS_FILE,
    WEIGHTS_FILE_2023,
)

# What the recipe of 2023 trained with, for folders that hold no adapter_config.json.
ALPHA_2023 = 32
ENABLE_LORA_2023 = (True, False, True)
_WHOLE = (True, True, True)

KEY_PREFIX = "base_model.model."
SUFFIX_A, SUFFIX_B = ".lora_A.weight", ".lora_B.weight"


@dataclass(frozen=True)
class Adapter:
    """An adapter in memory, in today's PEFT form whatever the format of its folder."""

    config: LoraConfig
    weights: dict[str, Tensor]
    """Today's keys (`base_model.model.<module>.lora_A.weight`) to float32 tensors on the CPU; see
    `biases` for those that end in `bias`."""
    path: Path
    """The weights file, for messages."""
    notices: tuple[str, ...] = ()
    """What had to be assumed to read the folder, a line each."""

    @property
    def modules(self) -> list[str]:
        """Names of the adapted modules in the base model."""
        keys = (key for key in self.weights if key.endswith(SUFFIX_A))
        return [key.removeprefix(KEY_PREFIX).removesuffix(SUFFIX_A) for key in keys]

    def digest(self) -> str:
        """The beginning of a sha256 over what the adapter adds: its tensors and their scale."""
        config = self.config
        how = (config.r, config.lora_alpha, config.rank_pattern, config.alpha_pattern)
        state = hashlib.sha256(repr((*how, config.use_rslora, config.use_dora)).encode())
        for key, tensor in sorted(self.weights.items()):
            state.update(f"{key} {list(tensor.shape)}".encode())
            state.update(tensor.numpy().tobytes())
        return state.hexdigest()[:16]

    def check_effect(self) -> None:
        """Refuse an adapter without any effect: every tensor but lora_A is zero.

        Raises:
            UserError: the adapter changes nothing.
        """
        if not any(tensor.any() for key, tensor in self.weights.items() if SUFFIX_A not in key):
            raise UserError(
                f"{self.path}: this adapter changes nothing: lora_B is zero in all "
                f"{len(self.modules)} modules, as before training; pass a trained one"
            )


def read_adapter(folder: str | Path) -> Adapter:
    """Read the adapter that `find_adapter` finds in a folder, in any of the formats above.

    Raises:
        UserError: a file is missing, is damaged, is no LoRA adapter or would run code when opened,
            or its tensors contradict each other; the message names file and tensor.
    """
    folder = find_adapter(folder)
    path = find_weights(folder)
    assert path, "find_adapter found it"
    refuse_prefix(folder)
    tensors = read_tensors(path)
    settings, notices = read_settings(folder)
    if path.name not in (WEIGHTS_FILE, WEIGHTS_FILE_2023):
        num_all = len(tensors)
        tensors = _of_adapter(tensors, settings)
        num_lora = sum(".lora_" in key for key in tensors)
        biases = f" and {len(tensors) - num_lora} biases" if len(tensors) > num_lora else ""
        others = f", the {num_all - len(tensors)} others are not" if len(tensors) < num_all else ""
        notices.append(f"{path}: its {num_lora} LoRA tensors{biases} are used{others}")
    weights = name_biases(_canonical_keys(tensors, path))
    enabled = enabled_parts(settings or {}, path)
    if settings is None:
        settings, enabled = _guess_settings(weights, path)
        notices.append(
            f"{folder}: no {ADAPTER_CONFIG_FILE}; rank {settings['r']} is read off the tensors and "
            f"lora_alpha {ALPHA_2023}, the recipe's of 2023, is assumed"
        )
    if enabled:
        # The rank is multiplied by the number of blocks, and alpha with it, which keeps the
        # scaling.
        weights = _dense_weights(weights, enabled, settings["r"], path)
        settings["r"] *= sum(enabled)
        settings["lora_alpha"] *= sum(enabled)
    if isinstance(settings.get("target_modules"), str):
        stems = [key.removesuffix(SUFFIX_A) for key in weights if key.endswith(SUFFIX_A)]
        settings["target_modules"] = [stem.removeprefix(KEY_PREFIX) for stem in stems]
    _check_rank(settings, weights, path)
    bias = bias_setting(weights)
    if bias == "none" and settings.get("bias", "none") != "none":
        notices.append(
            f"{path}: trained with bias {settings['bias']!r:.99}, but holds no bias: those of the "
            "base are used"
        )
    settings["bias"] = bias
    return Adapter(
        lora_config(settings, folder / ADAPTER_CONFIG_FILE), weights, path, tuple(notices)
    )


def write_adapter(
    config: LoraConfig, weights: dict[str, Tensor], folder: str | Path, base_name: str | None
) -> None:
    """Write a folder that plain `peft.PeftModel.from_pretrained` loads.

    Args:
        config: the adapter's settings.
        weights: today's keys to tensors, which are stored as float32.
        folder: where to write; it appears whole, or, if it exists, its two files are replaced.
        base_name: the base model's hub id or bare name; only the end of a path is written.

    Raises:
        UserError: the folder cannot be written.
    """
    assert weights, "an adapter without tensors"
    config = copy(config)
    config.base_model_name_or_path = public_name(base_name) if base_name else None
    config.inference_mode = True
    tensors = {key: tensor.detach().float().cpu().contiguous() for key, tensor in weights.items()}
    folder = Path(folder)
    if not folder.exists():
        with new_folder(str(folder)) as draft:
            _write_files(config, tensors, draft)
        return
    with write_errors(folder), replacing_files(folder) as draft:
        _write_files(config, tensors, draft)


def _write_files(config: LoraConfig, tensors: dict[str, Tensor], folder: Path) -> None:
    # Serialise in memory first: a full disk is then an OSError, as with every other file.
    (folder / WEIGHTS_FILE).write_bytes(save(tensors, metadata={"format": "pt"}))
    write_settings(config, folder)


def dense_pair(lora_a: Tensor, lora_b: Tensor, enabled: Sequence[bool]) -> tuple[Tensor, Tensor]:
    """A block-wise adapter of a fused projection as one dense adapter of the same effect.

    PEFT 0.2's MergedLinear gave each enabled part of the output (thirds of its rows, regardless of
    heads) its own rank r: ``lora_A`` stacks k blocks of r rows, ``lora_B`` k
    blocks of output rows. With ``enabled = [true, false, true]``::

                    lora_A 1  lora_A 2
        first third  lora_B 1     0
        second           0        0
        last             0     lora_B 2

    Args:
        lora_a: ``(k * r, in)``.
        lora_b: ``(k * rows, r, 1)`` or ``(k * rows, r)``.
        enabled: which parts of the output are adapted, k of them.

    Returns:
        ``lora_A (k * r, in)`` and ``lora_B (len(enabled) * rows, k * r)``.
    """
    lora_b = lora_b.flatten(1)
    rank, parts = lora_b.shape[1], [part for part, is_on in enumerate(enabled) if is_on]
    rows = len(lora_b) // len(parts)
    dense = lora_b.new_zeros(len(enabled) * rows, len(parts) * rank)
    for block, part in enumerate(parts):
        source = lora_b[block * rows : (block + 1) * rows]
        dense[part * rows : (part + 1) * rows, block * rank : (block + 1) * rank] = source
    return lora_a, dense


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read names to tensors; no code in a pickle is run."""
    check_inside(path)
    try:
        if is_lfs_pointer(path):
            raise UserError(f"{path}: is a Git-LFS pointer, not weights; run `git lfs pull` there")
        tensors = load_file(path) if path.suffix == ".safetensors" else load_bin(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read ({error}); get the adapter again") from error
    if not tensors:
        raise UserError(f"{path}: holds no tensors, so it is no adapter; pass another folder")
    return tensors


def _of_adapter(tensors: dict[str, Tensor], settings: dict | None) -> dict[str, Tensor]:
    """The tensors of an adapter in a file that may hold its base as well.

    A bias counts as the adapter's where the settings say that it was trained, and, without
    settings, where the file has no weight beside it: then the base is not in the file.
    """
    kind = (settings or {}).get("bias")
    stems = {key.partition(".lora_")[0] for key in tensors if ".lora_" in key}

    def belongs(key: str) -> bool:
        if ".lora_" in key:
            return True
        stem = key.removesuffix(".bias").removesuffix(".base_layer")
        if not key.endswith(".bias") or kind == "none":
            return False
        if kind is None:
            return key.removesuffix("bias") + "weight" not in tensors
        return kind == "all" or stem in stems

    return {key: tensor for key, tensor in tensors.items() if belongs(key)}


def _canonical_keys(tensors: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The tensors under today's keys: with PEFT's prefix, without an adapter's name; in float32."""
    weights: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        if not tensor.is_floating_point() or not tensor.ndim:
            what = f"{list(tensor.shape)} of {tensor.dtype}"
            raise UserError(f"{path}: {key} is {what}, no weights; pass another adapter")
        name = key.removeprefix("module.").removeprefix(KEY_PREFIX)
        name = re.sub(r"\.(lora_[AB])(\.([^.]+\.)?weight)?$", r".\1.weight", KEY_PREFIX + name)
        if name in weights:
            raise UserError(f"{path}: holds {name} twice, from two adapters; pass one")
        if not torch.isfinite(tensor).all():
            raise UserError(f"{path}: {key} holds values that are not finite; pass another")
        weights[name] = tensor.detach().float()
    return weights


def _pairs(weights: dict[str, Tensor], path: Path) -> Iterator[tuple[str, str]]:
    """The keys of each lora_A with its lora_B, after checking that both are matrices."""
    stems = (key.rpartition(".lora_")[0] for key in weights if key.endswith((SUFFIX_A, SUFFIX_B)))
    for stem in dict.fromkeys(stems):
        for key in (stem + SUFFIX_A, stem + SUFFIX_B):
            if key not in weights:
                raise UserError(f"{path}: {key} is missing; get the whole file again")
            if weights[key].ndim < 2 or not weights[key].numel():
                shape = list(weights[key].shape)
                raise UserError(f"{path}: {key} has shape {shape}, no matrix; get it again")
        yield stem + SUFFIX_A, stem + SUFFIX_B


def _dense_weights(
    weights: dict[str, Tensor], enabled: Sequence[bool], rank: int, path: Path
) -> dict[str, Tensor]:
    """Convert all pairs by `dense_pair`, after checking their shapes."""
    blocks, dense = sum(enabled), dict(weights)
    for key_a, key_b in _pairs(weights, path):
        for key, fits, wanted in (
            (key_a, weights[key_a].shape[0] == blocks * rank, f"[{blocks * rank}, in]"),
            (key_b, weights[key_b].shape[1:] in ((rank,), (rank, 1)), f"[rows, {rank}, 1]"),
            (key_b, weights[key_b].shape[0] % blocks == 0, f"a multiple of {blocks} rows"),
        ):
            if not fits:
                raise UserError(
                    f"{path}: {key} has shape {list(weights[key].shape)}, but rank {rank} with "
                    f"enable_lora {list(enabled)} means {wanted}; the config is of another adapter"
                )
        dense[key_a], dense[key_b] = dense_pair(weights[key_a], weights[key_b], enabled)
    return dense


def _check_rank(settings: dict, weights: dict[str, Tensor], path: Path) -> None:
    """Refuse a rank that no tensor has, before PEFT allocates memory for it."""
    pattern = settings.get("rank_pattern") or {}
    ranks = [settings["r"], *pattern.values()] if isinstance(pattern, dict) else [pattern]
    found = max((len(weights[a]) for a in weights if a.endswith(SUFFIX_A)), default=0)
    if any(not isinstance(rank, int) or rank > found for rank in ranks):
        raise UserError(
            f"{path}: its lora_A has {found} rows, {ADAPTER_CONFIG_FILE} says rank {ranks!s:.99}; "
            "the config is of another adapter"
        )


def _guess_settings(weights: dict[str, Tensor], path: Path) -> tuple[dict, Sequence[bool] | None]:
    """Infer settings and `enable_lora` of weights without a config from their shapes."""
    pairs = list(_pairs(weights, path))
    ranks = {weights[key_b].shape[1] for _, key_b in pairs}
    blocks = {weights[key_a].shape[0] // weights[key_b].shape[1] for key_a, key_b in pairs}
    enabled = {1: None, sum(ENABLE_LORA_2023): ENABLE_LORA_2023, len(_WHOLE): _WHOLE}
    if len(ranks) != 1 or len(blocks) != 1 or blocks - enabled.keys():
        raise UserError(
            f"{path}: without {ADAPTER_CONFIG_FILE} its tensors fit no known form (ranks "
            f"{sorted(ranks)}, {sorted(blocks)} blocks in lora_A); add the {ADAPTER_CONFIG_FILE} "
            "it was trained with"
        )
    modules = (key_a.removesuffix(SUFFIX_A).rpartition(".")[2] for key_a, _ in pairs)
    settings = {
        "r": ranks.pop(),
        "lora_alpha": ALPHA_2023,
        "target_modules": sorted(set(modules)),
        "task_type": "CAUSAL_LM",
    }
    return settings, enabled[blocks.pop()]
