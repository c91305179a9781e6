"""`glmtune bench memory`: memory that training takes, beside the estimate of `glmtune plan`.

Each setting is run in a process of its own, from loading random weights to some steps. So no peak
includes memory of an earlier run, and a run that fails does not end the others.
"""

import gc
import tempfile
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch

from glmtune import disk
from glmtune.bench.limits import copy_rate
from glmtune.bench.random_model import CONFIGS, check_room, shape_of
from glmtune.bench.rows import random_rows
from glmtune.bench.timing import machine
from glmtune.bench.train import time_steps
from glmtune.config.settings import BenchMemorySettings, TrainSettings
from glmtune.data.jsonlines import append_json, check_appendable
from glmtune.errors import UserError, reason_of
from glmtune.hardware import GIB, memory_gib, pick_device, pick_dtype
from glmtune.models.families import family_of
from glmtune.models.loading import load_base_model
from glmtune.runlog import print_pairs
from glmtune.training.first_step import check_first_step
from glmtune.training.launch import start_accelerator
from glmtune.training.run import Run, adapt, build_pass, build_state

_SIX_ROWS: dict[str, Any] = {"layout": "exact", "per_device_train_batch_size": 6}
CASES: dict[str, dict[str, Any]] = {
    "4bit": {**_SIX_ROWS, "quantization_bit": "4", "gradient_checkpointing": True},
    "8bit": {**_SIX_ROWS, "quantization_bit": "8", "gradient_checkpointing": True},
    "recompute": {**_SIX_ROWS, "gradient_checkpointing": True},
    "packed": {"layout": "packed", "gradient_checkpointing": False},
}
"""Name of a case -> settings of `glmtune train`."""
_NUM_ROWS = 20_000


@dataclass(frozen=True)
class Peak:
    """Peak memory of a run of one setting, in GiB, and its speed."""

    allocated_gib: float
    """Tensors at the peak; on a CPU the growth of the process since its imports."""
    reserved_gib: float | None
    """Memory that the allocator had reserved; None on a CPU."""
    loading_gib: float
    """Like `allocated_gib`, while the weights were loaded."""
    estimate_gib: float
    ratio: float
    """Estimate divided by measurement."""
    real_tokens_per_second: float
    ms: float
    """A median step."""
    forecast: dict[str, Any]


def bench_memory(settings: BenchMemorySettings) -> dict[str, Any]:
    """Measure, print and return a record; append it to `json_path` if given.

    Raises:
        UserError: a setting that is not known, a device or a disk too small for the weights, or a
            JSON file that cannot be written.
    """
    check_appendable(settings.json_path)
    names = settings.only or tuple(CASES)
    if unknown := [name for name in names if name not in CASES]:
        raise UserError(f"only {unknown[0]!r}: is none of {', '.join(CASES)}")
    device = pick_device(settings.use_cpu)
    dtype, _ = pick_dtype(device, settings.bf16, settings.fp16)
    check_room(settings.shape, device, dtype)
    record: dict[str, Any] = {
        **machine(device),
        "settings": settings.model_dump(exclude_defaults=True),
        "shape": settings.shape,
    }
    with tempfile.TemporaryDirectory(prefix="glmtune-") as folder:
        _check_disk(settings, folder)
        print(f"writing random weights ({settings.shape})", flush=True)
        rate = _in_a_process(_prepare, Path(folder), settings.shape, device)
        record["copy_bytes_per_second"] = rate
        for name in names:
            print(f"measuring {name}", flush=True)
            try:
                record[name] = asdict(_in_a_process(measure, name, settings, folder))
            except (UserError, BrokenProcessPool, torch.OutOfMemoryError) as error:
                record[name] = {"not_measured": reason_of(error)}
            print(f"  {_words(record[name])}", flush=True)  # now, since each takes minutes
    copied = f"{record['copy_bytes_per_second'] / 1e9:,.0f} GB/s read and written"
    pairs = {"copy": copied} | {name: _words(record[name]) for name in names}
    print_pairs(f"memory of training, {record['shape']}, {record['device']}", pairs)
    if settings.json_path:
        append_json(record, settings.json_path)
    return record


def _prepare(folder: Path, shape: str, device: torch.device) -> float:
    """Write the weights, and measure the copy rate in bytes a second: one process for both."""
    config = CONFIGS[shape]
    write = family_of(config).native().write_random
    assert write is not None, f"{shape}: its family writes no random weights"
    write(folder, config, device=str(device))
    return copy_rate(device)


def measure(name: str, settings: BenchMemorySettings, folder: str) -> Peak:
    """One setting, from loading to its last step; to be called in a process of its own.

    Raises:
        UserError: the device or the installation lacks what the setting needs.
    """
    config = train_settings(name, settings)
    accelerator, dtype = start_accelerator(config)
    device = accelerator.device
    before = 0.0 if device.type == "cuda" else _peak_gib(device)
    base = load_base_model(
        folder, dtype=dtype, device=device, bits=config.bits, quantize_head=config.quantize_head
    )
    model = adapt(base, config)
    gc.collect()
    loading = _peak_gib(device) - before
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    rows = random_rows(CONFIGS[settings.shape], _NUM_ROWS)
    run = Run.of(config, accelerator, rows, model, settings.shape)
    state = build_state(run, model)
    step_pass = build_pass(run, model, state.weights)
    check_first_step(run, state, step_pass)
    times, row_ids = time_steps(run, state, step_pass, settings.warmup, settings.steps)
    num_tokens = int(rows.lengths_R[row_ids].sum())
    allocated, estimate = _peak_gib(device) - before, run.forecast.estimate.allocated / GIB
    on_gpu = device.type == "cuda"
    return Peak(
        allocated_gib=allocated,
        reserved_gib=torch.cuda.max_memory_reserved(device) / GIB if on_gpu else None,
        loading_gib=loading,
        estimate_gib=estimate,
        ratio=estimate / allocated,
        real_tokens_per_second=num_tokens / (sum(times) / 1e3),
        ms=float(np.median(times)),
        forecast=run.forecast.as_record(),
    )


def _peak_gib(device: torch.device) -> float:
    """Like `memory_gib`; on a CPU from Linux's own counter, since getrusage's is inherited."""
    status = Path("/proc/self/status")
    if device.type == "cuda" or not status.is_file():
        return memory_gib(device)
    lines = dict(line.split(":", 1) for line in status.read_text(encoding="ascii").splitlines())
    return int(lines["VmHWM"].split()[0]) * 1024 / GIB


def train_settings(name: str, settings: BenchMemorySettings) -> TrainSettings:
    """The settings of a case; no data set and no run folder are used."""
    shared = settings.model_dump(include=set(TrainSettings.model_fields))
    return TrainSettings(dataset_path="random rows", output_dir="none", **shared, **CASES[name])


def _in_a_process(work: Any, *arguments: Any, **named: Any) -> Any:
    """Call a function in a new process, and return what it returns or raise what it raises."""
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as pool:
        return pool.submit(work, *arguments, **named).result()


def _check_disk(settings: BenchMemorySettings, folder: str) -> None:
    needed = int(1.05 * shape_of(settings.shape).weight_bytes(torch.float16))
    fix = "set TMPDIR to a folder on another disk, or pass --shape small"
    disk.check_room(Path(folder), needed, "random weights take at most", fix)


def _words(peak: dict[str, Any]) -> str:
    if "not_measured" in peak:
        return f"not measured: {peak['not_measured']}"
    reserved = peak["reserved_gib"]
    held = "" if reserved is None else f", {reserved:.2f} reserved"
    return (
        f"{peak['allocated_gib']:.2f} GiB{held}, estimated {peak['estimate_gib']:.2f} "
        f"({peak['ratio']:.2f}), loading {peak['loading_gib']:.2f}; "
        f"{peak['real_tokens_per_second']:,.0f} tokens/s, {peak['ms']:,.1f} ms a step"
    )
