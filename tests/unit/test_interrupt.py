"""What ends a run early: signals at any moment, the clock, memory or disk that is too small."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from glmtune import runlog
from glmtune.config import TrainSettings
from glmtune.errors import UserError
from glmtune.models.resolve import GLM_TINY
from glmtune.training import loop, passes
from glmtune.training.saving import checkpoints, disk
from glmtune.training.saving.disk import check_room, checkpoint_bytes, most_new_checkpoints
from glmtune.training.saving.manifest import find_fault
from glmtune.training.saving.run_folder import find_checkpoint


@pytest.fixture(autouse=True)
def no_curve(monkeypatch):
    """Drawing takes longer than training these few rows."""
    monkeypatch.setattr("glmtune.runlog.RunLog.plot_loss", lambda *_: None)


def records(folder):
    """All that was logged but the speed."""
    lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    drop = ("tokens_per_second", "memory_gib")
    return [{k: v for k, v in json.loads(line).items() if k not in drop} for line in lines]


def weights(folder):
    return (Path(folder) / "adapter_model.safetensors").read_bytes()


def saved(folder):
    return sorted(path.name for path in Path(folder).glob("checkpoint-*"))


class TestSignals:
    """A real process, told to stop while it does one thing or another."""

    def stopped(self, rows, folder, moment, number):
        """Start a run, send it a signal at a moment; gives its output and exit code."""
        child = subprocess.Popen(
            [sys.executable, __file__, moment, rows, str(folder)],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            out = ""
            while f"now {moment}" not in out:
                line = child.stdout.readline()
                assert line, child.stderr.read()
                out += line
            child.send_signal(number)
            rest, err = child.communicate(timeout=300)
        finally:
            child.kill()
        assert "Traceback" not in err
        return out + rest, err, child.returncode

    @pytest.mark.parametrize(
        ("moment", "checkpoint", "number"),
        [
            ("stepping", 3, signal.SIGTERM),
            ("evaluating", 2, signal.SIGINT),
            ("saving", 2, signal.SIGTERM),
            ("accumulating", 2, signal.SIGINT),
            pytest.param("stepping", 3, signal.SIGINT, marks=pytest.mark.slow),
            pytest.param("evaluating", 2, signal.SIGTERM, marks=pytest.mark.slow),
            pytest.param("saving", 2, signal.SIGINT, marks=pytest.mark.slow),
            pytest.param("accumulating", 2, signal.SIGTERM, marks=pytest.mark.slow),
        ],
    )
    def test_a_signalled_run_saves_and_ends(self, toy_rows, tmp_path, moment, checkpoint, number):
        folder = tmp_path / "run"
        out, err, code = self.stopped(toy_rows, folder, moment, number)
        assert code == 130
        assert err.endswith("interrupted\n")
        newest, notes = find_checkpoint(folder)
        assert (newest.name, notes) == (f"checkpoint-{checkpoint}", [])
        assert f"--resume_from_checkpoint {newest}" in out
        assert not [entry for entry in folder.iterdir() if entry.name.startswith(".")]

    def test_a_signal_before_the_first_step_leaves_nothing_written(self, toy_rows, tmp_path):
        for number in (signal.SIGTERM, signal.SIGINT):
            _, err, code = self.stopped(toy_rows, tmp_path / "run", "loading", number)
            assert (code, err.splitlines()[-1]) == (130, "interrupted")
            assert not (tmp_path / "run").exists()


def be_stopped(moment, rows, folder):
    """The process that is told to stop: a run that says when the moment is there, and dwells."""
    from glmtune.cli import main

    def dwell(seconds):
        print(f"now {moment}", flush=True)
        time.sleep(seconds)

    def slow(call, seconds, at=lambda *_: True):
        def slowed(*args, **how):
            if at(*args):
                dwell(seconds)
            return call(*args, **how)

        return slowed

    if moment == "loading":
        loop.load_base_model = slow(loop.load_base_model, 40)
    elif moment == "stepping":
        loop.sum_gradients = slow(loop.sum_gradients, 2, FromCall(3))
    elif moment == "evaluating":  # 20 s for its four rows
        passes.PaddedPass.loss = slow(passes.PaddedPass.loss, 5)
    elif moment == "saving":
        checkpoints.write_manifest = slow(checkpoints.write_manifest, 2)
    else:  # of four passes, which take 20 s
        passes.PaddedPass.run = slow(passes.PaddedPass.run, 5, FromCall(9))
    flags = {
        "dataset_path": rows, "output_dir": folder, "chatglm_path": GLM_TINY, "use_cpu": "true",
        "per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "max_steps": 10000,
        "per_device_eval_batch_size": 1, "eval_ratio": 0.17, "eval_steps": 2, "save_steps": 2,
        "report_to": "none",
    }  # fmt: skip
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    sys.exit(main(["train", *words]))


class FromCall:
    """True from the n-th call on."""

    def __init__(self, number):
        self.left = number

    def __call__(self, *_):
        self.left -= 1
        return self.left <= 0


def test_an_evaluation_that_was_cut_short_is_made_up_for(toy_run, tmp_path, monkeypatch):
    """The run that goes on has the records and the weights of one that was never stopped."""
    settings = {"eval_ratio": 0.3, "eval_steps": 2, "per_device_eval_batch_size": 2}
    loop.train(toy_run(output_dir=str(tmp_path / "unbroken"), **settings))
    loss, at = passes.PaddedPass.loss, FromCall(2)

    def interrupted(self, row_ids):
        if at():
            os.kill(os.getpid(), signal.SIGTERM)
        return loss(self, row_ids)

    monkeypatch.setattr(passes.PaddedPass, "loss", interrupted)
    stopped = loop.train(toy_run(**settings))
    assert (stopped.interrupted, stopped.global_step) == (True, 2)
    assert not [record for record in records(tmp_path / "run") if "eval_loss" in record]
    monkeypatch.setattr(passes.PaddedPass, "loss", loss)
    loop.train(toy_run(resume_from_checkpoint="true", **settings))
    assert records(tmp_path / "run") == records(tmp_path / "unbroken")
    assert weights(tmp_path / "run") == weights(tmp_path / "unbroken")


class TestTheClock:
    def test_a_run_out_of_time_ends_with_a_checkpoint_and_says_how_to_go_on(
        self, toy_run, tmp_path, capsys
    ):
        loop.train(toy_run(output_dir=str(tmp_path / "unbroken")))
        capsys.readouterr()
        stopped = loop.train(toy_run(max_hours=1e-9))
        assert not stopped.interrupted
        assert stopped.global_step == 0
        out = capsys.readouterr().out
        checkpoint = tmp_path / "run" / "checkpoint-0"
        assert "max_hours (1e-09) is reached: stopping, with a checkpoint" in out
        assert "Stopped after step 0 of 4 steps" in out
        assert f"--resume_from_checkpoint {checkpoint}\n" in out
        loop.train(toy_run(resume_from_checkpoint="true"))
        assert weights(tmp_path / "run") == weights(tmp_path / "unbroken")

    def test_the_clock_is_read_between_passes(self, toy_run, monkeypatch):
        run, clock = passes.PaddedPass.run, SimpleNamespace(seconds=0.0)

        def an_hour_later(self, *args):
            clock.seconds += 3600
            return run(self, *args)

        monkeypatch.setattr(passes.PaddedPass, "run", an_hour_later)
        monkeypatch.setattr(
            "glmtune.training.interrupt.time", SimpleNamespace(monotonic=lambda: clock.seconds)
        )
        # Two passes a step: three hours are over after the first pass of the second step.
        assert loop.train(toy_run(max_hours=3)).global_step == 1


class TestMemory:
    def run_out(self, monkeypatch, method, number):
        """Let a pass run out of memory, after it has moved what a pass moves."""
        call, at = getattr(passes.PaddedPass, method), FromCall(number)

        def full(self, *args):
            result = call(self, *args)
            if at():
                raise torch.OutOfMemoryError("CUDA out of memory")
            return result

        monkeypatch.setattr(passes.PaddedPass, method, full)
        return lambda: monkeypatch.setattr(passes.PaddedPass, method, call)

    def test_steps_before_memory_ran_out_are_saved_and_gone_on_with(
        self, toy_run, tmp_path, monkeypatch
    ):
        """Bit for bit, though one pass of the failed step had drawn its dropout and gradients."""
        loop.train(toy_run(output_dir=str(tmp_path / "unbroken")))
        mend = self.run_out(monkeypatch, "run", 6)
        with pytest.raises(UserError) as error:
            loop.train(toy_run())
        checkpoint = tmp_path / "run" / "checkpoint-2"
        for words in (
            "small for this: per_device_train_batch_size 1, gradient_accumulation_steps 6 would",
            "; or gradient_checkpointing true would take",
            "checkpoint-2 is whole: go on with `glmtune train ",
            f"--resume_from_checkpoint {checkpoint}`",
        ):
            assert words in str(error.value)
        assert "\n" not in str(error.value)
        assert find_fault(checkpoint) is None
        mend()
        loop.train(toy_run(resume_from_checkpoint="true"))
        assert weights(tmp_path / "run") == weights(tmp_path / "unbroken")
        assert records(tmp_path / "run") == records(tmp_path / "unbroken")

    def test_what_is_advised_can_be_resumed_with(self, toy_run, monkeypatch):
        mend = self.run_out(monkeypatch, "run", 5)
        with pytest.raises(UserError):
            loop.train(toy_run(per_device_train_batch_size=2))
        mend()
        advised = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
        more = {"gradient_checkpointing": "true", "resume_from_checkpoint": "true"}
        assert loop.train(toy_run(**advised, **more)).global_step == 4

    def test_memory_that_runs_out_in_an_evaluation(self, toy_run, tmp_path, monkeypatch):
        self.run_out(monkeypatch, "loss", 1)
        with pytest.raises(UserError, match=r"halve per_device_eval_batch_size \(8\).*go on with"):
            loop.train(toy_run(eval_ratio=0.3, eval_steps=3))
        assert saved(tmp_path / "run") == ["checkpoint-3"]


class TestDisk:
    """A disk that is full or fails, a folder that vanishes: one line, and the last good one."""

    @pytest.fixture
    def kept(self, toy_run, tmp_path):
        """Train until something fails in the save of step 3, and look at what there is."""

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
            assert "checkpoint-2 is whole: go on with `glmtune train" in told
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
        """It may have been moved: nothing is written where it was, and it can be gone on with."""
        train_step = loop.train_step

        def moved(run, state, *how):
            if state.global_step == 2:
                (tmp_path / "run").rename(tmp_path / "moved")
            return train_step(run, state, *how)

        monkeypatch.setattr(loop, "train_step", moved)
        told = kept.look("run: this run's folder is no longer there")
        assert "no checkpoint of this run to go on from" in told
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
        """A write that the kernel cuts off in a real process: exit code 2, one line, no draft."""
        folder = tmp_path / "run"
        settings = (
            f"--dataset_path {toy_rows} --output_dir {folder} --chatglm_path {GLM_TINY} --use_cpu "
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
            from safetensors.torch import load_file

            sizes = load_file(folder / "adapter_model.safetensors").values()
            reckoned = checkpoint_bytes(sizes, num_processes=1, num_records=4)
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


def test_max_hours_is_above_0():
    with pytest.raises(ValueError, match="greater than 0"):
        TrainSettings(dataset_path="rows", output_dir="run", max_hours=0)


if __name__ == "__main__":
    be_stopped(*sys.argv[1:])
