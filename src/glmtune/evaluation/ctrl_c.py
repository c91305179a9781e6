"""Ctrl+C in a conversation: always handled, and raised only where it is expected."""

import signal
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from types import FrameType

from glmtune.signals import signal_handler


class CtrlC:
    """Turns Ctrl+C into a KeyboardInterrupt, once, inside `awaited`; elsewhere it is deferred.

    Python's own handler is not enough. It raises anywhere, so that a second Ctrl+C ends the program
    while it handles the first. And it is not installed where the parent ignores the signal, as a
    script does for what it starts with `&` or after `trap '' INT`: then nothing stops an answer.
    """

    def __init__(self) -> None:
        self._has_come = False
        self._is_awaited = False

    def heard(self) -> AbstractContextManager[None]:
        """Install the handler of Ctrl+C, and restore the previous one at the end."""
        return signal_handler(self._note, signal.SIGINT)

    @contextmanager
    def awaited(self) -> Iterator[None]:
        """A block that Ctrl+C interrupts, also one pressed before the block.

        Raises:
            KeyboardInterrupt: at most once, so that the code that cleans up is not interrupted.
        """
        self._is_awaited = True
        try:
            self._raise_if_awaited()
            yield
        finally:
            self._is_awaited = False

    def raise_if_lost(self) -> None:
        """Inside `awaited`, raise again what Python has swallowed, as it does in a `__del__`.

        Raises:
            KeyboardInterrupt: it was raised in this block, which has continued regardless.
        """
        if not self._is_awaited:
            raise KeyboardInterrupt

    def _note(self, _: int, __: FrameType | None) -> None:
        self._has_come = True
        self._raise_if_awaited()

    def _raise_if_awaited(self) -> None:
        if self._has_come and self._is_awaited:
            self._has_come = self._is_awaited = False
            raise KeyboardInterrupt
