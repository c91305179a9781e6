"""Packed passes with and without the compiler choosing forms of reductions: time and sameness.

    python benchmarks/compiler_choice.py [--shape glm-4-9b-0414] [--base_dtype fp8]

`triton.multi_kernel` makes each reduction in two forms, a loop and a whole row in registers, and
keeps what is faster. A model of eight layers with random weights goes through packs of 8,192 tokens
with it, without it, and with it once more; and a small model's gradients are computed thirteen
times in each way, which should give the same numbers.
"""

import argparse
import statistics
from copy import copy

import numpy as np
import torch
from accelerate import Accelerator
from torch._inductor import config as inductor

from glmtune.adapters import attach_lora
from glmtune.bench.random_model import CONFIGS, random_model
from glmtune.bench.rows import random_rows
from glmtune.data.packing import plan_packs
from glmtune.models.families import family_of
from glmtune.models.packed import PackedModel, to_fp8
from glmtune.training.passes import PackedPass

CUDA = torch.device("cuda")


def packed_pass(name: str, layers: int, targets: str, fp8: bool, length: int) -> tuple:
    """A compiled pass of a shape, its adapter's weights, and its rows in packs."""
    torch._dynamo.reset()
    config = copy(CONFIGS[name])
    config.num_hidden_layers = layers
    block = family_of(config).native().packed
    model = attach_lora(
        random_model(config, CUDA, torch.bfloat16), rank=8, dropout=0.1, targets=targets
    )
    for weight_name, weight in model.named_parameters():
        if "lora_B" in weight_name:
            torch.nn.init.normal_(weight, std=0.05)
    if fp8:
        to_fp8(model, block.together)
    rows = random_rows(config, 1000)
    packs = plan_packs(rows.lengths_R, np.arange(len(rows)), length)
    compiled = PackedModel(model, block, compiled=True)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    return PackedPass(Accelerator(), compiled, rows, 0.1, length), weights, packs


def milliseconds(name: str, fp8: bool) -> list[float]:
    """Time of each of 20 passes over 8,192 tokens, after 6."""
    step_pass, _, packs = packed_pass(name, 8, "all", fp8, 8192)
    times = []
    for number in range(26):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step_pass.run(packs[0], 100, number)
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return times[6:]


def changes(fp8: bool) -> float:
    """How far gradients of a small model move when a pass is computed again, at most."""
    step_pass, weights, packs = packed_pass("glm-small", 4, "all", fp8, 640)
    most = 0.0
    for row_ids in (packs[0], packs[1][:2], packs[2][:5]):
        first, *others = (step_pass.gradients(row_ids, weights)[1] for _ in range(13))
        size = torch.nn.utils.get_total_norm(first)
        for again in others:
            off = torch.nn.utils.get_total_norm(
                [one - other for one, other in zip(again, first, strict=True)]
            )
            most = max(most, (off / size).item())
    return most


def main() -> None:
    """Print a line for each of the three turns."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="glm-4-9b-0414")
    parser.add_argument("--base_dtype", choices=["auto", "fp8"], default="auto")
    given = parser.parse_args()
    fp8 = given.base_dtype == "fp8"
    for turn in (1, 0, 1):
        inductor.triton.multi_kernel = turn
        inductor.fx_graph_cache = not turn
        times = milliseconds(given.shape, fp8)
        print(
            f"{given.shape} {given.base_dtype} multi_kernel {turn}: median "
            f"{statistics.median(times):.2f} ms, least {min(times):.2f}; gradients of glm-small "
            f"move by {changes(fp8):.2%}",
            flush=True,
        )


if __name__ == "__main__":
    main()
