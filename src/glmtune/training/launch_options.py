"""What `accelerate launch` was asked for besides processes: FSDP, DeepSpeed, Megatron-LM.

It tells its processes through the environment. FSDP and DeepSpeed's ZeRO-3 share out the base,
which `models.sharded` does; what else they would do is said to have no effect, or refused.
"""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from glmtune.errors import UserError, note

_NOT_OF_FSDP = {
    ("FSDP_VERSION", "1"): "fsdp_version 1: set fsdp_version 2",
    ("FSDP_OFFLOAD_PARAMS", "true"): "fsdp_offload_params: shares stay on the GPUs; set it false",
    ("FSDP_ACTIVATION_CHECKPOINTING", "true"): "fsdp_activation_checkpointing: set it false, and "
    "give --gradient_checkpointing true",
    ("FSDP_RESHARD_AFTER_FORWARD", "false"): "fsdp_reshard_after_forward false: layers are freed "
    "after use; set it true",
}
"""Options of Accelerate's FSDP, by what it tells its processes, and why they are refused."""
_FSDP, _DEEPSPEED = "ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"
_MEGATRON = "ACCELERATE_USE_MEGATRON_LM"
_OF_DEEPSPEED = "ACCELERATE_DEEPSPEED_"
_OUR_NAMES = {
    "gradient_accumulation_steps": "--gradient_accumulation_steps",
    "gradient_clipping": "--max_grad_norm",
    "train_micro_batch_size_per_gpu": "--per_device_train_batch_size",
    "bf16": "--bf16",
    "fp16": "--fp16",
}
"""Options of DeepSpeed that have no effect, and the settings that have it."""
_ZERO = "zero_optimization"
_OFFLOADS = {"offload_param": "cpu_offload_params", "offload_optimizer": "cpu_offload"}
"""Options that leave a part of ZeRO to the host, and the names that were theirs once."""


def asks_for_shares() -> bool:
    """Whether `accelerate launch` was asked to share out the base: by FSDP, or by ZeRO-3.

    Accelerate is then not told of it a second time: its own FSDP would share out what trains as
    well, and transformers would load a part of the weights only.

    Raises:
        UserError: an option that is not offered, or a configuration that cannot be read.
    """
    if _is_set(_MEGATRON):
        raise not_offered("Megatron-LM")
    if _is_set(_FSDP):
        for (name, value), words in _NOT_OF_FSDP.items():
            if os.environ.get(name, "1" if name == "FSDP_VERSION" else "") == value:
                raise UserError(f"accelerate launch: {words}")
        os.environ[_FSDP] = "false"
        return True
    if _is_set(_DEEPSPEED):
        stage = _zero_stage()
        os.environ[_DEEPSPEED] = "false"
        return stage == 3
    return False


def not_offered(name: str) -> UserError:
    """The refusal of a way to run on several cards."""
    return UserError(
        f"accelerate launch: {name} is not offered: launch with --multi_gpu, where each process "
        "holds the whole frozen base, or a share of it with --shard_base true"
    )


def _is_set(name: str) -> bool:
    return os.environ.get(name, "false").lower() == "true"


def _zero_stage() -> int:
    """The stage of DeepSpeed's ZeRO that was asked for; a note says what is done for it."""
    path = os.environ.get(f"{_OF_DEEPSPEED}CONFIG_FILE", "none")
    given = _of_environment() if path == "none" else _read(path)
    zero = given.get(_ZERO) or {}
    for name, old_name in _OFFLOADS.items():
        told = zero.get(name) or {}
        device = (told.get("device") or "none") if isinstance(told, dict) else told
        if zero.get(old_name):
            name, device = old_name, "cpu"
        if device != "none":
            raise UserError(
                f"accelerate launch: DeepSpeed's {name} to {device} is not offered: shares stay on "
                "the GPUs; leave it out, and give --quantization_bit 4 or --gradient_checkpointing "
                "true for less memory"
            )
    stage = zero.get("stage", 0)
    if stage not in (0, 1, 2, 3) or isinstance(stage, bool):
        raise UserError(f"accelerate launch: ZeRO's stage {stage!r}: give 0, 1, 2 or 3")
    does = (
        "the processes share the base, as with --shard_base true"
        if stage == 3
        else "each process holds the whole base, and what trains beside it is too little to share"
    )
    ignored = [
        f"{name} ({_OUR_NAMES[name]} sets it)" if name in _OUR_NAMES else name
        for name in _in_effect(given)
        if name != _ZERO
    ]
    ignored += [f"{_ZERO}.{name}" for name in _in_effect(zero) if name not in ("stage", *_OFFLOADS)]
    more = f"; without effect: {', '.join(ignored)}" if ignored else ""
    note(f"accelerate launch: ZeRO-{stage} by torch, not by DeepSpeed: {does}{more}")
    return stage


def _of_environment() -> dict[str, Any]:
    """What options of the launcher say, as in a configuration file."""

    def told(name: str, default: str) -> str:
        return os.environ.get(f"{_OF_DEEPSPEED}{name}", default)

    given: dict[str, Any] = {
        _ZERO: {
            "stage": int(told("ZERO_STAGE", "2")),
            "offload_param": {"device": told("OFFLOAD_PARAM_DEVICE", "none")},
            "offload_optimizer": {"device": told("OFFLOAD_OPTIMIZER_DEVICE", "none")},
        }
    }
    steps = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if steps not in ("1", "auto"):
        given["gradient_accumulation_steps"] = int(steps)
    clipping = os.environ.get("ACCELERATE_GRADIENT_CLIPPING", "none")
    if clipping not in ("none", "auto"):
        given["gradient_clipping"] = float(clipping)
    return given


def _read(path: str) -> dict[str, Any]:
    """A configuration file of DeepSpeed."""
    where = f"accelerate launch: deepspeed_config_file {path}"
    try:
        given = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no JSON"
        raise UserError(f"{where}: cannot be read ({reason}); name a file of DeepSpeed") from error
    if not isinstance(given, dict) or not isinstance(given.get(_ZERO, {}), dict):
        raise UserError(f"{where}: is no configuration of DeepSpeed, an object of JSON")
    return given


def _in_effect(given: Mapping[str, Any]) -> Iterator[str]:
    """Options that are set: "auto" and what is off say nothing."""
    for name, value in given.items():
        off = isinstance(value, dict) and value.get("enabled") in (False, "auto")
        if value not in ("auto", None, False) and not off:
            yield name
