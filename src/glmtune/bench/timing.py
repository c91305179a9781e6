"""Timing on a device, and the facts recorded with a result."""

import importlib.metadata
import platform
import subprocess
import time
from collections.abc import Callable
from datetime import date
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from glmtune import __version__
from glmtune.hardware import device_name


def times_ms(
    work: Callable[[], Any], device: torch.device, *, warmup: int, repeats: int
) -> list[float]:
    """Milliseconds of each of `repeats` calls, after `warmup` more; on a GPU by its own clock."""
    for _ in range(warmup):
        work()
    if device.type != "cuda":
        moments = [time.perf_counter()]
        for _ in range(repeats):
            work()
            moments.append(time.perf_counter())
        return [1e3 * (b - a) for a, b in pairwise(moments)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    events[0].record()
    for event in events[1:]:
        work()
        event.record()
    torch.cuda.synchronize(device)
    return [a.elapsed_time(b) for a, b in pairwise(events)]


def median_ms(work: Callable[[], Any], device: torch.device, *, warmup: int, repeats: int) -> float:
    """The median of `times_ms`."""
    return float(np.median(times_ms(work, device, warmup=warmup, repeats=repeats)))


def machine(device: torch.device) -> dict[str, Any]:
    """The context of a result: date, commit, device and versions."""
    names = ("torch", "transformers", "peft")
    return {
        "date": date.today().isoformat(),
        "commit": _commit(),
        "device": device_name(device),
        "python": platform.python_version(),
        "glmtune": __version__,
        **{name: importlib.metadata.version(name) for name in names},
    }


def _commit() -> str | None:
    """The commit of the checkout that holds this package; None if it is in none."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() or None
