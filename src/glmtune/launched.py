"""What a launcher, such as torchrun, says of the processes that it started for a command.

It speaks through the environment. The store is the launcher's own table of keys and values, which
every process of every machine reaches, and which outlives them.
"""

import hashlib
import os
from datetime import timedelta
from typing import Any


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
    """Connect to the launcher's store.

    Args:
        name: keeps the keys of a purpose apart from those of others.
        seconds: how long a read waits for a key that is not there yet.
        restart: the start of all processes whose keys are meant, from 0; else the present one.

    Returns:
        torch's `Store`; each thread that uses one needs its own. None where the processes have no
        store before they form a group, as under launchers other than torch's.
    """
    if num_processes() == 1 or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    from torch.distributed import PrefixStore, TCPStore

    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(*address, is_master=False, timeout=timedelta(seconds=seconds))
    start = num_restarts() if restart is None else restart
    return PrefixStore(f"glmtune/{start}/{name}", store)


def is_first_to_say(line: str) -> bool:
    """Whether no other process has said a line: all find the same mistake, and one reports it."""
    if num_processes() == 1:
        return True
    try:
        store = connect("lines")
        return store is None or store.add(hashlib.sha256(line.encode()).hexdigest(), 1) == 1
    except (RuntimeError, OSError, ValueError, KeyError):  # the launcher is gone
        return True
