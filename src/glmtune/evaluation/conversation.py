"""A conversation in the format that the model was trained on."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from glmtune.data import templates
from glmtune.generation.streaming import without_beginning
from glmtune.models.family import ChatFormat

BASE, TUNED = "base", "tuned"
ALPACA, CHAT = "alpaca", "chat"
_ALPACA = "Instruction: and Answer:, as alpaca rows are taught; each question stands alone"


def formats(chat: ChatFormat) -> dict[str, str]:
    """The formats of a conversation, with a description of each."""
    return {ALPACA: _ALPACA, CHAT: chat.describe}


@dataclass
class Round:
    """A question and the answers of base or tuned weights, or both."""

    question: str
    answers: dict[str, str] = field(default_factory=dict)

    def seen_by(self, side: str) -> str:
        """The answer in one side's history: its own, or the other side's where it gave none."""
        return self.answers.get(side) or next(iter(self.answers.values()))


def write_prompt(
    chat: ChatFormat, rounds: Sequence[Round], question: str, side: str, format: str = CHAT
) -> str:
    """The text that the model reads.

    In its family's own format, all rounds so far and the question; in alpaca's template the
    question alone, since its training rows have only one round.
    """
    if format == ALPACA:
        return templates.alpaca(question)
    return chat.write([(r.question, r.seen_by(side)) for r in rounds], question)


def polish(chat: ChatFormat, text: str) -> str:
    """An answer as it is shown."""
    return chat.polish(text)


def polish_beginning(chat: ChatFormat, text: str) -> str:
    """The part of the polished answer that is final while more is being generated."""
    text = without_beginning(text, chat.marks)
    # The polished form of the last character may depend on what follows.
    return chat.polish(text[:-1] if text[-1:] and text[-1] in chat.unsettled else text)
