"""Which token comes next, chosen on the device without asking the host.

Shapes: B rows of a batch, T tokens of the longest answer, V vocabulary.
"""

import math
from collections.abc import Sequence

import numpy
import torch
from torch import Tensor
from transformers import LogitsProcessor
from transformers.generation import (
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from glmtune.config.groups import GenerationSettings
from glmtune.generation.prompts import EncodedPrompt


def largest(scores_BV: Tensor) -> tuple[Tensor, Tensor]:
    """The largest score of each row, and the first token that has it; NaN where any score is.

    It is looked for in parts at first, as a GPU gives each row of a maximum to one block.
    """
    num_parts = math.gcd(scores_BV.shape[-1], 32)
    of_part = scores_BV.unflatten(-1, (num_parts, -1)).max(-1)
    value_B, part_B = of_part.values.max(-1)
    within_B = of_part.indices.gather(-1, part_B[:, None]).squeeze(-1)
    return value_B, within_B.add(part_B, alpha=scores_BV.shape[-1] // num_parts)


def choose(
    scores_BV: Tensor,
    settings: GenerationSettings,
    seen_BV: Tensor | None,
    draw_B1: Tensor | None,
) -> Tensor:
    """The next token of each row, ``(B,)``.

    Args:
        scores_BV: float32 logits.
        settings: which penalty and filters there are, and whether the token is drawn.
        seen_BV: true for the tokens that a repetition penalty is about; only used with one.
        draw_B1: float64 in [0, 1), a random number a row; only used where tokens are drawn.
    """
    if settings.repetition_penalty is not None:
        assert seen_BV is not None
        scores_BV = penalise(scores_BV, seen_BV, settings.repetition_penalty)
    if not settings.draws:
        return largest(scores_BV)[1]
    assert draw_B1 is not None
    for keep in filters(settings):
        scores_BV = keep(None, scores_BV)
    return draw(scores_BV, draw_B1)


def penalise(scores_BV: Tensor, seen_BV: Tensor, penalty: float) -> Tensor:
    """transformers' repetition penalty, with a mask in the place of a list of ids."""
    penalised_BV = torch.where(scores_BV < 0, scores_BV * penalty, scores_BV / penalty)
    return torch.where(seen_BV, penalised_BV, scores_BV)


def filters(settings: GenerationSettings) -> list[LogitsProcessor]:
    """transformers' temperature, top_k and top_p, in its order, as far as they are set."""
    chosen: list[LogitsProcessor] = []
    if settings.temperature is not None:
        chosen.append(TemperatureLogitsWarper(settings.temperature))
    if settings.top_k is not None:
        chosen.append(TopKLogitsWarper(settings.top_k))
    if settings.top_p is not None:
        chosen.append(TopPLogitsWarper(settings.top_p))
    return chosen


def random_numbers(
    settings: GenerationSettings, prompts: Sequence[EncodedPrompt], device: torch.device
) -> Tensor:
    """Random numbers ``(B, T)`` that belong to seed, prompt and place in the answer alone.

    transformers draws from one generator for the whole batch, so that an answer would change with
    its neighbours, and with where a broken run was resumed.
    """
    rows = [
        numpy.random.default_rng((settings.seed, prompt.number)).random(settings.max_new_tokens)
        for prompt in prompts
    ]
    return torch.from_numpy(numpy.stack(rows)).to(device)


def draw(scores_BV: Tensor, draw_B1: Tensor) -> Tensor:
    """Draw a token a row by inverse transform sampling, ``(B,)``: one number decides it."""
    cumulative_BV = scores_BV.double().softmax(-1).cumsum(-1)
    # The sum over a vocabulary is only nearly 1; scaling keeps the draw below it.
    target_B1 = draw_B1 * cumulative_BV[:, -1:]
    token_B1 = torch.searchsorted(cumulative_BV, target_B1, right=True)
    # Scores that are not finite lead beyond the vocabulary, which a GPU does not survive; that they
    # are not finite is told a few tokens later.
    return token_B1.clamp(max=scores_BV.shape[-1] - 1).squeeze(-1)
