"""Scoring references beside the packed forward pass alone, in tokens a second.

    python benchmarks/reference_speed.py [--base FOLDER] [--rows 400] [--runs 5]

The forward pass runs on packs that lie ready on the device; scoring begins with lists of ids, as
`compare` has them, lays the packs and sums each row. By turns, medians.
"""

import argparse
import statistics
import time

import numpy as np
import torch

from glmtune.adapters import attach_lora
from glmtune.data.packing import lay_out, plan_packs
from glmtune.models.families import family_of
from glmtune.models.likelihood import PACK_LENGTH, Probe, packed_layers, rows_of, score_references
from glmtune.models.loading import load_base_model, load_tokenizer
from glmtune.models.packed import base_of
from glmtune.models.resolve import GLM_TINY


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", default=GLM_TINY)
    parser.add_argument("--rows", type=int, default=400)
    parser.add_argument("--runs", type=int, default=5)
    asked = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = attach_lora(load_base_model(asked.base, dtype=dtype, device=device)).eval()
    config, tokenizer = base_of(model).config, load_tokenizer(asked.base)
    random = np.random.default_rng(0)

    def ids(low: int, high: int) -> list[int]:
        return random.integers(100, 900, random.integers(low, high)).tolist()

    probes = [
        Probe(tokenizer.row_rule.prompt(ids(20, 90)), tokenizer.row_rule.answer(ids(10, 150)))
        for _ in range(asked.rows)
    ]
    packed = packed_layers(model)
    assert packed is not None
    rows = rows_of(probes, family_of(config).row_rule(config))
    packs = [
        packed.to_tensors(lay_out(rows, part, int(rows.lengths_R[part].sum())))
        for part in plan_packs(rows.lengths_R, np.arange(len(rows)), PACK_LENGTH)
    ]

    def forward() -> None:
        with torch.inference_mode():
            for pack in packs:
                packed.log_probs(pack)

    works = {"forward": forward, "scoring": lambda: score_references(model, probes, packed)}
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for run in range(asked.runs + 1):
        for name, work in works.items():
            start = time.perf_counter()
            work()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if run:  # the first warms up
                seconds[name].append(time.perf_counter() - start)
    speeds = {name: len(rows.ids_T) / statistics.median(of) for name, of in seconds.items()}
    for name, speed in speeds.items():
        print(f"{name:8} {speed:10,.0f} tokens/s")
    print(f"scoring is {speeds['scoring'] / speeds['forward']:.1%} of the forward pass")


if __name__ == "__main__":
    main()
