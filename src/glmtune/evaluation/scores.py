"""The scores of every record and side, as arrays: what a verdict is made of.

Shapes: N records.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import compress
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from glmtune.evaluation.labels import Text
from glmtune.evaluation.text_scores import (
    Language,
    corpus_scores,
    language_of_record,
    score_text,
    word_scores,
)

if TYPE_CHECKING:
    from glmtune.evaluation.metric import Metric
    from glmtune.evaluation.report import Pair

Part = Literal["zh", "en", "all"]
PARTS: tuple[Part, ...] = ("zh", "en", "all")


class Measure(NamedTuple):
    """What a score says, and how it is written."""

    label: Text
    unit: Text
    """Empty where the number needs none."""
    better: Literal[1, -1, 0] = 1
    """Whether more is better, or less; 0 where neither is."""
    digits: int = 1


POINTS = Text("分", "points")
MEASURES = {
    "chrf": Measure(Text("chrF", "chrF"), POINTS),
    "log_prob": Measure(
        Text("参考答案的对数概率", "Log-probability of the reference"),
        Text("nat/词元", "nats a token"),
        digits=3,
    ),
    "exact": Measure(Text("完全一致", "Exact match"), POINTS),
    "rouge_l": Measure(Text("ROUGE-L", "ROUGE-L"), POINTS),
    "stopped": Measure(Text("自行停止", "Stopped by themselves"), POINTS),
    "repetition": Measure(Text("自我重复", "Repetition"), POINTS, better=-1),
    "language_kept": Measure(Text("语言正确", "Language kept"), POINTS),
    "length": Measure(Text("长度", "Length"), Text("词元", "tokens"), better=0),
}
"""Every score of a record; in points, 0 to 100, unless `unit` says otherwise."""


class Sides(NamedTuple):
    """The scores of one measure, ``(N,)`` each; NaN where a record has none."""

    base: np.ndarray
    tuned: np.ndarray

    def of(self, is_asked_N: np.ndarray) -> "Sides":
        """The scores of some records, of those that have one on both sides."""
        kept_N = is_asked_N & np.isfinite(self.base) & np.isfinite(self.tuned)
        return Sides(self.base[kept_N], self.tuned[kept_N])


@dataclass(frozen=True)
class ScoreTable:
    """The scores of all records."""

    languages: Sequence[Language]
    """The language that each answer should have."""
    has_reference: np.ndarray
    scores: dict[str, Sides]
    measures: dict[str, Measure]
    """What each score is: `MEASURES`, and the user's own."""
    corpus: dict[Part, dict[str, dict[str, float]]]
    """Part -> side -> score over all its answers."""
    has_word_scores: bool = True
    """False where the packages of `word_scores` are missing, and it would have had answers."""

    def is_in(self, part: Part) -> np.ndarray:
        """Which records are of a part, ``(N,)``."""
        return np.array([part in ("all", language) for language in self.languages], dtype=bool)

    def of_rows(self, name: str) -> list[tuple[float | None, float | None]]:
        """The score of each record, base and tuned; None where it has none."""
        base, tuned = (map(_known, of_side.tolist()) for of_side in self.scores[name])
        return list(zip(base, tuned, strict=True))

    def some(self, pairs: Sequence["Pair"], is_kept_N: Sequence[bool]) -> "ScoreTable":
        """The scores of some of the records; those over all their answers are computed anew."""
        languages = list(compress(self.languages, is_kept_N))
        has_reference = self.has_reference[np.array(is_kept_N)]
        corpus, has_words = _corpus(list(compress(pairs, is_kept_N)), languages, has_reference)
        scores = {
            name: Sides(*(of_side[np.array(is_kept_N)] for of_side in sides))
            for name, sides in self.scores.items()
        }
        return ScoreTable(languages, has_reference, scores, self.measures, corpus, has_words)


def _known(score: float) -> float | None:
    return None if math.isnan(score) else score


def score_pairs(pairs: Sequence["Pair"], metrics: Sequence["Metric"] = ()) -> ScoreTable:
    """Score the answers of both sides.

    Args:
        pairs: all records, answered twice.
        metrics: the user's own.

    Raises:
        UserError: one of these raises, or returns no number.
    """
    languages = [language_of_record(pair.question, pair.expected) for pair in pairs]
    names = (*MEASURES, *(metric.name for metric in metrics))
    columns: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in names}
    for pair, language in zip(pairs, languages, strict=True):
        for side, (answer, log_prob) in enumerate(pair.sides):
            found: dict[str, float | None] = {
                **score_text(answer.text, pair.expected, language)._asdict(),
                "log_prob": log_prob,
                "stopped": 100.0 * answer.stopped,
                "length": float(answer.num_tokens),
            }
            found |= {metric.name: metric.score(answer.text, pair) for metric in metrics}
            for name, value in found.items():
                columns[name][side].append(math.nan if value is None else value)
    has_reference = np.array([bool(pair.expected.strip()) for pair in pairs], dtype=bool)
    corpus, has_words = _corpus(pairs, languages, has_reference)
    return ScoreTable(
        languages,
        has_reference,
        {name: Sides(*map(np.array, sides)) for name, sides in columns.items()},
        MEASURES | {metric.name: metric.measure for metric in metrics},
        corpus,
        has_words,
    )


def _corpus(
    pairs: Sequence["Pair"], languages: Sequence[Language], has_reference: np.ndarray
) -> tuple[dict[Part, dict[str, dict[str, float]]], bool]:
    found: dict[Part, dict[str, dict[str, float]]] = {}
    has_words = True
    for part in PARTS:
        chosen = [
            pair
            for pair, language, scored in zip(pairs, languages, has_reference, strict=True)
            if scored and part in ("all", language)
        ]
        if not chosen:
            continue
        found[part] = {}
        references = [pair.expected for pair in chosen]
        for side, name in enumerate(("base", "tuned")):
            of_side = _loss(chosen, side)
            if part != "all":  # a mean of two tokenizers' BLEU would be neither
                answers = [pair.sides[side][0].text for pair in chosen]
                of_side |= corpus_scores(answers, references, part)
                if part == "zh":
                    words = word_scores(answers, references)
                    has_words = has_words and words is not None
                    of_side |= words or {}
            found[part][name] = of_side
    return found, has_words


def _loss(pairs: Sequence["Pair"], side: int) -> dict[str, float]:
    """Loss and perplexity a token of the references."""
    known = [(p.sides[side][1], p.num_reference_tokens) for p in pairs]
    scored = [(log_prob, num) for log_prob, num in known if log_prob and math.isfinite(log_prob)]
    num_tokens = sum(num for _, num in scored)
    if not num_tokens:
        return {}
    loss = -sum(log_prob * num for log_prob, num in scored) / num_tokens
    return {"loss": loss, "perplexity": math.exp(min(loss, 700))}
