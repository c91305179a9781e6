"""The score panel of the demonstration's page, beside what every comparison shows."""

from collections.abc import Mapping

from glmtune.evaluation.bars import QUESTIONS, Change
from glmtune.evaluation.document import Panel
from glmtune.evaluation.labels import Text
from glmtune.evaluation.score_tables import PART_NAMES

TITLE = Text("一个微型模型学会了回答问题", "A tiny model learns to answer")
SCORE = Text("答对的比例（逐字一致，%）", "Right answers, word for word, %")


def score_panel(base: Mapping[str, tuple[int, int]], tuned: Mapping[str, tuple[int, int]]) -> Panel:
    """Base beside tuned in each language: (right, asked) by language."""
    changes = (
        Change(name, base[part][1], _percent(base[part]), _percent(tuned[part]), what=QUESTIONS)
        for part, name in PART_NAMES.items()
        if part != "all"
    )
    return Panel(SCORE, "".join(change.html for change in changes))


def _percent(count: tuple[int, int]) -> float:
    right, asked = count
    return 100 * right / asked
