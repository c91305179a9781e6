"""A resumed run equals one that was never stopped, bit for bit; other runs are refused."""

import atexit
import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from together import in_processes, output
from toys import EXACT, PACKED, adapter_weights, keep_only, records, short_run
from transformers import TrainerState

from glmtune import runlog
from glmtune.cli import main
from glmtune.errors import UserError
from glmtune.models.resolve import GLM_TINY
from glmtune.training import held_out, loop, prepare
from glmtune.training.interrupt import CutShort

# 23 rows, 4 held out: steps of 6 rows make four an epoch, the last of one row. Eight steps are two.
SETTINGS = {
    "max_steps": 9,
    "save_steps": 1,
    "logging_steps": 3,
    "eval_ratio": 0.17,
    "eval_steps": 4,
    "lora_dropout": 0.1,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 3,
}
LAYOUTS = {"padded": {}, "end to end": EXACT, "packed": PACKED}
# Within the first epoch, at its end, after it, and at the end of the second.
STEPS = (3, 4, 5, 8)
ONCE = {"save_steps": 1000}  # at the end; how often is no part of what a run computes

pytestmark = pytest.mark.usefixtures("no_curve")


def outcome(folder):
    """What must be equal in two runs: every tensor's bits, and every record except its speed."""
    state = TrainerState.load_from_json(Path(folder, "trainer_state.json"))
    bits = {name: weight.numpy().tobytes() for name, weight in adapter_weights(folder).items()}
    return bits, records(state, "step"), state.num_input_tokens_seen


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_run_resumed_at_any_step_is_the_unbroken_run(toy_run, tmp_path, layout):
    settings = SETTINGS | LAYOUTS[layout]
    loop.train(toy_run(**settings))
    unbroken = outcome(tmp_path / "run")
    assert any("eval_loss" in record for record in unbroken[1])
    for step in STEPS:
        folder = keep_only(tmp_path / "run", step, tmp_path / str(step))
        resumed = toy_run(output_dir=folder, resume_from_checkpoint="true", **settings | ONCE)
        assert loop.train(resumed).global_step == 9
        assert outcome(folder) == unbroken, step


def test_a_run_resumed_again_and_again_is_the_unbroken_run(toy_run, tmp_path):
    """Stopped after every second step by a time limit, as under a scheduler."""
    loop.train(toy_run(**SETTINGS | ONCE))
    settings = SETTINGS | ONCE | {"output_dir": str(tmp_path / "again")}
    with pytest.MonkeyPatch.context() as patch:
        train_step, steps = loop.train_step, []

        def stop_soon(run, state, *how):
            steps.append(state.global_step)
            if len(steps) % 2 == 0:
                os.kill(os.getpid(), signal.SIGTERM)
            return train_step(run, state, *how)

        patch.setattr(loop, "train_step", stop_soon)
        result = loop.train(toy_run(**settings))
        while result.interrupted:
            result = loop.train(toy_run(resume_from_checkpoint="true", **settings))
    assert len(steps) > 9
    assert outcome(tmp_path / "again") == outcome(tmp_path / "run")


class TestWorkers:
    """Two gloo processes, with dropout, padded and packed."""

    @pytest.fixture(scope="class")
    def folder(self, toy_rows, tmp_path_factory):
        folder = tmp_path_factory.mktemp("workers")
        assert in_processes(2, work, folder, toy_rows, folder=folder) == [0, 0], output(folder)
        return folder

    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("step", [3, 4])
    def test_two_resumed_processes_are_the_unbroken_run(self, folder, layout, step):
        assert outcome(folder / f"{layout} from {step}") == outcome(folder / layout)

    def test_a_save_that_fails_ends_both_processes_alike(self, folder):
        for rank in (0, 1):
            told = (folder / f"told by {rank}").read_text()
            assert "cannot be written" in told
            assert "checkpoint-2 is whole: resume with `torchrun --nproc_per_node 2" in told

    def test_processes_leave_their_group_before_python_ends(self, folder):
        for rank in (0, 1):
            assert (folder / f"group of {rank}").read_text() == "left"


def work(folder, rows):
    """What each of the two processes does."""
    rank, folder = os.environ["RANK"], Path(folder)

    def tell_of_the_group():
        state = "kept" if torch.distributed.is_initialized() else "left"
        (folder / f"group of {rank}").write_text(state)

    atexit.register(tell_of_the_group)  # the first to be registered is the last to be called
    runlog.RunLog.plot_loss = lambda *_: None

    def settings(name, **changes):
        return short_run(
            rows, folder / name, **{"per_device_train_batch_size": 2} | SETTINGS | changes
        )

    for name, layout in LAYOUTS.items():
        loop.train(settings(name, **layout))
        for step in (3, 4):
            again = f"{name} from {step}"
            if rank == "0":
                keep_only(folder / name, step, folder / again)
            torch.distributed.barrier()
            loop.train(settings(again, resume_from_checkpoint="true", **layout | ONCE))
    with pytest.MonkeyPatch.context() as patch:
        save = loop.checkpoints.write_torch_file

        def full(content, path):
            if "checkpoint-3" in str(path):
                raise OSError(28, "No space left on device")
            save(content, path)

        patch.setattr(loop.checkpoints, "write_torch_file", full)
        with pytest.raises(UserError) as error:
            loop.train(settings("full"))
    (folder / f"told by {rank}").write_text(str(error.value))


class TestAnotherRun:
    @pytest.fixture
    def saved(self, toy_run):
        loop.train(toy_run(max_steps=2, lr_scheduler_type="constant"))
        return {"max_steps": 3, "lr_scheduler_type": "constant", "resume_from_checkpoint": "true"}

    def refusal(self, config):
        recipe = Path(config.output_dir, "recipe.yaml").read_text()
        with pytest.raises(UserError) as error:
            loop.train(config)
        assert "--resume_anyway true" in str(error.value)
        assert Path(config.output_dir, "recipe.yaml").read_text() == recipe
        return str(error.value)

    def test_another_base_of_the_same_name_is_refused(self, toy_run, saved, tmp_path):
        base = shutil.copytree(GLM_TINY, tmp_path / "glm-tiny")
        tensors = load_file(base / "model.safetensors")
        name = next(name for name in tensors if "query_key_value.weight" in name)
        tensors[name] *= 1.01
        save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
        told = self.refusal(toy_run(base=str(base), **saved))
        assert "base weights " in told
        assert "base model" not in told

    def test_another_tokenizer_and_template_are_refused(
        self, toy_run, saved, tmp_path, monkeypatch
    ):
        from dataclasses import replace

        load_tokenizer, load_dataset = prepare.load_tokenizer, prepare.load_dataset

        class Other:
            vocab_hash = "f" * 64

            def __getattr__(self, name):
                return getattr(load_tokenizer(GLM_TINY), name)

        def other_template(path, rule):
            table, card = load_dataset(path, rule)
            return table, replace(card, template="vicuna")

        monkeypatch.setattr(prepare, "load_tokenizer", lambda base: Other())
        monkeypatch.setattr(prepare, "load_dataset", other_template)
        told = self.refusal(toy_run(**saved))
        assert "tokenizer sha256 " in told
        assert "(now ffffffffffffffff)" in told
        assert "template not set (now vicuna)" in told

    def test_another_pack_length_is_another_order(self, toy_run, tmp_path):
        settings = {"lr_scheduler_type": "constant", "layout": "packed"}
        loop.train(toy_run(max_steps=2, tokens_per_step=128, **settings))
        told = self.refusal(
            toy_run(
                max_steps=3,
                tokens_per_step=64,
                gradient_accumulation_steps=4,
                resume_from_checkpoint="true",
                **settings,
            )
        )
        assert "pack length 128 (now 64)" in told
        assert "tokens per step" not in told

    def test_resume_anyway_goes_on_with_the_new_settings(self, toy_run, saved, capsys):
        result = loop.train(toy_run(learning_rate=5e-4, resume_anyway=True, **saved))
        err = capsys.readouterr().err
        assert "checkpoint-2 is resumed although it differs: learning_rate 0.001 (now" in err
        rates = [record["learning_rate"] for record in result.log_history]
        assert rates == [1e-3, 1e-3, 5e-4]

    def test_another_shape_is_refused_in_any_case(self, toy_run, saved):
        with pytest.raises(UserError, match="has shape"):
            loop.train(toy_run(lora_rank=4, resume_anyway=True, **saved))


class TestNothingLeftToDo:
    """Resuming a finished run is refused, with the setting that would continue it."""

    def files(self, folder):
        found = sorted(path for path in Path(folder).rglob("*") if path.is_file())
        return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in found}

    def words(self, config):
        flags = config.model_dump(exclude_defaults=True, exclude={"resume_from_checkpoint"})
        return [word for name, value in flags.items() for word in (f"--{name}", str(value))]

    @pytest.mark.parametrize("schedule", ["linear", "constant"])
    @pytest.mark.parametrize(
        "length, told",
        [
            ({"max_steps": 2}, "max_steps (2) asks for 2"),
            ({"num_train_epochs": 0.5, "max_steps": -1}, "num_train_epochs (0.5) asks for 2"),
            ({"num_train_epochs": 1, "max_steps": -1}, "num_train_epochs (1) asks for 4"),
            ({"max_steps": 2, "eval_ratio": 0.17, "eval_steps": 1}, "max_steps (2) asks for 2"),
        ],
    )
    def test_resuming_a_finished_run_is_refused_and_the_fix_works(
        self, toy_run, tmp_path, capsys, length, told, schedule
    ):
        words = ["train", *self.words(toy_run(lr_scheduler_type=schedule, **length))]
        assert main(words) == 0
        before = self.files(tmp_path / "run")
        for where in ("true", str(max((tmp_path / "run").glob("checkpoint-*")))):
            capsys.readouterr()
            assert main([*words, "--resume_from_checkpoint", where]) == 2
            out, err = capsys.readouterr()
            assert "Done" not in out
            line = err.splitlines()[-1]
            assert "nothing is left to train" in line
            assert told in line
            assert self.files(tmp_path / "run") == before
        fix = line.partition("raise that: ")[2].split()
        assert main([*words, *fix, "--resume_from_checkpoint", "true"]) == 0
        last = json.loads((tmp_path / "run" / "trainer_state.json").read_text())
        first = json.loads(before[tmp_path / "run" / "trainer_state.json"][1])
        assert last["num_input_tokens_seen"] > first["num_input_tokens_seen"]
        assert "Done: all" in capsys.readouterr().out

    def test_a_job_that_is_started_again_at_its_end_ends_well(self, toy_run, tmp_path, capsys):
        """A queue cannot tell a run that has ended from one that was cut."""
        words = ["train", *self.words(toy_run(max_steps=2)), "--resume_from_checkpoint", "auto"]
        assert main(words) == 0
        before = outcome(tmp_path / "run")
        capsys.readouterr()
        assert main(words) == 0
        assert outcome(tmp_path / "run") == before
        line = "checkpoint-2: nothing is left to train (all 2 steps are done)"
        assert line in capsys.readouterr().err

    def test_a_finished_run_made_shorter_or_moved_is_refused(self, toy_run, tmp_path):
        loop.train(toy_run(lr_scheduler_type="constant"))
        shorter = toy_run(lr_scheduler_type="constant", max_steps=2, resume_from_checkpoint="true")
        with pytest.raises(UserError, match=r"has 4 steps, and max_steps \(2\).*--max_steps 8$"):
            loop.train(shorter)
        checkpoint = str(tmp_path / "run" / "checkpoint-4")
        elsewhere = {"output_dir": str(tmp_path / "other"), "resume_from_checkpoint": checkpoint}
        with pytest.raises(UserError, match="nothing is left to train"):
            loop.train(toy_run(lr_scheduler_type="constant", **elsewhere))
        assert not (tmp_path / "other").exists()

    def test_what_a_kill_took_from_the_run_folder_is_put_back_with_a_word(
        self, toy_run, tmp_path, capsys
    ):
        loop.train(toy_run())
        whole = outcome(tmp_path / "run")
        for name in ("adapter_model.safetensors", "adapter_config.json", "trainer_state.json"):
            (tmp_path / "run" / name).unlink()
            capsys.readouterr()
            loop.train(toy_run(resume_from_checkpoint="true"))
            assert "nothing is trained" in capsys.readouterr().err
            assert outcome(tmp_path / "run") == whole
            with pytest.raises(UserError, match="nothing is left to train"):
                loop.train(toy_run(resume_from_checkpoint="true"))

    def test_an_evaluation_that_is_due_is_made_once(self, toy_run, tmp_path, monkeypatch):
        settings = {"eval_ratio": 0.3}
        evaluate = held_out.row_losses

        def cut(*_):
            raise CutShort

        monkeypatch.setattr(held_out, "row_losses", cut)
        loop.train(toy_run(**settings))
        monkeypatch.setattr(held_out, "row_losses", evaluate)
        again = loop.train(toy_run(resume_from_checkpoint="true", **settings))
        assert "eval_loss" in again.log_history[-1]
        with pytest.raises(UserError, match="nothing is left to train"):
            loop.train(toy_run(resume_from_checkpoint="true", **settings))

    def test_a_clock_that_leaves_no_step_is_told(self, toy_run, capsys):
        loop.train(toy_run(max_hours=1e-9))
        assert "max_hours (1e-09) was over before the first step: raise it" in (
            capsys.readouterr().err
        )


class TestFallingBack:
    def test_a_flipped_bit_costs_some_steps_and_no_more(self, toy_run, tmp_path, capsys):
        loop.train(toy_run(**SETTINGS))
        unbroken = outcome(tmp_path / "run")
        file = tmp_path / "run" / "checkpoint-9" / "optimizer.pt"
        for wanted in ("true", str(tmp_path / "run" / "checkpoint-9")):
            content = bytearray(file.read_bytes())
            content[len(content) // 2] ^= 1
            file.write_bytes(content)
            capsys.readouterr()
            loop.train(toy_run(resume_from_checkpoint=wanted, **SETTINGS))
            assert outcome(tmp_path / "run") == unbroken
            out, err = capsys.readouterr()
            assert err.count("passed over") == 1
            assert "8 of them done" in out

    def test_a_checkpoint_of_an_earlier_version_is_taken_with_a_word(
        self, toy_run, tmp_path, capsys
    ):
        """It has no manifest, and no record of tokenizer, template and weights."""
        loop.train(toy_run(**SETTINGS))
        folder = keep_only(tmp_path / "run", 5, tmp_path / "old")
        old = Path(folder, "checkpoint-5")
        (old / "manifest.json").unlink()
        state = json.loads((old / "trainer_state.json").read_text())
        identity = state["stateful_callbacks"]["glmtune"]
        for key in ("base weights", "tokenizer sha256", "template", "pack length"):
            del identity[key]
        (old / "trainer_state.json").write_text(json.dumps(state))
        capsys.readouterr()
        loop.train(toy_run(output_dir=folder, resume_from_checkpoint="true", **SETTINGS))
        err = capsys.readouterr().err
        assert "checkpoint-5 is of an earlier version, without a manifest" in err
        assert "does not say its base weights, tokenizer sha256, template, pack length" in err
        assert outcome(folder) == outcome(tmp_path / "run")

    @pytest.mark.parametrize(
        ("file", "content"),
        [
            ("optimizer.pt", {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": []}),
            ("optimizer.pt", [1]),
            ("scheduler.pt", {"last_epoch": "soon"}),
            ("rng_state_0.pth", {"cpu": np.zeros(3).tolist()}),
        ],
    )
    def test_an_unverified_one_that_holds_something_else(self, toy_run, tmp_path, file, content):
        settings = {"max_steps": 2, "lr_scheduler_type": "constant"}
        loop.train(toy_run(**settings))
        checkpoint = tmp_path / "run" / "checkpoint-2"
        (checkpoint / "manifest.json").unlink()
        torch.save(content, checkpoint / file)
        with pytest.raises(UserError, match="is not this run's state"):
            loop.train(toy_run(resume_from_checkpoint="true", **settings | {"max_steps": 3}))
