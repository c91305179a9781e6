"""The records of a run: metrics, events, printed lines, the curve."""

import json
import math
import re
import sys
from importlib import resources
from types import SimpleNamespace

import matplotlib.image
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from glmtune import runlog
from glmtune.runlog import METRICS_FILE, Progress, RunLog, format_seconds, print_pairs, smooth

RECORD = {"loss": 2.5, "learning_rate": 1e-4, "tokens_per_second": 1234.5, "memory_gib": 14.25}


def lines_of(folder):
    return [json.loads(line) for line in (folder / METRICS_FILE).read_text().splitlines()]


def events_of(folder, tag):
    events = EventAccumulator(str(folder / "runs"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_a_record_goes_to_file_history_events_and_terminal(tmp_path, capsys):
    with RunLog(tmp_path, 100) as log:
        log.log(50, RECORD)
        log.log(50, {"eval_loss": 3.0})
    assert (
        lines_of(tmp_path) == log.history == [RECORD | {"step": 50}, {"eval_loss": 3.0, "step": 50}]
    )
    assert events_of(tmp_path, "train/loss") == [(50, 2.5)]
    assert events_of(tmp_path, "eval/loss") == [(50, 3.0)]
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("step 50/100: loss 2.5000, lr 1.00e-04, 1,234 tok/s, 14.2 GiB")
    assert first.endswith("left")
    assert "evaluation loss 3.0000" in second


def test_lines_are_on_disk_while_the_run_goes_on(tmp_path):
    with RunLog(tmp_path, 100, report_to="none") as log:
        log.log(1, RECORD)
        assert len(lines_of(tmp_path)) == 1


def test_no_events_where_none_are_wanted(tmp_path):
    with RunLog(tmp_path, 100, report_to="none") as log:
        log.log(1, RECORD)
    assert not (tmp_path / "runs").exists()


def test_what_is_not_finite_becomes_null(tmp_path):
    with RunLog(tmp_path, 100, report_to="none") as log:
        log.log(1, {"loss": 2.0, "grad_norm": math.inf})
        log.log(2, {"loss": math.nan})
    assert lines_of(tmp_path)[0] == {"loss": 2.0, "grad_norm": None, "step": 1}
    assert lines_of(tmp_path)[1] == {"loss": None, "step": 2}
    log.plot_loss(tmp_path / "curve.png")
    assert (tmp_path / "curve.png").exists()


def test_a_resumed_run_drops_what_came_after_its_checkpoint(tmp_path):
    with RunLog(tmp_path, 40) as log:
        for step in (10, 20, 30):
            log.log(step, {"loss": float(step)})
        history = log.history
    with RunLog(tmp_path, 40, first_step=20, history=history) as log:
        log.log(30, {"loss": -30.0})
    assert [(r["step"], r["loss"]) for r in lines_of(tmp_path)] == [(10, 10), (20, 20), (30, -30)]
    assert lines_of(tmp_path) == log.history
    assert events_of(tmp_path, "train/loss") == [(10, 10), (20, 20), (30, -30)]


def test_another_process_is_silent(tmp_path, capsys):
    with RunLog(tmp_path, 10, enabled=False) as log:
        log.advance()
        log.log(1, RECORD)
    log.plot_loss(tmp_path / "curve.png")
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr() == ("", "")
    assert len(log.history) == 1


@pytest.mark.parametrize(("disable_tqdm", "bars"), [(False, True), (True, False)])
def test_a_terminal_gets_a_bar(tmp_path, capsys, monkeypatch, disable_tqdm, bars):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with RunLog(tmp_path, 4, report_to="none", disable_tqdm=disable_tqdm, first_step=2) as log:
        log.advance()
        log.log(3, RECORD)
        log.advance()
    out, err = capsys.readouterr()
    assert ("loss 2.5000, lr 1.00e-04, 1,234 tok/s, 14.2 GiB" in err) == bars
    assert ("4/4" in err) == bars
    assert ("step 3/4" in out) != bars


def test_the_curve_is_a_picture_with_both_losses(tmp_path):
    with RunLog(tmp_path, 400, report_to="none") as log:
        for step in range(1, 401):
            log.log(step, {"loss": 2 + 5 / step + 0.3 * math.sin(step * 1.7)})
            if step % 100 == 0:
                log.log(step, {"eval_loss": 2.4 + 3 / step})
        log.plot_loss(tmp_path / "curve.png")
    assert [path.name for path in tmp_path.glob("*.png")] == ["curve.png"]
    pixels = matplotlib.image.imread(tmp_path / "curve.png")
    assert pixels.shape[:2] == (720, 1280)
    for colour in (runlog.ACCENT[1:], runlog.PALE[1:], runlog.GONE[1:]):
        wanted = [int(colour[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        assert (abs(pixels[..., :3] - wanted).max(-1) < 0.02).sum() > 30, colour


@pytest.mark.parametrize("num_readings", [1, 3, 12, 19, 20, 400])
def test_what_the_curve_labels_are_losses_that_were(tmp_path, num_readings):
    losses = [(step, 3 + 9.24 / step) for step in range(1, num_readings + 1)]
    figure = runlog._draw(losses, [])
    (axes,) = figure.axes
    shown = [(text.xy, text.get_text()) for text in axes.texts]
    ends = {losses[0], losses[-1]}
    assert sorted(shown) == sorted((end, f"{end[1]:.3f}") for end in ends)
    by_label = {line.get_label(): line.get_ydata() for line in axes.lines}
    assert list(by_label["loss"]) == [loss for _, loss in losses]
    assert ("smoothed" in by_label) == (num_readings >= 20)


@pytest.mark.parametrize(
    ("lowest", "highest", "ticks"),
    [(1.6, 2.1, [1, 3]), (3, 3, [3, 10]), (0.02, 20, [0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30]),
     (3.1, 3.15, [3, 10]), (0.5, 3.1, [0.3, 1, 3, 10]), (1, 10, [1, 3, 10])],
)  # fmt: skip
def test_a_logarithmic_axis_holds_all_losses(lowest, highest, ticks):
    assert runlog.log_ticks(lowest, highest) == ticks
    (axes,) = runlog._draw([(1, highest), (2, lowest)], []).axes
    assert axes.get_yscale() == "log"
    assert axes.get_ylim() == (ticks[0], ticks[-1])
    assert [text.get_text() for text in axes.get_yticklabels()] == [f"{tick:g}" for tick in ticks]


def test_the_axis_holds_evaluations_and_a_loss_of_zero():
    (axes,) = runlog._draw([(1, 2.0), (2, 1.5)], [(2, 40.0)]).axes
    assert axes.get_ylim() == (1, 100)
    (axes,) = runlog._draw([(1, 2.0), (2, 0.0)], []).axes
    assert axes.get_yscale() == "linear"


def test_colours_are_the_page_s():
    css = resources.files("glmtune.evaluation").joinpath("page.css").read_text("utf-8")
    light = dict(re.findall(r"--([\w-]+): (#\w+)", css.split("}")[0]))
    names = {"accent": runlog.ACCENT, "ink": runlog.INK, "soft": runlog.SOFT, "line": runlog.LINE,
             "gone-line": runlog.GONE}  # fmt: skip
    assert {name: light[name] for name in names} == names


def test_without_a_loss_there_is_no_curve(tmp_path):
    with RunLog(tmp_path, 10, report_to="none") as log:
        log.plot_loss(tmp_path / "curve.png")
    assert not (tmp_path / "curve.png").exists()


def test_smoothing_takes_noise_away_without_lag():
    assert smooth([3.0], width=1) == [3.0]
    assert smooth([3.0] * 5, width=2) == pytest.approx([3.0] * 5)
    line = [float(step) for step in range(100)]
    noisy = [value + (-1) ** step for step, value in enumerate(line)]
    assert smooth(noisy, width=5)[20:80] == pytest.approx(line[20:80], abs=0.01)


def test_pairs_stand_in_columns(capsys):
    print_pairs("Title", {"a": "1", "longer": "2"})
    assert capsys.readouterr().out == "Title\n  a       1\n  longer  2\n"


def test_seconds_read_like_a_clock():
    assert (format_seconds(61.4), format_seconds(3723)) == ("01:01", "1:02:03")


class TestProgress:
    @pytest.fixture
    def clock(self, monkeypatch):
        clock = SimpleNamespace(seconds=0.0)
        monkeypatch.setattr("glmtune.runlog.time", SimpleNamespace(monotonic=lambda: clock.seconds))
        return clock

    def test_a_line_for_each_tenth_with_the_time_left(self, clock, capsys):
        progress = Progress(300, 0, "records answered")
        for done in range(8, 308, 8):  # 38 batches
            clock.seconds += 2
            progress.tell(min(done, 300))
        first, *others, last = capsys.readouterr().out.splitlines()
        assert first == "8 of 300 records answered, 01:13 left"
        assert last == "300 of 300 records answered"
        assert len(others) == 9
        assert all(line.endswith(" left") for line in others)

    def test_slow_progress_is_told_every_five_minutes(self, clock, capsys):
        progress = Progress(1000, 500, "records answered")
        for done in range(501, 531):
            clock.seconds += 60
            progress.tell(done)
        lines = capsys.readouterr().out.splitlines()
        assert [line.split()[0] for line in lines] == ["501", "506", "511", "516", "521", "526"]
        assert lines[0].endswith("8:19:00 left"), "what was done before took no time"
