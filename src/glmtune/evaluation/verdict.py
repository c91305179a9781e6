"""Better, worse, or undecided: the verdict on an adapter, from the scores of both sides.

The answers decide, by chrF. Where they do not differ enough, the log-probability of the references
does, which shows smaller effects because nothing is sampled. It has to change by a least amount
besides: two trainings that differ in their seed alone differ by something, and an interval over
rows knows nothing of seeds (benchmarks/2026-11-29-verdict-seeds.md).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from glmtune.evaluation.intervals import Interval, intervals
from glmtune.evaluation.labels import Text
from glmtune.evaluation.scores import PARTS, Measure, Part, ScoreTable, Sides
from glmtune.training.planning.power import LEAST_ROWS, smallest_difference

Verdict = Literal["better", "worse", "undecided"]
JUDGES = ("chrf", "log_prob")
LEAST_CHANGE = {"log_prob": 0.02}
"""Smallest mean change that counts, by measure; 0 for the others."""
VERDICTS: dict[Verdict, Text] = {
    "better": Text("更好", "Better"),
    "worse": Text("更差", "Worse"),
    "undecided": Text("行数太少，无法判断", "Not to be told with so few rows"),
}
TIE = 1e-9


@dataclass(frozen=True)
class Compared:
    """One measure of both sides over some rows."""

    num_rows: int
    base: float
    tuned: float
    interval: Interval | None
    """The difference's; None with fewer rows than a verdict takes."""
    deviation: float
    """Standard deviation of a row's difference; 0 where there is no interval."""

    @classmethod
    def of(cls, sides: Sides, interval: Interval | None) -> "Compared":
        """Compare the scores of at least one row."""
        differences = sides.tuned - sides.base
        deviation = float(differences.std(ddof=1)) if interval else 0.0
        means = float(sides.base.mean()), float(sides.tuned.mean())
        return cls(len(differences), *means, interval, deviation)

    def verdict(self, name: str, measure: Measure) -> Verdict:
        """What this measure alone says."""
        interval = self.interval
        if interval is None or not measure.better:
            return "undecided"
        if abs(interval.mean) < LEAST_CHANGE.get(name, 0.0):
            return "undecided"
        sign = interval.sign * measure.better
        return "better" if sign > 0 else "worse" if sign < 0 else "undecided"

    def as_json(self) -> dict[str, float | int | None]:
        """The figures, by the names of compare.json."""
        mean, low, high = (
            self.interval[:3] if self.interval else (self.tuned - self.base, None, None)
        )
        sides = {"base": self.base, "tuned": self.tuned}
        return sides | {"difference": mean, "low": low, "high": high, "n": self.num_rows}


@dataclass(frozen=True)
class PartVerdict:
    """The verdict on the rows of one language, or on all."""

    part: Part
    num_rows: int
    """Rows with a reference."""
    compared: dict[str, Compared]
    measures: Mapping[str, Measure]
    wins: int
    ties: int
    losses: int
    corpus: Mapping[str, Mapping[str, float]]

    @property
    def judge(self) -> str | None:
        """The measure that decides; None where none does."""
        of = {n: c.verdict(n, self.measures[n]) for n, c in self.compared.items()}
        return next((name for name in JUDGES if of.get(name, "undecided") != "undecided"), None)

    @property
    def verdict(self) -> Verdict:
        """Better, worse or undecided."""
        return self.verdict_of(self.judge) if self.judge else "undecided"

    def verdict_of(self, name: str) -> Verdict:
        """What one measure says; undecided where no row has it."""
        found = self.compared.get(name)
        return found.verdict(name, self.measures[name]) if found else "undecided"

    @property
    def smallest_difference(self) -> float | None:
        """The smallest difference in chrF that these rows show, by how much theirs vary."""
        found = self.compared.get("chrf")
        if found is None or not found.interval:
            return None
        return smallest_difference(found.num_rows, found.deviation)

    def as_json(self) -> dict[str, object]:
        """The part's entry in compare.json."""
        return {
            "n": self.num_rows,
            "verdict": self.verdict,
            "judged_by": self.judge,
            "smallest_difference": self.smallest_difference,
            "wins": self.wins,
            "ties": self.ties,
            "losses": self.losses,
            "metrics": {name: found.as_json() for name, found in self.compared.items()},
            "corpus": self.corpus,
        }

    @property
    def sentence(self) -> Text:
        """The verdict in a sentence."""
        if self.num_rows < LEAST_ROWS:
            return Text(
                f"不作结论：只有 {self.num_rows} 行带参考答案，至少需要 {LEAST_ROWS} 行。",
                f"No verdict: {self.num_rows} rows have a reference, and {LEAST_ROWS} are the "
                "least.",
            )
        word = VERDICTS[self.verdict]
        name = self.judge or "chrf"
        found, measure = self.compared[name], self.measures[name]
        interval = found.interval
        assert interval is not None, "with LEAST_ROWS rows there is one"
        low, high = (signed(bound, measure.digits) for bound in (interval.low, interval.high))
        change = signed(interval.mean, measure.digits)
        zh = (
            f"{word.zh}：{found.num_rows} 行上{measure.label.zh}变化 {change} {measure.unit.zh}"
            f"（95% 区间 {low} 至 {high}）"
        )
        en = (
            f"{word.en}: over {found.num_rows} rows {measure.label.en} changes by {change} "
            f"{measure.unit.en} (95 % interval {low} to {high})"
        )
        if self.judge is None:
            least = f"{self.smallest_difference or 0:.1f}"
            return Text(
                f"{zh}；这些行能看出的最小差别是 {least} 分。",
                f"{en}; these rows show {least} points or more.",
            )
        return Text(
            f"{zh}；{self.wins} 行变好，{self.ties} 行持平，{self.losses} 行变差。",
            f"{en}; {self.wins} rows won, {self.ties} tied, {self.losses} lost.",
        )


def signed(value: float, digits: int) -> str:
    """A difference with its sign."""
    return f"{value:+.{digits}f}".replace("-", "\u2212")


def judge(table: ScoreTable) -> dict[Part, PartVerdict]:
    """The verdicts on Chinese, English and all rows."""
    return {part: _judge_part(table, part) for part in PARTS}


def _judge_part(table: ScoreTable, part: Part) -> PartVerdict:
    is_in_N = table.is_in(part)
    chosen = {name: sides.of(is_in_N) for name, sides in table.scores.items()}
    chosen = {name: sides for name, sides in chosen.items() if len(sides.base)}
    found = intervals_of(chosen)
    compared = {name: Compared.of(sides, found.get(name)) for name, sides in chosen.items()}
    gains = chosen["chrf"].tuned - chosen["chrf"].base if "chrf" in chosen else np.zeros(0)
    return PartVerdict(
        part,
        int((is_in_N & table.has_reference).sum()),
        compared,
        table.measures,
        wins=int((gains > TIE).sum()),
        ties=int((abs(gains) <= TIE).sum()),
        losses=int((gains < -TIE).sum()),
        corpus=table.corpus.get(part, {}),
    )


def intervals_of(chosen: Mapping[str, Sides]) -> dict[str, Interval]:
    """The interval of each measure that has enough rows; those of equal rows from equal draws."""
    by_size: dict[int, list[str]] = {}
    for name, sides in chosen.items():
        if len(sides.base) >= LEAST_ROWS:
            by_size.setdefault(len(sides.base), []).append(name)
    found: dict[str, Interval] = {}
    for names in by_size.values():
        differences_NM = np.stack([chosen[n].tuned - chosen[n].base for n in names], axis=1)
        found |= dict(zip(names, intervals(differences_NM), strict=True))
    return found
