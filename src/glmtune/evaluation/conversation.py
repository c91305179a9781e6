"""A conversation in the words the model learned them in.

Source: the published code's `chat` and its clean-up of answers, as revision v1.1 has them.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from glmtune.data import templates
from glmtune.generation.streaming import without_beginning

BASE, TUNED = "base", "tuned"
ALPACA, CHAT = "alpaca", "chat"
FORMATS = {
    ALPACA: "Instruction: and Answer:, as alpaca rows are taught; each question stands alone",
    CHAT: "the model's own, [Round N], 问：, 答：; a question goes on from what was said",
}

# The vocabulary has no full-width punctuation of these kinds, so answers come with the half-width.
_FULL_WIDTH = dict(zip(",!:;?", "，！：；？", strict=True))
_BESIDE_CHINESE = re.compile("(?<=[\u4e00-\u9fff])[,!:;?]|[,!:;?](?=[\u4e00-\u9fff])")
# A mark that the model's training data had in the place of a date.
_MARK, _MARKED = "[[训练时间]]", "2023年"


@dataclass
class Round:
    """A question and what base or tuned weights, or both, said to it."""

    question: str
    answers: dict[str, str] = field(default_factory=dict)

    def seen_by(self, side: str) -> str:
        """The answer that one side takes for its own: its own, or the other's where it had none."""
        return self.answers.get(side) or next(iter(self.answers.values()))


def write_prompt(rounds: Sequence[Round], question: str, side: str, format: str = CHAT) -> str:
    """What the model reads.

    In its own format all rounds so far and the question: a first question stands alone, rounds
    count from 0. In alpaca's template the question alone, since no row of it has taught more.
    """
    if format == ALPACA:
        return templates.alpaca(question)
    if not rounds:
        return question
    return templates.rounds([(r.question, r.seen_by(side)) for r in rounds], question)


def polish(text: str) -> str:
    """An answer as it is shown: full-width punctuation beside Chinese, a year for its mark."""
    text = text.replace(_MARK, _MARKED)
    return _BESIDE_CHINESE.sub(lambda mark: _FULL_WIDTH[mark[0]], text)


def polish_beginning(text: str) -> str:
    """As much of the polished answer as is certain while it goes on."""
    text = without_beginning(text, [_MARK])
    # What punctuation at the end becomes is up to what follows.
    return polish(text[:-1] if text[-1:] in _FULL_WIDTH else text)
