"""Prompts and answers as plain data."""

from collections.abc import Sequence
from typing import Any, NamedTuple


class Prompt(NamedTuple):
    """A question as the model will see it."""

    text: str
    where: str = "prompt"
    """Where it comes from, for messages: "data.json:12 (row 3)"."""
    number: int = 0
    """Number of the random stream that its answer is drawn from, such as a record's row."""


class EncodedPrompt(NamedTuple):
    """A prompt's ids, special ones included, and the number of its random stream."""

    ids: list[int]
    number: int


def prompt_ids(tokenizer: Any, contexts: Sequence[str]) -> list[list[int]]:
    """The ids after which an answer is generated, for each context.

    Args:
        tokenizer: with `encode_contexts` and `row_rule`; and, where its folder's chat template
            begins an answer with more than the row rule, with `generation_ids`.
        contexts: as rows have them.
    """
    rule, more = tokenizer.row_rule, getattr(tokenizer, "generation_ids", ())
    return [[*rule.prompt(ids), *more] for ids in tokenizer.encode_contexts(list(contexts))]


class Answer(NamedTuple):
    """A model's answer to a prompt."""

    text: str
    num_tokens: int
    """Tokens of the answer, the stop token not counted."""
    stopped: bool
    """Whether the model stopped by itself or at a stop string, within max_new_tokens."""
