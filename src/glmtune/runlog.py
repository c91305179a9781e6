"""What a run reports while it runs, and the log files in its folder.

A record is a dictionary of numbers at a step. Each goes to `metrics.jsonl` (a line), TensorBoard
(under `runs/`), the terminal, and `history`, which `trainer_state.json` keeps as `log_history`.
"""

import json
import math
import sys
import time
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from glmtune.drafts import replacing_file, write_errors
from glmtune.run_files import METRICS_FILE, TENSORBOARD_FOLDER

Record = dict[str, Any]

_SECONDS_OF_SILENCE = 300
_BAR_FORMAT = "{percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt} [{elapsed} < {remaining}{postfix}]"
# With fewer readings than this a curve is not smoothed.
_SMOOTHED_FROM = 20
# Colours and names of evaluation/page.css; PALE is the accent as faint as the page's raw curves.
ACCENT, PALE, INK = "#0b6b5d", "#aacbc6", "#1d2126"
SOFT, LINE, GONE = "#5f666e", "#e2e2dc", "#b23c2a"


class RunLog:
    """Writes a run's records; used in a `with`, which closes the files and the bar.

    Args:
        output_dir: the run folder, which exists.
        max_steps: steps of the whole run.
        report_to: "tensorboard" or "all" writes TensorBoard events, "none" does not.
        disable_tqdm: plain lines instead of a progress bar, as when stderr is no terminal.
        first_step: steps done before; newer records are dropped from `history`.
        history: the records of those steps.
        enabled: false in all processes but the first, where nothing is written or shown.
    """

    def __init__(
        self,
        output_dir: str | Path,
        max_steps: int,
        *,
        report_to: str = "tensorboard",
        disable_tqdm: bool = False,
        first_step: int = 0,
        history: Sequence[Record] = (),
        enabled: bool = True,
    ):
        self.history: list[Record] = [dict(r) for r in history if r["step"] <= first_step]
        self.max_steps = max_steps
        self.enabled = enabled
        self._started = time.monotonic()
        self._first_step = first_step
        self._general = ""
        self._writer = None
        self._file = None
        self._bar = None
        if not enabled:
            return
        self._path = Path(output_dir) / METRICS_FILE
        with write_errors(self._path):
            self._file = _rewrite_metrics(self._path, self.history)
        if report_to in ("tensorboard", "all"):
            from torch.utils.tensorboard import SummaryWriter

            # TensorBoard hides what an earlier run wrote from purge_step on.
            folder = str(Path(output_dir) / TENSORBOARD_FOLDER)
            self._writer = SummaryWriter(folder, purge_step=first_step + 1 if first_step else None)
        if not disable_tqdm and sys.stderr.isatty():
            self._bar = tqdm(
                total=max_steps,
                initial=first_step,
                bar_format=_BAR_FORMAT,
                dynamic_ncols=True,
                file=sys.stderr,
            )

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *_) -> None:
        for part in (self._bar, self._file, self._writer):
            if part is not None:
                with write_errors(self._path):
                    part.close()

    def advance(self) -> None:
        """Advance the bar by a step, without waiting for the device."""
        if self._bar is not None:
            self._bar.update()

    def log(self, step: int, record: Mapping[str, float | str]) -> None:
        """Write a record everywhere; its texts, which name something, to the files alone.

        A number that is not finite becomes null, as JSON requires.

        Raises:
            UserError: a file cannot be written.
        """
        entry: Record = {
            key: value if isinstance(value, str) or math.isfinite(value) else None
            for key, value in record.items()
        }
        entry["step"] = step
        self.history.append(entry)
        if not self.enabled:
            return
        assert self._file is not None
        with write_errors(self._path):
            self._file.write(json.dumps(entry) + "\n")
            self._file.flush()
            if self._writer is not None:
                for key, value in record.items():
                    if not isinstance(value, str):
                        self._writer.add_scalar(_tag(key), value, step)
        self._show(step, entry)

    def _show(self, step: int, entry: Record) -> None:
        words = ", ".join(_word(key, value) for key, value in entry.items() if key in _WORDS)
        if step == self._first_step:
            self._started = time.monotonic()  # what was before the first step is none of it
        if "general" in entry:
            self._general = f", {_word('general', entry['general'])}"
        if self._bar is None:
            left = ""
            if step > self._first_step:
                left = f", {format_seconds(self._seconds_left(step))} left"
            print(f"step {step:,}/{self.max_steps:,}: {words}{left}", flush=True)
        elif "loss" in entry:
            self._bar.set_postfix_str(words + self._general, refresh=False)
        else:
            self._bar.write(f"step {step:,}: {words}")

    def _seconds_left(self, step: int) -> float:
        seconds_a_step = (time.monotonic() - self._started) / max(1, step - self._first_step)
        return seconds_a_step * (self.max_steps - step)

    def plot_loss(self, path: str | Path) -> None:
        """Draw loss (raw and smoothed), evaluation loss and general score as a PNG.

        The file appears whole.

        Without any loss so far nothing is drawn.
        """
        loss = series(self.history, "loss")
        if not self.enabled or not loss:
            return
        others = (series(self.history, key) for key in ("eval_loss", "general"))
        figure = _draw(loss, *others)
        with write_errors(path), replacing_file(path) as draft:
            figure.savefig(draft, format="png", dpi=160)


class Progress:
    """Lines on a job's progress and remaining time, few enough for a log file.

    One is printed with the first part done, one with each tenth of the job, and one after five
    minutes of silence.

    Args:
        total: parts of the job, such as records.
        done: parts done before.
        what: the rest of the line, such as "records answered".
    """

    def __init__(self, total: int, done: int, what: str):
        self._total, self._first, self._what = total, done, what
        self._started = self._told = time.monotonic()
        self._tenths = -1

    def tell(self, done: int) -> None:
        """Print the progress if a line is due."""
        now, tenths = time.monotonic(), 10 * done // self._total
        if tenths == self._tenths and now - self._told < _SECONDS_OF_SILENCE:
            return
        self._tenths, self._told = tenths, now
        seconds = (now - self._started) / max(1, done - self._first) * (self._total - done)
        left = f", {format_seconds(seconds)} left" if done < self._total else ""
        print(f"{done:,} of {self._total:,} {self._what}{left}", flush=True)


def print_pairs(title: str, pairs: Mapping[str, str]) -> None:
    """Print a title, and below it names and values in two columns."""
    width = max(map(len, pairs), default=0)
    lines = [f"  {name:<{width}}  {value}" for name, value in pairs.items()]
    print("\n".join([title, *lines]), flush=True)


_WORDS = {
    "loss": "loss {:.4f}",
    "eval_loss": "evaluation loss {:.4f}",
    "general": "general questions {:.1f} % right",
    "general_zh": "zh {:.1f} %",
    "general_en": "en {:.1f} %",
    "general_log_prob": "log-probability {:.3f} a token",
    "general_seconds": "scored in {:.1f} s",
    "learning_rate": "lr {:.2e}",
    "tokens_per_second": "{:,.0f} tok/s",
    "memory_gib": "{:.1f} GiB",
}


def _tag(key: str) -> str:
    """The name of a number in TensorBoard, behind that of its group."""
    group, _, name = key.partition("_")
    if group == "general":
        return f"general/{name or 'right'}"
    return f"eval/{name}" if group == "eval" else f"train/{key}"


def _word(key: str, value: float | None) -> str:
    return _WORDS[key].format(math.nan if value is None else value)


def format_seconds(seconds: float) -> str:
    """A duration as 12:34 or 1:02:03."""
    return tqdm.format_interval(round(seconds))


def _rewrite_metrics(path: Path, history: Sequence[Record]):
    """Start the metrics file with the records of earlier steps, all at once."""
    lines = (json.dumps(record) + "\n" for record in history)
    with replacing_file(path) as draft:
        draft.write_text("".join(lines), encoding="utf-8")
    return path.open("a", encoding="utf-8")


def series(history: Sequence[Mapping[str, Any]], key: str) -> list[tuple[int, float]]:
    """The steps and numbers of a key, where a history has it."""
    return [(r["step"], r[key]) for r in history if r.get(key) is not None]


def smooth(values: Sequence[float], width: float) -> list[float]:
    """Weighted mean of each value and its neighbours on both sides, so that a curve does not lag.

    Args:
        values: equally far apart.
        width: standard deviation of the weights, a Gaussian cut off at three of them.
    """
    import numpy as np

    reach = max(1, round(3 * width))
    weights = np.exp(-0.5 * (np.arange(-reach, reach + 1) / width) ** 2)
    inside = slice(reach, reach + len(values))  # beyond the ends there are no values
    norm = np.convolve(np.ones(len(values)), weights)[inside]
    return (np.convolve(values, weights)[inside] / norm).tolist()


def log_ticks(lowest: float, highest: float) -> list[float]:
    """1, 3, 10, 30, ... around two numbers: two nearly evenly spaced ticks a decade."""
    decades = range(math.floor(math.log10(lowest)), math.ceil(math.log10(highest)) + 1)
    ticks = [float(f"{digit}e{decade}") for decade in decades for digit in (1, 3)]
    below = bisect_right(ticks, lowest) - 1
    return ticks[below : max(bisect_left(ticks, highest), below + 1) + 1]


Series = list[tuple[int, float]]


def _draw(loss: Series, eval_loss: Series, general: Sequence[tuple[int, float]] = ()):
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.ticker import EngFormatter, MaxNLocator, NullLocator

    figure = Figure(figsize=(8, 4.5), layout=ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.15))
    axes = figure.subplots()
    steps, values = zip(*loss, strict=True)
    if len(values) >= _SMOOTHED_FROM:
        axes.plot(steps, values, color=PALE, linewidth=1.2, label="loss")
        smoothed = smooth(values, width=max(1, len(values) / 40))
        axes.plot(steps, smoothed, color=ACCENT, linewidth=2.2, label="smoothed")
    else:
        axes.plot(steps, values, color=ACCENT, linewidth=2.2, label="loss")
    for at in {0, len(steps) - 1}:  # raw values: smoothing distorts the ends
        axes.annotate(  # the first above the line, which falls from there; the last beside it
            f"{values[at]:.3f}", (steps[at], values[at]), xytext=(6, 0 if at else 4),
            textcoords="offset points", va="center" if at else "bottom", color=ACCENT, fontsize=10,
        )  # fmt: skip
    if eval_loss:
        axes.plot(
            *zip(*eval_loss, strict=True), color=GONE, marker="o", markersize=5, linewidth=1.2,
            label="evaluation loss",
        )  # fmt: skip
    axes.set_title("Training loss (log scale)", loc="left", fontsize=13, color=INK, pad=14)
    axes.set_xlabel("step", color=SOFT)
    shown = [*values, *(value for _, value in eval_loss)]
    if min(shown) > 0:  # a loss that underflowed to 0 has no logarithm
        ticks = log_ticks(min(shown), max(shown))
        axes.set_yscale("log")
        axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.yaxis.set_minor_locator(NullLocator())
        axes.set_ylim(ticks[0], ticks[-1])
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if steps[-1] >= 10_000:
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.grid(axis="y", color=LINE, linewidth=0.8)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(LINE)
    axes.tick_params(colors=SOFT, length=0)
    axes.margins(x=0.02)
    handles = axes.get_lines()
    if general:
        right = axes.twinx()
        handles += right.plot(
            *zip(*general, strict=True), color=INK, marker="s", markersize=4, linewidth=1.2,
            linestyle="--", label="general questions right, %",
        )  # fmt: skip
        right.set_ylim(0, 105)
        right.tick_params(colors=SOFT, length=0)
        right.spines[["top", "right", "left", "bottom"]].set_visible(False)
    axes.legend(
        handles=handles, frameon=False, labelcolor=SOFT, loc="lower right", bbox_to_anchor=(1, 1),
        ncols=4, borderaxespad=0.8,
    )  # fmt: skip
    return figure
