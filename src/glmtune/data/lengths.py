"""Token lengths of rows: four numbers for a summary, and a histogram."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from glmtune.runlog import ACCENT, GONE, INK, LINE, SOFT

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, slots=True)
class LengthStats:
    """Token counts of rows; each is the length of an actual row (nearest rank)."""

    min: int
    median: int
    p95: int
    max: int

    @classmethod
    def of(cls, lengths: Sequence[int] | np.ndarray) -> "LengthStats":
        """Sum up at least one length."""
        ranks = np.percentile(np.asarray(lengths), [0, 50, 95, 100], method="nearest")
        return cls(*map(int, ranks))

    def __str__(self) -> str:
        return f"min {self.min}, median {self.median}, 95 % {self.p95}, max {self.max}"


_MAX_BARS = 70


def plot_lengths(
    path: Path,
    *,
    kept: Sequence[int] | np.ndarray,
    dropped: Sequence[int] | np.ndarray,
    max_seq_length: int,
) -> None:
    """Draw a PNG histogram of the tokens in a row: kept rows, on top those dropped as too long.

    Dropped rows longer than twice max_seq_length are counted in the last bar.
    """
    _draw(kept, dropped, max_seq_length).savefig(path)


def _draw(
    kept: Sequence[int] | np.ndarray, dropped: Sequence[int] | np.ndarray, max_seq_length: int
) -> "Figure":
    from matplotlib.figure import Figure  # without pyplot: no window, no global state
    from matplotlib.ticker import MaxNLocator

    stats = LengthStats.of(np.concatenate([kept, dropped]))
    last = max(int(np.max(kept)), *np.minimum(dropped, 2 * max_seq_length), 1)
    marks = [("half of the rows within", stats.median), ("95 % of the rows within", stats.p95)]
    if max_seq_length <= 1.5 * last:  # a limit far beyond every row would squeeze the bars
        marks.append(("max_seq_length", max_seq_length))
        last = max(last, max_seq_length)
    width = -(-last // _MAX_BARS)
    # max_seq_length ends a bar, so that no bar mixes rows within and beyond it.
    first_edge = max_seq_length % width - width + 0.5
    edges = np.arange(first_edge, last + width + 0.5, width)

    figure = Figure(figsize=(8, 4.2), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    series = [(kept, ACCENT, f"kept: {len(kept):,} rows")]
    if len(dropped):
        label = f"dropped, longer than {max_seq_length}: {len(dropped):,} rows"
        series.append((np.minimum(dropped, last), GONE, label))
    lengths, colors, labels = zip(*series, strict=True)
    axes.hist(lengths, bins=edges.tolist(), stacked=True, color=colors, label=labels, rwidth=0.88)
    axes.set_xlim(edges[0], edges[-1])
    axes.set_ylim(top=axes.get_ylim()[1] * 1.2)

    for rank, (name, at) in enumerate(marks):
        shown = min(at, last) + 0.5
        axes.axvline(shown, color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
        side = -1 if at > 0.75 * last else 1
        axes.annotate(
            f"{name} {at}",
            xy=(shown, 1),
            xycoords=("data", "axes fraction"),
            xytext=(4 * side, -4 - 14 * rank),
            textcoords="offset points",
            ha="left" if side > 0 else "right",
            va="top",
            fontsize=9,
            color=INK,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
        )
    beyond = f" (last bar: {last} and more)" if max(dropped, default=0) > last else ""
    axes.set_title("Length of rows", loc="left", fontsize=13, color=INK)
    axes.set_xlabel(f"tokens in a row: prompt, answer and its end{beyond}", color=SOFT)
    axes.set_ylabel(f"rows per {width} tokens" if width > 1 else "rows", color=SOFT)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.grid(axis="y", color=LINE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(LINE)
    axes.tick_params(colors=SOFT, length=0)
    axes.legend(
        frameon=False, labelcolor=SOFT, loc="lower right", bbox_to_anchor=(1, 1), ncols=2,
        borderaxespad=0.2,
    )  # fmt: skip
    return figure
