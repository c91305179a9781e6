"""Metrics of the user's own: found, used, and refused in one line."""

import pytest

import glmtune
from glmtune.errors import UserError
from glmtune.evaluation.metric import Metric, load_metric
from glmtune.evaluation.report import Pair
from glmtune.generation import Answer
from glmtune.imports import leave_out

PAIR = Pair(3, "问", "输入", "答", Answer("好", 1, True), Answer("答", 1, True))


def test_a_metric_of_this_folder_gets_answer_reference_and_record(tmp_path, monkeypatch):
    (tmp_path / "my_own_metrics.py").write_text(
        "def right(answer, reference, record):\n"
        "    assert record == {'row': 3, 'instruction': '问', 'input': '输入', 'output': '答'}\n"
        "    return answer == reference\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    metric = load_metric("my_own_metrics:right")
    assert (metric.name, metric.score("好", PAIR), metric.score("答", PAIR)) == ("right", 0, 1)
    assert metric.measure.better == 1


def test_a_metric_may_import_what_the_command_leaves_out(tmp_path, monkeypatch):
    monkeypatch.setattr(glmtune, "is_command", True)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("left_out_early", "left_out_late"):
        (tmp_path / f"{name}.py").write_text("SCORE = 1\n")
        leave_out(name)
        with pytest.raises(ImportError):
            __import__(name)
    (tmp_path / "metrics_with_imports.py").write_text(
        "import left_out_early\n"
        "def scored(answer, reference, record):\n"
        "    import left_out_late\n"
        "    return left_out_early.SCORE + left_out_late.SCORE\n"
    )
    assert load_metric("metrics_with_imports:scored").score("好", PAIR) == 2


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        ("is_polite", "give module:function"),
        (":f", "give module:function"),
        ("json:", "give module:function"),
        ("no_such_module:f", "cannot be imported (ModuleNotFoundError"),
        ("json:no_such", "json has no function no_such"),
        ("json:chrf", "chrf is a score of glmtune"),
        ("json:dumps", "too many positional arguments"),
    ],
)
def test_what_is_no_metric_is_refused(spec, told):
    with pytest.raises(UserError) as refused:
        load_metric(spec)
    assert told in str(refused.value)


@pytest.mark.parametrize(
    ("function", "told"),
    [
        (lambda *_: 1 / 0, "ZeroDivisionError: division by zero"),
        (lambda *_: float("nan"), "gives nan; a score is a finite number"),
        (lambda *_: "good", "ValueError"),
        (lambda answer: 1.0, "TypeError"),
    ],
)
def test_a_metric_that_fails_names_the_record_in_one_line(function, told):
    with pytest.raises(UserError) as refused:
        Metric("mine:f", function).score("好", PAIR)
    assert str(refused.value).startswith("metric mine:f: record 3: ")
    assert told in str(refused.value)
    assert "\n" not in str(refused.value)
