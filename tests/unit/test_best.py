"""The best checkpoint: the rule, the link, early stopping, and checkpoints after epochs."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from toys import adapter_weights, losses, saved, stop_at

from glmtune.adapters import load_adapter
from glmtune.cli import main
from glmtune.config.reading import read_config
from glmtune.config.settings import TrainSettings
from glmtune.errors import UserError
from glmtune.models.loading import load_base_model
from glmtune.models.resolve import GLM_TINY
from glmtune.training import best as module
from glmtune.training import loop
from glmtune.training.best import Evaluation, Evaluations, choose_best, why_no_better
from glmtune.training.saving import best_link
from glmtune.training.saving.checkpoint_size import last_checkpoint_bytes

pytestmark = pytest.mark.usefixtures("no_curve")

ROWS = np.array([1.0, 2.0, 3.0, 4.0])
OVERTAUGHT = {
    "general_set": False, "eval_ratio": 0.3, "eval_steps": 2, "save_steps": 2, "max_steps": 16,
    "learning_rate": 1.5e-2, "lr_scheduler_type": "constant", "lora_dropout": 0.0,
}  # fmt: skip


def evaluations(*shifts, harmed=()):
    """Evaluations of four rows at steps 10, 20, ...: the same losses, and what is added to each."""
    lost = np.full(20, -1.0) + np.arange(20) / 100
    return [
        Evaluation(10 * (i + 1), ROWS + shift, lost if 10 * (i + 1) in harmed else -lost[::-1] * 0)
        for i, shift in enumerate(shifts)
    ]


class TestRule:
    def test_a_clear_lowest_is_the_best(self):
        assert choose_best(evaluations(0.5, 0.2, 0.3)).step == 20

    def test_of_equals_the_earliest_is(self):
        assert choose_best(evaluations(0.5, 0.2, 0.2)).step == 20

    def test_within_one_standard_error_the_earliest_is(self):
        """Differences 0.3, -0.1, 0.3, -0.1: mean 0.1, standard error 0.2309 / 2 = 0.1155."""
        shift = np.array([0.3, -0.1, 0.3, -0.1])
        best = choose_best(evaluations(1, shift, 0))
        assert (best.step, best.lowest) == (20, 30)
        assert best.candidates[1].behind == pytest.approx(0.1)
        assert best.candidates[1].error == pytest.approx(0.11547, abs=1e-5)
        assert choose_best(evaluations(1, shift + 0.02, 0)).step == 30

    def test_the_rows_are_paired(self):
        """However much rows differ from each other, a difference that all of them show counts."""
        assert choose_best(evaluations(0.01, 0)).step == 20

    def test_a_loss_of_general_ability_counts_first(self):
        assert choose_best(evaluations(0.5, 0.2, 0.3, harmed=(20,))).step == 30
        assert choose_best(evaluations(0.5, 0.2, 0.3, harmed=(10, 20, 30))).step == 20
        reason = choose_best(evaluations(0.5, 0.2, harmed=(20,))).reason()
        assert "without checkpoint-20, which lost general ability" in reason["en"]
        assert "checkpoint-20 的通用能力有损失" in reason["zh"]

    def test_a_loss_that_cannot_be_told_does_not(self):
        noise = np.array([1.0, -1.1] * 10)
        assert not Evaluation(1, ROWS, noise).harms
        assert not Evaluation(1, ROWS, np.full(7, -1.0)).harms
        assert not Evaluation(1, ROWS, np.array([-100.0] * 5 + [0.0] * 5)).harms
        assert Evaluation(1, ROWS, np.array([-100.0] * 6 + [0.0] * 4)).harms
        assert Evaluation(1, ROWS, noise - 2).harms

    def test_of_one_row_the_lowest_is_the_best(self):
        pair = [Evaluation(1, np.array([2.0])), Evaluation(2, np.array([1.0]))]
        assert choose_best(pair).step == 2
        assert choose_best([]) is None

    def test_patience_counts_evaluations_since_the_best(self):
        found = evaluations(0.5, 0.2, 0.3, 0.4)
        assert "step 20 " in why_no_better(found, 2)
        assert why_no_better(found, 3) is None
        assert why_no_better(found[:3], 2) is None
        losses = {one.step: one.losses_N for one in found}
        assert "step 20 " in Evaluations(losses=losses).why_no_better(2)
        assert Evaluations(losses=losses).why_no_better(None) is None

    def test_steps_between_evaluations_cost_nothing(self, spy):
        calls = spy(module, "choose_best")
        found = Evaluations(losses={10: np.array([1.0, 2.0])})
        assert [found.why_no_better(1) for _ in range(3)] == [None] * 3
        assert len(calls) == 1
        found.losses[20] = found.losses[10] + 1
        assert all("step 10 " in found.why_no_better(1) for _ in range(3))
        assert len(calls) == 2


@pytest.fixture(scope="module")
def overtaught(toy_rows, tmp_path_factory):
    """A run whose held-out loss falls and then rises, with its settings."""
    from toys import short_run

    folder = tmp_path_factory.mktemp("overtaught") / "run"
    settings = short_run(toy_rows, folder, **OVERTAUGHT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("glmtune.runlog.RunLog.plot_loss", lambda *_: None)
        result = loop.train(settings)
    return settings, folder, result


class TestLink:
    def test_the_link_leads_to_the_checkpoint_that_the_rule_takes(self, overtaught):
        _, folder, result = overtaught
        told = json.loads((folder / "best.json").read_text())
        num_rows = len(
            json.loads((folder / "held_out.jsonl").read_text().splitlines()[0])["losses"]
        )
        found = Evaluations.read(folder, 16, num_rows).all()
        assert [one.step for one in found] == [2, 4, 6, 8, 10, 12, 14, 16]
        best = choose_best(found)
        assert best.step < 16, "or this run shows nothing"
        assert told["checkpoint"] == f"checkpoint-{best.step}"
        assert (folder / "best").resolve() == (folder / told["checkpoint"]).resolve()
        assert [one["step"] for one in told["checkpoints"]] == [one.step for one in found]
        assert told["reason"]["en"].startswith("held-out loss ")
        assert told["rows"] == num_rows
        assert len(losses(result, "eval_loss")) == 8

    def test_the_verbs_take_the_link(self, overtaught, tmp_path, capsys):
        _, folder, _ = overtaught
        (tmp_path / "rows.json").write_text('[{"instruction": "a", "output": "b"}]')
        line = f"infer --data_path {tmp_path}/rows.json --adapter {folder}/best --max_new_tokens 2"
        answers = tmp_path / "answers.jsonl"
        assert main([*line.split(), "--output_path", str(answers), "--use_cpu", "true"]) == 0
        settings = json.loads(answers.with_suffix(".settings.json").read_text())
        told = json.loads((folder / "best.json").read_text())
        assert settings["adapter"] == f"run/{told['checkpoint']}"

    def test_without_links_it_is_a_copy(self, overtaught, tmp_path, monkeypatch):
        _, folder, _ = overtaught
        copy = shutil.copytree(folder, tmp_path / "copy", symlinks=True)

        def no_link(*_, **__):
            raise OSError("not permitted")

        monkeypatch.setattr(Path, "symlink_to", no_link)
        (copy / "best").unlink()
        found = Evaluations.read(copy, 16, len(best_rows(copy))).all()
        for some in (found, found[:2], found):
            best = best_link.mark_best(copy, some)
            assert not (copy / "best").is_symlink()
            ours = adapter_weights(copy / "best")
            theirs = adapter_weights(copy / f"checkpoint-{best.step}")
            assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
            load_adapter(load_base_model(GLM_TINY, dtype=torch.float32), copy / "best")
        monkeypatch.undo()
        best_link.mark_best(copy, found)
        assert (copy / "best").is_symlink()

    def test_the_limit_keeps_the_best(self, overtaught, toy_run, tmp_path):
        _, folder, _ = overtaught
        loop.train(toy_run(**OVERTAUGHT, save_total_limit=1))
        told = json.loads((tmp_path / "run" / "best.json").read_text())
        best = told["checkpoint"]
        assert best != "checkpoint-16"
        assert saved(tmp_path / "run") == sorted([best, "checkpoint-16"])
        assert (tmp_path / "run" / "best" / "adapter_model.safetensors").is_file()
        assert best == json.loads((folder / "best.json").read_text())["checkpoint"]

    def test_a_run_that_holds_nothing_out_has_none(self, toy_run, tmp_path):
        loop.train(toy_run(max_steps=1))
        assert not {"best", "best.json", "held_out.jsonl"} & set(os.listdir(tmp_path / "run"))

    def test_a_new_run_over_it_removes_it_and_not_what_it_leads_to(self, toy_run, tmp_path):
        loop.train(toy_run(eval_ratio=0.3, max_steps=2))
        kept = shutil.copytree(tmp_path / "run" / "checkpoint-2", tmp_path / "kept")
        (tmp_path / "run" / "best").unlink()
        (tmp_path / "run" / "best").symlink_to(kept)
        loop.train(toy_run(max_steps=1, overwrite_output_dir=True))
        assert not (tmp_path / "run" / "best").is_symlink()
        assert (kept / "adapter_model.safetensors").is_file()

    def test_an_interrupted_run_chooses_the_same(self, overtaught, toy_run, tmp_path, monkeypatch):
        _, folder, _ = overtaught
        go_on = stop_at(8, monkeypatch)
        assert loop.train(toy_run(**OVERTAUGHT)).interrupted
        go_on()
        # What it had evaluated after the checkpoint that it resumes from, and a line cut short.
        with open(tmp_path / "run" / "held_out.jsonl", "a") as file:
            file.write('{"step": 15, "losses": [0, 0, 0, 0, 0, 0, 0]}\n{"step": 16, "loss')
        loop.train(toy_run(**OVERTAUGHT, resume_from_checkpoint="true"))
        for name in ("best.json", "held_out.jsonl"):
            ours, theirs = ((place / name).read_text() for place in (tmp_path / "run", folder))
            assert ours == theirs


def best_rows(folder, number=0):
    """The losses of the rows in a line of a run's evaluations."""
    return json.loads((folder / "held_out.jsonl").read_text().splitlines()[number])["losses"]


class TestEarlyStopping:
    def test_a_run_ends_whole_when_it_gets_no_better(self, overtaught, toy_run, tmp_path, capsys):
        _, folder, whole = overtaught
        ended = []
        settings = toy_run(**OVERTAUGHT | {"save_steps": 1000}, early_stopping=2)
        result = loop.train(settings, at_end=lambda *_: ended.append(True))
        assert ended == [True]
        assert not result.interrupted
        found = Evaluations.read(folder, 16, len(best_rows(folder))).all()
        wanted = next(n for n in range(1, 9) if why_no_better(found[:n], 2))
        assert result.global_step == found[wanted - 1].step < 16
        assert saved(tmp_path / "run") == [f"checkpoint-{result.global_step}"]
        assert losses(result, "eval_loss") == losses(whole, "eval_loss")[:wanted]
        out = capsys.readouterr().out
        assert f"Done: ended early after {result.global_step} of 16 steps" in out
        assert "is better by more than one standard error (2 since, early_stopping 2)" in out

        again = settings.model_copy(update={"resume_from_checkpoint": "true"})
        with pytest.raises(UserError, match=r"nothing is left to train: no evaluation") as error:
            loop.train(again)
        assert "--early_stopping none" in str(error.value)
        on = read_config(
            TrainSettings,
            str(tmp_path / "run" / "recipe.yaml"),
            {"resume_from_checkpoint": "true", "early_stopping": "none"},
        )
        assert loop.train(on).global_step == 16

    def test_an_interrupted_run_ends_at_the_same_step(self, overtaught, toy_run, monkeypatch):
        _, folder, _ = overtaught
        found = Evaluations.read(folder, 16, len(best_rows(folder))).all()
        wanted = next(one.step for n, one in enumerate(found, 1) if why_no_better(found[:n], 2))
        settings = {**OVERTAUGHT, "early_stopping": 2}
        go_on = stop_at(wanted, monkeypatch)
        assert not loop.train(toy_run(**settings)).is_done
        go_on()
        resumed = loop.train(toy_run(**settings, resume_from_checkpoint="true"))
        assert (resumed.global_step, resumed.is_done) == (wanted, True)

    def test_without_held_out_rows_it_is_refused(self, toy_run, tmp_path):
        with pytest.raises(UserError, match="no rows are held out to tell by; set eval_ratio"):
            loop.train(toy_run(early_stopping=2))
        assert not (tmp_path / "run").exists()


class TestEpochs:
    @pytest.mark.parametrize("layout", [{}, {"layout": "packed", "tokens_per_step": 128}])
    def test_checkpoints_and_evaluations_come_after_each_epoch(self, toy_run, layout, tmp_path):
        settings = {"max_steps": -1, "num_train_epochs": 2.5, "save_strategy": "epoch"}
        result = loop.train(toy_run(**settings, eval_ratio=0.3, **layout))
        epochs = losses(result, "eval_loss")
        at = [record["epoch"] for record in result.log_history if "eval_loss" in record]
        assert len(epochs) == 3
        assert at[:2] == [1, 2]
        assert 2 < at[2] < 3
        steps = [record["step"] for record in result.log_history if "eval_loss" in record]
        assert saved(tmp_path / "run") == sorted(f"checkpoint-{step}" for step in steps)

    def test_eval_steps_stay_their_own(self, toy_run):
        settings = {"max_steps": 6, "save_strategy": "epoch", "eval_steps": 4}
        result = loop.train(toy_run(**settings, eval_ratio=0.3))
        at = [record["step"] for record in result.log_history if "eval_loss" in record]
        assert at == [4, 6]

    def test_a_save_steps_without_effect_is_told(self, toy_run, capsys):
        loop.train(toy_run(max_steps=1, save_strategy="epoch", save_steps=7))
        assert "note: save_steps 7 has no effect" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("settings", "num_asked"),
        [
            ({"max_steps": -1, "num_train_epochs": 2.5, "save_strategy": "epoch"}, 3),
            ({"max_steps": 6, "save_steps": 1, "save_total_limit": 2}, 3),
            # The best one is kept besides.
            ({"max_steps": 6, "save_steps": 1, "save_total_limit": 2, "eval_ratio": 0.3}, 4),
        ],
    )
    def test_the_disk_is_asked_for_as_many_checkpoints(
        self, toy_run, monkeypatch, settings, num_asked
    ):
        def refuse(_, needed, what, fix):
            raise UserError(what)

        monkeypatch.setattr("glmtune.training.saving.run_folder.check_room", refuse)
        with pytest.raises(UserError, match=rf"^{num_asked} checkpoint\(s\) of "):
            loop.train(toy_run(**settings))

    def test_no_step_is_a_checkpoint_too_many(self, toy_run):
        every = last_checkpoint_bytes(
            toy_run(save_strategy="epoch", eval_ratio=0.3), _setup(toy_run), 100
        )
        assert every >= last_checkpoint_bytes(
            toy_run(save_steps=10, eval_ratio=0.3), _setup(toy_run), 100
        )


def _setup(toy_run):
    from glmtune.hardware import FLOAT32, Card
    from glmtune.models.loading import load_config
    from glmtune.training.planning.forecast import EqualRows, forecast

    settings = toy_run()
    rows = EqualRows.of(settings, 20)
    return forecast(settings, load_config(GLM_TINY), FLOAT32, Card.of_cpu(), rows).setup


def test_the_general_set_joins_the_rule(toy_run, tmp_path):
    """Its questions are scored before the first step and with the held-out rows."""
    settings = {"eval_ratio": 0.3, "eval_steps": 2, "general_set": True}
    loop.train(toy_run(**settings, save_steps=2))
    file = tmp_path / "run" / "held_out.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    general = {line["step"]: np.array(line["general"]) for line in lines if "general" in line}
    assert sorted(general) == [0, 2, 4]
    (name,) = {line["general_set"] for line in lines if "general" in line}
    num_rows = len(best_rows(tmp_path / "run", 1))
    found = Evaluations.read(tmp_path / "run", 4, num_rows, name).all()
    assert [(one.changes_G == general[one.step] - general[0]).all() for one in found] == [True] * 2
    assert Evaluations.read(tmp_path / "run", 4, num_rows, "another").all()[0].changes_G is None
    told = json.loads((tmp_path / "run" / "best.json").read_text())
    assert [one["general_lost"] for one in told["checkpoints"]] == [one.harms for one in found]
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    loop.train(toy_run(**settings, save_steps=2, resume_from_checkpoint="true"))
    again = map(json.loads, file.read_text().splitlines())
    assert sorted(again, key=_place) == sorted(lines, key=_place)


def _place(line):
    return line["step"], "general" in line
