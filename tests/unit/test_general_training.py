"""The general set while a run trains: when it is scored, where it is seen, what it changes."""

import json
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from toys import draw_rows, save_rows, short_run

from glmtune.errors import UserError
from glmtune.general.items import find_general
from glmtune.models.loading import load_tokenizer
from glmtune.models.resolve import GLM_TINY
from glmtune.run_files import METRICS_FILE
from glmtune.training import general as general_of_run
from glmtune.training.loop import train

STEPS = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Rows, and a general set of twelve items a language."""
    folder = tmp_path_factory.mktemp("general")
    tokenizer = load_tokenizer(GLM_TINY)
    save_rows(draw_rows([(5, 4)] * 40, tokenizer), folder / "rows")
    lines = []
    for language in ("zh", "en"):
        path = Path(GLM_TINY, f"general_{language}.jsonl")
        lines += path.read_text(encoding="utf-8").splitlines()[::17]
    (folder / "few.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (folder / "fewer.jsonl").write_text("\n".join(lines[::2]), encoding="utf-8")
    return folder


def run(folder, out, **changes):
    settings = {"max_steps": STEPS, "save_steps": 3, "eval_steps": 2, "learning_rate": 1e-2}
    settings |= {"general_set": str(folder / "few.jsonl"), "lr_scheduler_type": "constant"}
    return train(short_run(folder / "rows", out, **settings | changes))


@pytest.fixture(scope="module")
def trained(folder):
    """A run that scores the set, without held-out rows."""
    return run(folder, folder / "run", report_to="tensorboard")


def scored(history):
    return [record for record in history if "general" in record]


def test_it_is_scored_before_the_first_step_and_at_every_evaluation(trained, folder):
    records = scored(trained.log_history)
    assert [record["step"] for record in records] == [0, 2, 4, 6]
    first, *_, last = records
    assert first["general"] == 100.0
    assert -0.1 < first["general_log_prob"] < 0
    assert last["general_log_prob"] < first["general_log_prob"]
    assert first["general_zh"] == first["general_en"] == 100.0
    assert first["general_seconds"] > 0
    assert first["general_set"] == find_general(str(folder / "few.jsonl"), GLM_TINY).digest
    lines = (folder / "run" / METRICS_FILE).read_text(encoding="utf-8").splitlines()
    assert scored(map(json.loads, lines)) == records


def test_it_is_in_tensorboard_and_the_curve(trained, folder):
    events = EventAccumulator(str(folder / "run" / "runs"))
    events.Reload()
    names = {"right", "zh", "en", "log_prob", "seconds"}
    assert {f"general/{name}" for name in names} <= set(events.Tags()["scalars"])
    values = [(event.step, event.value) for event in events.Scalars("general/log_prob")]
    wanted = [(r["step"], r["general_log_prob"]) for r in scored(trained.log_history)]
    assert [step for step, _ in values] == [step for step, _ in wanted]
    assert [v for _, v in values] == pytest.approx([v for _, v in wanted])
    without = [record for record in trained.log_history if "general" not in record]
    from glmtune.runlog import RunLog

    with RunLog(folder, STEPS, report_to="none") as log:
        for name, history in (("with.png", trained.log_history), ("without.png", without)):
            log.history = history
            log.plot_loss(folder / name)
    assert (folder / "with.png").read_bytes() != (folder / "without.png").read_bytes()


def test_the_progress_says_it_with_both_languages_and_the_seconds(folder, tmp_path, capsys):
    run(folder, tmp_path / "run", max_steps=1)
    out = capsys.readouterr().out
    line = next(line for line in out.splitlines() if line.startswith("step 0/1"))
    assert "general questions 100.0 % right, zh 100.0 %, en 100.0 %" in line
    assert "scored in" in line
    assert "left" not in line
    assert "general questions" in out.partition("Done: all 1 steps")[2]


@pytest.mark.parametrize("layout", ["padded", "exact"])
def test_it_changes_no_step(layout, folder, tmp_path):
    losses = []
    for wish in (str(folder / "few.jsonl"), False):
        found = run(folder, tmp_path / str(len(losses)), general_set=wish, layout=layout)
        losses.append([r["loss"] for r in found.log_history if "loss" in r])
        assert bool(scored(found.log_history)) == bool(wish)
    assert losses[0] == losses[1]
    assert len(losses[0]) == STEPS


def test_a_resumed_run_keeps_the_scores_and_goes_on_with_the_same(trained, folder, tmp_path):
    run(folder, tmp_path / "run", max_steps=3)
    resumed = run(folder, tmp_path / "run", resume_from_checkpoint="true")
    names = ("step", "general", "general_log_prob")
    kept = [[r[name] for name in names] for r in scored(resumed.log_history) if r["step"] != 3]
    assert kept == [[r[name] for name in names] for r in scored(trained.log_history)]


def test_scores_of_another_set_are_left_out_of_a_resumed_run(folder, tmp_path, capsys):
    run(folder, tmp_path / "run", max_steps=3)
    other = {"general_set": str(folder / "fewer.jsonl"), "resume_from_checkpoint": "true"}
    resumed = run(folder, tmp_path / "run", **other)
    assert "another one than this run began with" in capsys.readouterr().err
    assert [record["step"] for record in scored(resumed.log_history)] == [4, 6]
    assert [r["step"] for r in resumed.log_history if "loss" in r] == [1, 2, 3, 4, 5, 6]


def test_by_itself_a_run_scores_it_where_rows_are_held_out_and_it_costs_little(
    folder, tmp_path, monkeypatch, capsys
):
    held_out = {"general_set": "auto", "eval_ratio": 0.2}
    few = find_general(str(folder / "few.jsonl"), GLM_TINY)
    monkeypatch.setattr(general_of_run, "find_general", lambda *_: few)
    monkeypatch.setattr(general_of_run, "MOST_SHARE", 100.0)
    found = run(folder, tmp_path / "cheap", **held_out)
    assert [record["step"] for record in scored(found.log_history)] == [0, 2, 4, 6]
    assert [r["step"] for r in found.log_history if "eval_loss" in r] == [2, 4, 6]
    assert "not scored" not in capsys.readouterr().err
    monkeypatch.setattr(general_of_run, "MOST_SHARE", 0.1)
    assert not scored(run(folder, tmp_path / "dear", **held_out).log_history)
    err = capsys.readouterr().err
    assert "general set: not scored while training: 4 times" in err
    assert "--general_set true scores it all the same" in err
    alone = run(folder, tmp_path / "alone", **held_out | {"eval_ratio": 0.0})
    assert not scored(alone.log_history)
    assert "general set" not in capsys.readouterr().err


def test_a_file_that_is_no_set_stops_a_run_before_it_writes(folder, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"kind": "facts"}\n', encoding="utf-8")
    with pytest.raises(UserError, match=r"bad.jsonl:1: give either question, or text"):
        run(folder, tmp_path / "run", general_set=str(tmp_path / "bad.jsonl"))
    assert not (tmp_path / "run").exists()
