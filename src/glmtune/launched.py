"""What a launcher, such as torchrun, says of the processes that it started for a command.

It speaks through the environment. The store is a table of keys and values that every process of
every machine reaches; torchrun's outlives them.
"""

import os
from typing import Any

_OWN: list[Any] = []
"""The store of process 0, where the launcher has none; it lives as long as this process."""


def process_number() -> int:
    """The number of this process, from 0."""
    return int(os.environ.get("RANK", "0"))


def local_number() -> int:
    """The number of this process on its machine, from 0: that of its card."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def num_processes() -> int:
    """How many processes the launcher has started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def num_restarts() -> int:
    """How often torchrun has started all processes again after one of them failed."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def connect(name: str, seconds: float = 60, restart: int | None = None) -> Any:
    """Connect to a store that all processes reach: the launcher's, or else process 0's own.

    The latter, where something like Slurm's srun starts each process, is at the port after
    MASTER_PORT and ends with process 0.

    Args:
        name: keeps the keys of a purpose apart from those of others.
        seconds: how long a read waits for a key that is not there yet.
        restart: the start of all processes whose keys are meant, from 0; else the present one.

    Returns:
        torch's `Store`; each thread that uses one needs its own. None for a single process.
    """
    if num_processes() == 1:
        return None
    from datetime import timedelta

    from torch.distributed import PrefixStore, TCPStore

    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    wait = timedelta(seconds=seconds)
    if not _has_launchers_store():
        port += 1
        if process_number() == 0 and not _OWN:
            _OWN.append(TCPStore(address, port, is_master=True, wait_for_workers=False))
    store = TCPStore(address, port, is_master=False, timeout=wait)
    start = num_restarts() if restart is None else restart
    return PrefixStore(f"glmtune/{start}/{name}", store)


def _has_launchers_store() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def is_first_to_say(line: str) -> bool:
    """Whether no other process has said a line: all find the same mistake, and one reports it."""
    if num_processes() == 1 or not (_has_launchers_store() or _OWN):
        return True
    import hashlib

    try:
        return connect("lines").add(hashlib.sha256(line.encode()).hexdigest(), 1) == 1
    except (RuntimeError, OSError, ValueError, KeyError):  # the launcher is gone
        return True
