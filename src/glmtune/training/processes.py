"""Work that one process does for all, what all decide together, and how one leaves the group."""

import atexit
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, TypeVar

import torch
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


@contextmanager
def memory_of_all(
    accelerator: Accelerator, send: Callable[[], object] = lambda: None
) -> Iterator[None]:
    """Where memory is too small for the block in one process, end it so in all. Called by all.

    The hosts wait for each other, the devices do not.

    Args:
        accelerator: knows the other processes.
        send: called after the block in any case, before the processes tell each other: what it
            sends is what the others wait for. Not called if the block raises anything else.

    Raises:
        torch.OutOfMemoryError: memory was too small, here or elsewhere.
    """
    fault = None
    try:
        yield
    except torch.OutOfMemoryError as error:
        if accelerator.num_processes == 1:
            raise
        traceback.clear_frames(error.__traceback__)  # they hold the activations
        fault = error
    send()
    if accelerator.num_processes == 1:
        return
    is_short = torch.tensor(float(fault is not None))
    dist.all_reduce(is_short, group=_host_group(dist.group.WORLD))
    if is_short:
        raise fault or torch.OutOfMemoryError("another process has too little memory")


@cache
def _host_group(group: Any) -> Any:
    """A group of the same processes for tensors of the host; made by all when first asked for."""
    is_gloo = dist.get_backend(group) == dist.Backend.GLOO
    return group if is_gloo else dist.new_group(backend=dist.Backend.GLOO)


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
