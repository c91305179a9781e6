"""The other processes of a run: what all must have alike, and whether each is still there.

They tell each other through the launcher's store (see `launched`), which needs no group and no
device: a process that waits for a collective operation hears all the same that a peer has failed.
"""

import itertools
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from glmtune.errors import UserError, note, reason_of
from glmtune.launched import (
    connect,
    is_first_to_say,
    num_processes,
    num_restarts,
    process_number,
)

POLL_SECONDS = 1.0
"""How often a process says that it is there, and looks whether its peers are."""
SILENCE_SECONDS = 20.0
"""After which a process that says nothing counts as gone; torchrun kills the others 30 s after it
has seen one die."""
QUICK_SECONDS = 5.0
"""The same once an operation with the others has failed: then one of them is gone."""
GRACE_SECONDS = 15.0
"""What a process has to end by itself after a peer failed, such as to finish a file."""
_LOADING_SECONDS = 600.0
"""The silence that is allowed before the first step: a library may hold Python while it loads."""
_WORDS, _DONE, _BEAT = "why the run ends", "done", "beat"
_MOST_ROWS, _MOST_TOLD = 4, 8
_RUNS = itertools.count()
"""Numbers the runs of this process: every process has them in the same order."""


@dataclass(frozen=True)
class _Beat:
    """What a process says of itself."""

    host: str
    pid: int
    log: str
    """Where its output goes, or empty."""
    step: int = -1
    """The step that it works on, counted from 0; -1 before the first."""
    rows: tuple[int, ...] = ()
    """The first row numbers of its newest pass."""
    num_rows: int = 0
    at: float = 0.0
    """When it said so, in seconds since 1970: no two are the same."""


class Peers:
    """This process among those of a run.

    Within `watched`, a thread looks after the others. Alone, nothing of it does anything.

    Args:
        number: this process's number.
        size: how many processes there are.
        store: opens a connection to the launcher's store, see `launched.connect`; None for none.
        dataset: the name of the rows, for messages.
        log: the run's log, for messages about a process whose output is kept nowhere.
    """

    def __init__(
        self,
        number: int,
        size: int,
        store: Callable[..., Any] | None = None,
        dataset: str = "",
        log: str = "",
    ):
        self._number, self._size = number, size
        self._open, self._dataset, self._log = store, dataset, log
        self._store = store() if store and size > 1 else None
        self._now = _Beat(socket.gethostname(), os.getpid(), _own_log())
        self._silence = _LOADING_SECONDS
        self._what_is_kept: Callable[[], str] = lambda: "nothing was saved"
        self._ended = threading.Event()
        self._heard: dict[int, tuple[bytes, float]] = {}

    @classmethod
    def of_launch(cls, dataset: str, log: str) -> "Peers":
        """The processes that the launcher has started."""
        name = f"run {next(_RUNS)}"
        connected = partial(connect, name, _LOADING_SECONDS)
        return cls(process_number(), num_processes(), connected, dataset, log)

    def tell_restart(self) -> None:
        """Note where the processes were that torchrun has started again, longest silent first."""
        if not num_restarts() or self._store is None or self._open is None or self._number:
            return
        before, told = self._open(restart=num_restarts() - 1), []
        for number in range(self._size):
            if before.check([key := f"{_BEAT} {number}"]):
                content = before.get(key)
                told.append((json.loads(content)["at"], self._describe(number, content)))
        words = self._words(before)
        note(
            f"torchrun has started all processes again (restart {num_restarts()})"
            + (f": {words}" if words else ""),
            *(f"before: {line}" for _, line in sorted(told)[:_MOST_TOLD]),
        )

    def beat(self, step: int, rows: np.ndarray) -> None:
        """Note which step this process works on, counted from 0, and the rows of its pass."""
        if self._store is None:
            return
        first = tuple(int(row) + 1 for row in rows[:_MOST_ROWS])
        self._now = replace(self._now, step=step, rows=first, num_rows=len(rows))

    def begin(self, what_is_kept: Callable[[], str]) -> None:
        """From here on a silent process is missed soon.

        Args:
            what_is_kept: says what the run has saved and how to resume it.
        """
        self._silence, self._what_is_kept = SILENCE_SECONDS, what_is_kept

    def what_is_kept(self) -> str:
        """What the run has saved, and how to resume it."""
        return self._what_is_kept()

    def compare(self, what: str, facts: Mapping[str, Any]) -> None:
        """Make sure that all processes have the same facts. Called by all, once for each `what`.

        Raises:
            UserError: this process's differ from those of process 0.
        """
        if self._store is None:
            return
        mine = json.loads(json.dumps(dict(facts), default=str))
        if self._number == 0:
            self._store.set(f"facts {what}", json.dumps([self._now.host, mine]))
            return
        host, theirs = json.loads(self._store.get(f"facts {what}"))
        names = [name for name in {**theirs, **mine} if theirs.get(name) != mine.get(name)]
        if not names:
            return
        told = ", ".join(f"{name} {mine.get(name)} (there {theirs.get(name)})" for name in names)
        raise UserError(
            f"{self._name} differs from process 0 on {host} in its {what}: {told}; give every "
            "machine the same"
        )

    @contextmanager
    def watched(self, failed: Callable[[], None] = lambda: None) -> Iterator[None]:
        """Look after the other processes while the block runs; tell them if it fails.

        If another fails or falls silent, the block ends: by an exception, where an operation with
        the others fails, or else with the process itself, after `GRACE_SECONDS`.

        Args:
            failed: called where the block fails, before this process waits for word of the others.

        Raises:
            UserError: another process is gone.
        """
        if self._store is None or self._open is None:
            yield
            return
        watcher = threading.Thread(target=self._watch, args=[self._open()], daemon=True)
        watcher.start()
        try:
            yield
            with suppress(RuntimeError, OSError):  # process 0 may have ended, and its store with it
                self._store.set(f"{_DONE} {self._number}", "")
        except UserError as error:
            failed()
            raise UserError(self._tell(str(error))) from error
        except KeyboardInterrupt:
            self._tell(f"{self._name} was interrupted")
            raise
        except Exception as error:
            # A failed operation with the others means that one is gone: which, is soon known.
            failed()
            self._silence = QUICK_SECONDS
            if line := self._words_within(QUICK_SECONDS + 2 * POLL_SECONDS):
                raise UserError(line) from error
            self._tell(f"{type(error).__name__}: {reason_of(error)}; {self._what_is_kept()}")
            raise
        finally:
            self._ended.set()
            watcher.join(2 * POLL_SECONDS)

    @property
    def _name(self) -> str:
        return f"process {self._number} of {self._size} on {self._now.host}"

    def _tell(self, line: str) -> str:
        """Tell the others why this process ends; return the first such line.

        Process 0 reports a mistake that all find; another reports its own with its name.
        """
        if self._number:
            if first := self._words_within(2 * POLL_SECONDS):
                return first
            line = line if self._name in line else f"{self._name}: {line}"
        return self._put_words(self._store, line)

    def _words_within(self, seconds: float) -> str:
        """The line of a process that ended, or about a silent one; empty if there is none."""
        until = time.monotonic() + seconds
        while not (line := self._words(self._store)) and time.monotonic() < until:
            time.sleep(0.1)
        return line

    def _words(self, store: Any) -> str:
        try:
            return store.get(_WORDS).decode() if store.check([_WORDS]) else ""
        except (RuntimeError, OSError):
            return f"process 0, or the launcher, is gone; {self._what_is_kept()}"

    def _put_words(self, store: Any, line: str) -> str:
        """Put the line where all read it, unless another was first; return the first."""
        try:
            return store.compare_set(_WORDS, "", line).decode()
        except (RuntimeError, OSError):  # the launcher is gone, and with it the store
            return line

    def _watch(self, store: Any) -> None:
        """Say that this process is there, and look at the next one, until the run ends."""
        while not self._ended.wait(POLL_SECONDS):
            line = self._words(store)
            with suppress(RuntimeError, OSError):  # then the next look finds that the store is gone
                now = replace(self._now, at=time.time())
                store.set(f"{_BEAT} {self._number}", json.dumps(asdict(now)))
                if not line and (silent := self._silent(store)):
                    line = self._put_words(store, silent)
            if line:
                break
        else:
            return
        if self._ended.wait(POLL_SECONDS):  # the line was its own
            return
        if is_first_to_say(line):
            print(f"error: {line}", file=sys.stderr, flush=True)
        if not self._ended.wait(GRACE_SECONDS):
            sys.stdout.flush()
            os._exit(2)

    def _silent(self, store: Any) -> str:
        """The line about the next process if it has said nothing for too long; else empty."""
        others = [(self._number + i) % self._size for i in range(1, self._size)]
        number = next((i for i in others if not store.check([f"{_DONE} {i}"])), None)
        if number is None:
            return ""
        key, now = f"{_BEAT} {number}", time.monotonic()
        content = store.get(key) if store.check([key]) else b""
        known, since = self._heard.setdefault(number, (content, now))
        if content != known:
            self._heard[number] = content, now
        elif now - since >= (self._silence if content else _LOADING_SECONDS):
            who = self._describe(number, content)
            return f"{who}; it is gone; {self._what_is_kept()}"
        return ""

    def _describe(self, number: int, content: bytes) -> str:
        if not content:
            return f"process {number} of {self._size} has not begun"
        beat = _Beat(**json.loads(content))
        return (
            f"process {number} of {self._size} (pid {beat.pid} on {beat.host}), last heard of "
            f"{self._place(beat)}; log: {beat.log or self._log}"
        )

    def _place(self, beat: _Beat) -> str:
        if beat.step < 0:
            return "before its first step"
        rows = ", ".join(map(str, beat.rows))
        num_more = beat.num_rows - len(beat.rows)
        more = f" and {num_more:,} more" if num_more else ""
        return f"in step {beat.step + 1:,}, at rows {rows}{more} of {self._dataset}"


def _own_log() -> str:
    """Where torchrun keeps this process's output, if it was asked to."""
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE", "")
    log = os.path.join(os.path.dirname(error_file), "stderr.log")
    return log if error_file and os.path.isfile(log) else ""
