"""What ends a run before its last step: a signal, the clock, memory that is too small.

After Ctrl+C, a scheduler's SIGTERM or `max_hours`, the current pass ends; then the run writes a
checkpoint and stops. An unfinished step is rolled back.
"""

import signal
import time
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType

import torch
from accelerate import Accelerator

from glmtune.signals import signal_handler
from glmtune.training.state import TrainingState, own_state, restore_own_state

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Notices a request to stop inside its `with` block; a second Ctrl+C stops at once.

    Before `begin` there is nothing to save yet: a signal ends the run with KeyboardInterrupt.

    Args:
        accelerator: lets the processes agree on the step after which they stop; may be set later,
            before `begin`.
        max_hours: hours from now after which to stop; None for no limit.
    """

    def __init__(self, accelerator: Accelerator | None = None, max_hours: float | None = None):
        self.by_signal = False
        """Whether a signal, and not the clock alone, has requested the stop."""
        self.accelerator = accelerator
        self._max_hours = max_hours
        self._started = time.monotonic()
        self._has_begun = False
        self._is_told = False
        self._in_flight: torch.Tensor | None = None
        self._exits = ExitStack()

    def __enter__(self) -> "StopRequest":
        self._exits.enter_context(signal_handler(self._note, *_SIGNALS))
        return self

    def __exit__(self, *_) -> None:
        self._exits.close()

    def begin(self) -> None:
        """From here on, a signal lets the run save before it stops."""
        self._has_begun = True

    def _note(self, number: int, _: FrameType | None) -> None:
        if not self._has_begun or (self.by_signal and number == signal.SIGINT):
            raise KeyboardInterrupt
        self.by_signal = True

    def is_wanted(self) -> bool:
        """Whether this process has been asked to stop, by a signal or by the clock."""
        hours = (time.monotonic() - self._started) / 3600
        is_late = self._max_hours is not None and hours >= self._max_hours
        is_wanted = self.by_signal or is_late
        assert self.accelerator is not None
        if is_wanted and not self._is_told and self.accelerator.is_main_process:
            why = "" if self.by_signal else f"max_hours ({self._max_hours:g}) is reached: "
            print(f"\n{why}stopping, with a checkpoint ...", flush=True)
            self._is_told = True
        return is_wanted

    def is_agreed(self) -> bool:
        """Decide, once a step and the same in every process, whether to stop now.

        A signal may reach the processes in different steps. Each step sums their requests and reads
        the sum of the step before, which has arrived by now, so that no process waits for the
        device.
        """
        is_wanted = self.is_wanted()
        assert self.accelerator is not None
        if self.accelerator.num_processes == 1:
            return is_wanted
        before = self._in_flight
        wishes = torch.tensor(
            [float(is_wanted), float(self.by_signal)], device=self.accelerator.device
        )
        self._in_flight = self.accelerator.reduce(wishes, reduction="sum")
        if before is None or not before[0]:
            return False
        self.by_signal = bool(before[1])
        return True


class CutShort(Exception):
    """The run ends before its last step, in the state after the last whole step.

    Args:
        out_of_memory: the cause is too little memory, not a request to stop.
    """

    def __init__(self, out_of_memory: bool = False):
        super().__init__()
        self.out_of_memory = out_of_memory


@contextmanager
def undone_when_cut_short(state: TrainingState) -> Iterator[None]:
    """Roll back gradients, random numbers and running loss if a step is cut short.

    Raises:
        CutShort: if the block raises it, or instead of torch.OutOfMemoryError.
    """
    before = own_state(state)
    try:
        yield
    except (CutShort, torch.OutOfMemoryError) as error:
        traceback.clear_frames(error.__traceback__)  # they hold the activations
        state.optimizer.zero_grad()
        restore_own_state(before, state)
        raise CutShort(isinstance(error, torch.OutOfMemoryError)) from None
