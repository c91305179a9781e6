"""A disk that is too small or fails: found before a run, or reported with a good checkpoint."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from toys import adapter_weights, saved

from glmtune import cli, disk, runlog
from glmtune.disk import check_room
from glmtune.errors import UserError
from glmtune.models.resolve import GLM_TINY
from glmtune.training import loop
from glmtune.training.saving import checkpoints
from glmtune.training.saving.checkpoint_size import checkpoint_bytes, most_new_checkpoints
from glmtune.training.saving.manifest import find_fault
from glmtune.training.saving.run_folder import find_checkpoint

pytestmark = pytest.mark.usefixtures("no_curve")


class TestDisk:
    """A disk that is full or fails, a folder that vanishes: one line, and the last good one."""

    @pytest.fixture
    def kept(self, toy_run, tmp_path):
        """Train until something fails while step 3 is saved, and check the files."""

        def look(words, **settings):
            with pytest.raises(UserError) as error:
                loop.train(toy_run(save_steps=1, save_total_limit=1, **settings))
            told = str(error.value)
            assert words in told
            assert "\n" not in told
            assert ".tmp" not in told
            return told

        def check(words, **settings):
            told = look(words, **settings)
            assert "checkpoint-2 is whole: resume with `glmtune train" in told
            assert saved(tmp_path / "run") == ["checkpoint-2"]
            assert find_fault(tmp_path / "run" / "checkpoint-2") is None
            entries = [entry.name for entry in (tmp_path / "run").iterdir()]
            assert not [name for name in entries if name.startswith(".")]

        check.look = look
        return check

    @pytest.mark.parametrize("call", ["fsync", "rename", "mkdir"])
    @pytest.mark.parametrize(("number", "words"), [(28, "No space left"), (5, "Input/output")])
    def test_a_save_whose_call_fails(self, kept, monkeypatch, call, number, words):
        real = getattr(os, call)

        def fails(path, *args, **how):
            name = os.readlink(f"/proc/self/fd/{path}") if isinstance(path, int) else str(path)
            if "checkpoint-3." in name:
                raise OSError(number, os.strerror(number))
            return real(path, *args, **how)

        monkeypatch.setattr(os, call, fails)
        kept(words)

    @pytest.mark.parametrize(
        "file", ["adapter_model.safetensors", "optimizer.pt", "rng_state_0.pth", "manifest.json"]
    )
    def test_a_file_that_cannot_be_written(self, kept, monkeypatch, file):
        real = Path.write_text if file.endswith("json") else Path.write_bytes

        def fails(path, content, **how):
            if path.name == file and "checkpoint-3" in str(path):
                real(path, content[:100], **how)
                raise OSError(28, "No space left on device")
            return real(path, content, **how)

        monkeypatch.setattr(Path, real.__name__, fails)
        kept("checkpoint-3: cannot be written (No space left on device)")

    def test_too_little_room_is_seen_before_a_save(self, kept, monkeypatch):
        usage = shutil.disk_usage

        def shrinking(path):
            free = 10**5 if str(path).endswith("run") and saved(path) == ["checkpoint-2"] else 10**9
            return usage(path)._replace(free=free)

        monkeypatch.setattr(disk.shutil, "disk_usage", shrinking)
        kept("checkpoint-3: 0 MB are free, but the checkpoint takes 1 MB; free some space there")

    def test_too_little_room_is_seen_before_training(self, toy_run, tmp_path, monkeypatch):
        usage = shutil.disk_usage(tmp_path)
        monkeypatch.setattr(disk.shutil, "disk_usage", lambda path: usage._replace(free=2 * 10**6))
        with pytest.raises(UserError) as error:
            loop.train(toy_run(save_steps=1))
        for words in ("2 MB are free", "4 checkpoint(s) of 0.", "save_total_limit", "save_steps"):
            assert words in str(error.value)
        assert not (tmp_path / "run").exists()
        assert loop.train(toy_run(save_steps=1, save_total_limit=1)).global_step == 4

    def test_a_disk_that_is_full_while_a_record_is_logged(self, kept, monkeypatch):
        class Full:
            def __init__(self, file):
                self.file = file

            def write(self, line):
                if json.loads(line)["step"] == 3:
                    raise OSError(28, "No space left on device")
                self.file.write(line)

            def __getattr__(self, name):
                return getattr(self.file, name)

        rewrite = runlog._rewrite_metrics
        monkeypatch.setattr(runlog, "_rewrite_metrics", lambda *args: Full(rewrite(*args)))
        told = kept.look("metrics.jsonl: cannot be written (No space left on device)")
        assert told

    def test_a_run_folder_that_vanishes(self, kept, tmp_path, monkeypatch):
        """It may have been moved: nothing is written in its old place, and it can be resumed."""
        train_step = loop.train_step

        def moved(run, state, *how):
            if state.global_step == 2:
                (tmp_path / "run").rename(tmp_path / "moved")
            return train_step(run, state, *how)

        monkeypatch.setattr(loop, "train_step", moved)
        told = kept.look("run: this run's folder is no longer there")
        assert "no checkpoint of this run to resume from" in told
        assert not (tmp_path / "run").exists()
        assert find_checkpoint(tmp_path / "moved")[0].name == "checkpoint-2"

    def test_a_draft_that_vanishes(self, kept, monkeypatch):
        write_manifest = checkpoints.write_manifest

        def vanish(folder, step, identity):
            if step == 3:
                shutil.rmtree(folder)
            write_manifest(folder, step, identity)

        monkeypatch.setattr(checkpoints, "write_manifest", vanish)
        kept("checkpoint-3: cannot be written (No such file or directory)")

    def test_a_limit_of_the_system_on_files(self, toy_rows, tmp_path):
        """The kernel cuts off a write in a real process: exit code 2, one line, no draft."""
        folder = tmp_path / "run"
        settings = (
            f"--dataset_path {toy_rows} --output_dir {folder} --base {GLM_TINY} --use_cpu "
            "true --per_device_train_batch_size 3 --max_steps 4 --report_to none"
        )
        done = subprocess.run(
            ["bash", "-c", f"ulimit -f 200; exec {sys.executable} -m glmtune train {settings}"],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=200,
        )
        assert done.returncode == 2, done.stderr
        assert "Traceback" not in done.stderr
        last = done.stderr.splitlines()[-1]
        assert "checkpoint-4: cannot be written (File too large)" in last
        assert "there is no checkpoint of this run" in last
        assert not [entry.name for entry in folder.iterdir() if "checkpoint" in entry.name]


class TestRoom:
    def test_a_checkpoint_takes_no_more_than_is_reckoned_with(self, toy_run, tmp_path):
        for name, targets in (("a", "all"), ("b", "query_key_value")):
            settings = {"lora_target": targets, "logging_steps": 1, "max_steps": 4}
            folder = tmp_path / name
            result = loop.train(toy_run(output_dir=str(folder), **settings))
            tensors = loop.checkpoints.read_trainer_state(folder)
            assert len(tensors["log_history"]) == len(result.log_history) == 4
            weights = adapter_weights(folder).values()
            num_weights = sum(weight.numel() for weight in weights)
            reckoned = checkpoint_bytes(num_weights, len(weights), num_processes=1, num_records=4)
            taken = sum(file.stat().st_size for file in (folder / "checkpoint-4").iterdir())
            assert 0.8 * reckoned < taken <= reckoned

    @pytest.mark.parametrize(
        ("num_saves", "num_there", "limit", "expected"),
        [
            (52, 0, None, 52),
            (52, 0, 2, 3),
            (2, 0, 2, 2),
            (10, 2, 2, 1),
            (10, 9, 2, 1),
            (10, 1, 3, 3),
            (0, 3, 2, 0),
            (0, 0, None, 0),
        ],
    )
    def test_how_many_checkpoints_there_will_be_at_a_time(
        self, num_saves, num_there, limit, expected
    ):
        assert most_new_checkpoints(num_saves, num_there, limit) == expected

    def test_a_folder_that_is_not_there_yet_is_on_the_disk_of_the_one_above(self, tmp_path):
        check_room(tmp_path / "a" / "b", 1, "it takes", "")
        with pytest.raises(UserError, match=r"b: [\d,]+ MB are free, but it takes 1,000,000,000"):
            check_room(tmp_path / "a" / "b", 10**15, "it takes", "free some")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("new-model {}/new --like glm-tiny", "the weights take 11 MB; name a folder on another"),
        ("demo --out {}/new", "the demo takes at most 67 MB; free some"),
        ("bench memory --shape small --use_cpu true", "random weights take at most"),
    ],
)
def test_too_little_room_is_told_in_one_line(line, words, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(disk, "free_bytes", lambda folder: 10**6)
    assert cli.main(line.format(tmp_path).split()) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert ": 1 MB are free, but " in told
    assert words in told
    assert not (tmp_path / "new").exists()
