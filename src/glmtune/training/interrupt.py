"""Ctrl+C and a scheduler's SIGTERM: the step ends, a checkpoint is written, the run stops."""

import signal
import threading
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Notices a wish to stop while its `with` lasts; a second Ctrl+C stops at once.

    Args:
        accelerator: brings the processes to one mind about the step after which they stop.
    """

    def __init__(self, accelerator: Accelerator):
        self._accelerator = accelerator
        self._is_wanted = False
        self._in_flight: torch.Tensor | None = None
        self._earlier: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():  # elsewhere Python forbids it
            self._earlier = {number: signal.signal(number, self._note) for number in _SIGNALS}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._earlier.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        if self._is_wanted and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._is_wanted = True
        if self._accelerator.is_main_process:
            print("\nstopping after this step, with a checkpoint ...", flush=True)

    def is_agreed(self) -> bool:
        """Say, once a step and in every process alike, whether to stop now.

        A signal may reach the processes in different steps. Each step sums their wishes and reads
        the sum of the step before, which is there by now, so that no process waits for the device.
        """
        if self._accelerator.num_processes == 1:
            return self._is_wanted
        before = self._in_flight
        wish = torch.tensor(float(self._is_wanted), device=self._accelerator.device)
        self._in_flight = self._accelerator.reduce(wish, reduction="sum")
        return before is not None and before.item() > 0
