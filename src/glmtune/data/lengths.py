"""Token lengths of rows: four numbers for a summary, and a histogram."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True, slots=True)
class LengthStats:
    """Token counts of rows; each is the length of a row that exists (nearest rank)."""

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


_KEPT, _DROPPED, _INK, _FAINT = "#3a6ea5", "#e6b07a", "#333333", "#dddddd"
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
    from matplotlib.figure import Figure  # without pyplot: no window, no global state
    from matplotlib.ticker import MaxNLocator

    stats = LengthStats.of(kept)
    last = max(stats.max, *np.minimum(dropped, 2 * max_seq_length), 1)
    marks = [("median", stats.median), ("95 %", stats.p95)]
    if max_seq_length <= 1.5 * last:  # a limit far beyond every row would only press the bars
        marks.append(("max_seq_length", max_seq_length))
        last = max(last, max_seq_length)
    width = -(-last // _MAX_BARS)
    # max_seq_length ends a bar, so that no bar mixes rows within it and rows beyond.
    first_edge = max_seq_length % width - width + 0.5
    edges = np.arange(first_edge, last + width + 0.5, width)

    figure = Figure(figsize=(8, 4.2), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    series = [(kept, _KEPT, f"kept: {len(kept):,} rows")]
    if len(dropped):
        label = f"dropped, longer than {max_seq_length}: {len(dropped):,} rows"
        series.append((np.minimum(dropped, last), _DROPPED, label))
    lengths, colors, labels = zip(*series, strict=True)
    axes.hist(lengths, bins=edges.tolist(), stacked=True, color=colors, label=labels, rwidth=0.88)
    axes.set_xlim(edges[0], edges[-1])
    axes.set_ylim(top=axes.get_ylim()[1] * 1.2)

    for rank, (name, at) in enumerate(marks):
        axes.axvline(at + 0.5, color=_INK, linewidth=0.8, linestyle=(0, (4, 3)))
        side = -1 if at > 0.75 * last else 1
        axes.annotate(
            f"{name} {at}",
            xy=(at + 0.5, 1),
            xycoords=("data", "axes fraction"),
            xytext=(4 * side, -4 - 14 * rank),
            textcoords="offset points",
            ha="left" if side > 0 else "right",
            va="top",
            fontsize=9,
            color=_INK,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
        )
    beyond = f" (last bar: {last} and more)" if max(dropped, default=0) > last else ""
    axes.set_xlabel(f"tokens in a row: prompt, answer and its end{beyond}")
    axes.set_ylabel(f"rows per {width} tokens" if width > 1 else "rows")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.grid(axis="y", color=_FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(length=0)
    axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderpad=0)
    figure.savefig(path)
