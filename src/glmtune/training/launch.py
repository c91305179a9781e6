"""The devices of a run: what its launcher, Accelerate or torchrun, has started it on."""

import os

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType

from glmtune.config.settings import TrainSettings
from glmtune.errors import UserError, note
from glmtune.hardware import pick_device, pick_dtype
from glmtune.launched import local_number
from glmtune.training.processes import leave_at_exit

_NOT_OF_FSDP = {
    ("FSDP_VERSION", "1"): "fsdp_version 1: set fsdp_version 2",
    ("FSDP_OFFLOAD_PARAMS", "true"): "fsdp_offload_params: shares stay on the GPUs; set it false",
    ("FSDP_ACTIVATION_CHECKPOINTING", "true"): "fsdp_activation_checkpointing: set it false, and "
    "give --gradient_checkpointing true",
    ("FSDP_RESHARD_AFTER_FORWARD", "false"): "fsdp_reshard_after_forward false: layers are freed "
    "after use; set it true",
}
"""Options of Accelerate's FSDP, by what it tells its processes, and why they are refused."""
_USES_FSDP = "ACCELERATE_USE_FSDP"
_OTHERS = {"ACCELERATE_USE_DEEPSPEED": "DeepSpeed", "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM"}


def asks_for_fsdp() -> bool:
    """Whether `accelerate launch` was asked for FSDP; it is then not told of it a second time.

    Accelerate's own would share out what trains as well, and transformers would load a part of the
    weights only.

    Raises:
        UserError: an option of it that is not offered, or what is none of torch's.
    """
    for name, words in _OTHERS.items():
        if _is_set(name):
            raise _not_offered(words)
    if not _is_set(_USES_FSDP):
        return False
    for (name, value), words in _NOT_OF_FSDP.items():
        if os.environ.get(name, "1" if name == "FSDP_VERSION" else "") == value:
            raise UserError(f"accelerate launch: {words}")
    os.environ[_USES_FSDP] = "false"
    return True


def _is_set(name: str) -> bool:
    return os.environ.get(name, "false").lower() == "true"


def _not_offered(name: str) -> UserError:
    return UserError(
        f"accelerate launch: {name} is not offered: launch with --multi_gpu, where each process "
        "holds the whole frozen base, or a share of it with --shard_base true"
    )


def shards_base(settings: TrainSettings, accelerator: Accelerator) -> bool:
    """Whether a run's processes share the base."""
    return settings.shard_base and accelerator.num_processes > 1


def start_accelerator(settings: TrainSettings) -> tuple[Accelerator, torch.dtype]:
    """The device or devices that a run trains on, and the compute type of its base model.

    bfloat16 and float32 run without autocast: the base is in that type, the adapter in float32.
    float16 uses Accelerate's autocast and gradient scaler, and prints a warning.

    Raises:
        UserError: a number format or a kind of distribution that is not available.
    """
    device = pick_device(settings.use_cpu)
    if device.type == "cuda" and local_number() >= (num_cards := torch.cuda.device_count()):
        raise UserError(
            f"process {local_number()} of this machine has no card: it has {num_cards}, and a "
            f"process needs one of its own: torchrun --nproc_per_node {num_cards}"
        )
    dtype, caution = pick_dtype(device, settings.bf16, settings.fp16)
    accelerator = Accelerator(
        cpu=device.type == "cpu", mixed_precision="fp16" if dtype == torch.float16 else "no"
    )
    # The loop counts its passes itself; the launcher's environment must not divide the loss again.
    accelerator.gradient_accumulation_steps = 1
    kind = accelerator.distributed_type
    if kind not in (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU):
        raise _not_offered(kind.value)
    leave_at_exit(accelerator)
    # A launcher asked for several CPU processes then starts one, with an address but no world size.
    launched_alone = "ACCELERATE_USE_CPU" in os.environ and "MASTER_ADDR" in os.environ
    if accelerator.num_processes == 1 and launched_alone and "WORLD_SIZE" not in os.environ:
        note(
            "accelerate launch has started one process: on CPUs it starts no more, whatever "
            "--num_processes says; for N of them: torchrun --nproc_per_node N -m glmtune train ..."
        )
    if settings.shard_base and accelerator.num_processes == 1:
        note(
            "shard_base has no effect: there is one process, which holds the whole base "
            "(torchrun --nproc_per_node N -m glmtune train ...)"
        )
    if caution:
        note(caution)
    return accelerator, dtype
