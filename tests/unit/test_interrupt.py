"""What ends a run early: signals at any moment, the clock, memory that is too small."""

import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import stopped_run
import torch
from stopped_run import FromCall
from torch.distributed import HashStore
from toys import losses, records, saved

from glmtune.config.settings import TrainSettings
from glmtune.errors import UserError
from glmtune.signals import signal_handler
from glmtune.training import loop, passes
from glmtune.training.peers import Peers
from glmtune.training.saving.manifest import find_fault
from glmtune.training.saving.run_folder import find_checkpoint

pytestmark = pytest.mark.usefixtures("no_curve")


def weights(folder):
    return (Path(folder) / "adapter_model.safetensors").read_bytes()


class TestSignals:
    """A real process that gets a signal during different stages."""

    def stopped(self, rows, folder, moment, number):
        """Start a run, send it a signal at a moment; gives its output and exit code."""
        out, err = (folder.with_suffix(f".{number}.{name}") for name in ("out", "err"))
        child = stopped_run.start(moment, rows, folder, out, err)
        try:
            while not out.exists() or f"now {moment}" not in out.read_text(encoding="utf-8"):
                assert child.is_alive(), err.read_text(encoding="utf-8")
                time.sleep(0.05)
            os.kill(child.pid, number)
            child.join(timeout=300)
        finally:
            child.kill()
        out, err = (file.read_text(encoding="utf-8") for file in (out, err))
        assert "Traceback" not in err
        return out, err, child.exitcode

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


@pytest.mark.parametrize("moment", ["prepare", "fit"])
def test_a_signal_does_not_end_a_process_that_waits_for_word_of_the_others(
    toy_run, monkeypatch, moment
):
    """torchrun sends one as soon as a process is gone, and the others have to say which."""
    store = HashStore()
    peers = Peers(0, 2, lambda **_: store)
    monkeypatch.setattr(loop.Peers, "of_launch", lambda *_: peers)

    def fail(*_):
        raise RuntimeError("Connection reset by peer")

    def signalled(_):
        os.kill(os.getpid(), signal.SIGTERM)
        return "process 1 of 2 is gone"

    monkeypatch.setattr(loop, moment, fail)
    monkeypatch.setattr(peers, "_words_within", signalled)
    ended = []
    with (
        signal_handler(lambda *_: ended.append("ended"), signal.SIGTERM),
        pytest.raises(UserError, match="process 1 of 2 is gone"),
    ):
        loop.train(toy_run())
    assert not ended


def test_an_evaluation_that_was_cut_short_is_made_up_for(toy_run, tmp_path, monkeypatch):
    """The resumed run has the records and weights of one that was never stopped."""
    settings = {"eval_ratio": 0.3, "eval_steps": 2, "per_device_eval_batch_size": 2}
    loop.train(toy_run(output_dir=str(tmp_path / "unbroken"), **settings))
    row_losses, at = passes.PaddedPass.row_losses, FromCall(2)

    def interrupted(self, row_ids):
        if at():
            os.kill(os.getpid(), signal.SIGTERM)
        return row_losses(self, row_ids)

    monkeypatch.setattr(passes.PaddedPass, "row_losses", interrupted)
    stopped = loop.train(toy_run(**settings))
    assert (stopped.interrupted, stopped.global_step) == (True, 2)
    assert losses(tmp_path / "run", "eval_loss") == []
    monkeypatch.setattr(passes.PaddedPass, "row_losses", row_losses)
    loop.train(toy_run(resume_from_checkpoint="true", **settings))
    assert records(tmp_path / "run", "step") == records(tmp_path / "unbroken", "step")
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
            "checkpoint-2 is whole: resume with `glmtune train ",
            f"--resume_from_checkpoint {checkpoint}`",
        ):
            assert words in str(error.value)
        assert "\n" not in str(error.value)
        assert find_fault(checkpoint) is None
        mend()
        loop.train(toy_run(resume_from_checkpoint="true"))
        assert weights(tmp_path / "run") == weights(tmp_path / "unbroken")
        assert records(tmp_path / "run", "step") == records(tmp_path / "unbroken", "step")

    def test_what_is_advised_can_be_resumed_with(self, toy_run, monkeypatch):
        mend = self.run_out(monkeypatch, "run", 5)
        with pytest.raises(UserError):
            loop.train(toy_run(per_device_train_batch_size=2))
        mend()
        advised = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
        more = {"gradient_checkpointing": "true", "resume_from_checkpoint": "true"}
        assert loop.train(toy_run(**advised, **more)).global_step == 4

    def test_memory_that_runs_out_in_an_evaluation(self, toy_run, tmp_path, monkeypatch):
        self.run_out(monkeypatch, "row_losses", 1)
        with pytest.raises(UserError, match=r"halve per_device_eval_batch_size \(8\).*resume with"):
            loop.train(toy_run(eval_ratio=0.3, eval_steps=3))
        assert saved(tmp_path / "run") == ["checkpoint-3"]


def test_max_hours_is_above_0():
    with pytest.raises(ValueError, match="greater than 0"):
        TrainSettings(dataset_path="rows", output_dir="run", max_hours=0)
