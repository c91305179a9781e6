"""What replay saved: general questions after a run with it, and after a run without."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glmtune.config.settings import CompareSettings
from glmtune.errors import UserError
from glmtune.evaluation.answers import ModelChoice
from glmtune.evaluation.general import BothScores, GeneralFile
from glmtune.evaluation.labels import Text
from glmtune.evaluation.price import Price
from glmtune.evaluation.run_facts import RunFacts
from glmtune.evaluation.verdict import signed
from glmtune.general.items import GeneralSet

SAVED = Text("混入通用数据后保住了多少", "What replay saved")
WITHOUT, WITH = Text("不混入", "without replay"), Text("混入", "with replay")
_WORDS = {
    -1: Text("混入后损失更多", "more was lost with replay"),
    0: Text("看不出差别", "no difference is seen"),
    1: Text("混入后损失更少", "less was lost with replay"),
}


@dataclass(frozen=True)
class Saved:
    """The general scores of two runs: `before` without replay, `after` with it."""

    price: Price
    other: str
    """The name of the run without."""

    @property
    def sentence(self) -> Text:
        """The difference over all questions, in one line."""
        found = self.price.parts["all"].accuracy
        num, without, with_ = found.num_rows, f"{found.base:.1f}", f"{found.tuned:.1f}"
        zh = f"{num} 道通用题：不混入通用数据（{self.other}）答对 {without}%，混入后 {with_}%"
        en = f"Of {num} general questions the run without replay ({self.other}) has {without} % "
        en += f"right and this one {with_} %"
        if found.interval is None:
            return Text(f"{zh}（题目太少，没有区间）。", f"{en} (too few for an interval).")
        change, low, high = (signed(value, 1) for value in found.interval[:3])
        word = _WORDS[found.interval.sign]
        zh += f"，相差 {change} 个百分点（95% 区间 {low} 至 {high}）：{word.zh}。"
        en += f", {change} points (95 % interval {low} to {high}): {word.en}."
        return Text(zh, en)

    def as_json(self) -> dict[str, Any]:
        """The content of `replay_saved` in compare.json."""
        names = {"before": "without", "after": "with"}
        parts: dict[str, Any] = {
            part: {names.get(name, name): value for name, value in of.items() if name != "log_prob"}
            for part, of in self.price.as_json().items()
        }
        return {"without_replay": self.other, **parts}


def find_run_without(
    settings: CompareSettings,
    subject: ModelChoice,
    identity: Mapping[str, Any],
    general: GeneralSet,
) -> tuple[str, BothScores]:
    """The name of the run without replay, and its scores from the comparison beside it.

    Args:
        settings: which name that run.
        subject: the model that is compared.
        identity: what distinguishes it, see `ModelChoice.identity`.
        general: the questions.

    Raises:
        UserError: it cannot be read, is the same adapter or of another base, has not been compared
            on these questions, or the rows of one of the two are not what its place says.
    """
    name = str(settings.without_replay)
    where = f"without_replay {name}"
    other = ModelChoice.of(settings.model_copy(update={"adapter": name}))
    assert subject.adapter is not None
    assert other.adapter is not None
    if other.base != subject.base:
        raise UserError(
            f"{where}: is of the base {other.base}, and adapter {settings.adapter} of "
            f"{subject.base}; name a run of the same base"
        )
    of_other = other.identity()
    if of_other["adapter_sha256"] == identity["adapter_sha256"]:
        raise UserError(f"{where}: is the adapter that is compared; name the run without replay")
    has_replay = {path: _has_replay(path) for path in (other.adapter, subject.adapter)}
    if has_replay[other.adapter]:
        raise UserError(f"{where}: its rows have replay among them; name a run without")
    if has_replay[subject.adapter] is False:
        raise UserError(
            f"adapter {settings.adapter}: its rows have no replay among them, so nothing was "
            "saved by it; leave without_replay out"
        )
    folder = Path(name, "compare")
    scores = GeneralFile(folder, general, of_other, overwrite=False).scores
    if scores is None:
        raise UserError(
            f"{where}: has no scores of these {len(general.items):,} general questions in "
            f"{folder}; run glmtune compare --adapter {name} first, with the same base and "
            "general_set"
        )
    return str(other.adapter_name), scores


def _has_replay(adapter: Path) -> bool | None:
    """Whether general rows were mixed into an adapter's; None where that is not known."""
    facts = RunFacts.of(adapter)
    if facts is None or facts.card is None:
        return None
    return any(one.is_replay for one in facts.card.sets)
