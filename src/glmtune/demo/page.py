"""What the demonstration's page has beyond a comparison's: the score and the curve of the loss."""

import math
from collections.abc import Mapping, Sequence
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

SCORE_STYLE = """
.scores { display: grid; gap: 1.1rem; margin-top: .9rem; }
.scores h3 { font-size: .85rem; font-weight: 400; color: var(--soft); margin-bottom: .3rem; }
.scores dl { display: grid; grid-template-columns: max-content 1fr 4.6rem; gap: .35rem .8rem;
  align-items: center; margin: 0; font-size: .88rem; }
.scores dd { display: contents; }
.scores b { text-align: right; font-size: 1.15rem; font-weight: 600; }
.scores i { height: .85rem; border-radius: 99px; background: var(--line); overflow: hidden; }
.scores i::before { content: ""; display: block; height: 100%; width: var(--share);
  border-radius: 99px; background: var(--soft); }
.scores .of-tuned b { color: var(--accent); }
.scores .of-tuned i::before { background: var(--accent); }
"""
LOSS_STYLE = """
.plot { position: relative; height: 12.5rem; margin: 1rem 0 1.5rem 2.2rem; font-size: .75rem;
  color: var(--soft); }
.plot svg { position: absolute; inset: 0; width: 100%; height: 100%; overflow: visible; }
.plot path { fill: none; vector-effect: non-scaling-stroke; stroke-linejoin: round;
  stroke-linecap: round; stroke: var(--accent); }
.plot .raw { stroke-width: 1.2; opacity: .35; }
.plot .smooth { stroke-width: 2.5; }
.plot hr { position: absolute; inset-inline: 0; margin: 0; border: 0;
  border-top: 1px solid var(--line); }
.plot .y { position: absolute; right: 100%; margin-right: .6rem; transform: translateY(50%); }
.plot .x { position: absolute; top: 100%; margin-top: .4rem; transform: translateX(-50%);
  white-space: nowrap; }
.plot .x.last { transform: translateX(-100%); }
.plot .x:first-of-type { transform: none; }
.plot .end { position: absolute; right: 0; transform: translateY(-.3rem); font-weight: 600;
  font-size: .85rem; color: var(--accent);
  text-shadow: 0 0 .25rem var(--card), 0 0 .25rem var(--card), 0 0 .25rem var(--card); }
"""


def score_panel(base: Mapping[str, tuple[int, int]], tuned: Mapping[str, tuple[int, int]]) -> Panel:
    """Base beside tuned in each language: (right, asked) by language."""
    parts = []
    for language, name in LANGUAGE_NAMES.items():
        rows = "".join(
            f'<dt>{both(label)}</dt><dd class="{css}">{_bar(*count[language])}</dd>'
            for css, label, count in (("of-base", BASE, base), ("of-tuned", TUNED, tuned))
        )
        parts.append(f"<div><h3>{both(name)}</h3><dl>{rows}</dl></div>")
    return Panel(SCORE, f'<div class="scores">{"".join(parts)}</div>', SCORE_STYLE)


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
    return Panel(LOSS, body, LOSS_STYLE)


# Ticks at 1, 3, 10, 30, ...: two a decade, nearly evenly far apart.
def _third(loss: float) -> float:
    return 2 * math.log10(loss)


def _tick(i: int) -> float:
    return 10.0 ** (i // 2) * (3 if i % 2 else 1)
