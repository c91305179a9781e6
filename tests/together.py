"""Functions that run in several processes of one group, as a launcher starts them.

They are forked from a server that has imported all that a run needs, which is many times faster
than a launcher: tests/recipes/test_several_processes.py uses a real one.
"""

import atexit
import inspect
import os
import sys
import traceback
from importlib.util import module_from_spec, spec_from_file_location
from multiprocessing import get_context
from multiprocessing.connection import wait
from pathlib import Path
from unittest.mock import patch

from torch.distributed import TCPStore
from toys import child_environment

from glmtune.cli import main  # noqa: F401  (the server imports it for all)
from glmtune.training import loop  # noqa: F401

SECONDS = 300


def in_processes(number, work, *arguments, folder=None):
    """Call a function of a test module in several processes, each with its number in RANK.

    Args:
        number: how many.
        work: a function of a module, which each process loads anew from its file.
        arguments: what it is called with.
        folder: where `output N` is written, what process N prints; by default nothing is kept.

    Returns:
        The exit code of each; a function that returns ends with 0.
    """
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = get_context("forkserver")
    context.set_forkserver_preload([__name__])
    # pytest's names of modules are none that Python can import.
    place = inspect.getsourcefile(work), work.__name__
    given = [(n, number, store.port, place, arguments, folder) for n in range(number)]
    processes = [context.Process(target=_begin, args=each) for each in given]
    with patch.dict(os.environ, child_environment()):
        for process in processes:
            process.start()
    try:
        for process in processes:
            process.join(SECONDS)
        return [process.exitcode for process in processes]
    finally:
        for process in processes:
            process.kill()
        wait([process.sentinel for process in processes], SECONDS)


def output(folder, number=0):
    """What a process has printed."""
    return Path(folder, f"output {number}").read_text(encoding="utf-8")


def _begin(rank, size, port, place, arguments, folder):
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0",
    }  # fmt: skip
    if folder is not None:
        file = os.open(Path(folder, f"output {rank}"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file, stream.fileno())
    try:
        spec = spec_from_file_location("work", place[0])
        spec.loader.exec_module(module := module_from_spec(spec))
        code = getattr(module, place[1])(*arguments) or 0
    except Exception:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()  # as Python does at its end, but multiprocessing's does not
    sys.stdout.flush()
    os._exit(code)
