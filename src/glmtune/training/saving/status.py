"""`status.json` in a run folder: that a run trains, and afterwards how it ended.

While it trains, its process holds the folder (see `locks`): a status of `training` in a folder that
nobody holds is that of a process that was killed.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel

from glmtune.data.files import write_json
from glmtune.errors import UserError, reason_of
from glmtune.locks import held_alone
from glmtune.run_files import STATUS_FILE

if TYPE_CHECKING:  # what reads a status needs no torch
    from glmtune.training.run import Run
    from glmtune.training.state import TrainingState

Ending = Literal["training", "done", "stopped", "failed"]


class RunStatus(BaseModel):
    """The content of status.json."""

    state: Ending
    first_step: int
    """Steps that were done before, where the run was resumed."""
    max_steps: int
    began: float
    """When the first of its steps began, in seconds since 1970."""
    step: int = 0
    """Steps done at the end."""
    reason: str = ""
    """Why it failed, or ended before its last step."""


@contextmanager
def kept_status(run: "Run", state: "TrainingState") -> Iterator[Callable[[bool], None]]:
    """Keep the status while a block trains; it calls what is yielded with whether all is done.

    Raises:
        UserError: the file cannot be written.
    """
    if not run.accelerator.is_main_process:
        yield lambda _: None
        return
    folder, is_done = Path(run.settings.output_dir), False
    status = RunStatus(
        state="training",
        first_step=state.global_step,
        max_steps=run.max_steps,
        began=time.time(),
    )

    def write(**changes: Any) -> None:
        if folder.is_dir():  # else it was moved away, and a new one would hide that
            write_json(status.model_copy(update=changes).model_dump(), folder / STATUS_FILE)

    def end(done: bool) -> None:
        nonlocal is_done
        is_done = done

    with held_alone(folder):
        write()
        try:
            yield end
        except BaseException as error:
            stopped = isinstance(error, KeyboardInterrupt)
            reason = "" if stopped else reason_of(error)
            # A full disk may be what ended it.
            with suppress(UserError):
                write(
                    state="stopped" if stopped else "failed", step=state.global_step, reason=reason
                )
            raise
        early = state.evaluations.why_no_better(run.settings.early_stopping)
        reason = early or "" if state.global_step < run.max_steps else ""
        write(state="done" if is_done else "stopped", step=state.global_step, reason=reason)
