"""`--gate better|not_worse[:METRIC]`: a verdict as an exit code, for scripts."""

from collections.abc import Sequence
from typing import NamedTuple

from glmtune.errors import UserError
from glmtune.evaluation.metric import Metric
from glmtune.evaluation.scores import MEASURES
from glmtune.evaluation.verdict import PartVerdict
from glmtune.training.planning.power import LEAST_ROWS


class Gate(NamedTuple):
    """What has to hold on all rows."""

    spec: str
    """The text of the flag, see `CompareSettings.know_gate`."""

    @classmethod
    def of(cls, spec: str | None, metrics: Sequence[Metric]) -> "Gate | None":
        """The gate of a command; None without one.

        Raises:
            UserError: it names no score, or one of which neither more nor less is better.
        """
        if spec is None:
            return None
        gate, directions = cls(spec), {name: of.better for name, of in MEASURES.items()}
        directions |= {metric.name: metric.measure.better for metric in metrics}
        if gate.metric is not None and not directions.get(gate.metric):
            known = ", ".join(name for name, better in directions.items() if better)
            raise UserError(f"gate {spec}: no score to judge by; there are {known}")
        return gate

    @property
    def metric(self) -> str | None:
        """The score that it names."""
        return self.spec.partition(":")[2] or None

    def check_rows(self, num_scored: int) -> None:
        """Make sure that there can be a verdict, before a model is loaded.

        Raises:
            UserError: there are too few rows.
        """
        if num_scored < LEAST_ROWS:
            raise UserError(
                f"gate {self.spec}: {num_scored} rows have an output to compare with, and a "
                f"verdict takes {LEAST_ROWS}; ask more rows, or leave gate out"
            )

    def is_passed(self, found: PartVerdict) -> bool:
        """Whether a verdict is good enough."""
        verdict = found.verdict_of(self.metric) if self.metric else found.verdict
        return verdict == "better" if self.spec.startswith("better") else verdict != "worse"
