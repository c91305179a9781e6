"""What runs in the process that Ray works for, and in Ray's workers; `spread` starts it.

The command asks for one result after another, on stdin, and gets each on stdout: Ray holds work
back while none is asked for. When the command is gone, so are this process and a Ray of its own.
"""

import logging
import os
import pickle
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache, partial
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from glmtune.errors import UserError, reason_of
from glmtune.imports import prepare_imports

if TYPE_CHECKING:
    import pyarrow as pa

START, WARM, OVER, OVER_MODELS, NEXT = "start", "warm", "over", "over models", "next"
"""What the command asks for."""
READY, FAILED, NOTE, RESULT, MISTAKE, ERROR, END = (
    "ready", "failed", "note", "result", "mistake", "error", "end",
)  # fmt: skip
"""What it is answered."""
STORE_BYTES = 1 << 29
"""Shared memory of a Ray of this machine, for results that have not been taken yet."""
_BLOCK_BYTES = 1 << 24
"""Results of a worker that are handed over together."""
_LOOPBACK = "127.0.0.1"
# Workers are kept from one pass to the next, and give way to other programs as the command itself
# does: Ray's are of niceness 15, and crawl on a machine with work of its own.
_SYSTEM = {
    "idle_worker_killing_time_threshold_ms": 600_000,
    "worker_niceness": 0,
    "process_group_cleanup_enabled": False,  # they stay in the group that `end_group` ends
}

Rows = Iterator[tuple[str, Any]]
_told: SimpleQueue[str] = SimpleQueue()
"""What Ray has to say, until the next answer."""


def main() -> None:
    """Start Ray, or reach a cluster, and answer until the command ends."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # which is nowhere: what Ray prints is no answer

    def answer(kind: str, value: Any = None) -> None:
        while not _told.empty():
            pickle.dump((NOTE, _told.get()), answers)
        pickle.dump((kind, value), answers)
        answers.flush()

    asked: SimpleQueue[tuple[Any, ...]] = SimpleQueue()
    threading.Thread(target=_listen, args=(asked,), daemon=True).start()
    _, address, folder = asked.get()
    try:
        _start_ray(address, folder)
    except Exception as error:  # Ray raises many kinds, plain ones among them
        answer(FAILED, reason_of(error))
        return
    kept: list[Rows] = []
    rows: Rows = iter(())
    while True:
        kind, *given = asked.get()
        try:
            if kind == WARM:
                kept.append(_rows_of_warming(*given))  # dropped, its other workers would stop
                next(kept[-1])
                answer(READY)
            elif kind == NEXT:
                answer(*next(rows, (END, None)))
            else:
                rows = _rows_over(*given) if kind == OVER else _rows_over_models(*given)
        except Exception:
            answer(ERROR, traceback.format_exc())


def _listen(asked: "SimpleQueue[tuple[Any, ...]]") -> None:
    """Take what the command asks for; end with it, at whatever Ray is."""
    try:
        while True:
            asked.put(pickle.load(sys.stdin.buffer))
    finally:
        end_group(os.getpid())


def end_group(leader: int) -> None:
    """End a process and those that it has started, at once; of a Ray nothing has to be kept."""
    if hasattr(os, "killpg"):
        os.killpg(leader, signal.SIGKILL)
    else:  # on Windows, where Ray's own processes end with the one that started them
        os.kill(leader, signal.SIGTERM)


def _start_ray(address: str | None, folder: str) -> None:
    """Start a Ray of this machine, or connect to a cluster.

    Args:
        address: of the cluster; None for a Ray of this machine.
        folder: gets its files.
    """
    import ray
    from ray._private import parameter, worker

    # Ray has no setting for what it prints on stdout, such as that a worker has died, nor for the
    # two of its processes that serve machines to be added and logs to be printed.
    setattr(worker, "print_to_stdstream", _tell)  # noqa: B010
    without: dict[str, Any] = {"no_monitor": True, "include_log_monitor": False}
    setattr(parameter, "RayParams", partial(parameter.RayParams, **without))  # noqa: B010
    options: dict[str, Any] = {
        "log_to_driver": False,
        "logging_level": logging.ERROR,
        "configure_logging": True,
    }
    if address:
        options["address"] = address
    else:
        options |= {
            "address": "local",
            "include_dashboard": False,
            "object_store_memory": STORE_BYTES,
            "_node_ip_address": _LOOPBACK,
            "_temp_dir": folder,
            "_system_config": _SYSTEM,
        }
    ray.init(**options)


def _tell(message: dict[str, Any], **_: Any) -> None:
    """Keep what Ray has to say for the command, which prints it as notes."""
    for line in message["lines"]:
        if line.strip():
            _told.put(f"Ray: {line.splitlines()[0]}")


def _rows_of_warming(work: bytes) -> Rows:
    """A row for each core, from a worker that has imported what the work needs."""
    import ray

    num = max(1, int(ray.cluster_resources().get("CPU", 1)))
    return _rows([b""] * num, partial(_warm, work), in_order=False, num_cpus=1)


def _rows_over(work: bytes, items: Sequence[bytes]) -> Rows:
    return _rows(items, partial(_do, work), num_cpus=1)


def _rows_over_models(make: bytes, items: Sequence[bytes], on_gpu: bool) -> Rows:
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    key = "GPU" if on_gpu else "CPU"
    nums = [int(node.get(key, 0)) for node in nodes]
    most = sum(nums) if on_gpu else sum(num > 0 for num in nums)
    if not most:
        yield MISTAKE, "engine ray: the Ray cluster has no GPU; set use_cpu true"
        return
    share: dict[str, Any] = (
        {"num_gpus": 1} if on_gpu else {"num_cpus": min(num for num in nums if num)}
    )
    workers = ray.data.ActorPoolStrategy(min_size=1, max_size=min(most, len(items)))
    yield from _rows(items, _Worker, fn_constructor_args=(make,), compute=workers, **share)


def _rows(items: Sequence[bytes], work: Any, in_order: bool = True, **options: Any) -> Rows:
    """What workers make of items, as it is asked for."""
    import pyarrow as pa
    import ray.data

    for name in ("ray", "ray.data"):
        logging.getLogger(name).setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = in_order
    context.target_max_block_size = _BLOCK_BYTES
    column = pa.array(items, pa.large_binary())
    tables = [pa.table({"data": column[place : place + 1]}) for place in range(len(items))]
    data = ray.data.from_arrow(tables).map_batches(
        work, batch_size=1, batch_format="pyarrow", **options
    )
    for row in data.iter_rows():
        yield row["kind"], row["data"]


@lru_cache(1)
def _unpacked(work: bytes) -> Callable[..., Any]:
    """What was packed, once for all items, in the folder that paths are relative to."""
    prepare_imports()  # a worker is the command's own process, as the one that started it
    folder, packed = pickle.loads(work)
    try:
        os.chdir(folder)
    except OSError as error:
        raise UserError(
            f"{folder}: is not on each machine of the Ray cluster ({reason_of(error)}); run the "
            "command in a folder that all of them share"
        ) from error
    return pickle.loads(packed)


def _warm(work: bytes, _: "pa.Table") -> Iterator["pa.Table"]:
    """Import what the work needs; what stands against it the first item says."""

    def unpack() -> list[None]:
        _unpacked(work)
        return [None]

    return _tables(unpack)


def _do(work: bytes, item: "pa.Table") -> Iterator["pa.Table"]:
    """Do the work of one item, in a worker."""
    return _tables(lambda: _unpacked(work)(_item_of(item)))


def _item_of(table: "pa.Table") -> Any:
    return pickle.loads(table["data"][0].as_py())


def _tables(work: Callable[[], Iterable[Any]]) -> Iterator["pa.Table"]:
    try:
        for result in work():
            yield _as_table(RESULT, result)
    except UserError as error:
        yield _as_table(MISTAKE, str(error))


def _as_table(kind: str, value: object) -> "pa.Table":
    import pyarrow as pa

    data = pa.array([pickle.dumps(value)], pa.large_binary())
    return pa.table({"kind": pa.array([kind]), "data": data})


class _Worker:
    """A worker that keeps its model."""

    def __init__(self, make: bytes) -> None:
        self._make = make
        self._work: Callable[[Any], Iterable[Any]] | None = None

    def __call__(self, item: "pa.Table") -> Iterator["pa.Table"]:
        return _tables(lambda: self._with_model(_item_of(item)))

    def _with_model(self, item: Any) -> Iterable[Any]:
        if self._work is None:
            self._work = _unpacked(self._make)()
        return self._work(item)
