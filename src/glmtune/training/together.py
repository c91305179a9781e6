"""What one process does for all: it looks at the disk and writes there, and tells how it went."""

from collections.abc import Callable
from typing import TypeVar

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
