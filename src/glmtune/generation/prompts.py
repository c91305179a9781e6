"""What is asked, and the answer."""

from typing import NamedTuple


class Prompt(NamedTuple):
    """A question as the model will see it."""

    text: str
    where: str = "prompt"
    """Where it comes from, for messages: "data.json:12 (row 3)"."""
    number: int = 0
    """Which stream of random numbers its answer is drawn with; a record's row, say."""


class EncodedPrompt(NamedTuple):
    """A prompt's ids, special ones included, and the number of its random stream."""

    ids: list[int]
    number: int


class Answer(NamedTuple):
    """What the model said."""

    text: str
    num_tokens: int
    """Tokens of the answer, the stop token not counted."""
    stopped: bool
    """Whether the model stopped by itself or at a stop string, within max_new_tokens."""
