"""Whether a process works in a folder: a lock says so, which ends with its process in any case."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_TRIES, _SECONDS = 5, 0.02
"""A process that only looks holds a folder for an instant."""


@contextmanager
def held_alone(folder: Path) -> Iterator[bool]:
    """Hold a folder, where the system can; yield False if another process holds it."""
    try:
        import fcntl
    except ImportError:  # on Windows
        yield True
        return
    number = os.open(folder, os.O_RDONLY)
    try:
        is_ours = False
        for _ in range(_TRIES):
            try:
                fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(_SECONDS)
            except OSError:  # a file system without locks
                is_ours = True
                break
            else:
                is_ours = True
                break
        yield is_ours
    finally:
        os.close(number)


def is_held(folder: Path) -> bool | None:
    """Whether another process, or another part of this one, holds a folder; None if unknown."""
    try:
        import fcntl
    except ImportError:  # on Windows
        return None
    try:
        number = os.open(folder, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(number, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return None
    finally:
        os.close(number)
    return False
