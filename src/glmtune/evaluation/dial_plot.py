"""The plot of a dial: gain against price, a point for each scale."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from glmtune.drafts import replacing_file, write_errors
from glmtune.runlog import ACCENT, GONE, INK, LINE, PALE, SOFT

if TYPE_CHECKING:
    from glmtune.evaluation.dial import Dial


def plot(dial: "Dial", path: Path) -> None:
    """Draw a PNG that appears whole: without a price, the gain against the scale.

    Raises:
        UserError: the file cannot be written.
    """
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure(figsize=(8, 4.5), layout=ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.15))
    axes = figure.subplots()
    has_price = all(one.cost for one in dial.settings)
    places, gains = [], []
    for one in dial.settings:
        cost = one.cost.accuracy if one.cost else None
        x = cost.tuned - cost.base if cost else one.scale
        y = float(one.gains[dial.measure].mean())
        places.append(x)
        gains.append(y)
        if gain := one.gain(dial.measure):
            axes.plot([x, x], [gain.low, gain.high], color=PALE, linewidth=2, zorder=1)
        if cost and cost.interval:
            bounds = [cost.interval.low, cost.interval.high]
            axes.plot(bounds, [y, y], color=PALE, linewidth=2, zorder=1)
        is_best = one is dial.recommended
        axes.plot(
            x, y, color=GONE if one.harms else ACCENT, marker="o", zorder=3, linestyle="none",
            markersize=11 if is_best else 6, markeredgecolor=INK if is_best else "none",
        )  # fmt: skip
        text, offset = f"{one.scale:g}", (8, 6)
        if is_best:
            text, offset = f"{one.scale:g}, recommended", (-8, -20)
        axes.annotate(
            text, (x, y), xytext=offset, textcoords="offset points", fontsize=10,
            ha="right" if is_best else "left", color=INK if is_best else SOFT,
        )  # fmt: skip
    axes.plot(places, gains, color=ACCENT, linewidth=1, zorder=2)
    axes.axhline(0, color=LINE, linewidth=1, zorder=0)
    if has_price:
        axes.axvline(0, color=LINE, linewidth=1, zorder=0)
    words = {"log_prob": "log-probability a token", "chrf": "chrF"}[dial.measure]
    axes.set_title(f"Scales of the adapter: gain in {words}", loc="left", fontsize=13, color=INK,
                   pad=14)  # fmt: skip
    axes.set_xlabel(
        "price: change of general questions right, points" if has_price else "scale", color=SOFT
    )
    axes.set_ylabel("gain over the base", color=SOFT)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(LINE)
    axes.tick_params(colors=SOFT, length=0)
    axes.grid(axis="y", color=LINE, linewidth=0.8)
    axes.margins(x=0.12, y=0.12)
    assert np.isfinite(gains).all()
    with write_errors(path), replacing_file(path) as draft:
        figure.savefig(draft, format="png", dpi=160)
