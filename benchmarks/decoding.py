"""Decoding of the 6B shape with random weights: rates of 1 and 32 rows, and the first token.

    python benchmarks/decoding.py >> FIGURES.jsonl

An older commit is measured beside this one with PYTHONPATH on its src, by turns.
"""

import json
import time
from statistics import median

import torch

# Commits of before have these under other names.
from glmtune.bench import random_model as models
from glmtune.bench.decode import _random_prompts as random_prompts
from glmtune.generation import Decoder, GenerationSettings

LENGTH, ANSWER, REPEATS = 64, 256, 5
config = (getattr(models, "CONFIGS", None) or models.SHAPES)["6b"]
model = models.random_model(config, torch.device("cuda"), torch.bfloat16).eval()


def seconds(decoder: Decoder, prompts: list, max_new_tokens: int) -> tuple[float, float]:
    """Until the first token is there, and until the last."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    stream = decoder.stream(prompts, GenerationSettings(max_new_tokens=max_new_tokens))
    next(stream)
    torch.cuda.synchronize()
    first = time.perf_counter() - start
    for _ in stream:
        pass
    torch.cuda.synchronize()
    return first, time.perf_counter() - start


for bits in (16, 8, 4):
    decoder, figures = Decoder(model, [], bits=bits), {"bits": bits}
    for rows in (1, 32):
        torch.manual_seed(0)
        prompts = random_prompts(config, rows, LENGTH)
        for _ in range(2):  # the first captures the step
            seconds(decoder, prompts, ANSWER)
        times = [seconds(decoder, prompts, ANSWER) for _ in range(REPEATS)]
        rate = median(rows * (ANSWER - 1) / (whole - first) for first, whole in times)
        figures[f"{rows} rows, tok/s after the first"] = rate
        figures[f"{rows} rows, first token, ms"] = 1e3 * median(first for first, _ in times)
    new = [seconds(decoder, random_prompts(config, 1, LENGTH - n), 2)[0] for n in range(1, 12)]
    figures["first token of a new length, ms"] = 1e3 * median(new)
    print(json.dumps(figures), flush=True)
    del decoder
    torch.cuda.empty_cache()
