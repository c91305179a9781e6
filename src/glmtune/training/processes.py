"""What one process does for all, and how each takes its leave of the others."""

import atexit
from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from glmtune.errors import UserError

Result = TypeVar("Result")


def on_main(accelerator: Accelerator, task: Callable[[], Result]) -> Result:
    """Do a task in the first process; called by all, who wait for it and get what it gives.

    Raises:
        UserError: the task raised it; then all raise it, so that none waits for another in vain.
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
    """Have this process leave the others' group before Python ends, if gloo connects them.

    gloo's threads need Python to free what they hold: those that outlive it can abort a process
    that has done all its work, and its launcher then reports a failure. NCCL's do not, and would
    wait here for processes that may have failed.
    """
    atexit.unregister(_leave)  # once, however many runs there are in this process
    if accelerator.num_processes > 1 and dist.get_backend() == dist.Backend.GLOO:
        atexit.register(_leave)


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
