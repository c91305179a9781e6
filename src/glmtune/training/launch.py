"""The devices of a run: what its launcher, Accelerate or torchrun, has started it on."""

import os
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, InitProcessGroupKwargs
from torch.distributed import PrefixStore, Store
from torch.distributed.rendezvous import register_rendezvous_handler, rendezvous

from glmtune.config.settings import TrainSettings
from glmtune.errors import UserError, note
from glmtune.hardware import pick_device, pick_dtype
from glmtune.launched import local_number, num_restarts
from glmtune.training.launch_options import not_offered
from glmtune.training.processes import leave_at_exit


def shards_base(settings: TrainSettings, accelerator: Accelerator) -> bool:
    """Whether a run's processes share the base."""
    return settings.shard_base and accelerator.num_processes > 1


def _meet(_: str, **given: Any) -> Iterator[tuple[Store, int, int]]:
    """torch's `rendezvous` by the environment, but apart from earlier starts of the processes.

    torchrun 2.13 keeps one store over its restarts: a process that starts again can find in it the
    address of one that is gone, where the new one has not written its own yet.
    """
    for store, number, count in rendezvous("env://", **given):
        yield PrefixStore(f"glmtune/{num_restarts()}/group", store), number, count


_MEETING = "glmtune"
register_rendezvous_handler(_MEETING, _meet)


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
        cpu=device.type == "cpu",
        mixed_precision="fp16" if dtype == torch.float16 else "no",
        kwargs_handlers=[InitProcessGroupKwargs(init_method=f"{_MEETING}://")],
    )
    # The loop counts its passes itself; the launcher's environment must not divide the loss again.
    accelerator.gradient_accumulation_steps = 1
    kind = accelerator.distributed_type
    if kind not in (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU):
        raise not_offered(kind.value)
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
