"""Answers in batches, over transformers' own `generate`.

Shapes: B rows of a batch, S tokens of the longest prompt, T tokens of the longest answer,
V vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy
import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel
from transformers.generation import (
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from glmtune.config.settings import AnswerSettings
from glmtune.errors import UserError

if TYPE_CHECKING:
    from peft import PeftModel


class Prompt(NamedTuple):
    """A question as the model will see it."""

    text: str
    where: str = "prompt"
    """Where it comes from, for messages: "data.json:12 (row 3)"."""
    number: int = 0
    """Which stream of random numbers its answer is drawn with; a record's row, say."""


class Answer(NamedTuple):
    """What the model said."""

    text: str
    num_tokens: int
    """Tokens of the answer, the stop token not counted."""
    stopped: bool
    """Whether the model stopped by itself, within max_new_tokens."""


@dataclass(frozen=True, kw_only=True)
class GenerationSettings:
    """How answers are generated, with transformers' names; what is None has no effect.

    Raises:
        UserError: a beam search that is to draw at random as well.
    """

    max_new_tokens: int = 150
    num_beams: int = 1
    do_sample: bool = False
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None
    seed: int = 42

    def __post_init__(self):
        if self.do_sample and self.num_beams > 1:
            raise UserError(
                f"num_beams {self.num_beams} searches for the likeliest answer, do_sample true "
                "draws one at random; choose one of them"
            )

    @classmethod
    def from_config(cls, config: AnswerSettings) -> "GenerationSettings":
        """The settings of `infer` or `compare`."""
        return cls(**{name: getattr(config, name) for name in cls.__dataclass_fields__})

    def in_effect(self) -> dict[str, int | float | bool]:
        """The settings that shape the answers: those that are set, and the seed where one draws."""
        unused = set() if self.do_sample else {"seed"}
        return {
            name: value
            for name, value in asdict(self).items()
            if value is not None and name not in unused
        }


class EncodedPrompt(NamedTuple):
    """A prompt's ids, [gMASK] <sop> included, and the number of its random stream."""

    ids: list[int]
    number: int


def generate_answers(
    model: "PreTrainedModel | PeftModel",
    tokenizer: Any,
    prompts: Sequence[Prompt],
    settings: GenerationSettings,
    batch_size: int,
) -> Iterator[Answer]:
    """Answer prompts in left-padded batches, and deliver the answers in order as batches finish.

    An answer does not depend on the prompts beside it: padding is masked, and a drawn answer has
    random numbers of its own, given by the seed and the prompt's number alone.

    Args:
        model: in evaluation mode, with or without an adapter.
        tokenizer: any with `encode_batch` and `decode` (see models.chatglm.tokenization).
        prompts: all are checked before the first is answered.
        settings: how to generate.
        batch_size: prompts answered at a time.

    Raises:
        UserError: see `encode_prompts` and `answer_batch`.
    """
    encoded = encode_prompts(model, tokenizer, prompts, settings.max_new_tokens)
    return (
        answer
        for start in range(0, len(encoded), batch_size)
        for answer in answer_batch(model, tokenizer, encoded[start : start + batch_size], settings)
    )


def encode_prompts(
    model: "PreTrainedModel | PeftModel",
    tokenizer: Any,
    prompts: Sequence[Prompt],
    max_new_tokens: int,
) -> list[EncodedPrompt]:
    """Encode prompts whole; none is cut.

    Raises:
        UserError: a prompt that leaves the model no positions for `max_new_tokens` more.
    """
    limit = model.config.max_position_embeddings
    texts = [prompt.text for prompt in prompts]
    encoded = tokenizer.encode_batch(texts, add_special_tokens=True)
    too_long = [i for i, ids in enumerate(encoded) if len(ids) + max_new_tokens > limit]
    if too_long:
        first, more = too_long[0], len(too_long) - 1
        num_ids = len(encoded[first])
        fix = f", or max_new_tokens to {limit - num_ids} at most" if num_ids < limit else ""
        raise UserError(
            f"{prompts[first].where}: the prompt has {num_ids} tokens, which with max_new_tokens "
            f"{max_new_tokens} is more than the model's {limit} positions; shorten the prompt{fix}"
            + (f" ({more} more are too long as well)" if more else "")
        )
    return [EncodedPrompt(ids, prompt.number) for ids, prompt in zip(encoded, prompts, strict=True)]


def answer_batch(
    model: "PreTrainedModel | PeftModel",
    tokenizer: Any,
    prompts: Sequence[EncodedPrompt],
    settings: GenerationSettings,
) -> list[Answer]:
    """Answer one batch of encoded prompts.

    Raises:
        UserError: the batch does not fit into memory, or the model's logits are not finite.
    """
    stop_ids = find_stop_ids(model)
    pad_id = model.config.pad_token_id
    longest = max(len(prompt.ids) for prompt in prompts)
    padding = [longest - len(prompt.ids) for prompt in prompts]
    input_ids_BS = torch.tensor(
        [[pad_id] * num + prompt.ids for num, prompt in zip(padding, prompts, strict=True)],
        device=model.device,
    )
    first_real_B1 = torch.tensor(padding, device=model.device)[:, None]
    generate: Any = model.generate
    processors: list[LogitsProcessor] = [RefuseNonFinite()]
    if settings.do_sample:
        processors += sampling_processors(settings, prompts, longest, model.device)
    try:
        rows = generate(
            input_ids=input_ids_BS,
            attention_mask=(torch.arange(longest, device=model.device) >= first_real_B1).long(),
            logits_processor=LogitsProcessorList(processors),
            generation_config=GenerationConfig(
                max_new_tokens=settings.max_new_tokens,
                num_beams=settings.num_beams,
                do_sample=False,  # drawing is the work of `DrawToken`
                repetition_penalty=settings.repetition_penalty,
                eos_token_id=stop_ids,
                pad_token_id=pad_id,
            ),
        ).tolist()
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"per_device_eval_batch_size {len(prompts)}: no memory for a batch of so many prompts "
            f"of up to {longest} tokens and {settings.max_new_tokens} new ones; lower it"
        ) from error
    return [_read_answer(row[longest:], stop_ids, tokenizer) for row in rows]


def find_stop_ids(model: "PreTrainedModel | PeftModel") -> list[int]:
    """The ids at which an answer ends, as the model's generation_config or config names them."""
    for config in (model.generation_config, model.config):
        stop = config.eos_token_id
        if stop is not None:
            return [stop] if isinstance(stop, int) else list(stop)
    raise AssertionError("the model names no eos_token_id")


def _read_answer(ids: list[int], stop_ids: list[int], tokenizer: Any) -> Answer:
    end = next((i for i, token in enumerate(ids) if token in stop_ids), None)
    text = tokenizer.decode(ids[:end], skip_special_tokens=True)
    return Answer(text.strip(), len(ids[:end]), end is not None)


def sampling_processors(
    settings: GenerationSettings,
    prompts: Sequence[EncodedPrompt],
    prompt_length: int,
    device: torch.device,
) -> list[LogitsProcessor]:
    """transformers' temperature, top_k and top_p, as far as they are set, and then the draw."""
    processors: list[LogitsProcessor] = []
    if settings.temperature is not None:
        processors.append(TemperatureLogitsWarper(settings.temperature))
    if settings.top_k is not None:
        processors.append(TopKLogitsWarper(settings.top_k))
    if settings.top_p is not None:
        processors.append(TopPLogitsWarper(settings.top_p))
    draws = [
        numpy.random.default_rng((settings.seed, prompt.number)).random(settings.max_new_tokens)
        for prompt in prompts
    ]
    draws_BT = torch.from_numpy(numpy.stack(draws)).to(device)
    return [*processors, DrawToken(draws_BT, prompt_length)]


class DrawToken(LogitsProcessor):
    """Draw each row's next token with a random number that belongs to the row and the step.

    transformers' own draw takes from one generator for the whole batch, so that an answer would
    change with its neighbours, and with where a broken run was resumed. Here the token is found by
    inverse transform sampling, and all others are ruled out: the likeliest is then the drawn one.

    Args:
        draws_BT: float64, uniform in [0, 1).
        prompt_length: S, the place of the first drawn token.
    """

    def __init__(self, draws_BT: Tensor, prompt_length: int):
        self.draws_BT = draws_BT
        self.prompt_length = prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores ``(B, V)`` with one token a row left in the running."""
        draw_B1 = self.draws_BT[:, input_ids.shape[1] - self.prompt_length, None]
        cumulative_BV = scores.double().softmax(-1).cumsum(-1)
        # The sum over a vocabulary is only nearly 1; scaling keeps the draw below it.
        token_B1 = torch.searchsorted(cumulative_BV, draw_B1 * cumulative_BV[:, -1:], right=True)
        return torch.full_like(scores, -torch.inf).scatter_(-1, token_B1, 0.0)


class RefuseNonFinite(LogitsProcessor):
    """Stop where the likeliest token cannot be told, instead of answering nonsense."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """The scores as they are. Raises UserError where one is NaN or infinite."""
        if not scores.max().isfinite():  # the maximum is NaN where any score is
            raise UserError(
                "the model's logits are not finite: its weights are damaged, or float16 overflowed "
                "(then pass --bf16 true, or --fp16 false)"
            )
        return scores
