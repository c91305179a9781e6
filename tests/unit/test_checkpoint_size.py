"""The size of a checkpoint is computed by one formula, before training and in the doctor."""

import re
from pathlib import Path

import pytest

from glmtune import disk
from glmtune.config.reading import write_recipe
from glmtune.config.settings import DoctorSettings
from glmtune.doctor import run as doctor
from glmtune.errors import UserError
from glmtune.training import loop
from glmtune.training.saving import checkpoints, run_folder

CASES = {
    "few": {"max_steps": 4},
    "by epochs": {"max_steps": -1, "num_train_epochs": 2},
    "evaluated": {
        "max_steps": 4, "save_steps": 2, "eval_ratio": 0.2, "lora_target": "all",
        "save_total_limit": 1,
    },
    "packed": {"max_steps": -1, "num_train_epochs": 3, "layout": "packed", "tokens_per_step": 64},
}  # fmt: skip


@pytest.fixture(autouse=True)
def no_curve(monkeypatch):
    monkeypatch.setattr("glmtune.runlog.RunLog.plot_loss", lambda *_: None)


def told_of_run_folder(settings, tmp_path):
    """The doctor's finding on a recipe's run folder."""
    recipe = tmp_path / "recipe.yaml"
    write_recipe(settings, str(recipe))
    findings = doctor.examine(DoctorSettings(recipe_path=str(recipe)))
    return [finding for finding in findings if finding.check == "run folder"][-1]


@pytest.mark.parametrize("case", CASES)
def test_train_and_doctor_refuse_a_small_disk_in_the_same_words(
    case, toy_run, tmp_path, monkeypatch
):
    settings = toy_run(**{"save_steps": 1, **CASES[case]})
    monkeypatch.setattr(disk, "free_bytes", lambda folder: 0)
    finding = told_of_run_folder(settings, tmp_path)
    with pytest.raises(UserError, match=r"checkpoint\(s\) of \d") as caught:
        loop.train(settings)
    assert (finding.status, finding.text) == ("problem", str(caught.value))
    assert not Path(settings.output_dir).exists()


@pytest.mark.parametrize("targets", ["query_key_value", "all"])
def test_what_the_doctor_tells_is_what_a_checkpoint_takes(targets, toy_run, tmp_path):
    settings = toy_run(lora_target=targets, eval_ratio=0.2, eval_steps=1)
    finding = told_of_run_folder(settings, tmp_path)
    told = float(re.search(r"takes ([\d.]+) MB", finding.text)[1]) * 1e6
    loop.train(settings)
    written = Path(settings.output_dir, "checkpoint-4").iterdir()
    taken = sum(file.stat().st_size for file in written)
    assert 0.8 * told < taken <= told + 0.05e6  # rounded to a tenth of a megabyte


@pytest.mark.parametrize("eval_ratio", [0.0, 0.3])
def test_what_is_planned_for_the_last_checkpoint_is_what_it_asks_for(
    eval_ratio, toy_run, monkeypatch
):
    """Except for a record or two that are planned but not written."""
    settings = toy_run(
        eval_ratio=eval_ratio, eval_steps=2, logging_steps=3, save_steps=4, max_steps=12
    )
    asked, planned = [], []
    needed, last = checkpoints.checkpoint_bytes, run_folder.last_checkpoint_bytes

    def spy(*sizes):
        asked.append(needed(*sizes))
        return asked[-1]

    monkeypatch.setattr(checkpoints, "checkpoint_bytes", spy)
    monkeypatch.setattr(
        run_folder, "last_checkpoint_bytes", lambda *run: planned.append(last(*run)) or planned[-1]
    )
    loop.train(settings)
    assert len(asked) == 3
    record = needed(0, 0, 0, 1) - needed(0, 0, 0, 0)
    assert 0 <= planned[0] - asked[-1] <= 2 * record
