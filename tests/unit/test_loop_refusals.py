"""What the training loop warns of, and what it refuses."""

from types import SimpleNamespace

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_simple_launcher_cmd_env
from safetensors.torch import load_file, save_file
from toys import ToyTokenizer, adapter_weights, draw_uneven_rows, save_rows

from glmtune.errors import UserError
from glmtune.training import loop, passes, prepare
from glmtune.training.launch import start_accelerator
from glmtune.training.saving import checkpoints


class TestCautions:
    """A likely mistake is reported before the first step."""

    def test_many_epochs_are_warned_of(self, tiny_run, capsys, monkeypatch):
        monkeypatch.setattr(loop, "fit", lambda run, *_: SimpleNamespace(global_step=0))
        loop.train(tiny_run(max_steps=2000))
        told = capsys.readouterr().err
        assert "2,000 steps are 500 epochs of 23 rows" in told
        fix = told.partition("little else; ")[2].split()[:4]
        flags = dict(zip(fix[::2], fix[1::2], strict=True))
        flags = {name.removeprefix("--"): float(value) for name, value in flags.items()}
        loop.train(tiny_run(overwrite_output_dir=True, **flags))
        assert "epochs" not in capsys.readouterr().err

    @pytest.mark.parametrize("schedule", ["linear", "constant_with_warmup"])
    def test_a_warm_up_without_an_end_is_warned_of(self, tiny_run, capsys, monkeypatch, schedule):
        monkeypatch.setattr(loop, "fit", lambda run, *_: SimpleNamespace(global_step=0))
        settings = {"max_steps": 4, "lr_scheduler_type": schedule, "overwrite_output_dir": True}
        loop.train(tiny_run(warmup_steps=4, **settings))
        assert "never comes to 0.001; --warmup_steps 0.03" in capsys.readouterr().err
        loop.train(tiny_run(warmup_steps=0.03, **settings))
        assert "warmup_steps" not in capsys.readouterr().err

    @pytest.mark.parametrize(
        "idle, useful, told",
        [
            (
                {"max_steps": 2, "num_train_epochs": 5},
                {"max_steps": -1, "num_train_epochs": 5},
                "num_train_epochs 5 has no effect: the run has max_steps 2",
            ),
            (
                {"max_steps": 2, "eval_steps": 1, "general_set": False},
                {"max_steps": 2, "eval_steps": 1, "general_set": False, "eval_ratio": 0.1},
                "eval_steps 1 has no effect: no rows are held out",
            ),
        ],
    )
    def test_what_changes_nothing_is_told(self, tiny_run, capsys, monkeypatch, idle, useful, told):
        monkeypatch.setattr(loop, "fit", lambda run, *_: SimpleNamespace(global_step=0))
        loop.train(tiny_run(overwrite_output_dir=True, **idle))
        assert told in capsys.readouterr().err
        loop.train(tiny_run(overwrite_output_dir=True, **useful))
        assert "no effect" not in capsys.readouterr().err

    @pytest.mark.parametrize("number", [1, 2])
    def test_accelerate_that_launches_one_process_is_warned_of(
        self, number, monkeypatch, capsys, tiny_run
    ):
        """With the environment that `accelerate launch --cpu --num_processes 2` makes."""
        words = ["--cpu", "--num_processes", str(number), "finetune.py"]
        arguments, *_ = _validate_launch_command(launch_command_parser().parse_args(words))
        _, environment = prepare_simple_launcher_cmd_env(arguments)
        for name in ("ACCELERATE_USE_CPU", "MASTER_ADDR", "MASTER_PORT"):
            if name in environment:
                monkeypatch.setenv(name, environment[name])
        start_accelerator(tiny_run())
        told = "accelerate launch has started one process" in capsys.readouterr().err
        assert told == (number == 2)


class TestRefusals:
    def test_a_folder_with_a_run_is_not_trained_over(self, tiny_run, tmp_path):
        loop.train(tiny_run(max_steps=1))
        before = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*")}
        with pytest.raises(UserError, match="holds a run already") as error:
            loop.train(tiny_run(max_steps=1))
        for fix in ("--resume_from_checkpoint true", "--overwrite_output_dir true", "another"):
            assert fix in str(error.value)
        assert {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*")} == before

    def test_overwriting_takes_the_run_away_and_nothing_else(self, tiny_run, tmp_path):
        loop.train(tiny_run(max_steps=3, save_steps=1, report_to="tensorboard"))
        (tmp_path / "run" / "notes.txt").write_text("mine")
        (tmp_path / "run" / "runs" / "mine.txt").write_text("mine")
        result = loop.train(tiny_run(max_steps=1, overwrite_output_dir=True))
        assert len(result.log_history) == 1
        assert [p.name for p in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-1"]
        assert (tmp_path / "run" / "notes.txt").read_text() == "mine"
        assert [p.name for p in (tmp_path / "run" / "runs").iterdir()] == ["mine.txt"]

    @pytest.mark.parametrize("wanted", ["true", "no/such/folder"])
    def test_nothing_to_resume_from_is_refused(self, tiny_run, wanted, tmp_path):
        with pytest.raises(UserError, match="no folder"):
            loop.train(tiny_run(resume_from_checkpoint=wanted))
        assert not (tmp_path / "run").exists()

    def test_data_of_another_tokenizer_is_refused(self, tiny_run, tmp_path, monkeypatch):
        other = ToyTokenizer()
        other.eos_token_id = 1006
        monkeypatch.setattr(prepare, "load_tokenizer", lambda base: other)
        with pytest.raises(UserError, match="another tokenizer"):
            loop.train(tiny_run())
        assert not (tmp_path / "run").exists()

    def test_a_bad_row_is_named_before_anything_is_written(
        self, tiny_run, word_tokenizer, tmp_path
    ):
        rows = draw_uneven_rows(word_tokenizer)
        rows[4]["input_ids"][-2] = 1024
        path = save_rows(rows, tmp_path / "bad")
        with pytest.raises(UserError, match="row 5 holds id 1024"):
            loop.train(tiny_run(dataset_path=path))
        assert not (tmp_path / "run").exists()

    def test_an_unwritable_folder_is_refused(self, tiny_run, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(UserError, match=r"output_dir.*is a file"):
            loop.train(tiny_run(output_dir=str(tmp_path / "file")))
        with pytest.raises(UserError, match=r"output_dir.*cannot be written"):
            loop.train(tiny_run(output_dir=str(tmp_path / "file" / "run")))

    def test_a_diverged_run_stops_and_spoils_no_checkpoint(self, tiny_run, tmp_path):
        settings = {"learning_rate": 1e30, "lr_scheduler_type": "constant", "max_grad_norm": 0}
        with pytest.raises(UserError, match=r"logits are not finite, so it is not kept"):
            loop.train(tiny_run(save_steps=1, logging_steps=100, max_steps=50, **settings))
        with pytest.raises(UserError, match=r"step 2: .*learning_rate \(1e\+30\)"):
            loop.train(tiny_run(max_steps=50, overwrite_output_dir=True, **settings))
        for checkpoint in (tmp_path / "run").glob("checkpoint-*"):
            assert all(weight.isfinite().all() for weight in adapter_weights(checkpoint).values())

    def test_a_checkpoint_that_is_not_what_was_trained_is_removed(
        self, tiny_run, tmp_path, monkeypatch
    ):
        save = checkpoints.save_adapter

        def save_less(model, folder, base):
            save(model, folder, base)
            if "checkpoint-4" in str(folder):
                tensors = load_file(folder / "adapter_model.safetensors")
                tensors.pop(max(tensors))
                save_file(tensors, folder / "adapter_model.safetensors")

        monkeypatch.setattr(checkpoints, "save_adapter", save_less)
        with pytest.raises(UserError, match=r"checkpoint-4.*not what was trained.*is missing"):
            loop.train(tiny_run(save_steps=2, save_total_limit=1))
        assert [p.name for p in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-2"]

    def test_weights_that_learn_nothing_are_told(self, tiny_run, monkeypatch, capsys):
        """A zero gradient of one weight is reported, of all weights it ends the run."""
        run_pass = passes.PaddedPass.run
        silenced = ["layers.2.attention.query_key_value.lora_A"]

        def run(self, *args):
            loss = run_pass(self, *args)
            for name, weight in self.model.named_parameters():
                if weight.requires_grad and any(part in name for part in silenced):
                    weight.grad.zero_()
            return loss

        monkeypatch.setattr(passes.PaddedPass, "run", run)
        loop.train(tiny_run())
        told = capsys.readouterr().err
        assert told.count("they learn nothing") == 1
        assert "step 4: the gradient was exactly 0 in all of the first steps for 1 of 8" in told
        assert "layers.2.attention.query_key_value.lora_A" in told
        silenced[:] = [""]
        with pytest.raises(UserError, match="for 8 of 8 weights"):
            loop.train(tiny_run(overwrite_output_dir=True))

    def test_a_loss_that_explodes_ends_the_run(self, tiny_run, monkeypatch, capsys):
        readings = iter([5.0, 4.0, 30.0, 40.0, 50.0, 60.0])
        take_loss = loop.take_loss
        monkeypatch.setattr(loop, "take_loss", lambda *args: take_loss(*args) * 0 + next(readings))
        with pytest.raises(UserError, match=r"step 5: the loss explodes: 50, .*learning_rate"):
            loop.train(tiny_run())
        assert capsys.readouterr().err.count("warning: step") == 2

    def test_a_loss_of_zero_keeps_what_was_learned(self, tiny_run, monkeypatch, tmp_path):
        readings = iter([5.0, 0.0, 0.0, 0.0])
        monkeypatch.setattr(loop, "take_loss", lambda *args: next(readings))
        with pytest.raises(UserError, match="step 4: the loss is exactly 0"):
            loop.train(tiny_run())
        assert [p.name for p in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-4"]

    def test_a_gpu_that_is_too_small_is_told_with_a_setting_that_helps(self, tiny_run, monkeypatch):
        def full(*_):
            raise torch.OutOfMemoryError("CUDA out of memory")

        monkeypatch.setattr(loop, "build_pass", full)
        with pytest.raises(UserError, match="too small for this: per_device_train_batch_size 1"):
            loop.train(tiny_run())
        with pytest.raises(UserError, match="too small for this: gradient_checkpointing true"):
            loop.train(
                tiny_run(
                    layout="packed", tokens_per_step=64, output_dir=tiny_run().output_dir + "2"
                )
            )
