"""Lines in a frame, as SVG that a page can stretch: the text in it keeps its size.

Places are shares of the frame, so that a plot fits a phone and a desktop alike; the labels of its
axes stand outside, in the margin that page.css leaves.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from glmtune.evaluation.document import both, spoken
from glmtune.evaluation.labels import Text


class Line(NamedTuple):
    """A line of a plot."""

    name: Text
    css: str
    """Its CSS class."""
    points: Sequence[tuple[float, float]]
    """At least one."""
    end: str = ""
    """A label at its last point."""


def line_plot(
    lines: Sequence[Line],
    ticks: Sequence[float],
    *,
    name: Text,
    x_name: Text,
    log: bool = False,
    mark: float | None = None,
) -> str:
    """Draw lines.

    Args:
        lines: what is drawn; several get a legend.
        ticks: at least two, in ascending order; the first and the last are the frame's edges.
        name: what a screen reader says.
        x_name: follows the largest x.
        log: the scale of y is logarithmic.
        mark: an x that a vertical line marks.
    """
    first = min(x for line in lines for x, _ in line.points)
    last = max(x for line in lines for x, _ in line.points)
    low, high = (math.log(t) if log else t for t in (ticks[0], ticks[-1]))

    def across(x: float) -> float:
        return (x - first) / (last - first or 1)

    def down(y: float) -> float:
        return 1 - ((math.log(y) if log else y) - low) / (high - low)

    grid = "".join(
        f'<line x2="100%" y1="{down(tick):.2%}" y2="{down(tick):.2%}"/>'
        f'<text class="y" x="-8" y="{down(tick):.2%}" dy=".35em">{tick:g}</text>'
        for tick in ticks
    )
    if mark is not None:
        grid += f'<line class="mark" x1="{across(mark):.2%}" x2="{across(mark):.2%}" y2="100%"/>'
    paths, ends = "", ""
    for line in lines:
        places = [(1000 * across(x), 1000 * down(y)) for x, y in line.points]
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
        paths += f'<path class="{line.css}" d="M{path}"/>'
        if line.end:
            x, y = places[-1]
            ends += (
                f'<text class="end {line.css}" x="{x / 10:.2f}%" y="{y / 10:.2f}%" dy="-.7em">'
                f"{line.end}</text>"
            )
    # The two languages of the axis lie one over the other, and one is shown.
    axis = f'<text class="x first" y="100%" dy="1.5em">{first:g}</text>' + "".join(
        f'<text class="x {css}" x="100%" y="100%" dy="1.5em">{last:,g} {word}</text>'
        for css, word in zip(("zh", "en"), x_name, strict=True)
    )
    shown = [line for line in lines if line.name.en]
    legend = "".join(f'<span class="{line.css}">{both(line.name)}</span>' for line in shown)
    return f"""<svg class="plot" role="img" {spoken(name)}>{grid}
<svg viewBox="0 0 1000 1000" preserveAspectRatio="none" width="100%" height="100%">{paths}</svg>
{ends}{axis}</svg>{f'<p class="legend">{legend}</p>' if len(shown) > 1 else ""}"""


def linear_ticks(lowest: float, highest: float) -> list[float]:
    """Round numbers, four or so, around two numbers."""
    raw = (highest - lowest or abs(highest) or 1) / 4
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * n for n in (1, 2, 5, 10) if power * n >= raw)
    bounds = math.floor(lowest / step + 1e-9), math.ceil(highest / step - 1e-9)
    return [round(step * n, 10) for n in range(bounds[0], max(bounds[1], bounds[0] + 1) + 1)]
