"""Prompts and answers as plain data."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from glmtune.data.conversations import ASSISTANT, Asked, Example, PlainText, Turn
from glmtune.data.flaws import Flaw
from glmtune.data.thoughts import arrange


class Prompt(NamedTuple):
    """A question as the model will see it."""

    asked: Asked
    where: str = "prompt"
    """Where it comes from, for messages: "data.json:12 (row 3)"."""
    number: int = 0
    """Number of the random stream that its answer is drawn from, such as a record's row."""


class EncodedPrompt(NamedTuple):
    """A prompt's ids, special ones included, and the number of its random stream."""

    ids: list[int]
    number: int


def prompt_ids(tokenizer: Any, asked: Sequence[Asked]) -> list[list[int] | Flaw]:
    """The ids after which an answer is generated, or why there can be none; as rows have them.

    Args:
        tokenizer: with `encode_contexts`, `row_rule` and, for conversations, `encode_examples` and
            `opens_thoughts`; and with `generation_ids` where its folder's chat template begins an
            answer with more than the row rule.
        asked: contexts, conversations up to the answer, or texts to go on, in any order.
    """
    rule, more = tokenizer.row_rule, getattr(tokenizer, "generation_ids", ())
    found: list[list[int] | Flaw] = [[] for _ in asked]
    contexts = {place: one for place, one in enumerate(asked) if isinstance(one, str)}
    examples = {place: one for place, one in enumerate(asked) if isinstance(one, Example)}
    texts = {place: one for place, one in enumerate(asked) if isinstance(one, PlainText)}
    if contexts:
        encoded = tokenizer.encode_contexts(list(contexts.values()))
        for place, ids in zip(contexts, encoded, strict=True):
            found[place] = [*rule.prompt(ids), *more]
    if examples:
        thinks = tokenizer.opens_thoughts
        answered = [arrange(_with_answer(ex), None, thinks)[0] for ex in examples.values()]
        for place, row in zip(examples, tokenizer.encode_examples(answered), strict=True):
            is_flaw = isinstance(row, Flaw)
            found[place] = row if is_flaw else [*row.input_ids[: row.prompt_length], *more]
    if texts:
        encoded = tokenizer.encode_batch([text.text for text in texts.values()])
        for place, ids in zip(texts, encoded, strict=True):
            found[place] = [*rule.text_prefix, *ids] or no_text()
    return found


def no_text() -> Flaw:
    """The flaw of a text that is to be continued and has no token, nor does the family add any."""
    return Flaw(
        "empty text", "an empty text, of which nothing can be continued", "write its beginning"
    )


def _with_answer(example: Example) -> Example:
    """A conversation with an answer whose ids do not matter: only what is before it does."""
    return example._replace(turns=(*example.turns, Turn(ASSISTANT, "", supervised=True)))


class Answer(NamedTuple):
    """A model's answer to a prompt."""

    text: str
    num_tokens: int
    """Tokens of the answer, the stop token not counted."""
    stopped: bool
    """Whether the model stopped by itself or at a stop string, within max_new_tokens."""
