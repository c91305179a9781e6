"""The curves of a watched run, and its files that a page may open."""

from collections.abc import Iterator
from pathlib import Path

from glmtune.data.files import check_inside
from glmtune.errors import UserError
from glmtune.evaluation.document import Panel
from glmtune.evaluation.labels import Text
from glmtune.evaluation.line_plot import Line, line_plot, linear_ticks
from glmtune.evaluation.run_plots import NOTHING, STEPS, general_panel, loss_panel
from glmtune.run_files import (
    COMPARE_FOLDER,
    COMPARE_PAGE,
    DIAL_PLOT_FILE,
    JOURNAL_FILE,
    METRICS_FILE,
    PLOT_FILE,
    RECIPE_FILE,
    TUNE_PAGE,
)
from glmtune.runlog import series
from glmtune.serving.watch import RunWatch, thinned

SPEED = Text("速度（词元/秒）", "Speed, tokens a second")
LABELS = {
    COMPARE_PAGE: Text("对照页：原模型与微调后逐条对照", "Comparison: base and tuned, row by row"),
    TUNE_PAGE: Text("微调结果页", "Result of the tuning"),
    PLOT_FILE: Text("损失曲线（PNG）", "Loss curve, PNG"),
    DIAL_PLOT_FILE: Text("缩放曲线（PNG）", "Scales of the adapter, PNG"),
    METRICS_FILE: Text("全部记录（JSON）", "All records, JSON lines"),
    RECIPE_FILE: Text("配置（YAML）", "Recipe, YAML"),
}


def plots(watch: RunWatch) -> list[Panel]:
    """The curves that the run has readings for."""
    history = thinned(watch.history)
    return list(filter(None, (loss_panel(history), general_panel(history), *_speed(watch))))


def _speed(watch: RunWatch) -> Iterator[Panel]:
    points = series(thinned(watch.history), "tokens_per_second")
    if len(points) < 2:
        return
    values = [value for _, value in points]
    line = Line(NOTHING, "smooth", points, f"{values[-1]:,.0f}")
    ticks = linear_ticks(min(0.0, *values), max(values))
    yield Panel(SPEED, line_plot([line], ticks, name=SPEED, x_name=STEPS))


def run_files(folder: Path) -> dict[str, Path]:
    """The files that a page may open, by name: no others are served, whatever a request names."""
    places = {name: [folder / name] for name in LABELS}
    places[COMPARE_PAGE] = [folder / COMPARE_FOLDER / COMPARE_PAGE]
    places[TUNE_PAGE] = []
    if (folder.parent / JOURNAL_FILE).is_file():
        places[COMPARE_PAGE].append(folder.parent / COMPARE_FOLDER / COMPARE_PAGE)
        places[TUNE_PAGE].append(folder.parent / TUNE_PAGE)
    return {
        name: found[0] for name, paths in places.items() if (found := list(filter(_is_own, paths)))
    }


def _is_own(path: Path) -> bool:
    """Whether a file is there, and no link to one of another folder."""
    try:
        check_inside(path)
    except UserError:
        return False
    return path.is_file()
