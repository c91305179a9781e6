"""Loss curves of quantised bases beside bfloat16's: the same random weights, rows and dropout.

    python benchmarks/loss_curves.py ROWS curves.json

ROWS is a folder that `glmtune tokenize` wrote. Each base trains alone, one after the other; the
losses of every step are written, and how far each base is from bfloat16 is printed; `--only nf4`
trains on that one and bfloat16. A GPU is wanted for the shape of ChatGLM-6B: `--shape small` shows
on a CPU that it runs.
"""

import argparse
import gc
import json
from pathlib import Path

import numpy as np
import torch

from glmtune.bench.random_model import CONFIGS, random_model
from glmtune.config.settings import TrainSettings
from glmtune.data.dataset import load_dataset
from glmtune.data.token_rows import TokenRows
from glmtune.models.families import family_of
from glmtune.training.loop import train_step
from glmtune.training.run import Run, adapt, build_pass, build_state, start_accelerator

BASES = {
    "as it is": {},
    "int8": {"quantization_bit": 8},
    "nf4": {"quantization_bit": 4},
    "nf4, head in 8 bits": {"quantization_bit": 4, "quantize_head": True},
}
WINDOW = 20
"""Steps that are averaged before curves are compared."""


def curve(settings: dict, rows: TokenRows, shape: str, steps: int) -> list[float]:
    """The loss of every step of a run."""
    config = TrainSettings(
        dataset_path="rows", output_dir="none", layout="packed", max_steps=steps,
        lr_scheduler_type="constant", **settings,
    )  # fmt: skip
    accelerator, dtype = start_accelerator(config)
    base = random_model(
        CONFIGS[shape], accelerator.device, dtype, bits=config.bits,
        quantize_head=config.quantize_head,
    )  # fmt: skip
    torch.manual_seed(config.seed)
    model = adapt(base, config)
    run = Run.of(config, accelerator, rows, model, shape)
    state = build_state(run, model)
    step_pass = build_pass(run, model, state.weights)
    losses = []
    for _ in range(steps):
        train_step(run, state, step_pass)
        losses.append(state.loss_sum.clone())
        state.loss_sum.zero_()
    return [loss.item() for loss in losses]


def main() -> None:
    """Train on every base, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows")
    parser.add_argument("json_path")
    parser.add_argument("--shape", default="6b", choices=CONFIGS)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--tokens_per_step", type=int, default=2048)
    parser.add_argument("--learning_rate", type=float, default=1e-4)
    parser.add_argument("--only", nargs="+", choices=list(BASES)[1:], default=list(BASES)[1:])
    parser.add_argument("--use_cpu", action="store_true")
    given = parser.parse_args()
    config = CONFIGS[given.shape]
    rule = family_of(config).row_rule(config)
    rows = TokenRows.from_table(load_dataset(given.rows)[0], rule)
    common = {
        "tokens_per_step": given.tokens_per_step,
        "learning_rate": given.learning_rate,
        "use_cpu": given.use_cpu,
    }
    curves: dict[str, list[float]] = {}
    for name in ("as it is", *given.only):
        curves[name] = curve(common | BASES[name], rows, given.shape, given.steps)
        Path(given.json_path).write_text(json.dumps(curves) + "\n", encoding="utf-8")
        torch.compiler.reset()  # or each base counts as one more recompilation of one block
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        plain, ours = (
            np.convolve(curves[key], np.ones(WINDOW) / WINDOW, "valid")
            for key in ("as it is", name)
        )
        off = np.abs(ours / plain - 1)
        print(
            f"{name}: loss {curves[name][0]:.4f} at first, {curves[name][-1]:.4f} at last; over "
            f"{WINDOW} steps at most {off.max():.2%} from the base as it is, {off[-1]:.2%} at last",
            flush=True,
        )


if __name__ == "__main__":
    main()
