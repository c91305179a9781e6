"""Work spread over processes, and over machines, by Ray Data: `engine ray`.

Ray keeps what workers return in memory that all processes of a machine share, starts work again
whose worker has died, and holds work back where results are not taken. Without an address it is
started on this machine alone, reachable from nowhere else, and ends with the command.

Ray takes seconds to start, and its workers to import. So it is used from a process of its own
(`ray_driver`), and the command works itself until it is there.
"""

import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from queue import SimpleQueue
from typing import Any, TypeVar

from glmtune import ray_driver as driver
from glmtune.errors import UserError, note, reason_of

Item = TypeVar("Item")
Result = TypeVar("Result")

SECONDS_TO_ANSWER = 5
SECONDS_WORTH_IT = 5.0
"""What this process would still work at for so long goes to workers: it takes a while to begin."""
_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_BACKEND_LOG_LEVEL": "fatal",
}
# What both sides of HTTP/2, which Ray speaks, begin with (RFC 9113, 3.4): asked of a port, a Ray
# answers at once, where Ray's own client tries for minutes.
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_SETTINGS, _FRAME_TYPE = b"\0\0\0\x04\0\0\0\0\0", 3
_ALONE = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
"""Without clusters Ray stays on the loopback address, as it does on Windows and macOS by itself; an
address that is given it replaces by one that other machines reach."""
_running: "list[_Ray]" = []
"""The Ray that works for this process; none, or one."""


def check_ray(address: str | None) -> None:
    """Check that Ray is installed, and that a cluster that is named answers.

    Args:
        address: of a cluster, such as 10.0.0.1:6379; None for the environment's RAY_ADDRESS, and
            without that for this machine.

    Raises:
        UserError: it is not, or does not.
    """
    if find_spec("ray") is None:
        raise UserError("engine ray needs Ray: pip install 'glmtune[ray]', or leave engine out")
    if place := _address(address):
        name, told = place
        _check_cluster(name, told)


def _address(address: str | None) -> tuple[str, str] | None:
    """The address of a cluster and what names it; None for a Ray of this machine."""
    ray = sys.modules.get("ray")
    if ray and ray.is_initialized():
        return ray.get_runtime_context().gcs_address, "the Ray of this process"
    if address:
        return address, f"ray_address {address}"
    given = os.environ.get("RAY_ADDRESS")
    return (given, f"RAY_ADDRESS {given}") if given and given != "local" else None


def _check_cluster(address: str, told: str) -> None:
    import socket

    fix = "start one with `ray start --head`, or leave it out for a Ray of this machine"
    host, _, port = address.rpartition(":")
    if address == "auto" or not (host and port.isdecimal()):
        raise UserError(
            f"{told}: is no address of a Ray cluster; write HOST:PORT, port 6379 mostly"
        )
    if "//" in host:
        raise UserError(f"{told}: is of Ray's client; run this on a machine of the cluster, with "
                        "its address as HOST:PORT")  # fmt: skip
    try:
        with socket.create_connection((host, int(port)), SECONDS_TO_ANSWER) as connection:
            connection.settimeout(SECONDS_TO_ANSWER)
            connection.sendall(_PREFACE + _SETTINGS)
            answer = connection.recv(len(_SETTINGS))
    except OSError as error:
        raise UserError(
            f"{told}: no Ray cluster answers there ({reason_of(error)}); {fix}"
        ) from error
    if answer[_FRAME_TYPE : _FRAME_TYPE + 1] != _SETTINGS[_FRAME_TYPE : _FRAME_TYPE + 1]:
        raise UserError(f"{told}: something else than a Ray cluster answers there; {fix}")


@contextmanager
def running_ray(address: str | None) -> Iterator[None]:
    """Have a Ray that `over` works with: that of a cluster, or one of this machine.

    It starts while this goes on. One that works for this process already is used, and stays; where
    the process itself is connected to a cluster, it is that one.

    Args:
        address: see `check_ray`.

    Raises:
        UserError: see `check_ray`.
    """
    check_ray(address)
    if _running:
        yield
        return
    ray = _Ray(_address(address))
    _running.append(ray)
    try:
        yield
    finally:
        _running.clear()
        ray.end()


class _Ray:
    """A Ray, and the process that it works for, which is asked for one result after another.

    Args:
        place: see `_address`.
    """

    def __init__(self, place: tuple[str, str] | None) -> None:
        address, self._told = place or (None, "engine ray")
        self._fix = "run `ray status` to see whether a Ray runs on this machine"
        if address:  # as `ray start` makes one since 2.60
            self._fix = (
                "if it asks for a token, set RAY_AUTH_MODE=token, and have the token in "
                "~/.ray/auth_token as on its first machine"
            )
        self._is_asked = self._is_ready = False
        self._answers: SimpleQueue[tuple[str, Any]] = SimpleQueue()
        self._folder = tempfile.mkdtemp(prefix="glmtune-ray-")
        wishes = _QUIET if address else _QUIET | _ALONE
        search = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        # In a session of its own, Ctrl+C is for the command alone, which then ends all of it.
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", f"from {driver.__name__} import main; main()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=wishes | os.environ | search,
            start_new_session=True,
        )
        threading.Thread(target=self._listen, daemon=True).start()
        self._ask(driver.START, address, self._folder)

    def is_ready(self, work: Callable[..., Any]) -> bool:
        """Whether a worker has imported what some work needs.

        Raises:
            UserError: Ray does not start.
        """
        if not self._is_asked:
            self._ask(driver.WARM, _packed(work))
            self._is_asked = True
        while not self._answers.empty():
            self._take()
        return self._is_ready

    def results(self, kind: str, work: Callable[..., Any], *given: Any) -> Iterator[Any]:
        """The results of work, see `over` and `over_models`; one at a time is under way."""
        self._ask(kind, _packed(work), *given)
        while True:
            self._ask(driver.NEXT)
            while (answer := self._take()) is None:
                pass
            answered, value = answer
            if answered == driver.END:
                return
            if answered == driver.MISTAKE:
                raise UserError(pickle.loads(value))
            yield pickle.loads(value)

    def end(self) -> None:
        """End Ray, at whatever it is."""
        with suppress(ProcessLookupError, PermissionError):  # it has ended
            driver.end_group(self._process.pid)
        self._process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _ask(self, *request: Any) -> None:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # what is answered says so
            pickle.dump(request, self._process.stdin)
            self._process.stdin.flush()

    def _listen(self) -> None:
        """Take answers, so that `is_ready` need not wait for them."""
        assert self._process.stdout is not None
        with suppress(EOFError, pickle.UnpicklingError):
            while True:
                self._answers.put(pickle.load(self._process.stdout))
        self._answers.put((driver.FAILED, "its process has ended"))

    def _take(self) -> tuple[str, Any] | None:
        """The next answer, waited for; None if it was not to what was asked last."""
        kind, value = self._answers.get()
        if kind == driver.FAILED:
            raise UserError(
                f"{self._told}: Ray does not start, or has died ({value}); {self._fix}, or leave "
                "engine out"
            )
        if kind == driver.ERROR:
            raise RuntimeError(f"a worker of Ray failed:\n{value}")
        if kind == driver.NOTE:
            note(value)
        self._is_ready |= kind == driver.READY
        return None if kind in (driver.NOTE, driver.READY) else (kind, value)


def _packed(work: Callable[..., Any]) -> bytes:
    return pickle.dumps((os.getcwd(), pickle.dumps(work)))


def over(work: Callable[[Item], Iterable[Result]], items: Sequence[Item]) -> Iterator[Result]:
    """The results of all items, in the order of the items.

    Until Ray's workers are there, this process works itself; from then on it collects, unless it
    has nearly done.

    Args:
        work: yields the results of an item, the same ones in each process; one item keeps a core
            busy.
        items: are copied to the workers, as `work` is.

    Raises:
        UserError: `work` did, in the order of the items; or Ray does not start.
    """
    (ray,) = _running
    start = time.monotonic()
    for place, item in enumerate(items):
        num_left = len(items) - place
        is_long = (time.monotonic() - start) * num_left >= place * SECONDS_WORTH_IT
        if num_left > 1 and ray.is_ready(work) and is_long:
            rest = [pickle.dumps(one) for one in items[place:]]
            yield from ray.results(driver.OVER, work, rest)
            return
        yield from work(item)


def over_models(
    make: Callable[[], Callable[[Item], Iterable[Result]]], items: Sequence[Item], on_gpu: bool
) -> Iterator[Result]:
    """The same where work needs a model: each worker makes its own, once, and has a card for it.

    This process only collects.

    Args:
        make: loads the model and returns the work.
        items: see `over`.
        on_gpu: whether a worker has a GPU; else it has all cores of its machine.

    Raises:
        UserError: `make` or the work did, or Ray does not start.
    """
    (ray,) = _running
    if items:
        packed = [pickle.dumps(item) for item in items]
        yield from ray.results(driver.OVER_MODELS, make, packed, on_gpu)
