"""Run a command without and with `--engine ray`, by turns, each in a process of its own.

    python benchmarks/spread_rows.py 4 tokenize --jsonl_path ten.jsonl --save_path new

Prints the seconds on the clock of each pair, start and end of Ray included, those of CPU time of
the command itself, and the medians.
"""

import os
import shutil
import subprocess
import sys
import time
from statistics import median


def measured(arguments: list[str]) -> tuple[float, float]:
    """Run a command, and return its seconds on the clock and of its own CPU time."""
    if "--save_path" in arguments:
        shutil.rmtree(arguments[arguments.index("--save_path") + 1], ignore_errors=True)
    start, before = time.perf_counter(), os.times()
    command = [sys.executable, "-m", "glmtune", *arguments]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert done.returncode in (0, 2)
    seconds, after = time.perf_counter() - start, os.times()
    own = sum(getattr(after, f"children_{kind}") - getattr(before, f"children_{kind}")
              for kind in ("user", "system"))  # fmt: skip
    return seconds, own


def main(num: str, *arguments: str) -> None:
    """Measure some pairs."""
    pairs = []
    for _ in range(int(num)):
        load = os.getloadavg()[0]
        local, ray = measured([*arguments]), measured([*arguments, "--engine", "ray"])
        pairs.append((*local, *ray, local[0] / ray[0]))
        told = "local {:.1f} s, {:.1f} s of CPU time; ray {:.1f} s, {:.1f} s; ratio {:.2f}"
        print(told.format(*pairs[-1]), f"(load {load:.1f})", flush=True)
    told = "medians: local {:.1f} s, {:.1f} s of CPU time; ray {:.1f} s, {:.1f} s; ratio {:.2f}"
    print(told.format(*map(median, zip(*pairs, strict=True))))


if __name__ == "__main__":
    main(*sys.argv[1:])
