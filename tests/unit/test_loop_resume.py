"""The training loop stops with a checkpoint and resumes from it without a difference."""

import json
import os
import signal

import pytest
import torch
from toys import (
    ToyTokenizer,
    adapter_weights,
    draw_uneven_rows,
    losses,
    records,
    save_rows,
    stop_at,
)

from glmtune.config.reading import read_config
from glmtune.config.settings import TrainSettings
from glmtune.errors import UserError
from glmtune.training import loop


class TestResume:
    SETTINGS = {  # noqa: RUF012
        "max_steps": 9,
        "save_steps": 5,
        "logging_steps": 3,
        "eval_ratio": 0.2,
        "eval_steps": 4,
        "lora_dropout": 0.1,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 3,
    }

    @pytest.fixture
    def unbroken(self, tiny_run, tmp_path):
        return loop.train(tiny_run(output_dir=str(tmp_path / "unbroken"), **self.SETTINGS))

    def test_a_resumed_run_is_the_unbroken_run(self, tiny_run, unbroken, tmp_path):
        """Bit for bit: from step 5, within an epoch and within three steps logged together."""
        checkpoint = tmp_path / "unbroken" / "checkpoint-5"
        resumed = loop.train(tiny_run(resume_from_checkpoint=str(checkpoint), **self.SETTINGS))
        assert resumed.global_step == 9
        assert [r["step"] for r in records(unbroken)] == [1, 3, 6, 9]
        assert records(resumed) == records(unbroken)
        assert records(resumed, "eval_loss") == records(unbroken, "eval_loss")
        ours, theirs = adapter_weights(tmp_path / "run"), adapter_weights(tmp_path / "unbroken")
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
        states = [
            json.loads((tmp_path / name / "trainer_state.json").read_text())
            for name in ("run", "unbroken")
        ]
        assert states[0]["num_input_tokens_seen"] == states[1]["num_input_tokens_seen"]

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl+C", "SIGTERM"])
    def test_a_signal_stops_between_two_passes_with_a_checkpoint(
        self, tiny_run, unbroken, tmp_path, monkeypatch, capsys, number
    ):
        go_on = stop_at(7, monkeypatch, number)
        handler = signal.getsignal(number)
        stopped = loop.train(tiny_run(**self.SETTINGS))
        assert signal.getsignal(number) == handler
        assert (stopped.interrupted, stopped.global_step) == (True, 6)  # one pass of 7 is undone
        checkpoint = tmp_path / "run" / "checkpoint-6"
        assert checkpoint.is_dir()
        out = capsys.readouterr().out
        recipe = tmp_path / "run" / "recipe.yaml"
        assert f"glmtune train {recipe} --resume_from_checkpoint {checkpoint}\n" in out
        go_on()
        flags = {"resume_from_checkpoint": str(checkpoint)}
        resumed = loop.train(read_config(TrainSettings, str(recipe), flags))
        assert not resumed.interrupted
        assert records(resumed) == records(unbroken)
        assert records(resumed, "eval_loss") == records(unbroken, "eval_loss")
        lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == [1, 3, 4, 6, 8, 9, 9]

    def test_a_second_ctrl_c_does_not_wait(self, tiny_run, monkeypatch):
        def step(*_):
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

        monkeypatch.setattr(loop, "train_step", step)
        with pytest.raises(KeyboardInterrupt):
            loop.train(tiny_run())

    def test_true_takes_the_newest_checkpoint_and_names_those_passed_over(
        self, tiny_run, tmp_path, capsys
    ):
        settings = {"max_steps": 6, "save_steps": 2, "lr_scheduler_type": "constant"}
        loop.train(tiny_run(**settings))
        (tmp_path / "run" / "checkpoint-6" / "optimizer.pt").write_bytes(b"cut short")
        capsys.readouterr()
        loop.train(tiny_run(resume_from_checkpoint="true", **settings | {"max_steps": 7}))
        out, err = capsys.readouterr()
        assert "7, which is" in out
        assert "4 of them done" in out
        assert "passed over" in err
        assert "optimizer.pt is damaged" in err

    def test_a_run_without_an_end_in_its_schedule_can_be_made_longer(self, tiny_run):
        settings = {"lr_scheduler_type": "constant", "max_steps": 2}
        loop.train(tiny_run(**settings))
        longer = loop.train(tiny_run(resume_from_checkpoint="true", **settings | {"max_steps": 4}))
        assert len(losses(longer)) == 4

    def test_another_recipe_is_refused_with_each_difference(self, tiny_run, tmp_path):
        loop.train(tiny_run(max_steps=2))
        with pytest.raises(UserError) as error:
            loop.train(
                tiny_run(
                    max_steps=4, learning_rate=2e-3, lora_rank=4, per_device_train_batch_size=2
                ).model_copy(update={"resume_from_checkpoint": "true"})
            )
        for words in (
            "checkpoint-2: belongs to another recipe",
            "learning_rate 0.001 (now 0.002)",
            "lora_rank 8 (now 4)",
            "rows per step 6 (now 4)",
            "steps of the schedule 2 (now 4)",
            "recipe.yaml",
        ):
            assert words in str(error.value), words
        for same in ("seed", "lora_alpha", "data sha256"):
            assert same not in str(error.value)

    def test_other_data_under_the_same_path_are_refused(self, tiny_run, tmp_path):
        path = save_rows(draw_uneven_rows(ToyTokenizer, seed=1), tmp_path / "data")
        loop.train(tiny_run(max_steps=2, dataset_path=path))
        save_rows(draw_uneven_rows(ToyTokenizer, seed=2), path)
        with pytest.raises(UserError, match="data sha256"):
            loop.train(tiny_run(max_steps=2, dataset_path=path, resume_from_checkpoint="true"))

    def test_settings_that_change_no_numbers_may_change(self, tiny_run):
        loop.train(tiny_run(max_steps=2, lr_scheduler_type="constant"))
        result = loop.train(
            tiny_run(
                max_steps=3,
                lr_scheduler_type="constant",
                resume_from_checkpoint="true",
                per_device_train_batch_size=6,
                gradient_accumulation_steps=1,
                save_steps=1,
                logging_steps=2,
                gradient_checkpointing="true",
            )
        )
        assert result.global_step == 3
