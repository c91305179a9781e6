"""The score panel of the demonstration's page, beside the comparison and the loss curve."""

from collections.abc import Mapping
from importlib import resources

from glmtune.evaluation.page import Panel, both
from glmtune.evaluation.report import BASE, TUNED, Text

TITLE = Text("一个微型模型学会了回答问题", "A tiny model learns to answer")
SCORE = Text("答对的比例（逐字一致）", "Right answers, word for word")
LANGUAGE_NAMES = {
    "zh": Text("中文题", "Questions in Chinese"),
    "en": Text("英文题", "Questions in English"),
}


def panel_style() -> str:
    """The CSS of the score."""
    return resources.files(__package__).joinpath("page.css").read_text("utf-8")


def score_panel(base: Mapping[str, tuple[int, int]], tuned: Mapping[str, tuple[int, int]]) -> Panel:
    """Base beside tuned in each language: (right, asked) by language."""
    parts = []
    for language, name in LANGUAGE_NAMES.items():
        rows = "".join(
            f'<dt>{both(label)}</dt><dd class="{css}">{_bar(*count[language])}</dd>'
            for css, label, count in (("of-base", BASE, base), ("of-tuned", TUNED, tuned))
        )
        parts.append(f"<div><h3>{both(name)}</h3><dl>{rows}</dl></div>")
    return Panel(SCORE, f'<div class="scores">{"".join(parts)}</div>')


def _bar(right: int, asked: int) -> str:
    share = right / asked
    return f'<i style="--share: {share:.2%}"></i><b>{share:.1%}</b>'
