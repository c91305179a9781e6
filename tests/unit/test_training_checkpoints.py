"""Finding, judging, rotating and clearing checkpoints, on folders made by hand."""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from glmtune.errors import UserError
from glmtune.training.checkpoints import (
    claim_output_dir,
    find_checkpoint,
    find_fault,
    resume_point,
    rotate_checkpoints,
    write_json,
)


def make_checkpoint(run, step):
    """A folder that has what a whole checkpoint has."""
    folder = run / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    save_file({"w": torch.zeros(3)}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text("{}")
    torch.save({"step": step}, folder / "optimizer.pt")
    torch.save({"step": step}, folder / "scheduler.pt")
    state = {"global_step": step, "stateful_callbacks": {"glmtune": {}}}
    (folder / "trainer_state.json").write_text(json.dumps(state))
    return folder


@pytest.fixture
def run(tmp_path):
    """A run folder with checkpoints 900 and 1000, which text would sort the other way."""
    for step in (900, 1000):
        make_checkpoint(tmp_path / "run", step)
    return tmp_path / "run"


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def settings(run, resume=None, overwrite=False):
    return SimpleNamespace(
        output_dir=str(run), resume_from_checkpoint=resume, overwrite_output_dir=overwrite
    )


def cut(name):
    def damage(folder):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])

    return damage


def remove(name):
    return lambda folder: (folder / name).unlink()


def rewrite(name, text):
    return lambda folder: (folder / name).write_text(text)


DAMAGES = [
    (remove("adapter_model.safetensors"), "without weights"),
    (remove("adapter_config.json"), "adapter_config.json is missing"),
    (remove("optimizer.pt"), "optimizer.pt is missing"),
    (remove("scheduler.pt"), "scheduler.pt is missing"),
    (remove("trainer_state.json"), "trainer_state.json is missing"),
    (cut("adapter_model.safetensors"), "adapter_model.safetensors is damaged"),
    (cut("optimizer.pt"), "optimizer.pt is damaged"),
    (cut("scheduler.pt"), "scheduler.pt is damaged"),
    (cut("trainer_state.json"), "trainer_state.json is damaged"),
    (rewrite("trainer_state.json", '{"global_step": 5}'), "of another program"),
]


class TestFind:
    def test_the_newest_counts_by_number(self, run):
        assert find_checkpoint(run).name == "checkpoint-1000"

    def test_a_checkpoint_is_taken_by_its_path(self, run):
        assert find_checkpoint(run / "checkpoint-900").name == "checkpoint-900"

    @pytest.mark.parametrize(("damage", "words"), DAMAGES)
    def test_a_damaged_one_is_passed_over_or_refused(self, run, damage, words, capsys):
        newest = run / "checkpoint-1000"
        assert find_fault(newest) is None
        damage(newest)
        assert words in find_fault(newest)
        assert find_checkpoint(run).name == "checkpoint-900"
        assert words in capsys.readouterr().err
        with pytest.raises(UserError) as error:
            find_checkpoint(newest)
        assert str(newest) in str(error.value)
        assert words in str(error.value)

    def test_all_damaged(self, run):
        for step in (900, 1000):
            (run / f"checkpoint-{step}" / "optimizer.pt").unlink()
        with pytest.raises(UserError, match=r"nothing to resume from: .*1000.*900"):
            find_checkpoint(run)

    def test_a_folder_without_any(self, tmp_path):
        with pytest.raises(UserError, match="there is no checkpoint-N"):
            find_checkpoint(tmp_path)

    def test_drafts_and_strangers_are_no_checkpoints(self, run):
        (run / ".checkpoint-2000.77.tmp").mkdir()
        (run / "checkpoint-best").mkdir()
        (run / "checkpoint-3000").write_text("a file")
        assert find_checkpoint(run).name == "checkpoint-1000"


class TestRotate:
    @pytest.fixture
    def steps(self, tmp_path):
        def left(saved, limit, step):
            for one in saved:
                (tmp_path / f"checkpoint-{one}").mkdir()
            rotate_checkpoints(tmp_path, limit, step)
            return sorted(int(name.partition("-")[2]) for name in names(tmp_path))

        return left

    def test_the_oldest_go(self, steps):
        assert steps([800, 900, 1000], 2, step=1000) == [900, 1000]

    def test_without_a_limit_all_stay(self, steps):
        assert steps([1, 2, 3], None, step=3) == [1, 2, 3]

    def test_fewer_than_the_limit_stay(self, steps):
        assert steps([1, 2], 5, step=2) == [1, 2]

    def test_the_one_just_saved_outlives_those_from_before_a_resume(self, steps):
        assert steps([5, 6, 8, 10], 2, step=6) == [5, 6]


class TestOutputDir:
    def test_an_absent_or_unrelated_folder_is_free(self, tmp_path):
        assert resume_point(settings(tmp_path / "new")) is None
        (tmp_path / "notes.txt").write_text("mine")
        (tmp_path / "runs").mkdir()
        assert resume_point(settings(tmp_path)) is None

    @pytest.mark.parametrize(
        "name",
        ["recipe.yaml", "metrics.jsonl", "trainer_state.json", "adapter_model.safetensors"],
    )
    def test_a_trace_of_a_run_is_enough_to_refuse(self, tmp_path, name):
        (tmp_path / name).write_text("")
        with pytest.raises(UserError, match=f"holds a run already .{name}"):
            resume_point(settings(tmp_path))
        assert resume_point(settings(tmp_path, overwrite=True)) is None

    def test_a_checkpoint_is_resumed_in_its_own_folder_or_in_a_free_one(self, run, tmp_path):
        wanted = str(run / "checkpoint-900")
        assert resume_point(settings(run, resume=wanted)).name == "checkpoint-900"
        assert resume_point(settings(tmp_path / "new", resume=wanted)).name == "checkpoint-900"
        make_checkpoint(tmp_path / "other", 7)
        with pytest.raises(UserError, match="holds a run already"):
            resume_point(settings(tmp_path / "other", resume=wanted))

    def test_resuming_keeps_the_run_and_clears_drafts(self, run):
        (run / ".checkpoint-2000.77.tmp").mkdir()
        claim_output_dir(settings(run), run / "checkpoint-900")
        assert names(run) == ["checkpoint-1000", "checkpoint-900"]

    def test_starting_anew_clears_the_run_alone(self, run):
        (run / "metrics.jsonl").write_text("")
        (run / "notes.txt").write_text("mine")
        claim_output_dir(settings(run, overwrite=True), None)
        assert names(run) == ["notes.txt"]


def test_json_replaces_a_file_only_when_whole(tmp_path):
    path = tmp_path / "state.json"
    write_json({"loss": "损失"}, path)
    with pytest.raises(TypeError):
        write_json({"loss": object()}, path)
    assert json.loads(path.read_text(encoding="utf-8")) == {"loss": "损失"}
    assert "损失" in path.read_text(encoding="utf-8")
    assert names(tmp_path) == ["state.json"]
