"""Collapse: one answer to many questions, or trained answers to questions of another kind.

Texts are compared by their letters and digits alone; texts that differ little count as the same.
"""

import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from itertools import combinations, islice
from typing import Any, NamedTuple

import numpy as np

from glmtune.data.flaws import show
from glmtune.data.templates import parts
from glmtune.evaluation.findings import NUM_EXAMPLES, Example, Finding
from glmtune.evaluation.labels import Text
from glmtune.evaluation.source_run import RunRows

# docs/reliability.md gives the reasons for these values.
SIMILARITY = 0.85
"""Texts with at least this similarity count as the same."""
MOST_AGREEING = 0.15
"""Allowed excess share of question pairs with one answer, over base and right answers."""
MOST_TAUGHT = 0.25
"""Allowed excess share of unrelated questions that get a trained answer, over the base."""
FEW_ANSWERS = 16
"""With no more trained answers than this, any of them counts, however short it is."""
SENTENCE_TOKENS = 6
"""A text of more tokens than this is not given by chance, however many were trained."""
LABEL_LETTERS, QUESTIONS_A_LABEL = 12, 4
"""A label has at most this many letters, and on average answers at least this many questions."""
# Limits on long texts and large runs, so that the check takes a second at most.
_COMPARED, _MOST_ANSWERS, _MOST_QUESTIONS, _MOST_ROWS = 200, 4096, 64, 200_000


def letters(text: str) -> str:
    """A text without punctuation and white space, in one case and width of letters."""
    plain = unicodedata.normalize("NFKC", text).casefold()
    return "".join(filter(str.isalnum, plain)) or plain.strip()


def is_alike(one: str, other: str) -> bool:
    """Whether two texts, from `letters`, differ little, or one only adds to the other."""
    length = min(len(one), len(other), _COMPARED)
    pairs = [(one[:_COMPARED], other[:_COMPARED])]
    if sum(map(_width, one[:length])) > LABEL_LETTERS:  # such as where one repeats itself
        pairs.append((one[:length], other[:length]))
    matchers = (SequenceMatcher(None, *pair, autojunk=False) for pair in pairs)
    return any(m.real_quick_ratio() >= SIMILARITY <= m.ratio() for m in matchers)


def question_of(context: str) -> str:
    """The question in a decoded context, whose last blank no vocabulary preserves."""
    return " ".join(filter(None, parts(context.rstrip() + " "))).strip()


def agreeing(texts: Sequence[str]) -> float:
    """The probability that two different questions get one answer: the share of equal pairs."""
    pairs = list(combinations(map(letters, texts), 2))
    return sum(is_alike(*pair) for pair in pairs) / len(pairs) if pairs else 0.0


def are_labels(pairs: Iterable[tuple[str, str]]) -> bool:
    """Whether these are answers of a classification: few, short, each to many questions.

    Args:
        pairs: questions and right answers, from `letters`.
    """
    different = set(pairs)
    labels = {answer for _, answer in different}
    short = all(sum(map(_width, label)) <= LABEL_LETTERS for label in labels)
    return short and 2 <= len(labels) <= len(different) / QUESTIONS_A_LABEL


def _width(letter: str) -> int:
    return 3 if unicodedata.east_asian_width(letter) in "WF" else 1  # a Han character says more


@dataclass(frozen=True)
class Taught:
    """The answers of a run's rows, and the questions that each belongs to."""

    questions: dict[str, list[str]]
    """Answer -> its questions, both from `letters`; only the commonest answers."""
    sentences: frozenset[str]
    """The answers of many tokens."""
    of_labels: bool

    @classmethod
    def of(cls, tokenizer: Any, run_rows: RunRows) -> "Taught":
        """Collect them from the rows that were trained on, or a random part where those are many.

        An answer that many rows have is in it as well.
        """
        rows, looked_at = run_rows.rows, run_rows.trained_on
        if len(looked_at) > _MOST_ROWS:
            looked_at = np.sort(
                np.random.default_rng(0).choice(looked_at, _MOST_ROWS, replace=False)
            )
        by_answer: dict[bytes, list[int]] = {}
        for row in looked_at.tolist():
            answer_ids = rows[row][rows.prompt_lengths_R[row] :]
            by_answer.setdefault(answer_ids.tobytes(), []).append(row)

        def read(ids: np.ndarray) -> str:
            return tokenizer.decode(ids.tolist(), skip_special_tokens=True)

        questions: dict[str, list[str]] = {}
        sentences = set()
        for row_ids in sorted(by_answer.values(), key=len, reverse=True)[:_MOST_ANSWERS]:
            asked = []
            for row in row_ids[:_MOST_QUESTIONS]:
                prompt_ids, answer_ids = np.split(rows[row], [rows.prompt_lengths_R[row]])
                asked.append(letters(question_of(read(prompt_ids))))
            answer = letters(read(answer_ids))
            questions.setdefault(answer, []).extend(asked)
            if len(answer_ids) > SENTENCE_TOKENS:  # the end id included
                sentences.add(answer)
        pairs = ((asked, answer) for answer in questions for asked in questions[answer])
        return cls(questions, frozenset(sentences), are_labels(pairs))

    def is_out_of_place(self, question: str, expected: str, answer: str) -> bool:
        """Whether an answer was trained for other questions, and not for this one.

        Args:
            question: without its template.
            expected: a right answer.
            answer: the model's answer.
        """
        asked, said = letters(question), letters(answer)
        if is_alike(said, letters(expected)):
            return False
        known = self.questions if len(self.questions) <= FEW_ANSWERS else self.sentences
        found = [text for text in known if is_alike(said, text)]
        meant = (of_row for text in found for of_row in self.questions[text])
        return bool(found) and not any(is_alike(asked, of_row) for of_row in meant)


@dataclass(frozen=True)
class Agreement:
    """The probability that two different questions of a set get one answer."""

    asked: int
    tuned: float
    base: float | None
    """The share for the base's answers; None where it was not asked."""
    expected: float
    """The share for the right answers."""
    commonest: str
    """The tuned model's most frequent answer."""

    @classmethod
    def of(cls, tuned: Sequence[str], base: Sequence[str], expected: Sequence[str]) -> "Agreement":
        """Compute it for some answers."""
        of_base = agreeing(base) if base else None
        commonest = Counter(text.strip() for text in tuned).most_common(1)[0][0]
        return cls(len(tuned), agreeing(tuned), of_base, agreeing(expected), commonest)

    @property
    def sentence(self) -> Text | None:
        """What is wrong with it."""
        if self.tuned - max(self.base or 0.0, self.expected) < MOST_AGREEING:
            return None
        most = show(self.commonest)
        return Text(
            f"不同的问题得到同一个回答（{self.asked} 题中任取两题，{self.tuned:.0%} 相同），"
            f"最常见的是 {most}",
            f"different questions get one answer (any two of {self.asked} with a chance of "
            f"{self.tuned:.0%}), most often {most}",
        )


class Sides(NamedTuple):
    """Questions, their right answers, and both sides' answers (no base: it was not asked)."""

    questions: Sequence[str]
    expected: Sequence[str]
    tuned: Sequence[str]
    base: Sequence[str] = ()
    rows: Sequence[int] = ()
    """The questions' rows in their file; empty for questions of our own."""

    def example(self, place: int) -> Example:
        """A question with the tuned model's answer."""
        row = self.rows[place] if self.rows else None
        return Example(row, self.questions[place], self.tuned[place])

    def same_answer(self) -> tuple[Agreement, Finding | None]:
        """How often questions get one answer, and what is wrong with that."""
        agreement = Agreement.of(self.tuned, self.base, self.expected)
        if not agreement.sentence:
            return agreement, None
        most = letters(agreement.commonest)
        alike = (i for i, text in enumerate(self.tuned) if is_alike(letters(text), most))
        examples = tuple(self.example(place) for place in islice(alike, NUM_EXAMPLES))
        shares = agreement.tuned, agreement.base
        return agreement, Finding("same_answer", *shares, agreement.sentence, examples)


@dataclass(frozen=True)
class Collapse:
    """What distinguishes an adapter that answers from one that has memorised a few texts."""

    strange: Agreement
    """Questions unrelated to the training task, unless it was general."""
    taught: float | None
    """Share of them with an answer trained for another question; None if rows are unknown."""
    taught_of_base: float | None
    example: tuple[str, ...] | None
    """An unrelated question and the trained answer that it got."""
    task: Agreement | None
    """Questions of the training task, if available."""
    of_labels: bool
    """Whether it was trained to classify; unrelated questions may then get labels."""
    of_task: tuple[Finding, ...] = ()
    """What is wrong with the answers to questions of the training task."""
    of_strange: tuple[Finding, ...] = ()
    """What is wrong with those to unrelated ones."""

    @classmethod
    def of(
        cls,
        strange: Sides,
        task: Sides,
        taught: Taught | None,
    ) -> "Collapse":
        """Judge the answers of both sides.

        Args:
            strange: questions unrelated to the training task.
            task: questions of the training task; may be empty.
            taught: answers of the run's rows.
        """
        places: dict[str, list[int]] = {}
        for side, answers in (("tuned", strange.tuned), ("base", strange.base)):
            if taught is not None and answers:
                asked = enumerate(zip(*strange[:2], answers, strict=True))
                places[side] = [place for place, one in asked if taught.is_out_of_place(*one)]
        shares = {side: len(found) / len(strange.tuned) for side, found in places.items()}
        if taught is not None:
            of_labels = taught.of_labels
        else:
            pairs = zip(task.questions, task.expected, strict=True)
            of_labels = are_labels((letters(q), letters(right)) for q, right in pairs)
        agreement, strange_finding = strange.same_answer()
        task_agreement, task_finding = task.same_answer() if task.questions else (None, None)
        examples = tuple(map(strange.example, places.get("tuned", ())))
        taught_finding = _taught_answers(shares.get("tuned"), shares.get("base"), examples)
        return cls(
            agreement,
            shares.get("tuned"),
            shares.get("base"),
            examples[0][1:] if examples else None,
            task_agreement,
            of_labels,
            (task_finding,) if task_finding else (),
            tuple(filter(None, (strange_finding, taught_finding))),
        )

    @property
    def findings(self) -> tuple[Finding, ...]:
        """All that is wrong."""
        return self.of_task if self.of_labels else self.of_task + self.of_strange

    @property
    def gives_labels(self) -> bool:
        """Whether an adapter that classifies no longer does anything else."""
        return self.of_labels and bool(self.of_strange)

    def as_pairs(self) -> dict[str, str]:
        """The figures, for printing."""
        pairs = {}
        for name, agreement in (("strange questions", self.strange), ("its own", self.task)):
            if agreement:
                base = "" if agreement.base is None else f", the base to {agreement.base:.0%}"
                pairs[name] = (
                    f"{agreement.asked}; it gives one answer to {agreement.tuned:.0%} of their "
                    f"pairs{base}"
                )
        if self.taught is not None:
            base = "" if self.taught_of_base is None else f", the base to {self.taught_of_base:.0%}"
            pairs["taught answers"] = f"to {self.taught:.0%} of the strange ones{base}"
        return pairs


def _taught_answers(
    tuned: float | None, base: float | None, examples: tuple[Example, ...]
) -> Finding | None:
    if tuned is None or tuned - (base or 0.0) < MOST_TAUGHT:
        return None
    question, answer = map(show, examples[0][1:])
    sentence = Text(
        f"{tuned:.0%} 的无关问题得到为别的问题训练的回答（{question}：{answer}）",
        f"{tuned:.0%} of strange questions get an answer taught for another one "
        f"({question}: {answer})",
    )
    return Finding("taught_answer", tuned, base, sentence, examples[:NUM_EXAMPLES])
