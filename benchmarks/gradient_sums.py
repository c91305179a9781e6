"""Steps of several processes whose gradients are sent during the backward pass, or after it.

    torchrun --standalone --nproc_per_node 2 benchmarks/gradient_sums.py ROWS [--steps N]

ROWS is a folder that `glmtune tokenize` wrote for glm-tiny. Every second step sends after the
backward pass, all in the same run. Process 0 prints the median of each, in milliseconds.
"""

import argparse
import tempfile
import time
from contextlib import nullcontext
from statistics import median

from glmtune.config.settings import TrainSettings
from glmtune.launched import process_number
from glmtune.models.resolve import GLM_TINY
from glmtune.training import loop
from glmtune.training.gradients import GradientSums

WARM_UP = 4


def main() -> None:
    """Train for some steps and print how long they took."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows")
    parser.add_argument("--steps", type=int, default=64)
    given = parser.parse_args()
    times: dict[bool, list[float]] = {True: [], False: []}
    train_step, during = loop.train_step, GradientSums.during_last_pass
    state_of_step = {"early": True}

    def timed(run, state, *how):
        state_of_step["early"] = state.global_step % 2 == 0
        started = time.perf_counter()
        norm = train_step(run, state, *how)
        if state.global_step > WARM_UP:
            times[state_of_step["early"]].append(1e3 * (time.perf_counter() - started))
        return norm

    loop.train_step = timed
    GradientSums.during_last_pass = lambda self: (
        during(self) if state_of_step["early"] else nullcontext()
    )
    with tempfile.TemporaryDirectory() as folder:
        loop.train(
            TrainSettings(
                dataset_path=given.rows, output_dir=f"{folder}/run", base=GLM_TINY, use_cpu=True,
                max_steps=given.steps, lora_rank=64, lora_target="all", layout="exact",
                per_device_train_batch_size=8, general_set=False, report_to="none",
                disable_tqdm=True, save_steps=10_000,
            )
        )  # fmt: skip
    if process_number() == 0:
        print(f"during {median(times[True]):.1f} ms, after {median(times[False]):.1f} ms")


if __name__ == "__main__":
    main()
