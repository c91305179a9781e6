"""Run a command with `--engine ray` twice and without it twice, by turns in one process.

    python benchmarks/spread_rows.py tokenize --jsonl_path ten.jsonl --save_path new --base glm-tiny

Prints the seconds on the clock and of CPU time of all processes: Ray's start, the first command,
in which its workers import what they need, and a second one.
"""

import contextlib
import io
import sys
import time

import psutil

from glmtune.cli import run
from glmtune.spread import running_ray


def cpu_seconds() -> float:
    """CPU time of this process and of all that it has started and that still run."""
    own = psutil.Process()
    return sum(sum(one.cpu_times()[:2]) for one in (own, *own.children(recursive=True)))


def measured(what: str, arguments: list[str]) -> None:
    """Run a command without its output, and print what it took."""
    start, cpu = time.perf_counter(), cpu_seconds()
    with contextlib.redirect_stdout(io.StringIO()):
        run(arguments)
    seconds, cpu = time.perf_counter() - start, cpu_seconds() - cpu
    print(f"{what}: {seconds:.1f} s, {cpu:.1f} s of CPU time", flush=True)


def main(arguments: list[str]) -> None:
    """Measure each engine twice."""
    start, cpu = time.perf_counter(), cpu_seconds()
    with running_ray(None):
        seconds, cpu = time.perf_counter() - start, cpu_seconds() - cpu
        print(f"start of Ray: {seconds:.1f} s, {cpu:.1f} s of CPU time", flush=True)
        for name in ("ray, first", "local", "ray, second", "local"):
            engine = ["--engine", "ray"] if name.startswith("ray") else []
            measured(name, [*arguments, *engine])


if __name__ == "__main__":
    main(sys.argv[1:])
