"""What is wrong with a side's answers as a whole, in a sentence and by example."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from glmtune.evaluation.labels import Text
from glmtune.evaluation.text_scores import language_of, language_of_record
from glmtune.generation import Answer

What = Literal["same_answer", "taught_answer", "no_end", "language", "empty"]

# docs/reliability.md gives the reasons for these values.
MOST_WORSE = 0.15
"""Allowed share of answers with a flaw, over the base's."""
LEAST_ANSWERS = 3
"""Answers that have to have it."""
NUM_EXAMPLES = 3


class Example(NamedTuple):
    """A question and the answer that shows what is wrong."""

    row: int | None
    """The record's row in its file; None for a question of our own."""
    question: str
    answer: str


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong."""

    what: What
    tuned: float
    """Share of answers, or of pairs of them, 0 to 1."""
    base: float | None
    """The base's share; None where it was not asked."""
    sentence: Text
    examples: tuple[Example, ...]

    def as_json(self) -> dict[str, Any]:
        """Its entry in compare.json."""
        return {
            "what": self.what,
            "base": self.base,
            "tuned": self.tuned,
            "sentence": self.sentence._asdict(),
            "examples": [example._asdict() for example in self.examples],
        }


class Answered(NamedTuple):
    """A question with the answers of both sides."""

    question: str
    expected: str
    """A right answer; may be blank."""
    tuned: Answer
    base: Answer | None
    """None where the base was not asked."""
    row: int | None = None
    is_long: bool = False
    """Whether the right answer itself would not end within the limit."""


def answer_findings(answered: Sequence[Answered]) -> list[Finding]:
    """Answers that do not end, are in another language than they should be, or are empty.

    Each counts where the tuned model does it much more often than the base.
    """
    ends = [one for one in answered if not one.is_long]
    found = (
        _compare(ends, "no_end", _does_not_end, Text("没有结束", "do not end")),
        _compare(
            answered,
            "language",
            _is_in_another_language,
            Text("用了另一种语言", "are in another language than they should be"),
        ),
        _compare(answered, "empty", _is_empty, Text("是空的", "are empty")),
    )
    return [finding for finding in found if finding]


def _compare(
    answered: Sequence[Answered],
    what: What,
    has_flaw: Callable[[Answered, Answer], bool],
    words: Text,
) -> Finding | None:
    if not answered:
        return None
    flawed = [one for one in answered if has_flaw(one, one.tuned)]
    tuned = len(flawed) / len(answered)
    of_base = [has_flaw(one, one.base) for one in answered if one.base is not None]
    base = sum(of_base) / len(of_base) if of_base else None
    if len(flawed) < LEAST_ANSWERS or tuned - (base or 0.0) < MOST_WORSE:
        return None
    zh, en = (
        f"{beside}{base:.0%}" if base is not None else ""
        for beside in ("，原模型 ", ", the base's ")
    )
    sentence = Text(
        f"{tuned:.0%} 的回答{words.zh}{zh}", f"{tuned:.0%} of its answers {words.en}{en}"
    )
    examples = (Example(one.row, one.question, one.tuned.text) for one in flawed[:NUM_EXAMPLES])
    return Finding(what, tuned, base, sentence, tuple(examples))


def _does_not_end(_: Answered, answer: Answer) -> bool:
    return not answer.stopped


def _is_in_another_language(one: Answered, answer: Answer) -> bool:
    spoken = language_of(answer.text)
    return spoken is not None and spoken != language_of_record(one.question, one.expected)


def _is_empty(_: Answered, answer: Answer) -> bool:
    return not answer.text.strip()
