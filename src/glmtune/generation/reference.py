"""Answers through transformers' own `generate`: for beam search, and as the decoder's reference."""

from collections.abc import Sequence
from typing import Any

import numpy
import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.generation import (
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from glmtune.config.groups import GenerationSettings
from glmtune.errors import UserError
from glmtune.generation.prompts import EncodedPrompt
from glmtune.generation.sampling import draw, random_numbers

NOT_FINITE = (
    "the model's logits are not finite: its weights are damaged, or float16 overflowed (then pass "
    "--bf16 true, or --fp16 false)"
)


def left_padded(
    prompts: Sequence[EncodedPrompt], pad_id: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """The ids of some prompts as one batch, and the mask of real tokens: both ``(B, S)``."""
    longest = max(len(prompt.ids) for prompt in prompts)
    padding = [longest - len(prompt.ids) for prompt in prompts]
    rows = [[pad_id] * num + prompt.ids for num, prompt in zip(padding, prompts, strict=True)]
    first_real_B1 = torch.tensor(padding, device=device)[:, None]
    return torch.tensor(rows, device=device), torch.arange(longest, device=device) >= first_real_B1


def generate_ids(
    model: Any,
    prompts: Sequence[EncodedPrompt],
    settings: GenerationSettings,
    stop_ids: Sequence[int],
) -> list[list[int]]:
    """The ids of each answer, up to the end of the longest in the batch.

    Raises:
        UserError: the model's logits are not finite.
    """
    pad_id = model.config.pad_token_id
    input_ids_BS, valid_BS = left_padded(prompts, pad_id, model.device)
    num_columns = input_ids_BS.shape[1]
    processors: list[LogitsProcessor] = [RefuseNonFinite()]
    if settings.draws:
        numbers = random_numbers([settings] * len(prompts), prompts)
        numbers_BT = torch.from_numpy(numpy.stack(numbers)).to(model.device)
        processors += [*filters(settings), DrawToken(numbers_BT, num_columns)]
    rows = model.generate(
        input_ids=input_ids_BS,
        attention_mask=valid_BS.long(),
        logits_processor=LogitsProcessorList(processors),
        generation_config=GenerationConfig(
            max_new_tokens=settings.max_new_tokens,
            num_beams=settings.num_beams,
            do_sample=False,  # `DrawToken` draws
            repetition_penalty=settings.repetition_penalty,
            eos_token_id=list(stop_ids),
            pad_token_id=pad_id,
        ),
    )
    return rows[:, num_columns:].tolist()


def filters(settings: GenerationSettings) -> list[LogitsProcessor]:
    """transformers' temperature, top_k and top_p processors, in its order, where they are set."""
    chosen: list[LogitsProcessor] = []
    if settings.temperature is not None:
        chosen.append(TemperatureLogitsWarper(settings.temperature))
    if settings.top_k is not None:
        chosen.append(TopKLogitsWarper(settings.top_k))
    if settings.top_p is not None:
        chosen.append(TopPLogitsWarper(settings.top_p))
    return chosen


class DrawToken(LogitsProcessor):
    """Draw each row's next token and mask all others, so that greedy search takes the drawn one.

    Args:
        numbers_BT: from `random_numbers`.
        prompt_length: the place of the first drawn token.
    """

    def __init__(self, numbers_BT: Tensor, prompt_length: int):
        self.numbers_BT = numbers_BT
        self.prompt_length = prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores ``(B, V)`` with one token a row left in the running."""
        number_B1 = self.numbers_BT[:, input_ids.shape[1] - self.prompt_length, None]
        token_B1 = draw(scores, number_B1)[:, None]
        return torch.full_like(scores, -torch.inf).scatter_(-1, token_B1, 0.0)


class RefuseNonFinite(LogitsProcessor):
    """Stop at scores that are not finite, instead of returning a meaningless answer."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the scores unchanged. Raises UserError where one is NaN or infinite."""
        if not scores.max().isfinite():  # the maximum is NaN where any score is
            raise UserError(NOT_FINITE)
        return scores
