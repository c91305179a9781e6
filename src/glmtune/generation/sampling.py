"""Which token comes next, chosen on the device without asking the host.

Shapes: B rows of a batch, T tokens of the longest answer, V vocabulary.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy
import torch
from torch import Tensor

from glmtune.config.groups import AnswerSettings
from glmtune.generation.prompts import EncodedPrompt
from glmtune.models.packed import move


class ChoiceSettings(AnswerSettings):
    """How an answer of a server is generated: what its protocol has beside our verbs' settings."""

    frequency_penalty: float = 0.0
    """Subtracted from the score of a token for each time that the answer has it."""
    presence_penalty: float = 0.0
    """Subtracted from the score of a token that the answer has."""
    num_listed: int | None = None
    """Likeliest tokens to list with each token's own probability; None for no probability."""


class Sampling(NamedTuple):
    """How the next token of each row is chosen, as tensors that a captured step reads."""

    draws_B1: Tensor
    """Whether the token is drawn; otherwise it is the likeliest."""
    penalty_B1: Tensor
    temperature_B1: Tensor
    top_k_B1: Tensor
    """int64; the vocabulary's size where all tokens may be drawn."""
    tail_B1: Tensor
    """``1 - top_p``, the probability mass of the least likely tokens, cut off; -1 for none."""
    frequency_B1: Tensor
    presence_B1: Tensor

    @classmethod
    def of(
        cls, settings: Sequence[AnswerSettings], vocab_size: int, device: torch.device
    ) -> "Sampling":
        """Turn each row's settings into tensors, with neutral values where a setting is None."""
        rows = [
            (
                row.draws,
                row.repetition_penalty or 1.0,
                row.temperature or 1.0,
                min(row.top_k or vocab_size, vocab_size),
                -1.0 if row.top_p is None else 1 - row.top_p,
                *_penalties(row),
            )
            for row in settings
        ]
        kinds = torch.bool, torch.float32, torch.float32, torch.int64, *[torch.float32] * 3
        table_BX = move(torch.tensor(rows, dtype=torch.float64), device)
        columns_B1 = table_BX.split(1, 1)
        return cls(*(column.to(kind) for column, kind in zip(columns_B1, kinds, strict=True)))

    def reset(self, row: int) -> None:
        """Let a row take the likeliest token, without any penalty."""
        self.draws_B1[row] = False
        self.penalty_B1[row] = 1
        self.frequency_B1[row] = self.presence_B1[row] = 0


def is_plain(settings: AnswerSettings) -> bool:
    """Whether each token is simply the likeliest."""
    penalised = settings.repetition_penalty is not None or any(_penalties(settings))
    return not settings.draws and not penalised


def num_listed(settings: AnswerSettings) -> int | None:
    """Likeliest tokens to list with each token's own probability; None for no probability."""
    return settings.num_listed if isinstance(settings, ChoiceSettings) else None


def _penalties(settings: AnswerSettings) -> tuple[float, float]:
    """Penalties by how often the answer has a token, and for having it at all."""
    if not isinstance(settings, ChoiceSettings):
        return 0.0, 0.0
    return settings.frequency_penalty, settings.presence_penalty


def largest(scores_BV: Tensor) -> tuple[Tensor, Tensor]:
    """The largest score of each row, and the first token that has it; NaN where any score is.

    The maximum is first taken over parts of a row, since a GPU assigns each row to one block.
    """
    num_parts = math.gcd(scores_BV.shape[-1], 32)
    of_part = scores_BV.unflatten(-1, (num_parts, -1)).max(-1)
    value_B, part_B = of_part.values.max(-1)
    within_B = of_part.indices.gather(-1, part_B[:, None]).squeeze(-1)
    return value_B, within_B.add(part_B, alpha=scores_BV.shape[-1] // num_parts)


def choose(
    scores_BV: Tensor, sampling: Sampling, seen_BV: Tensor, count_BV: Tensor, draw_B1: Tensor
) -> Tensor:
    """The next token of each row, ``(B,)``, by the settings of each.

    Args:
        scores_BV: float32 logits.
        sampling: each row's settings.
        seen_BV: true for the tokens that a repetition penalty applies to.
        count_BV: how often the answer has each token, float32.
        draw_B1: a random number a row, float64 in [0, 1).
    """
    penalised_BV = penalise(scores_BV, seen_BV, sampling.penalty_B1)
    penalised_BV = penalised_BV - sampling.frequency_B1 * count_BV
    penalised_BV = penalised_BV - sampling.presence_B1 * (count_BV > 0)
    drawn_B = draw(filter_scores(penalised_BV, sampling), draw_B1)
    return torch.where(sampling.draws_B1[:, 0], drawn_B, largest(penalised_BV)[1])


def penalise(scores_BV: Tensor, seen_BV: Tensor, penalty_B1: Tensor) -> Tensor:
    """transformers' repetition penalty, with a mask instead of a list of ids."""
    penalised_BV = torch.where(scores_BV < 0, scores_BV * penalty_B1, scores_BV / penalty_B1)
    return torch.where(seen_BV, penalised_BV, scores_BV)


def filter_scores(scores_BV: Tensor, sampling: Sampling) -> Tensor:
    """transformers' temperature, top_k and top_p, in its order, with settings for each row.

    Both filters need the scores in ascending order and share one sort.
    """
    scores_BV = scores_BV / sampling.temperature_B1
    sorted_BV, token_BV = scores_BV.sort(-1)
    lowest_B1 = sorted_BV.gather(-1, scores_BV.shape[-1] - sampling.top_k_B1)
    sorted_BV = sorted_BV.masked_fill(sorted_BV < lowest_B1, -torch.inf)
    is_tail_BV = sorted_BV.softmax(-1).cumsum(-1) <= sampling.tail_B1
    is_tail_BV[:, -1] = False
    return scores_BV.scatter(-1, token_BV, sorted_BV.masked_fill(is_tail_BV, -torch.inf))


def random_numbers(
    settings: Sequence[AnswerSettings], prompts: Sequence[EncodedPrompt]
) -> list[numpy.ndarray]:
    """Random numbers that depend only on seed, prompt and place in the answer.

    transformers draws from one generator for the whole batch: an answer would change with its
    neighbours, and with the place where an interrupted run was resumed.
    """
    return [
        numpy.random.default_rng((each.seed, prompt.number)).random(each.max_new_tokens)
        for each, prompt in zip(settings, prompts, strict=True)
    ]


def draw(scores_BV: Tensor, draw_B1: Tensor) -> Tensor:
    """Draw a token a row, ``(B,)``, by inverse transform sampling from one random number."""
    cumulative_BV = scores_BV.double().softmax(-1).cumsum(-1)
    # The sum over a vocabulary is only nearly 1; scaling keeps the draw below it.
    target_B1 = draw_B1 * cumulative_BV[:, -1:]
    token_B1 = torch.searchsorted(cumulative_BV, target_B1, right=True)
    # NaN scores give a place beyond the vocabulary, an illegal access on a GPU. They are reported
    # when the host looks, a few tokens later.
    return token_B1.clamp(max=scores_BV.shape[-1] - 1).squeeze(-1)
