"""`glmtune bench train`: speed and memory of a step, its upper limit, and the reference path."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from peft import PeftModel
from transformers import PreTrainedConfig

from glmtune.bench import limits
from glmtune.bench.glm_peft import glm_peft_rate
from glmtune.bench.random_model import CONFIGS, check_room, random_model, shape_of
from glmtune.bench.rows import random_rows
from glmtune.bench.timing import machine, times_ms
from glmtune.config.settings import BenchTrainSettings, TrainSettings
from glmtune.data.dataset import load_dataset
from glmtune.data.jsonlines import append_json, check_appendable
from glmtune.data.token_rows import TokenRows
from glmtune.hardware import free_memory, memory_gib, rated_tflops
from glmtune.models.families import family_of
from glmtune.models.shape import Shape
from glmtune.runlog import print_pairs
from glmtune.training.launch import start_accelerator
from glmtune.training.loop import train_step
from glmtune.training.passes import PaddedPass, Pass
from glmtune.training.plan import RowPlan
from glmtune.training.run import Run, adapt, build_pass, build_state, check_fp8
from glmtune.training.state import TrainingState

_NUM_ROWS = 20_000
_ORIGINAL_ROWS = 6


@dataclass(frozen=True)
class Speed:
    """Measurements of some steps."""

    ms: float
    """A median step."""
    real_tokens_per_second: float
    supervised_tokens_per_second: float
    first_step_seconds: float
    """Compilation included."""
    peak_gib: float
    loss: float
    """Loss of the last step."""


def bench_train(settings: BenchTrainSettings) -> dict[str, Any]:
    """Measure on random weights, print and return a record; append it to `json_path` if given.

    Raises:
        UserError: float8 on a device without it, a device too small for the weights, rows that do
            not fit into packs, or a JSON file that cannot be written.
    """
    check_appendable(settings.json_path)
    training = _train_settings(settings)
    accelerator, dtype = start_accelerator(training)
    device = accelerator.device
    base_config, shape = CONFIGS[settings.shape], shape_of(settings.shape)
    check_room(settings.shape, device, dtype)
    if settings.base_dtype == "fp8":
        check_fp8(device)
    rows = _rows(settings, base_config)
    record: dict[str, Any] = {
        **machine(device),
        "settings": settings.model_dump(exclude_defaults=True),
        "shape": settings.shape,
        "dtype": str(dtype).removeprefix("torch."),
    }

    base = random_model(
        base_config, device, dtype, bits=settings.bits, quantize_head=settings.quantize_head
    )
    model = adapt(base, training)
    run = Run.of(training, accelerator, rows, model, settings.shape)
    record["layout"] = run.layout
    speed, tokens, supervised = _measure(run, model, settings)
    record |= speed.__dict__
    flops = 4 * shape.matmul_parameters() * speed.real_tokens_per_second
    record["model_tflops_4n"] = flops / 1e12
    rated = rated_tflops(device)
    record["mfu_4n"] = None if rated is None else flops / 1e12 / rated
    if settings.kernel_table:
        _write_kernel_table(run, model, settings.kernel_table)
    if settings.plain:
        record["plain"] = _measure_plain(training, accelerator, model, rows, settings).__dict__
    batches = [run.plan.parts(step, 1)[0] for step in range(settings.steps)]
    lengths = [rows.lengths_R[part].tolist() for part in batches]
    layout = run.layout
    del model, base, run
    free_memory()
    if settings.limits:
        _measure_limits(record, shape, tokens, supervised, device, dtype)
    if settings.compare:
        free_memory()
        peers = family_of(base_config).native().bench_peers
        record["glm_peft_real_tokens_per_second"] = glm_peft_rate(
            [[tokens]] * settings.steps if layout == "packed" else lengths,
            device,
            dtype,
            CONFIGS[peers.get(settings.shape, settings.shape)],
            targets=settings.lora_target,
            bits=settings.bits,
        )
    _print(record)
    if settings.json_path:
        append_json(record, settings.json_path)
    return record


def _train_settings(settings: BenchTrainSettings) -> TrainSettings:
    """The settings of a training run; no run folder is used."""
    shared = settings.model_dump(include=set(TrainSettings.model_fields) - {"dataset_path"})
    return TrainSettings(
        dataset_path=settings.dataset_path or "random rows", output_dir="none", **shared
    )


def _rows(settings: BenchTrainSettings, config: PreTrainedConfig) -> TokenRows:
    if settings.dataset_path is None:
        return random_rows(config, _NUM_ROWS)
    rule = family_of(config).row_rule(config)
    rows = TokenRows.from_table(load_dataset(settings.dataset_path, rule)[0], rule)
    rows.check(config.vocab_size, settings.dataset_path)
    return rows


def _measure(run: Run, model: PeftModel, settings: BenchTrainSettings) -> tuple[Speed, int, int]:
    """Speed, and tokens a pass that go through the layers, and through the head."""
    state = build_state(run, model)
    start = time.perf_counter()
    step_pass = build_pass(run, model, state.weights)
    speed = _time_steps(run, state, step_pass, settings, start)
    part = run.plan.parts(0, 1)[0]
    if run.layout == "padded":  # the head computes every token, padding too
        num_tokens = len(part) * int(run.rows.lengths_R[part].max())
        return speed, num_tokens, num_tokens
    pack = step_pass.pack(part)  # type: ignore[attr-defined]
    return speed, len(pack.input_ids_T), len(pack.targets_L)


def _time_steps(
    run: Run, state: TrainingState, step_pass: Pass, settings: BenchTrainSettings, start: float
) -> Speed:
    device = run.accelerator.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    train_step(run, state, step_pass)
    state.loss_sum.item()  # waits for the device
    first = time.perf_counter() - start
    times, row_ids = time_steps(run, state, step_pass, settings.warmup, settings.steps)
    seconds = sum(times) / 1e3
    state.loss_sum.zero_()
    train_step(run, state, step_pass)
    return Speed(
        ms=float(np.median(times)),
        real_tokens_per_second=run.rows.lengths_R[row_ids].sum() / seconds,
        supervised_tokens_per_second=run.rows.num_labels_R[row_ids].sum() / seconds,
        first_step_seconds=first,
        peak_gib=memory_gib(device),
        loss=state.loss_sum.item(),
    )


def time_steps(
    run: Run, state: TrainingState, step_pass: Pass, warmup: int, steps: int
) -> tuple[list[float], np.ndarray]:
    """Milliseconds of each of `steps` steps after `warmup` others, and the rows of these steps."""
    first = state.global_step + warmup
    times = times_ms(
        lambda: train_step(run, state, step_pass),
        run.accelerator.device,
        warmup=warmup,
        repeats=steps,
    )
    parts = [part for i in range(steps) for part in run.plan.parts(first + i, 1)]
    return times, np.concatenate(parts)


def _measure_plain(
    training: TrainSettings,
    accelerator: Accelerator,
    model: PeftModel,
    rows: TokenRows,
    settings: BenchTrainSettings,
) -> Speed:
    """The reference path at the original's batch of six rows."""
    free_memory()
    plain = training.model_copy(
        update={"layout": "padded", "tokens_per_step": None,
                "per_device_train_batch_size": _ORIGINAL_ROWS}
    )  # fmt: skip
    run = Run.of(plain, accelerator, rows, model, settings.shape)
    assert isinstance(run.plan, RowPlan)
    state = build_state(run, model)
    return _time_steps(
        run, state, PaddedPass(accelerator, model, rows), settings, time.perf_counter()
    )


def _measure_limits(
    record: dict[str, Any],
    shape: Shape,
    tokens: int,
    supervised: int,
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """Add the upper limits in tokens a second, and the share of the one that applies."""
    ms = limits.matmul_limit(shape, tokens, supervised, device, dtype)
    record["matmul_limit_tokens_per_second"] = limit = tokens / ms * 1e3
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0):
        ms = limits.matmul_limit(shape, tokens, supervised, device, dtype, fp8=True)
        record["matmul_limit_fp8_tokens_per_second"] = tokens / ms * 1e3
        if record["settings"].get("base_dtype") == "fp8":
            limit = record["matmul_limit_fp8_tokens_per_second"]
    record["share_of_limit"] = record["real_tokens_per_second"] / limit
    record["copy_bytes_per_second"] = limits.copy_rate(device)


def _write_kernel_table(run: Run, model: PeftModel, path: str) -> None:
    from torch.profiler import ProfilerActivity, profile

    state = build_state(run, model)
    step_pass = build_pass(run, model, state.weights)
    on_gpu = run.accelerator.device.type == "cuda"
    for _ in range(2):
        train_step(run, state, step_pass)
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as seen:
        train_step(run, state, step_pass)
        state.loss_sum.item()
    by = "self_cuda_time_total" if on_gpu else "self_cpu_time_total"
    table = seen.key_averages().table(sort_by=by, row_limit=50, max_name_column_width=80)
    Path(path).write_text(table + "\n", encoding="utf-8")


def _print(record: dict[str, Any]) -> None:
    def per_second(key: str) -> str:
        return f"{record[key]:,.0f} tokens/s"

    mfu = ""
    if record["mfu_4n"] is not None:
        mfu = f", {record['mfu_4n']:.1%} of the card's rated 16-bit speed"
    pairs = {
        "device": record["device"],
        "real": per_second("real_tokens_per_second"),
        "supervised": per_second("supervised_tokens_per_second"),
        "a step": f"{record['ms']:,.1f} ms",
        "first step": f"{record['first_step_seconds']:.1f} s, compilation included",
        "memory": f"{record['peak_gib']:.2f} GiB at most",
        "4N FLOPs": f"{record['model_tflops_4n']:,.1f} TFLOP/s{mfu}",
    }
    if "share_of_limit" in record:
        pairs["limit"] = per_second("matmul_limit_tokens_per_second") + " by matrix products alone"
        if "matmul_limit_fp8_tokens_per_second" in record:
            pairs["limit fp8"] = per_second("matmul_limit_fp8_tokens_per_second")
        pairs["share"] = f"{record['share_of_limit']:.1%} of the limit"
        pairs["copy"] = f"{record['copy_bytes_per_second'] / 1e9:,.0f} GB/s read and written"
    if "plain" in record:
        plain = record["plain"]
        pairs["plain"] = (
            f"{plain['real_tokens_per_second']:,.0f} tokens/s, {plain['ms']:,.1f} ms a step of "
            f"{_ORIGINAL_ROWS} padded rows, {plain['peak_gib']:.2f} GiB"
        )
    if "glm_peft_real_tokens_per_second" in record:
        pairs["Glm + PEFT"] = per_second("glm_peft_real_tokens_per_second")
    print_pairs(f"training step, {record['shape']}, {record['layout']}, {record['dtype']}", pairs)
