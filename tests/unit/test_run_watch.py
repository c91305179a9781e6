"""A run watched by its files alone: what they say of a run that waits, trains, ends or is gone."""

import json
import os
import subprocess
import sys
import time

import pytest

from glmtune.errors import UserError
from glmtune.evaluation.labels import Text
from glmtune.locks import held_alone, is_held
from glmtune.run_files import find_run
from glmtune.serving.run_plots import plots, run_files
from glmtune.serving.run_sentences import Condition, sentence
from glmtune.serving.watch import MOST_POINTS, RunWatch, thinned

NASTY = "</p><script>alert('x')</script>\x1b[31m"


def records(num, every=10):
    for step in range(1, num + 1):
        yield {
            "loss": 4.0 / step,
            "tokens_per_second": 900.0 + step,
            "memory_gib": 1.0,
            "step": step,
        }
        if step % every == 0:
            yield {"eval_loss": 5.0 / step, "step": step}
            yield {"general": 60.0 - step, "general_zh": 50.0, "general_en": 70.0, "step": step}


def write(folder, name, *lines):
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / name).write_text(text, encoding="utf-8")


def status(folder, state, **more):
    content = {"state": state, "first_step": 0, "max_steps": 40, "began": time.time() - 100}
    write(folder, "status.json", content | more)


@pytest.fixture
def run(tmp_path):
    """A run folder of 20 steps of 40, which began 100 seconds ago."""
    folder = tmp_path / "run"
    write(folder, "recipe.yaml", {})
    write(folder, "metrics.jsonl", *records(20))
    status(folder, "training")
    (folder / "checkpoint-10").mkdir()
    return folder


def condition(folder):
    return RunWatch.of(folder).condition()


def test_a_run_that_holds_its_folder_is_training(run):
    with held_alone(run):
        found = condition(run)
        assert (found.state, found.step, found.max_steps) == ("training", 20, 40)
        assert found.seconds_left == pytest.approx(100, rel=0.2), "as long again as the first half"
        assert "step 20 of 40, about" in sentence(found).en
    assert condition(run).state == "killed", "nobody is there, and none has said how it ended"
    assert "checkpoint-10 can be resumed" in sentence(condition(run)).en


def test_a_process_that_is_killed_holds_nothing(run):
    """By a real process, which gets no chance to write."""
    code = (
        "import sys, time; from pathlib import Path; from glmtune.locks import held_alone\n"
        "with held_alone(Path(sys.argv[1])): print('held', flush=True); time.sleep(600)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, run], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "held\n"
        assert is_held(run)
        assert condition(run).state == "training"
    finally:
        process.kill()
        process.wait()
    assert not is_held(run)
    assert condition(run).state == "killed"
    assert RunWatch.of(run).as_json()["resume"].endswith("--resume_from_checkpoint true")


def test_two_that_look_do_not_take_each_other_for_the_trainer(run):
    with held_alone(run) as is_ours:
        assert is_ours
        with held_alone(run) as is_other:
            assert not is_other
    assert is_held(run) is False
    assert is_held(run / "nothing") is None


@pytest.mark.parametrize(
    "state, more, words",
    [
        ("done", {"step": 40}, Text("已完成：全部 40 步。", "Done: all 40 steps.")),
        ("done", {"step": 30, "reason": "no better"}, Text("提前结束", "ended early at step 30")),
        ("stopped", {"step": 25}, Text("可从 checkpoint-10 继续", "Stopped at step 25 of 40; ")),
        ("failed", {"step": 25, "reason": f"the loss {NASTY}"}, Text("出错", "Failed at step 25")),
    ],
)
def test_it_says_how_a_run_ended(run, state, more, words):
    status(run, state, **more)
    found = condition(run)
    assert found.state == state
    for told, expected in zip(sentence(found), words, strict=True):
        assert expected in told
        assert "\x1b" not in told
    assert (RunWatch.of(run).as_json()["resume"] is None) == (state == "done")


def test_a_run_that_was_resumed_is_timed_from_there(run):
    status(run, "training", first_step=10)
    with held_alone(run):
        assert condition(run).seconds_left == pytest.approx(200, rel=0.2)


def test_a_run_that_begins_again_is_being_prepared(run):
    status(run, "stopped", step=20)
    old = time.time() - 3600
    for name in ("status.json", "metrics.jsonl"):
        os.utime(run / name, (old, old))
    assert condition(run).state == "preparing"
    os.utime(run / "recipe.yaml", (old, old))
    assert condition(run).state == "stopped"


def test_a_run_of_an_earlier_version_is_judged_by_what_it_saved(run):
    (run / "status.json").unlink()
    old = time.time() - 3600
    os.utime(run / "recipe.yaml", (old, old))
    assert condition(run).state == "stopped"
    write(run, "trainer_state.json", {"max_steps": 20})
    assert condition(run).state == "done"
    write(run / "crash-21", "crash.json", {})
    assert condition(run).state == "failed"
    assert "crash-21" in sentence(condition(run)).en


def test_a_run_that_has_not_begun_is_awaited(tmp_path):
    watch = RunWatch.of(tmp_path)
    assert watch.condition().state == "waiting"
    assert plots(watch) == []
    assert watch.as_json()["numbers"]["loss"] is None
    write(tmp_path, "metrics.jsonl", {"loss": 2.5, "step": 1})
    status(tmp_path, "training")
    with held_alone(tmp_path):
        assert watch.condition().state == "training", "the same watch follows"
    assert watch.as_json()["numbers"]["loss"] == 2.5


def test_the_run_is_found_from_its_checkpoint_and_from_tunes_folder(run, tmp_path):
    assert find_run(run) == run
    assert find_run(run / "checkpoint-10") == run
    (run / "best").symlink_to("checkpoint-10")
    assert find_run(run / "best") == run
    assert find_run(tmp_path) == run, "the folder around it, as `tune` makes it"
    tuned = tmp_path / "tuned"
    write(tuned, "stages.json", {})
    assert find_run(tuned) == tuned / "run"
    assert condition(tuned).state == "waiting"


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda folder: None, "does not exist"),
        (lambda folder: folder.write_text(""), "is a file"),
        (lambda folder: write(folder, "thesis.tex"), "holds no run"),
    ],
)
def test_what_is_no_run_is_refused_in_a_line(tmp_path, make, words):
    folder = tmp_path / "other"
    make(folder)
    with pytest.raises(UserError, match=words) as told:
        find_run(folder)
    assert "\n" not in str(told.value)


def test_half_lines_and_damage_are_left_out(run):
    watch = RunWatch.of(run)
    assert len(watch.history) == 24
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"loss": 0.1, "ste')
    assert len(watch.history) == 24
    with (run / "metrics.jsonl").open("a") as file:
        file.write('p": 21}\n[1]\n{"step": "x"}\n{"loss": null, "eval_loss": "high", "step": 22}\n')
    assert [r["step"] for r in watch.history[-2:]] == [21, 22]
    assert "eval_loss" not in watch.history[-1]
    (run / "status.json").write_text('{"state": "flying"}')
    (run / "best.json").write_text("{")
    assert watch.as_json()["best"] is None
    assert watch.status is None


def test_numbers_are_the_newest_and_the_first(run):
    found = RunWatch.of(run).numbers()
    assert found["loss"] == 0.2
    assert found["first"]["loss"] == 4.0
    assert (found["eval_loss"], found["general"], found["memory_gib"]) == (0.25, 40.0, 1.0)


def test_curves_of_a_long_run_are_thinned(run):
    write(run, "metrics.jsonl", *records(10_000, every=1000))
    watch = RunWatch.of(run)
    few = thinned(watch.history)
    with_loss = [r for r in few if "loss" in r]
    assert MOST_POINTS / 2 < len(with_loss) <= MOST_POINTS
    assert few[-1]["step"] == with_loss[-1]["step"] == 10_000
    assert sum("eval_loss" in r for r in few) == 10, "evaluations are all kept"
    mean = sum(4.0 / step for step in range(1, 14)) / 13
    assert with_loss[0] == {
        "loss": pytest.approx(mean), "tokens_per_second": 907.0, "memory_gib": 1.0, "step": 13
    }  # fmt: skip
    assert len(plots(watch)) == 3
    short = list(records(20))
    assert thinned(short) == short


def test_samples_are_put_together_by_question(run):
    lines = [
        {
            "step": step,
            "answers": [{"question": f"Why? {NASTY}", "expected": "So", "answer": answer}],
        }
        for step, answer in ((0, "x"), (10, "y"), (20, NASTY))
    ]
    write(run, "samples.jsonl", *lines, {"step": "z"}, {"step": 1, "answers": 5})
    (sample,) = RunWatch.of(run).samples
    assert [step for step, _ in sample.answers] == [0, 10, 20]
    assert "\x1b" not in sample.question + sample.answers[-1][1]


def test_the_version_changes_with_what_is_drawn(run):
    watch = RunWatch.of(run)
    before = watch.version()
    assert watch.version() == before
    write(run, "metrics.jsonl", *records(21))
    assert watch.version() != before


def test_only_files_of_the_run_are_opened(run, tmp_path):
    assert set(run_files(run)) == {"metrics.jsonl", "recipe.yaml"}
    write(run / "compare", "compare.html")
    write(tmp_path, "tune.html")
    assert "tune.html" not in run_files(run), "the folder around it is none of tune's"
    write(tmp_path, "stages.json", {})
    assert run_files(run)["tune.html"] == tmp_path / "tune.html"
    assert run_files(run)["compare.html"] == run / "compare" / "compare.html"
    secret = tmp_path / "secret"
    secret.write_text("x")
    (run / "training_loss.png").symlink_to(secret)
    assert "training_loss.png" not in run_files(run), "a link out of the folder"


@pytest.mark.parametrize(
    "state", ["waiting", "preparing", "training", "done", "stopped", "failed", "killed"]
)
def test_every_condition_has_its_sentence_in_both_languages(state):
    zh, en = sentence(Condition(state, step=1, max_steps=None))
    assert zh.isascii() is False
    assert en.isascii()
    assert len(en) > 10


def test_it_needs_neither_a_model_nor_torch():
    code = (
        "import sys; from glmtune.serving import pages, watching\n"
        "print(sorted({'torch', 'transformers', 'peft', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
