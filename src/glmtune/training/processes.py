"""Work that one process does for all, and how a process leaves the group."""

import atexit
from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from glmtune.errors import UserError

Result = TypeVar("Result")


def on_main(accelerator: Accelerator, task: Callable[[], Result]) -> Result:
    """Run a task in the first process; called by all, which wait for it and get its result.

    Raises:
        UserError: the task raised it; then all raise it, so that none waits for another forever.
    """
    if accelerator.num_processes == 1:
        return task()
    outcome: list = [None, None]
    if accelerator.is_main_process:
        try:
            outcome[0] = task()
        except UserError as error:
            outcome[1] = str(error)
    result, fault = broadcast_object_list(outcome)
    if fault is not None:
        raise UserError(fault)
    return result


def leave_at_exit(accelerator: Accelerator) -> None:
    """Make this process leave the process group before Python ends, if the backend is gloo.

    gloo's threads need Python to release what they hold: threads that outlive it can abort a
    process that has done all its work, and its launcher then reports a failure. NCCL has no such
    threads, and would wait here for processes that may have failed.
    """
    atexit.unregister(_leave)  # once, however many runs there are in this process
    if accelerator.num_processes > 1 and dist.get_backend() == dist.Backend.GLOO:
        atexit.register(_leave)


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
