"""How many of glm-tiny's answers depend on how many prompts are answered at a time.

python benchmarks/batch_sizes.py [--use_cpu]
"""

import argparse
from itertools import product

import torch

from glmtune.data.templates import alpaca
from glmtune.demo.questions import held_out_questions
from glmtune.errors import UserError
from glmtune.generation import GenerationSettings, Prompt, generate_answers
from glmtune.hardware import device_name, pick_device
from glmtune.models.loading import load_base_model, load_tokenizer
from glmtune.models.resolve import GLM_TINY

NUM_PROMPTS, SIZES = 26, (1, 3, 7, 26)


def main() -> None:
    """Print a line for each number format, bits, and way of choosing a token."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--use_cpu", action="store_true")
    device = pick_device(parser.parse_args().use_cpu)
    print(device_name(device), torch.__version__)
    tokenizer = load_tokenizer(GLM_TINY)
    asked = held_out_questions(NUM_PROMPTS)
    prompts = [Prompt(alpaca(q.instruction, q.input), number=i) for i, q in enumerate(asked)]
    for dtype, bits in product((torch.float32, torch.bfloat16, torch.float16), (16, 8, 4)):
        model = load_base_model(GLM_TINY, dtype=dtype, device=device)
        for sampled in (False, True):
            settings = GenerationSettings(max_new_tokens=48, decode_bits=bits, do_sample=sampled)
            try:
                answers = [
                    [a.text for a in generate_answers(model, tokenizer, prompts, settings, size)]
                    for size in SIZES
                ]
            except UserError as error:
                print(f"{dtype}, {bits} bits: {error}")
                break
            differ = sum(len(set(of_prompt)) > 1 for of_prompt in zip(*answers, strict=True))
            how = "sampled" if sampled else "greedy"
            print(f"{dtype}, {bits} bits, {how}: {differ} of {NUM_PROMPTS} differ", flush=True)


if __name__ == "__main__":
    main()
