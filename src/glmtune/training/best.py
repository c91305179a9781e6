"""Which evaluation of a run is the best, and whether a run has stopped getting better.

The lowest loss of several is partly luck. So the one-standard-error rule holds (Breiman, Friedman,
Olshen and Stone, Classification and Regression Trees, 1984, 3.4.3): the earliest evaluation counts
whose loss is within one standard error of the lowest. As all are of the same rows, that is the
standard error of the difference within a row. An evaluation that shows a loss of general ability,
the 95 % interval of its change being below 0, counts only where all others show one.

Shapes: N held-out rows, G general questions.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np

from glmtune.drafts import replacing_file, write_errors
from glmtune.errors import UserError
from glmtune.run_files import EVALUATIONS_FILE, checkpoint_name
from glmtune.training.planning.power import (
    CONFIDENCE,
    LEAST_CHANGED,
    LEAST_ROWS,
    standard_error,
)


class Evaluation(NamedTuple):
    """The scores of a run at one step."""

    step: int
    losses_N: np.ndarray
    """Mean loss of each held-out row's supervised tokens, in nats."""
    changes_G: np.ndarray | None = None
    """What each general question's score has changed by since before the run."""

    @property
    def loss(self) -> float:
        """Mean over the rows; each counts alike, however long it is."""
        return float(self.losses_N.mean())

    @property
    def harms(self) -> bool:
        """Whether general ability was lost, as far as the interval shows."""
        if self.changes_G is None or len(self.changes_G) < LEAST_ROWS:
            return False
        if np.count_nonzero(self.changes_G) < LEAST_CHANGED:
            return False
        return float(self.changes_G.mean()) + _Z * standard_error(self.changes_G) < 0


_Z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)


class Candidate(NamedTuple):
    """An evaluation beside the one of the lowest loss."""

    step: int
    loss: float
    behind: float
    """Mean difference of a row's loss from the lowest's."""
    error: float
    """Standard error of that difference."""
    harms: bool

    def as_json(self) -> dict[str, Any]:
        """The figures, by the names of best.json."""
        return {
            "step": self.step,
            "loss": self.loss,
            "behind": self.behind,
            "standard_error": self.error,
            "general_lost": self.harms,
        }


class Best(NamedTuple):
    """The best of several evaluations, and why."""

    step: int
    lowest: int
    """The step of the lowest loss."""
    num_rows: int
    candidates: list[Candidate]

    def reason(self) -> dict[str, str]:
        """Why this one, in Chinese and English."""
        by_step = {one.step: one for one in self.candidates}
        best, lowest, num = by_step[self.step], by_step[self.lowest], len(self.candidates)
        zh = f"留出集损失 {best.loss:.4f}，在 {num} 个检查点中"
        en = f"held-out loss {best.loss:.4f}, of {num} checkpoints "
        if best.step == lowest.step:
            zh, en = f"{zh}最低", f"{en}the lowest"
        else:
            name = checkpoint_name(self.lowest)
            zh += (
                f"最早与最低者（{name}，{lowest.loss:.4f}）相差不到一个标准误："
                f"{best.behind:.4f}，标准误 {best.error:.4f}，共 {self.num_rows} 行"
            )
            en += (
                f"the earliest within one standard error of the lowest, {name}: "
                f"{best.behind:.4f} behind its {lowest.loss:.4f}, standard error {best.error:.4f} "
                f"over {self.num_rows} rows"
            )
        if out := [checkpoint_name(one.step) for one in self.candidates if one.harms > best.harms]:
            zh += f"；{'、'.join(out)} 的通用能力有损失，不予考虑"
            en += f"; without {', '.join(out)}, which lost general ability"
        if best.harms:
            zh, en = f"{zh}；各检查点的通用能力都有损失", f"{en}; all of them lost general ability"
        return {"zh": zh, "en": en}

    def as_json(self) -> dict[str, Any]:
        """The content of best.json."""
        return {
            "checkpoint": checkpoint_name(self.step),
            "step": self.step,
            "lowest": self.lowest,
            "rows": self.num_rows,
            "reason": self.reason(),
            "checkpoints": [one.as_json() for one in self.candidates],
        }


def choose_best(evaluations: Iterable[Evaluation]) -> Best | None:
    """The best evaluation by the rule above; None without any.

    Args:
        evaluations: of the same rows, in the order of their steps.
    """
    every = list(evaluations)
    if not every:
        return None
    least_harm = min(one.harms for one in every)
    lowest = min((one for one in every if one.harms == least_harm), key=lambda one: one.loss)
    candidates = [_beside(one, lowest) for one in every]
    best = next(one for one in candidates if one.harms == least_harm and one.behind <= one.error)
    return Best(best.step, lowest.step, len(lowest.losses_N), candidates)


def _beside(one: Evaluation, lowest: Evaluation) -> Candidate:
    differences_N = one.losses_N - lowest.losses_N
    behind, error = float(differences_N.mean()), standard_error(differences_N)
    return Candidate(one.step, one.loss, behind, error, one.harms)


def why_no_better(evaluations: Sequence[Evaluation], patience: int) -> str | None:
    """Why a run ends early, in a line; None where it goes on.

    Args:
        evaluations: of the run so far.
        patience: how many evaluations may follow the best one.
    """
    best = choose_best(evaluations)
    if best is None:
        return None
    since = [one for one in evaluations if one.step > best.step]
    if len(since) < patience:
        return None
    return (
        f"no evaluation after step {best.step:,} is better by more than one standard error "
        f"({len(since)} since, early_stopping {patience})"
    )


@dataclass
class Evaluations:
    """What a run has found at its evaluations, by their steps.

    Its file holds a line for each: a step with `losses`, or with `general` and `general_set`.
    """

    general_set: str | None = None
    """What tells the general set from another; None without one."""
    losses: dict[int, np.ndarray] = field(default_factory=dict)
    """Mean loss of each held-out row's supervised tokens, in nats: N each."""
    right: dict[int, np.ndarray] = field(default_factory=dict)
    """100 for each general question that is answered rightly, else 0: G each."""
    _told: tuple[tuple[int, ...], str | None] = ((), None)
    """What `why_no_better` last said, and of how many evaluations."""

    def all(self) -> list[Evaluation]:
        """Those of held-out rows, in the order of their steps."""
        first = self.right[min(self.right)] if self.right else None
        return [
            Evaluation(
                step,
                self.losses[step],
                self.right[step] - first if first is not None and step in self.right else None,
            )
            for step in sorted(self.losses)
        ]

    def why_no_better(self, patience: int | None) -> str | None:
        """See the function of that name; asked at every step, it looks again after evaluations."""
        if patience is None:
            return None
        known = patience, len(self.losses), len(self.right)
        if self._told[0] != known:
            self._told = known, why_no_better(self.all(), patience)
        return self._told[1]

    def write(self, folder: Path) -> None:
        """Write them anew. Raises UserError where the file cannot be written."""
        lines = [_line(step, losses=of_rows) for step, of_rows in self.losses.items()]
        lines += [self._line_of_right(step) for step in self.right]
        with write_errors(folder), replacing_file(folder / EVALUATIONS_FILE) as draft:
            draft.write_text("".join(lines), encoding="utf-8")

    def append_losses(self, step: int, folder: Path) -> None:
        """Write the losses of a step. Raises UserError where the file cannot be written."""
        _append(_line(step, losses=self.losses[step]), folder)

    def append_right(self, step: int, folder: Path) -> None:
        """Write what general questions are right at a step; else like `append_losses`."""
        _append(self._line_of_right(step), folder)

    def _line_of_right(self, step: int) -> str:
        return _line(step, general=self.right[step], general_set=self.general_set)

    @classmethod
    def read(
        cls, folder: Path, step: int, num_rows: int, general_set: str | None = None
    ) -> "Evaluations":
        """Those of a run up to a step; what is of other rows or questions is left out.

        Args:
            folder: the run folder.
            step: the last step that counts.
            num_rows: held-out rows.
            general_set: see `Evaluations`.
        """
        found = cls(general_set)
        try:
            lines = (folder / EVALUATIONS_FILE).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError):
            return found
        for line in lines:
            try:
                content = json.loads(line)
                at = int(content["step"])
                losses, right = (
                    np.array(content.get(name, ()), np.float64) for name in ("losses", "general")
                )
            except (ValueError, LookupError, TypeError, AttributeError):
                continue  # a run was killed as it wrote
            if at <= step and len(losses) == num_rows > 0:
                found.losses[at] = losses
            if at <= step and len(right) and content.get("general_set") == general_set:
                found.right[at] = right
        return found


def _line(step: int, **scores: Any) -> str:
    values = {
        name: score.tolist() if isinstance(score, np.ndarray) else score
        for name, score in scores.items()
    }
    return json.dumps({"step": step, **values}) + "\n"


def _append(line: str, folder: Path) -> None:
    with write_errors(folder), open(folder / EVALUATIONS_FILE, "a", encoding="utf-8") as file:
        file.write(line)


def check_patience(early_stopping: int | None, num_rows: int) -> None:
    """Raise UserError where a run shall end early and holds no rows out to tell by."""
    if early_stopping and not num_rows:
        raise UserError(
            f"early_stopping {early_stopping}: no rows are held out to tell by; set eval_ratio 0.05"
        )
