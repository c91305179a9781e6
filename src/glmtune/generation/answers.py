"""Answers to prompts, in batches."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from glmtune.config.groups import GenerationSettings
from glmtune.data.flaws import Flaw
from glmtune.errors import UserError
from glmtune.generation.decoder import Decoder
from glmtune.generation.prompts import Answer, EncodedPrompt, Prompt, prompt_ids
from glmtune.generation.reference import generate_ids
from glmtune.generation.streaming import before_stop, check_stop_strings, cut_at_stop

if TYPE_CHECKING:
    from peft import PeftModel

    from glmtune.models.prefixed import PrefixedModel


def generate_answers(
    model: "PreTrainedModel | PeftModel",
    tokenizer: Any,
    prompts: Sequence[Prompt],
    settings: GenerationSettings,
    batch_size: int,
    device: torch.device | None = None,
) -> Iterator[Answer]:
    """Answer prompts in batches, and deliver the answers in order as batches finish.

    An answer depends on the prompts beside it by rounding alone: padding is masked, and a drawn
    answer has random numbers of its own, given by the seed and the prompt's number. In 16-bit
    formats, and with 8 or 4 bits on a CPU, that rounding can turn an answer into another
    (benchmarks/2026-11-29-batch-sizes.md), so answers that are to be compared need equal batches.

    Args:
        model: in evaluation mode, with or without an adapter.
        tokenizer: any with the project's `encode_contexts`, `row_rule` and `decode`.
        prompts: prompts to answer; all are checked before the first is answered.
        settings: how to generate.
        batch_size: prompts answered at a time.
        device: see `Decoder`.

    Raises:
        UserError: see `encode_prompts` and `answer_batch`.
    """
    check_stop_strings(settings.stop_strings or (), tokenizer)
    encoded = encode_prompts(model, tokenizer, prompts, settings.max_new_tokens)
    decoder = Decoder.of(model, settings, device)
    return answer_in_batches(model, tokenizer, encoded, settings, batch_size, decoder)


def answer_in_batches(
    model: "PreTrainedModel | PeftModel",
    tokenizer: Any,
    prompts: Sequence[EncodedPrompt],
    settings: GenerationSettings,
    batch_size: int,
    decoder: Decoder,
) -> Iterator[Answer]:
    """Answer encoded prompts, and deliver the answers in order; see `answer_batch`.

    A slot whose answer has ended stays empty until its whole batch has ended. If the next prompt
    joined at once, the rows beside an answer, and with them its rounding in 16-bit formats, would
    depend on the lengths of other answers: base and adapter would not be compared under equal
    conditions, and an interrupted run would not resume as it was.
    """
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        yield from answer_batch(model, tokenizer, batch, settings, decoder)


class TooLongError(UserError):
    """A prompt that leaves the model too few positions for an answer."""


def encode_prompts(
    model: "PreTrainedModel | PeftModel | PrefixedModel",
    tokenizer: Any,
    prompts: Sequence[Prompt],
    max_new_tokens: int,
) -> list[EncodedPrompt]:
    """Encode prompts whole; none is cut.

    Raises:
        TooLongError: a prompt that leaves the model no positions for `max_new_tokens` more.
        UserError: a conversation that the family cannot write.
    """
    encoded = []
    asked = [prompt.asked for prompt in prompts]
    for prompt, ids in zip(prompts, prompt_ids(tokenizer, asked), strict=True):
        if isinstance(ids, Flaw):
            raise UserError(f"{prompt.where}: {ids}")
        encoded.append(ids)
    limit = model.config.max_position_embeddings
    if too_long := find_too_long([len(ids) for ids in encoded], max_new_tokens, limit):
        (first, reason), *others = too_long.items()
        more = f" ({len(others)} more are too long as well)" if others else ""
        raise TooLongError(f"{prompts[first].where}: {reason}{more}")
    return [EncodedPrompt(ids, prompt.number) for ids, prompt in zip(encoded, prompts, strict=True)]


def find_too_long(lengths: Sequence[int], max_new_tokens: int, limit: int) -> dict[int, str]:
    """Which prompts leave a model no positions for an answer: index -> what is wrong, and the fix.

    Args:
        lengths: tokens of each prompt.
        max_new_tokens: tokens of the longest answer.
        limit: positions of the model.
    """
    found = {}
    for place, length in enumerate(lengths):
        if length + max_new_tokens > limit:
            fix = f", or max_new_tokens to {limit - length} at most" if length < limit else ""
            found[place] = (
                f"the prompt has {length} tokens, which with max_new_tokens {max_new_tokens} is "
                f"more than the model's {limit} positions; shorten the prompt{fix}"
            )
    return found


def answer_batch(
    model: "PreTrainedModel | PeftModel",
    tokenizer: Any,
    prompts: Sequence[EncodedPrompt],
    settings: GenerationSettings,
    decoder: Decoder | None = None,
) -> list[Answer]:
    """Answer one batch of encoded prompts.

    Args:
        model: used for beam searches, through transformers' `generate`.
        tokenizer: see `generate_answers`.
        prompts: one batch.
        settings: how to generate.
        decoder: decoder of this model, which knows its stop ids; the caller keeps it across
            batches. Beam searches use nothing else of it.

    Raises:
        UserError: the batch does not fit into memory, or the model's logits are not finite.
    """
    decoder = decoder or Decoder.of(model, settings)
    try:
        if settings.num_beams > 1 and decoder.prefix is not None:
            raise UserError(
                f"num_beams {settings.num_beams}: a prefix is answered with without beams; leave "
                "num_beams out, or make a LoRA adapter of it with `glmtune adapters distil`"
            )
        if settings.num_beams > 1:
            rows = generate_ids(model, prompts, settings, decoder.stop_ids)
        else:
            rows = _decode(decoder, tokenizer, prompts, settings)
    except torch.OutOfMemoryError as error:
        longest = max(len(prompt.ids) for prompt in prompts)
        raise UserError(
            f"per_device_eval_batch_size {len(prompts)}: no memory for a batch of that many "
            f"prompts of up to {longest} tokens and {settings.max_new_tokens} new ones; lower it"
        ) from error
    return [read_answer(row, decoder.stop_ids, settings, tokenizer) for row in rows]


def _decode(
    decoder: Decoder,
    tokenizer: Any,
    prompts: Sequence[EncodedPrompt],
    settings: GenerationSettings,
) -> list[list[int]]:
    """The ids of each answer; an answer is ended once it contains a stop string."""
    rows: list[list[int]] = [[] for _ in prompts]
    going_on = set(range(len(prompts))) if settings.stop_strings else set()
    for more in decoder.stream(prompts, settings):
        for row, ids in zip(rows, more, strict=True):
            row += ids
        for i in [i for i in going_on if stops(rows[i], settings, tokenizer)]:
            going_on.remove(i)
            decoder.finish(i)
    return rows


def stops(ids: Sequence[int], settings: GenerationSettings, tokenizer: Any) -> bool:
    """Whether the text of ids holds a stop string."""
    text = tokenizer.decode(ids, skip_special_tokens=True)
    return cut_at_stop(text, settings.stop_strings or ()) is not None


def read_answer(
    ids: list[int], stop_ids: Sequence[int], settings: GenerationSettings, tokenizer: Any
) -> Answer:
    """The answer that ids stand for, up to the first stop id or stop string."""
    kept = before_stop(ids, stop_ids)
    stopped = len(kept) < len(ids)
    if settings.stop_strings and stops(kept, settings, tokenizer):
        # Tokens count up to the one that completes the stop string.
        lengths = range(1, len(kept) + 1)
        kept = next(kept[:n] for n in lengths if stops(kept[:n], settings, tokenizer))
        stopped = True
    text = tokenizer.decode(kept, skip_special_tokens=True)
    cut = cut_at_stop(text, settings.stop_strings or ())
    return Answer((text if cut is None else cut).strip(), len(kept), stopped)
