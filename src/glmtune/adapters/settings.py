"""adapter_config.json of every version, read as untrusted input into today's PEFT settings."""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from peft import LoraConfig

from glmtune.data.files import check_inside, read_json_object
from glmtune.errors import UserError
from glmtune.run_files import ADAPTER_CONFIG_FILE, run_folder_of, step_in

_LORA_SETTINGS = {field.name for field in fields(LoraConfig)} - {"runtime_config"}
# PEFT 0.2 had two more: enable_lora is handled here, merge_weights only said how to run.
_KNOWN_SETTINGS = _LORA_SETTINGS | {"runtime_config", "enable_lora", "merge_weights"}
# The spelling of PEFT 0.2.
_ALWAYS_WRITTEN = (
    "peft_type", "task_type", "base_model_name_or_path", "r", "lora_alpha", "lora_dropout",
    "target_modules", "bias", "fan_in_fan_out", "modules_to_save", "init_lora_weights",
    "inference_mode",
)  # fmt: skip


def read_settings(folder: Path) -> tuple[dict | None, list[str]]:
    """adapter_config.json as a dict, with notices; None where there is no such file.

    The recipe of 2023 wrote the file once, into the run folder, when training had ended.
    """
    path, notices = folder / ADAPTER_CONFIG_FILE, []
    if not path.is_file() and step_in(folder.name) is not None:
        path = run_folder_of(folder) / ADAPTER_CONFIG_FILE
        notices = [f"{folder}: no {ADAPTER_CONFIG_FILE}; that of the run folder above is taken"]
    if not path.is_file():
        return None, []
    check_inside(path)
    settings = read_json_object(path)
    kind = settings.get("peft_type")
    if kind != "LORA":
        raise UserError(
            f"{path}: peft_type is {kind!r:.99}; only LoRA adapters (LORA) can be loaded"
        )
    for key, kinds in (("r", int), ("lora_alpha", int | float)):
        value = settings.get(key)
        if not isinstance(value, kinds) or not 0 < value < math.inf:
            raise UserError(f"{path}: {key} is {value!r:.99}, not above 0; correct it")
    if not isinstance(name := settings.get("base_model_name_or_path") or "", str):
        raise UserError(f"{path}: base_model_name_or_path is {name!r:.99}, no name; correct it")
    _refuse_code(settings, path)
    unknown = sorted(key for key in settings.keys() - _KNOWN_SETTINGS if settings[key])
    if unknown:
        notices.append(f"{path}: this version of peft does not know {', '.join(unknown)}: ignored")
    return settings, notices


def write_settings(config: LoraConfig, folder: Path) -> None:
    """Write adapter_config.json with the settings that matter, for any version of PEFT.

    Older versions refuse unknown names whatever their value, so settings at their defaults are
    left out.
    """
    config.save_pretrained(str(folder))
    path = folder / ADAPTER_CONFIG_FILE
    defaults = LoraConfig().to_dict()
    settings = {
        name: value
        for name, value in json.loads(path.read_text(encoding="utf-8")).items()
        if name in _ALWAYS_WRITTEN or value != defaults.get(name)
    }
    settings.pop("peft_version", None)
    path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _refuse_code(settings: dict, path: Path) -> None:
    """Refuse what would make PEFT import a module, or match a regular expression without end.

    `target_modules` as an expression is allowed, because the names of the tensors replace it.
    """
    if settings.get("megatron_config"):
        module = settings.get("megatron_core")
        raise UserError(
            f"{path}: megatron_config makes PEFT import {module!r:.99}, which is not done here; "
            "take it out"
        )
    patterns = []
    for key in ("rank_pattern", "alpha_pattern", "exclude_modules", "layers_pattern"):
        value = settings.get(key) or ()
        listed = value if isinstance(value, list | tuple | dict) else [value]
        patterns += [(key, item) for item in listed]
    for key, pattern in patterns:
        if not isinstance(pattern, str) or not re.fullmatch(r"\^?(\w|\\?\.)+\$?", pattern):
            raise UserError(
                f"{path}: {key} has the expression {pattern!r:.99}, which is not tried here; write "
                "out the modules' names"
            )


def enabled_parts(settings: dict, path: Path) -> Sequence[bool] | None:
    """Which parts of a fused projection PEFT 0.2 adapted; None for any other adapter."""
    enabled = settings.get("enable_lora")
    if not enabled:
        return None
    if not isinstance(enabled, list) or not all(isinstance(part, bool) for part in enabled):
        raise UserError(f"{path}: enable_lora is {enabled!r:.99}, no list of true and false")
    return enabled if any(enabled) else None


def lora_config(settings: dict, path: Path) -> LoraConfig:
    """Convert settings of any version to today's LoraConfig."""
    # Every linear of the GLM family is an nn.Linear, for which PEFT has always ignored this one.
    settings = settings | {"fan_in_fan_out": False}
    try:
        config = LoraConfig(**{key: settings[key] for key in _LORA_SETTINGS & settings.keys()})
    except Exception as error:  # PEFT raises many kinds of exceptions
        raise UserError(f"{path}: PEFT does not take these settings ({error!s:.200})") from error
    name = config.base_model_name_or_path
    config.base_model_name_or_path = public_name(name) if name else None
    return config


def public_name(name: str) -> str:
    """A hub id (owner/name) or a bare name unchanged; only the last part of any other path."""
    is_public = re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name)
    return name if is_public else re.split(r"[\\/]", name.rstrip("\\/"))[-1]
