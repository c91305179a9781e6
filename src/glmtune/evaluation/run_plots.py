"""What a run logged over its steps, as plots for a page."""

from collections.abc import Mapping, Sequence
from typing import Any

from glmtune.evaluation.document import Panel
from glmtune.evaluation.labels import Text
from glmtune.evaluation.line_plot import Line, line_plot, linear_ticks
from glmtune.runlog import log_ticks, series, smooth

LOSS = Text("训练损失（对数刻度）", "Training loss (log scale)")
STEPS = Text("步", "steps")
SMOOTHED = Text("训练", "Training")
HELD_OUT = Text("留出数据", "Rows held out")
NOTHING = Text("", "")
GENERAL = Text("通用题的正确率（%），随训练步数", "General questions right, %, over the steps")
GENERAL_LINES = {
    "general_zh": (Text("中文", "Chinese"), "smooth"),
    "general_en": (Text("英文", "English"), "other"),
}
GENERAL_ALL = (Text("全部", "All"), "smooth")


def loss_panel(history: Sequence[Mapping[str, Any]]) -> Panel | None:
    """The loss, raw and smoothed, and of rows held out, as a run logged them; None without any."""
    loss = [(step, value) for step, value in series(history, "loss") if value > 0]
    held_out = [(step, value) for step, value in series(history, "eval_loss") if value > 0]
    if not loss:
        return None
    values = [value for _, value in loss]
    smoothed = smooth(values, width=max(1, len(values) / 40))
    lines = [
        Line(NOTHING, "raw", loss),
        Line(
            SMOOTHED,
            "smooth",
            [(step, value) for (step, _), value in zip(loss, smoothed, strict=True)],
            f"{smoothed[-1]:.3f}",
        ),
    ]
    if held_out:
        lines.append(Line(HELD_OUT, "other", held_out, f"{held_out[-1][1]:.3f}"))
    everything = [value for line in lines for _, value in line.points]
    ticks = log_ticks(min(everything), max(everything))
    ends = Text(*(f"{text}: {values[0]:.3f} … {smoothed[-1]:.3f}" for text in LOSS))
    return Panel(LOSS, line_plot(lines, ticks, name=ends, x_name=STEPS, log=True))


def general_panel(history: Sequence[Mapping[str, Any]]) -> Panel | None:
    """The share of general questions that were right, as a run logged it; None without any."""
    found = {key: series(history, key) for key in GENERAL_LINES}
    lines = [
        Line(*GENERAL_LINES[key], points, f"{points[-1][1]:.0f}")
        for key, points in found.items()
        if points
    ]
    if not lines and (points := series(history, "general")):
        lines = [Line(*GENERAL_ALL, points, f"{points[-1][1]:.0f}")]
    if not lines:
        return None
    everything = [value for line in lines for _, value in line.points]
    ticks = linear_ticks(min(everything), max(everything))
    return Panel(GENERAL, line_plot(lines, ticks, name=GENERAL, x_name=STEPS))
