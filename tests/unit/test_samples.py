"""What a run leaves for a page that follows it: sample answers, and how it stands."""

import json
from pathlib import Path

import pytest
from toys import short_run

from glmtune.errors import UserError
from glmtune.locks import is_held
from glmtune.serving.watch import RunWatch
from glmtune.training import loop, samples
from glmtune.training.loop import train


@pytest.fixture
def no_plot(monkeypatch):
    monkeypatch.setattr("glmtune.runlog.RunLog.plot_loss", lambda *_: None)


def lines(folder):
    text = Path(folder, "samples.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def settings(rows, folder, **changes):
    asked = {"eval_ratio": 0.5, "eval_steps": 2, "general_set": False, "learning_rate": 0.05}
    return short_run(rows, folder, **asked | changes)


def test_held_out_questions_are_answered_at_each_evaluation(toy_rows, tmp_path, no_plot, spy):
    held = []
    calls = spy(samples.Samples, "answer")
    spy(samples, "answer_batch", calls)
    out = tmp_path / "run"
    result = train(
        settings(toy_rows, out, eval_answers=2), at_end=lambda *_: held.append(is_held(out))
    )
    found = lines(out)
    assert [line["step"] for line in found] == [0, 2, 4]
    assert all(len(line["answers"]) == 2 for line in found)
    questions = [[(one["question"], one["expected"]) for one in line["answers"]] for line in found]
    assert questions[0] == questions[1] == questions[2]
    assert found[0]["answers"] != found[-1]["answers"], "the base's, and what was taught since"
    watch = RunWatch.of(out)
    assert [[step for step, _ in one.answers] for one in watch.samples] == [[0, 2, 4]] * 2
    assert watch.condition().state == "done"
    assert held == [False], "nobody holds a run that has ended"
    without = train(settings(toy_rows, tmp_path / "without", eval_answers=0))
    assert not (tmp_path / "without" / "samples.jsonl").exists()
    numbers = [[{k: v for k, v in r.items() if "per_second" not in k} for r in of.log_history]
               for of in (result, without)]  # fmt: skip
    for of in numbers:
        for record in of:
            record.pop("memory_gib", None)
    assert numbers[0] == numbers[1], "no number of the run depends on them"


def test_nothing_is_asked_where_nothing_is_held_out(toy_rows, tmp_path, no_plot):
    train(settings(toy_rows, tmp_path / "run", eval_ratio=0))
    assert not (tmp_path / "run" / "samples.jsonl").exists()


def test_a_resumed_run_continues_them(toy_rows, tmp_path, no_plot):
    out = tmp_path / "run"
    train(settings(toy_rows, out, lr_scheduler_type="constant"))
    with (out / "samples.jsonl").open("a") as file:
        file.write('{"step": 6, "answers": []}\n{"step"')  # of a process that was killed
    more = {"max_steps": 6, "resume_from_checkpoint": "true", "lr_scheduler_type": "constant"}
    train(settings(toy_rows, out, **more))
    assert [line["step"] for line in lines(out)] == [0, 2, 4, 6]
    assert lines(out)[-1]["answers"]


@pytest.mark.parametrize("kind", [UserError, RuntimeError])
def test_a_run_goes_on_where_they_cannot_be_made(
    toy_rows, tmp_path, no_plot, monkeypatch, capsys, kind
):
    def fail(*_):
        raise kind("no memory for a batch")

    monkeypatch.setattr(samples, "answer_batch", fail)
    assert train(settings(toy_rows, tmp_path / "run")).is_done
    assert "no sample answers (no memory for a batch)" in capsys.readouterr().err


def test_texts_alone_are_no_questions(make_rows):
    rows = make_rows([(5, 4)])
    assert samples._is_question(rows, 0, 100)
    assert not samples._is_question(rows, 0, 5), "it leaves no room for an answer"


def test_a_run_is_held_while_it_trains_and_says_how_it_failed(
    toy_rows, tmp_path, no_plot, monkeypatch
):
    out, seen = tmp_path / "run", []

    def fail(*_):
        seen.append((is_held(out), RunWatch.of(out).condition()))
        raise UserError("the loss explodes")

    monkeypatch.setattr(loop, "record_if_due", fail)
    with pytest.raises(UserError, match="explodes"):
        train(settings(toy_rows, out))
    ((held, condition),) = seen
    assert held
    assert (condition.state, condition.max_steps) == ("training", 4)
    after = RunWatch.of(out).condition()
    assert (after.state, after.step, after.reason) == ("failed", 1, "the loss explodes")


def test_a_run_that_is_asked_to_stop_says_so(toy_rows, tmp_path, no_plot, monkeypatch):
    from toys import stop_at

    out = tmp_path / "run"
    stop_at(3, monkeypatch)
    assert train(settings(toy_rows, out)).interrupted
    after = RunWatch.of(out).condition()
    assert (after.state, after.step, after.saved) == ("stopped", after.saved, after.saved)
