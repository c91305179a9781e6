"""Finding, checking, rotating and deleting checkpoints, on folders made by hand."""

import json
import math
import os

import pytest
import torch
from safetensors.torch import save_file

from glmtune.config.settings import TrainSettings
from glmtune.data.files import write_json
from glmtune.errors import UserError
from glmtune.training.saving.checkpoints import rotate_checkpoints
from glmtune.training.saving.manifest import find_fault, write_manifest
from glmtune.training.saving.run_folder import claim_output_dir, find_checkpoint, resume_point


def make_checkpoint(run, step, manifest=True):
    """A folder that has what a whole checkpoint has."""
    folder = run / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    save_file({"w": torch.zeros(3)}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text("{}")
    torch.save({"rank": 0}, folder / "rng_state_0.pth")
    torch.save({"step": step}, folder / "optimizer.pt")
    torch.save({"step": step}, folder / "scheduler.pt")
    state = {
        "global_step": step,
        "num_input_tokens_seen": 9,
        "log_history": [],
        "stateful_callbacks": {"glmtune": {}},
    }
    (folder / "trainer_state.json").write_text(json.dumps(state))
    if manifest:
        write_manifest(folder, step, {"data sha256": "0"})
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
    return TrainSettings(
        dataset_path="rows",
        output_dir=str(run),
        resume_from_checkpoint=resume,
        overwrite_output_dir=overwrite,
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


def flip(name):
    """Flip one bit in the middle of the file."""

    def damage(folder):
        content = bytearray((folder / name).read_bytes())
        content[len(content) // 2] ^= 1
        (folder / name).write_bytes(content)

    return damage


def edit_manifest(change):
    def damage(folder):
        path = folder / "manifest.json"
        path.write_text(json.dumps(change(json.loads(path.read_text()))))

    return damage


def change_size(content, size):
    content["files"]["optimizer.pt"]["size"] = size
    return content


def add_file(content, name):
    content["files"][name] = {"size": 1, "sha256": "0"}
    return content


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
]
# Damage that only a manifest shows.
SILENT_DAMAGES = [
    (flip("adapter_model.safetensors"), "adapter_model.safetensors is damaged: its sha256"),
    (flip("adapter_config.json"), "adapter_config.json is damaged: its sha256"),
    (flip("optimizer.pt"), "optimizer.pt is damaged: its sha256"),
    (flip("rng_state_0.pth"), "rng_state_0.pth is damaged: its sha256"),
    (remove("rng_state_0.pth"), "rng_state_0.pth is missing"),
    (cut("manifest.json"), "manifest.json is damaged"),
    (rewrite("manifest.json", "[]"), "manifest.json is damaged"),
    (edit_manifest(lambda content: content | {"step": None}), "manifest.json is damaged"),
    (edit_manifest(lambda content: change_size(content, None)), "manifest.json is damaged"),
    (edit_manifest(lambda content: change_size(content, math.inf)), "manifest.json is damaged"),
    (edit_manifest(lambda content: add_file(content, "x" * 300)), "is missing"),
    (edit_manifest(lambda content: add_file(content, "x\0")), "is missing"),
    (rewrite("manifest.json", "[" * 100_000), "manifest.json is damaged"),
    (rewrite("manifest.json", '{"step": 1000, "files": {}}'), "does not list adapter_model"),
    (edit_manifest(lambda content: content | {"step": 7}), "it holds step 7"),
    (
        edit_manifest(lambda content: add_file(content, "../checkpoint-900/optimizer.pt")),
        "no file of this folder",
    ),
]


class TestFind:
    def test_the_newest_counts_by_number(self, run):
        assert find_checkpoint(run) == (run / "checkpoint-1000", [])

    def test_a_checkpoint_is_taken_by_its_path(self, run):
        assert find_checkpoint(run / "checkpoint-900") == (run / "checkpoint-900", [])

    @pytest.mark.parametrize("manifest", [True, False])
    @pytest.mark.parametrize(("damage", "words"), DAMAGES)
    def test_a_damaged_checkpoint_is_passed_over(self, tmp_path, manifest, damage, words):
        for step in (900, 1000):
            make_checkpoint(tmp_path, step, manifest)
        self.check_damage(tmp_path, damage, words)

    @pytest.mark.parametrize(("damage", "words"), SILENT_DAMAGES)
    def test_a_checkpoint_that_differs_from_its_manifest_is_passed_over(self, run, damage, words):
        self.check_damage(run, damage, words)

    def check_damage(self, run, damage, words):
        newest = run / "checkpoint-1000"
        assert find_fault(newest) is None
        damage(newest)
        assert words in find_fault(newest)
        for wanted in (run, newest):
            found, (note,) = find_checkpoint(wanted)
            assert found == run / "checkpoint-900"
            assert f"passed over {newest}: " in note
            assert words in note

    def test_a_damaged_checkpoint_gives_way_to_earlier_ones_only(self, run):
        remove("optimizer.pt")(run / "checkpoint-900")
        with pytest.raises(UserError, match=r"nothing to resume from: .*optimizer.pt is missing"):
            find_checkpoint(run / "checkpoint-900")

    def test_a_checkpoint_of_the_original_is_told_as_such(self, run):
        """Its Trainer wrote the same names, but not what a step depends on."""
        theirs = make_checkpoint(run, 2000, manifest=False)
        (theirs / "trainer_state.json").write_text('{"global_step": 2000}')
        (theirs / "training_args.bin").write_bytes(b"")
        assert "transformers' Trainer" in find_fault(theirs)
        assert find_checkpoint(run)[0] == run / "checkpoint-1000"

    def test_a_state_that_is_not_ours(self, tmp_path):
        folder = make_checkpoint(tmp_path, 3, manifest=False)
        rewrite("trainer_state.json", '{"global_step": 5}')(folder)
        assert "of another program" in find_fault(folder)

    def test_a_folder_of_damaged_checkpoints_alone(self, run):
        for step in (900, 1000):
            (run / f"checkpoint-{step}" / "optimizer.pt").unlink()
        with pytest.raises(UserError, match=r"nothing to resume from: .*1000.*900"):
            find_checkpoint(run)

    def test_a_folder_without_checkpoints(self, tmp_path):
        with pytest.raises(UserError, match="there is no checkpoint-N"):
            find_checkpoint(tmp_path)

    def test_drafts_and_strangers_are_no_checkpoints(self, run):
        (run / ".checkpoint-2000.77.tmp").mkdir()
        (run / "checkpoint-best").mkdir()
        (run / "checkpoint-3000").write_text("a file")
        assert find_checkpoint(run)[0].name == "checkpoint-1000"


class TestRotate:
    @pytest.fixture
    def steps(self, tmp_path):
        def left(saved, limit, step):
            for one in saved:
                make_checkpoint(tmp_path, one)
            rotate_checkpoints(tmp_path, limit, step)
            return sorted(int(name.partition("-")[2]) for name in names(tmp_path))

        return left

    def test_the_oldest_checkpoints_go(self, steps):
        assert steps([800, 900, 1000], 2, step=1000) == [900, 1000]

    def test_without_a_limit_all_checkpoints_stay(self, steps):
        assert steps([1, 2, 3], None, step=3) == [1, 2, 3]

    def test_fewer_checkpoints_than_the_limit_stay(self, steps):
        assert steps([1, 2], 5, step=2) == [1, 2]

    def test_the_checkpoint_just_saved_outlives_those_from_before_a_resume(self, steps):
        assert steps([5, 6, 8, 10], 2, step=6) == [5, 6]

    @pytest.mark.parametrize("damage", [flip("optimizer.pt"), cut("adapter_model.safetensors")])
    def test_no_checkpoint_goes_for_one_that_is_not_whole(self, run, damage):
        damage(make_checkpoint(run, 1100))
        with pytest.raises(UserError, match=r"checkpoint-1100: was written, but read back"):
            rotate_checkpoints(run, 1, step=1100)
        assert names(run) == ["checkpoint-1000", "checkpoint-1100", "checkpoint-900"]

    def test_no_part_of_a_deleted_checkpoint_keeps_its_name(self, run, monkeypatch):
        """Deleting takes several calls, after each of which the process may be killed."""

        def killed(path, **_):
            assert names(run) == [f".checkpoint-900.{os.getpid()}.old", "checkpoint-1000"]
            raise KeyboardInterrupt

        monkeypatch.setattr("shutil.rmtree", lambda path, **how: killed(path) if not how else None)
        with pytest.raises(KeyboardInterrupt):
            rotate_checkpoints(run, 1, step=1000)


class TestOutputDir:
    def test_an_absent_or_unrelated_folder_is_free(self, tmp_path):
        assert resume_point(settings(tmp_path / "new")) == (None, [])
        (tmp_path / "notes.txt").write_text("mine")
        (tmp_path / "runs").mkdir()
        assert resume_point(settings(tmp_path)) == (None, [])

    @pytest.mark.parametrize(
        "name",
        ["recipe.yaml", "metrics.jsonl", "trainer_state.json", "adapter_model.safetensors"],
    )
    def test_a_trace_of_a_run_is_enough_to_refuse(self, tmp_path, name):
        (tmp_path / name).write_text("")
        with pytest.raises(UserError, match=f"holds a run already .{name}"):
            resume_point(settings(tmp_path))
        assert resume_point(settings(tmp_path, overwrite=True)) == (None, [])

    def test_a_checkpoint_is_resumed_in_its_own_folder_or_in_a_free_one(self, run, tmp_path):
        wanted = str(run / "checkpoint-900")
        assert resume_point(settings(run, resume=wanted))[0].name == "checkpoint-900"
        free = settings(tmp_path / "new", resume=wanted)
        assert resume_point(free)[0].name == "checkpoint-900"
        make_checkpoint(tmp_path / "other", 7)
        with pytest.raises(UserError, match="holds a run already"):
            resume_point(settings(tmp_path / "other", resume=wanted))

    def test_auto_resumes_where_there_is_a_checkpoint_and_else_begins(self, run, tmp_path):
        assert resume_point(settings(tmp_path / "new", resume="auto")) == (None, [])
        checkpoint, notes = resume_point(settings(run, resume="auto"))
        assert checkpoint.name == "checkpoint-1000"
        assert notes == [f"{run}: resumed"]

    def test_auto_begins_anew_over_a_run_that_had_saved_nothing(self, tmp_path):
        (tmp_path / "metrics.jsonl").write_text("")
        assert resume_point(settings(tmp_path, resume="auto")) == (None, [])
        (tmp_path / "adapter_model.safetensors").write_text("an adapter whose checkpoints are gone")
        with pytest.raises(UserError, match="holds a run already"):
            resume_point(settings(tmp_path, resume="auto"))

    def test_a_restart_of_torchrun_resumes_unasked(self, run, tmp_path, monkeypatch):
        with pytest.raises(UserError, match="holds a run already"):
            resume_point(settings(run))
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
        assert resume_point(settings(run))[0].name == "checkpoint-1000"
        nothing = tmp_path / "nothing"
        nothing.mkdir()
        (nothing / "metrics.jsonl").write_text("")
        told = f"{nothing}: nothing was saved, begun anew"
        assert resume_point(settings(nothing)) == (None, [told])

    def test_resuming_keeps_the_run_and_clears_drafts_of_ours(self, run):
        for ours in (".checkpoint-2000.77.tmp", ".checkpoint-900.8.old", ".files.77.tmp"):
            (run / ours).mkdir()
        (run / ".metrics.jsonl.77.tmp").write_text("")
        theirs = [".cache", ".checkpoint-best.77.tmp", ".notes.txt.77.tmp", ".checkpoint-1"]
        for name in theirs:
            (run / name).mkdir()
        claim_output_dir(settings(run), run / "checkpoint-900")
        assert names(run) == sorted([*theirs, "checkpoint-1000", "checkpoint-900", "recipe.yaml"])

    def test_starting_anew_clears_the_run_alone(self, run):
        (run / "metrics.jsonl").write_text("")
        (run / "notes.txt").write_text("mine")
        claim_output_dir(settings(run, overwrite=True), None)
        assert names(run) == ["notes.txt", "recipe.yaml"]


def test_json_replaces_a_file_only_when_whole(tmp_path):
    path = tmp_path / "state.json"
    write_json({"loss": "损失"}, path)
    with pytest.raises(TypeError):
        write_json({"loss": object()}, path)
    assert json.loads(path.read_text(encoding="utf-8")) == {"loss": "损失"}
    assert "损失" in path.read_text(encoding="utf-8")
    assert names(tmp_path) == ["state.json"]
