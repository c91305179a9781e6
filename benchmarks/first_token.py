"""Time to the first token of a 64-token prompt on a GPU: of a length met before, and of a new one.

python benchmarks/first_token.py [SHAPE] >> FIGURES.jsonl   (SHAPE as of `glmtune bench decode`)
"""

import json
import sys
import time
from statistics import median

import torch

# As commits of before have it, too: they are timed beside this one, with PYTHONPATH on their src.
from glmtune.bench.decode import _random_prompts as random_prompts
from glmtune.bench.random_model import SHAPES, random_model
from glmtune.bench.timing import machine
from glmtune.generation import Decoder, GenerationSettings

LENGTH, REPEATS = 64, 11
SETTINGS = GenerationSettings(max_new_tokens=64)
shape, device = SHAPES[sys.argv[1] if sys.argv[1:] else "6b"], torch.device("cuda")


def first_token_ms(length: int) -> float:
    """Of one prompt, whose answer is not waited for."""
    prompts = random_prompts(shape, 1, length)
    torch.cuda.synchronize()
    start = time.perf_counter()
    stream = decoder.stream(prompts, SETTINGS)
    next(stream)
    stream.close()
    return 1e3 * (time.perf_counter() - start)


# What a library has planned for a length stays planned, whatever the bits.
new_lengths = iter(range(LENGTH - 1, 2, -1))
model = random_model(shape, device, torch.bfloat16).eval()
for bits in (16, 8, 4):
    decoder = Decoder(model, [], bits=bits)
    for _ in range(2):  # the first captures the step
        first_token_ms(LENGTH)
    met = [first_token_ms(LENGTH) for _ in range(REPEATS)]
    new = [first_token_ms(next(new_lengths)) for _ in range(REPEATS)]
    figures = {"decode_bits": bits, "prompt_length": LENGTH}
    for name, times in {"met": met, "new": new}.items():
        figures |= {f"{name}_ms": median(times), f"{name}_ms_best": min(times)}
        figures[f"{name}_ms_worst"] = max(times)
    print(json.dumps(machine(device) | figures), flush=True)
