"""Work that one process does for all, what all decide together, and how one leaves the group."""

import atexit
import traceback
from collections.abc import Callable, Iterator, Sequence, Sized
from contextlib import contextmanager
from functools import cache
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from glmtune.errors import UserError

Result = TypeVar("Result")


class MemoryOfOneError(Exception):
    """This process has too little memory, and the others wait for its share of the base."""


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


def in_shares(accelerator: Accelerator, task: Callable[[int, int], Result]) -> list[Result]:
    """Let each process do its share of a task; called by all, which get all results in order.

    Args:
        accelerator: knows the other processes.
        task: takes the number of a process and how many there are.
    """
    result = task(accelerator.process_index, accelerator.num_processes)
    return [result] if accelerator.num_processes == 1 else gather_object([result])


@contextmanager
def memory_of_all(
    accelerator: Accelerator,
    send: Callable[[], object] = lambda: None,
    in_step: bool = False,
) -> Iterator[None]:
    """Where memory is too small for the block in one process, end it so in all. Called by all.

    The hosts wait for each other, the devices do not.

    Args:
        accelerator: knows the other processes.
        send: called after the block in any case, before the processes tell each other: what it
            sends is what the others wait for. Not called if the block raises anything else.
        in_step: whether the processes wait for each other within the block, see `deal`.

    Raises:
        torch.OutOfMemoryError: memory was too small, here or elsewhere.
        MemoryOfOneError: it was too small here, and the others are still within the block.
    """
    fault = None
    try:
        yield
    except torch.OutOfMemoryError as error:
        if accelerator.num_processes == 1:
            raise
        if in_step:
            raise MemoryOfOneError from error
        traceback.clear_frames(error.__traceback__)  # they hold the activations
        fault = error
    send()
    if accelerator.num_processes == 1:
        return
    is_short = torch.tensor(float(fault is not None))
    dist.all_reduce(is_short, group=_host_group(dist.group.WORLD))
    if is_short:
        raise fault or torch.OutOfMemoryError("another process has too little memory")


@contextmanager
def one_at_a_time(accelerator: Accelerator, is_wanted: bool) -> Iterator[None]:
    """Let the processes of a machine go through the block one after another. Called by all.

    Args:
        accelerator: knows the other processes.
        is_wanted: else they go through it together.
    """
    if not is_wanted:
        yield
        return
    number = accelerator.local_process_index
    last = max(gather_object([number]))
    for _ in range(number):
        accelerator.wait_for_everyone()
    yield
    for _ in range(last - number):
        accelerator.wait_for_everyone()


def deal(
    parts: Sequence[Sized], accelerator: Accelerator, in_step: bool = False
) -> list[tuple[int, bool]]:
    """The passes that this process computes, of those that all share: by turns.

    Args:
        parts: rows of each pass; one without rows is nobody's.
        accelerator: knows the other processes.
        in_step: let every process compute as many passes as the one that has most, since they
            gather the base's layers together.

    Returns:
        The number of each, and whether it counts: those that fill up repeat some pass.
    """
    count = accelerator.num_processes
    of_each = [
        [number for number in range(rank, len(parts), count) if len(parts[number])]
        for rank in range(count)
    ]
    own = [(number, True) for number in of_each[accelerator.process_index]]
    missing = max(map(len, of_each)) - len(own) if in_step else 0
    some = next((number for number, part in enumerate(parts) if len(part)), 0)
    return own + [(some, False)] * missing


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
