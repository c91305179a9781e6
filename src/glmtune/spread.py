"""Work spread over processes, and over machines, by Ray Data: `engine ray`.

Ray keeps what workers return in memory that all processes of a machine share, starts work again
whose worker has died, and holds work back where results are not taken. Without an address it is
started on this machine alone, reachable from nowhere else, and ends with the command.
"""

import logging
import os
import pickle
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, TypeVar

from glmtune.errors import UserError, note, reason_of
from glmtune.imports import prepare_imports

if TYPE_CHECKING:
    import pyarrow as pa

Item = TypeVar("Item")
Result = TypeVar("Result")

STORE_BYTES = 1 << 29
"""Shared memory of a Ray of this machine, for results that have not been taken yet."""
SECONDS_TO_ANSWER = 5
_BLOCK_BYTES = 1 << 24
"""Results of a worker that are handed over together."""
_LOOPBACK = "127.0.0.1"
_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_BACKEND_LOG_LEVEL": "fatal",
}
# Workers are kept from one pass to the next, and give way to other programs as the command itself
# does: Ray's are of niceness 15, and crawl on a machine with work of its own.
_SYSTEM = {"idle_worker_killing_time_threshold_ms": 600_000, "worker_niceness": 0}
# What both sides of HTTP/2, which Ray speaks, begin with (RFC 9113, 3.4): asked of a port, a Ray
# answers at once, where Ray's own client tries for minutes.
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_SETTINGS, _FRAME_TYPE = b"\0\0\0\x04\0\0\0\0\0", 3
_ALONE = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
"""Without clusters Ray stays on the loopback address, as it does on Windows and macOS by itself; an
address that is given it replaces by one that other machines reach."""
_SAME_HASHES = {"PYTHONHASHSEED": "0"}
"""Hashes of texts that one worker makes are compared with those of others."""
_RESULT, _MISTAKE = "result", "mistake"


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

    Where this process is connected already, that connection is used, and stays.

    Args:
        address: see `check_ray`.

    Raises:
        UserError: see `check_ray`.
    """
    check_ray(address)
    place = _address(address)
    wishes = _QUIET if place else _QUIET | _ALONE
    os.environ.update({name: os.environ.get(name, value) for name, value in wishes.items()})
    with silent_stderr():
        import ray
    if ray.is_initialized():
        yield
        return
    for name in ("ray", "ray.data"):
        logging.getLogger(name).setLevel(logging.ERROR)
    from ray._private import ray_constants, worker

    if not place:  # it may have been imported before the environment said so
        setattr(ray_constants, "ENABLE_RAY_CLUSTER", False)  # noqa: B010

    # Ray has no setting for what it prints on stdout, such as that a worker has died.
    setattr(worker, "print_to_stdstream", _tell)  # noqa: B010
    options: dict[str, Any] = {
        "log_to_driver": False,
        "logging_level": logging.ERROR,
        "configure_logging": True,
    }
    folder = None
    if place:
        options |= {"address": place[0], "runtime_env": {"env_vars": _SAME_HASHES}}
    else:
        folder = tempfile.mkdtemp(prefix="glmtune-ray-")
        options |= {
            "address": "local",
            "include_dashboard": False,
            "object_store_memory": STORE_BYTES,
            "_node_ip_address": _LOOPBACK,
            "_temp_dir": folder,
            "_system_config": _SYSTEM,
        }
    try:
        try:
            with _environment(_SAME_HASHES), silent_stderr():
                ray.init(**options)
        except Exception as error:  # Ray raises many kinds, plain ones among them
            told = place[1] if place else "engine ray"
            raise UserError(
                f"{told}: Ray does not start ({reason_of(error)}); run `ray status` to see whether "
                "a Ray runs on this machine, or leave engine out"
            ) from error
        yield
    finally:
        ray.shutdown()
        if folder:
            shutil.rmtree(folder, ignore_errors=True)


def _tell(message: dict[str, Any], **_: Any) -> None:
    """Print what Ray has to say as a note, on stderr."""
    note(*(f"Ray: {line.splitlines()[0]}" for line in message["lines"] if line.strip()))


@contextmanager
def silent_stderr() -> Iterator[None]:
    """Let code of Ray or vLLM, which does not know of sys.stderr, print nothing there meanwhile."""
    sys.stderr.flush()
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Set variables of the environment that processes started meanwhile inherit."""
    former = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in former.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def over(work: Callable[[Item], Iterable[Result]], items: Sequence[Item]) -> Iterator[Result]:
    """The results of all items, in the order of the items.

    Args:
        work: yields the results of an item, the same ones each time; one item keeps a core busy.
        items: are copied to the workers, as `work` is.

    Raises:
        UserError: `work` did, in the order of the items.
    """
    yield from _results(items, partial(_do, _packed(work)), num_cpus=1)


def over_models(
    make: Callable[[], Callable[[Item], Iterable[Result]]], items: Sequence[Item], on_gpu: bool
) -> Iterator[Result]:
    """The same where work needs a model: each worker makes its own, once, and has a card for it.

    Args:
        make: loads the model and returns the work.
        items: see `over`.
        on_gpu: whether a worker has a GPU; else it has all cores of its machine.

    Raises:
        UserError: `make` or the work did.
    """
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    key = "GPU" if on_gpu else "CPU"
    nums = [int(node.get(key, 0)) for node in nodes]
    most = sum(nums) if on_gpu else sum(num > 0 for num in nums)
    if not most:
        raise UserError("engine ray: the Ray cluster has no GPU; set use_cpu true")
    share: dict[str, Any] = (
        {"num_gpus": 1} if on_gpu else {"num_cpus": min(num for num in nums if num)}
    )
    workers = ray.data.ActorPoolStrategy(min_size=1, max_size=min(most, len(items)))
    yield from _results(
        items, _Worker, fn_constructor_args=(_packed(make),), compute=workers, **share,
    )  # fmt: skip


def _results(items: Sequence[Any], work: Any, **options: Any) -> Iterator[Any]:
    import pyarrow as pa
    import ray.data

    if not items:
        return
    for name in ("ray", "ray.data"):
        logging.getLogger(name).setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    context.target_max_block_size = _BLOCK_BYTES
    column = pa.array([pickle.dumps(item) for item in items], pa.large_binary())
    tables = [pa.table({"data": column[place : place + 1]}) for place in range(len(items))]
    data = ray.data.from_arrow(tables).map_batches(
        work, batch_size=1, batch_format="pyarrow", **options
    )
    for row in data.iter_rows():
        kind, value = pickle.loads(row["data"])
        if kind == _MISTAKE:
            raise UserError(value)
        yield value


def _packed(work: Callable[..., Any]) -> bytes:
    from ray import cloudpickle

    return cloudpickle.dumps((os.getcwd(), work))


@lru_cache(1)
def _unpacked(work: bytes) -> Callable[..., Any]:
    """What was packed, once for all items, in the folder that paths are relative to."""
    prepare_imports()  # a worker is the command's own process, as the one that started it
    folder, unpacked = pickle.loads(work)
    try:
        os.chdir(folder)
    except OSError as error:
        raise UserError(
            f"{folder}: is not on each machine of the Ray cluster ({reason_of(error)}); run the "
            "command in a folder that all of them share"
        ) from error
    return unpacked


def _do(work: bytes, item: "pa.Table") -> Iterator["pa.Table"]:
    """Do the work of one item, in a worker."""
    yield from _tables(lambda one: _unpacked(work)(one), item)


def _tables(work: Callable[[Any], Iterable[Any]], item: "pa.Table") -> Iterator["pa.Table"]:
    try:
        for result in work(pickle.loads(item["data"][0].as_py())):
            yield _as_table(_RESULT, result)
    except UserError as error:
        yield _as_table(_MISTAKE, str(error))


def _as_table(kind: str, value: object) -> "pa.Table":
    import pyarrow as pa

    return pa.table({"data": pa.array([pickle.dumps((kind, value))], pa.large_binary())})


class _Worker:
    """A worker that keeps its model."""

    def __init__(self, make: bytes) -> None:
        self._make = make
        self._work: Callable[[Any], Iterable[Any]] | None = None

    def __call__(self, item: "pa.Table") -> Iterator["pa.Table"]:
        return _tables(self._with_model, item)

    def _with_model(self, item: Any) -> Iterable[Any]:
        if self._work is None:
            self._work = _unpacked(self._make)()
        return self._work(item)
