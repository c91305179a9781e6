"""Handlers of the operating system's signals."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def signal_handler(
    handler: Callable[[int, FrameType | None], None], *numbers: int
) -> Iterator[None]:
    """Handle signals with a function inside the `with` block, then restore earlier handlers.

    Outside the main thread, where Python forbids handlers, nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    earlier = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, former in earlier.items():
            signal.signal(number, former)
