"""What the demonstration's page has beyond a comparison's: the score and the curve of the loss."""

import math
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

from glmtune.evaluation.page import Panel, both
from glmtune.evaluation.report import BASE, TUNED, Text
from glmtune.runlog import smooth

TITLE = Text("一个微型模型学会了回答问题", "A tiny model learns to answer")
SCORE = Text("答对的比例（逐字一致）", "Right answers, word for word")
LOSS = Text("训练损失（对数刻度）", "Training loss (log scale)")
STEPS = Text("步", "steps")
LANGUAGE_NAMES = {
    "zh": Text("中文题", "Questions in Chinese"),
    "en": Text("英文题", "Questions in English"),
}


def panel_style() -> str:
    """The CSS of both panels."""
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


def loss_panel(history: Sequence[Mapping[str, Any]]) -> Panel:
    """The curve of the loss, raw and smoothed, as it stands in a run's log history."""
    steps = [record["step"] for record in history if record.get("loss")]
    losses = [record["loss"] for record in history if record.get("loss")]
    smoothed = smooth(losses, width=max(1, len(losses) / 40))
    top = math.ceil(_third(max(losses)))
    bottom = math.floor(_third(min(losses)))

    def height(loss: float) -> float:
        return 100 * (_third(loss) - bottom) / max(1, top - bottom)

    def path(values: Sequence[float]) -> str:
        first, last = steps[0], max(steps[-1], steps[0] + 1)
        points = (
            f"{1000 * (step - first) / (last - first):.1f} {1000 - 10 * height(value):.1f}"
            for step, value in zip(steps, values, strict=True)
        )
        return "M" + "L".join(points)

    grid = "".join(
        f'<hr style="bottom: {height(_tick(i)):.2f}%">'
        f'<span class="y" style="bottom: {height(_tick(i)):.2f}%">{_tick(i):g}</span>'
        for i in range(bottom, top + 1)
    )
    end = f"{smoothed[-1]:.3f}"
    body = f"""<div class="plot" role="img" aria-label="{LOSS}: {losses[0]:.3f} … {end}">{grid}
<svg viewBox="0 0 1000 1000" preserveAspectRatio="none" aria-hidden="true">
<path class="raw" d="{path(losses)}"/><path class="smooth" d="{path(smoothed)}"/></svg>
<span class="x" style="left: 0">{steps[0]}</span>
<span class="x last" style="left: 100%">{steps[-1]:,} {both(STEPS)}</span>
<span class="end" style="bottom: {height(smoothed[-1]):.2f}%">{end}</span></div>"""
    return Panel(LOSS, body)


# Ticks at 1, 3, 10, 30, ...: two a decade, nearly evenly far apart.
def _third(loss: float) -> float:
    return 2 * math.log10(loss)


def _tick(i: int) -> float:
    return 10.0 ** (i // 2) * (3 if i % 2 else 1)
