"""The curve of a run's loss, for a page."""

import math
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

from glmtune.evaluation.page import Panel, both
from glmtune.evaluation.report import Text
from glmtune.runlog import smooth

LOSS = Text("训练损失（对数刻度）", "Training loss (log scale)")
STEPS = Text("步", "steps")


def loss_style() -> str:
    """The CSS of the curve."""
    return resources.files(__package__).joinpath("loss.css").read_text("utf-8")


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
