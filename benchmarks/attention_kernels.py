"""Which of torch's attention kernels are right for rows of very low scores, and their speed.

    python benchmarks/attention_kernels.py            the lengths at which a gradient is not finite
    python benchmarks/attention_kernels.py --step     a padded step of the 6B shape, by turns

Shapes: N heads, S tokens, D head size.
"""

import argparse
import time
from contextlib import AbstractContextManager, nullcontext
from statistics import mean, median
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from glmtune.ops.attention import prefix_lm_mask, right_kernels

KERNELS = {
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "plain": SDPBackend.MATH,
}
LENGTHS = sorted({*range(16, 400, 16), *(64 * n + off for n in range(1, 10) for off in (-1, 0, 1))})
HEAD_DIMS, SCORES = (64, 128), (-8.0, -10.0, -12.0, -16.0, -86.0, -91.0, -1000.0, 100.0)
TYPES = torch.bfloat16, torch.float16
ROWS, STEPS, TURNS = 6, 60, 3


def rows_with_score(score: float, length: int, head_dim: int, dtype: torch.dtype) -> list[Tensor]:
    """Queries, keys and values ``(1, 2, S, D)``; each score is about the given one."""
    generator = torch.Generator("cuda").manual_seed(length)
    shape = 1, 2, length, head_dim

    def random() -> Tensor:
        return torch.randn(shape, generator=generator, device="cuda")

    size = abs(score) ** 0.5 * head_dim**-0.25
    query, key = size + 0.01 * random(), size * (1 if score > 0 else -1) + 0.01 * random()
    return [x.to(dtype).requires_grad_() for x in (query, key, random())]


def masks(length: int) -> dict[str, dict]:
    """What a call of torch's attention is told about who sees whom."""
    valid_BS = torch.ones(1, length, dtype=torch.bool, device="cuda")
    prefix_end_B = torch.tensor([length // 3], device="cuda")
    return {
        "prefix mask": {"attn_mask": prefix_lm_mask(prefix_end_B, valid_BS)},
        "causal": {"is_causal": True},
        "none": {},
    }


def gradients(kernel: SDPBackend, rows: list[Tensor], mask: dict) -> list[Tensor]:
    """Output and gradients of queries, keys and values."""
    with sdpa_kernel(kernel):
        output = F.scaled_dot_product_attention(*rows, **mask)
    weights = torch.linspace(-1, 1, output.numel(), device="cuda").view_as(output)
    return [output, *torch.autograd.grad(output, rows, weights.to(output.dtype))]


def error(found: list[Tensor], rows: list[Tensor], mask: dict) -> float:
    """Largest distance of output and gradients from float64, relative to their size.

    Of nearly equal keys the gradients all but cancel, so that 16 bits leave some tenths; a kernel
    is to be held against the plain one.
    """
    exact = [x.detach().double().requires_grad_() for x in rows]
    wanted = gradients(SDPBackend.MATH, exact, mask)
    pairs = zip(found, wanted, strict=True)
    return max(((a - b).norm() / b.norm()).item() for a, b in pairs)


def print_failures() -> None:
    """A line for each kernel, type, mask, head size and score."""
    for name, kernel in KERNELS.items():
        for dtype in TYPES:
            for head_dim in HEAD_DIMS:
                for mask_name in masks(1):
                    for score in SCORES:
                        case = f"{name}, {dtype}, D {head_dim}, {mask_name}, scores {score:g}"
                        _print_case(case, kernel, dtype, head_dim, mask_name, score)


def _print_case(case, kernel, dtype, head_dim, mask_name, score) -> None:
    failing: dict[str, list[int]] = {}
    worst = 0.0
    for length in LENGTHS:
        rows, mask = rows_with_score(score, length, head_dim, dtype), masks(length)[mask_name]
        try:
            found = gradients(kernel, rows, mask)
        except RuntimeError:
            print(f"{case}: not offered", flush=True)
            return
        for tensor, what in zip(found, ("output", "dq", "dk", "dv"), strict=True):
            if not tensor.isfinite().all():
                failing.setdefault(what, []).append(length)
        if not failing and length % 16 == 0:
            worst = max(worst, error(found, rows, mask))
    print(f"{case}: not finite at {failing or 'no length'}; error {worst:.1e}", flush=True)


def print_steps() -> None:
    """Milliseconds of six padded rows forward and backward, torch's choice and ours by turns."""
    from glmtune.bench.random_model import SHAPES, random_model
    from glmtune.bench.rows import random_rows
    from glmtune.config.settings import TrainSettings
    from glmtune.models.chatglm import modeling
    from glmtune.training.passes import PaddedPass
    from glmtune.training.run import adapt, start_accelerator

    config = TrainSettings(dataset_path="random rows", output_dir="none", report_to="none")
    accelerator, dtype = start_accelerator(config)
    rows = random_rows(SHAPES["6b"], ROWS * STEPS)
    model = adapt(random_model(SHAPES["6b"], accelerator.device, dtype), config)
    padded = PaddedPass(accelerator, model, rows)
    choices: dict[str, type[AbstractContextManager] | object] = {
        "right_kernels": right_kernels, "torch's choice": nullcontext,
    }  # fmt: skip
    for turn in range(TURNS):
        for name, kernels in choices.items():
            with patch.object(modeling, "right_kernels", kernels):
                times, losses = zip(
                    *(_timed_step(padded, step) for step in range(STEPS)), strict=True
                )
            print(
                f"turn {turn}, {name}: median {median(times):.1f} ms, mean {mean(times):.1f}, "
                f"longest {max(times):.1f}, mean loss {mean(losses):.5f}",
                flush=True,
            )


def _timed_step(padded, step: int) -> tuple[float, float]:
    import numpy as np

    part = np.arange(ROWS * step, ROWS * (step + 1))
    num_labels = int(padded.rows.num_labels_R[part].sum())
    torch.cuda.synchronize()
    start = time.perf_counter()
    loss = padded.run(part, num_labels, 0).item()
    torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start), loss


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--step", action="store_true")
    print(torch.cuda.get_device_name(), torch.__version__, torch.backends.cudnn.version())
    print_steps() if parser.parse_args().step else print_failures()
