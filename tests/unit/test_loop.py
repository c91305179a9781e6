"""The training loop, on a tiny model: what a step computes, what a run leaves, how it goes on."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_simple_launcher_cmd_env
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import TrainerState

from glmtune.adapters import load_adapter
from glmtune.config import TrainSettings, read_config
from glmtune.data.token_rows import TokenRows
from glmtune.errors import UserError
from glmtune.hardware import Card
from glmtune.models.checkpoints import load_base_model
from glmtune.training import held_out, loop, passes, prepare
from glmtune.training.plan import pass_seed, split_rows
from glmtune.training.planning.forecast import choose_layout
from glmtune.training.run import start_accelerator
from glmtune.training.saving import checkpoints

GMASK, SOP, EOP, VOCAB_SIZE = 1001, 1004, 1005, 1024
# The tiny model has no vocabulary file; training asks nothing else of a tokenizer.
TOKENIZER = SimpleNamespace(
    vocab_size=VOCAB_SIZE,
    vocab_hash="0" * 64,
    revision="v1.1",
    pad_token_id=3,
    mask_token_id=1000,
    gmask_token_id=GMASK,
    bos_token_id=SOP,
    eos_token_id=EOP,
)
NUM_ROWS = 23  # no multiple of any batch size here


@pytest.fixture(autouse=True)
def tiny_tokenizer(monkeypatch):
    monkeypatch.setattr(prepare, "load_tokenizer", lambda base: TOKENIZER)


@pytest.fixture(scope="module")
def dataset_path(tmp_path_factory):
    """Rows of very different lengths, so that means of means show."""
    return write_rows(tmp_path_factory.mktemp("data") / "rows", seed=0)


def write_rows(path, seed, change=lambda rows: rows):
    random = np.random.default_rng(seed)
    rows = []
    for _ in range(NUM_ROWS):
        prompt, answer = (random.integers(10, 990, random.integers(1, 16)).tolist() for _ in "ab")
        rows.append({"input_ids": [*prompt, GMASK, SOP, *answer, EOP], "seq_len": len(prompt) + 2})
    datasets.Dataset.from_list(change(rows)).save_to_disk(path)
    return str(path)


@pytest.fixture
def config(dataset_path, tiny_folder, short_run, tmp_path):
    """Make settings: those of a short run unless told otherwise."""

    def make(**settings):
        paths = {"dataset_path": dataset_path, "output_dir": str(tmp_path / "run")}
        defaults = short_run | paths | {"chatglm_path": str(tiny_folder), "max_steps": 6}
        return TrainSettings(**defaults | settings)

    return make


def records(result, key="loss", drop=("tokens_per_second", "memory_gib")):
    """The records with a key, without the numbers that no two runs share."""
    return [
        {name: value for name, value in record.items() if name not in drop}
        for record in result.log_history
        if key in record
    ]


def losses(result, key="loss"):
    return [record[key] for record in records(result, key)]


def adapter(folder):
    return load_file(Path(folder) / "adapter_model.safetensors")


def stop_at(step, monkeypatch, number=signal.SIGINT):
    """Send this process a signal while it computes a step."""
    train_step = loop.train_step

    def interrupted_step(run, state, *how):
        if state.global_step == step - 1:
            os.kill(os.getpid(), number)
        return train_step(run, state, *how)

    monkeypatch.setattr(loop, "train_step", interrupted_step)
    return lambda: monkeypatch.setattr(loop, "train_step", train_step)


class TestRunFolder:
    @pytest.fixture(scope="class")
    def run(self, dataset_path, tiny_folder, tmp_path_factory, request):
        folder = tmp_path_factory.mktemp("whole") / "run"
        config = TrainSettings(
            dataset_path=dataset_path,
            output_dir=str(folder),
            chatglm_path=str(tiny_folder),
            num_train_epochs=2,
            logging_steps=2,
            save_steps=2,
            save_total_limit=2,
            eval_ratio=0.2,  # 18 rows to train on, three steps of 6
            eval_steps=3,
            use_cpu=True,
        )
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(prepare, "load_tokenizer", lambda base: TOKENIZER)
            return config, folder, loop.train(config)

    def test_the_newest_checkpoints_are_kept(self, run):
        _, folder, result = run
        assert result.global_step == 6
        assert sorted(path.name for path in folder.glob("checkpoint-*")) == [
            "checkpoint-4",
            "checkpoint-6",
        ]

    @pytest.mark.parametrize("name", ["checkpoint-4", "."])
    def test_each_is_a_peft_adapter_as_it_stands(self, run, name, tiny_folder):
        _, folder, _ = run
        base = load_base_model(str(tiny_folder))
        tuned = PeftModel.from_pretrained(base, folder / name)
        ids = torch.tensor([[5, 6, GMASK, SOP, 9]])
        with torch.no_grad(), tuned.disable_adapter():
            without = tuned(ids).logits
        with torch.no_grad():
            assert not torch.equal(tuned(ids).logits, without)
        settings = json.loads((folder / name / "adapter_config.json").read_text())
        assert settings["base_model_name_or_path"] == "chatglm-6b-tiny"
        assert (settings["r"], settings["lora_alpha"]) == (8, 32)

    def test_a_checkpoint_holds_what_going_on_takes(self, run):
        _, folder, _ = run
        assert {path.name for path in (folder / "checkpoint-4").iterdir()} == {
            "adapter_config.json",
            "adapter_model.safetensors",
            "optimizer.pt",
            "scheduler.pt",
            "rng_state_0.pth",
            "trainer_state.json",
            "manifest.json",
        }

    def test_transformers_reads_the_trainer_state(self, run):
        _, folder, result = run
        state = TrainerState.load_from_json(str(folder / "trainer_state.json"))
        assert (state.global_step, state.max_steps, state.num_train_epochs) == (6, 6, 2)
        assert state.epoch == 2.0
        assert state.log_history == result.log_history
        earlier = TrainerState.load_from_json(str(folder / "checkpoint-4" / "trainer_state.json"))
        assert earlier.log_history == [r for r in result.log_history if r["step"] <= 4]

    def test_every_record_has_its_numbers(self, run):
        _, folder, result = run
        keys = {"loss", "grad_norm", "learning_rate", "epoch", "step"}
        training = [r for r in result.log_history if "loss" in r]
        assert [r["step"] for r in training] == [1, 2, 4, 6]
        assert all(r.keys() == keys | {"tokens_per_second", "memory_gib"} for r in training)
        assert all(r["tokens_per_second"] > 0 for r in training)
        assert [r["step"] for r in result.log_history if "eval_loss" in r] == [3, 6]
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line) for line in lines] == result.log_history

    def test_curve_events_and_recipe_lie_there(self, run):
        config, folder, _ = run
        assert (folder / "training_loss.png").read_bytes().startswith(b"\x89PNG")
        assert list(folder.glob("runs/events.out.tfevents.*"))
        as_run = config.model_copy(update={"layout": "padded"})
        assert read_config(TrainSettings, "train", str(folder / "recipe.yaml"), {}) == as_run

    def test_nothing_half_written_is_left(self, run):
        _, folder, _ = run
        assert [p for p in folder.rglob("*") if p.name.startswith(".") or "tmp" in p.name] == []


def test_banner_and_summary_tell_the_run(config, capsys):
    loop.train(config(eval_ratio=0.2, max_steps=4))
    out = capsys.readouterr().out
    for words in (
        "LoRA of rank 8 on query_key_value of chatglm-6b-tiny",
        "18 to train on, 5 held out",
        "4, which is 1.333 epoch(s) of 3",
        "6 = 3 a pass x 2 pass(es) x 1 process(es)",
        "8,192 of ",
        "float32",
        "step 1/4: loss ",
        "Done: all 4 steps",
        "evaluation loss",
        f"glmtune infer --data_path RECORDS.json --model_path {config().output_dir}",
    ):
        assert words in out, words


class TestStep:
    def test_passes_change_nothing(self, config, tmp_path):
        """The mean is over the label tokens of the global batch, not over passes of a few."""
        whole = loop.train(
            config(per_device_train_batch_size=6, gradient_accumulation_steps=1, lora_dropout=0)
        )
        for size, num_passes in ((3, 2), (1, 6)):
            other = loop.train(
                config(
                    output_dir=str(tmp_path / f"{size}x{num_passes}"),
                    per_device_train_batch_size=size,
                    gradient_accumulation_steps=num_passes,
                    lora_dropout=0,
                )
            )
            assert losses(other) == pytest.approx(losses(whole), abs=1e-5)
            assert losses(other, "grad_norm") == pytest.approx(losses(whole, "grad_norm"), rel=1e-4)

    def test_recomputing_changes_nothing(self, config, tmp_path):
        kept = loop.train(config())
        again = loop.train(config(output_dir=str(tmp_path / "b"), gradient_checkpointing="true"))
        assert losses(again) == losses(kept)

    def test_the_base_stays_and_the_adapter_is_float32(self, config, monkeypatch, tiny_folder):
        seen = []
        fit = loop.fit
        monkeypatch.setattr(loop, "fit", lambda *args: (seen.append(args[1]), fit(*args))[1])
        loop.train(config(bf16=True, lora_target="all"))
        (model,) = seen
        weights = dict(model.named_parameters())
        trained = {name for name, weight in weights.items() if weight.requires_grad}
        assert trained == {name for name in weights if "lora_" in name}
        assert len(trained) == 4 * 4 * 2
        assert all(weights[name].dtype == torch.float32 for name in trained)
        assert all(weights[name].any() for name in trained if "lora_B" in name)
        model.unload()
        fresh = load_base_model(str(tiny_folder), dtype=torch.bfloat16).state_dict()
        after = model.get_base_model().state_dict()
        assert after.keys() == fresh.keys()
        assert all(torch.equal(after[name], fresh[name]) for name in fresh)

    @pytest.mark.parametrize(
        ("schedule", "warmup", "expected"),
        [
            ("constant", 0, [1, 1, 1, 1]),
            ("linear", 0, [1, 0.75, 0.5, 0.25]),
            ("linear", 2, [0, 0.5, 1, 0.5]),
            ("linear", 0.5, [0, 0.5, 1, 0.5]),
            ("constant_with_warmup", 2, [0, 0.5, 1, 1]),
            ("cosine", 0, [(1 + math.cos(math.pi * step / 4)) / 2 for step in range(4)]),
        ],
    )
    def test_each_schedule(self, config, schedule, warmup, expected):
        result = loop.train(config(max_steps=4, lr_scheduler_type=schedule, warmup_steps=warmup))
        rates = [rate / 1e-3 for rate in losses(result, "learning_rate")]
        assert rates == pytest.approx(expected)

    def test_clipping_bounds_the_update_and_tells_the_norm_before(
        self, config, tmp_path, monkeypatch
    ):
        norms = []
        step = torch.optim.AdamW.step

        def measured(optimizer, *args):
            grads = [w.grad for w in optimizer.param_groups[0]["params"]]
            norms.append(torch.nn.utils.get_total_norm(grads).item())
            return step(optimizer, *args)

        monkeypatch.setattr(torch.optim.AdamW, "step", measured)
        told = losses(loop.train(config(max_grad_norm=0.01, max_steps=2)), "grad_norm")
        assert norms == pytest.approx([0.01] * 2, rel=1e-3)
        assert min(told) > 0.02
        norms.clear()
        told = losses(
            loop.train(config(max_grad_norm=0, max_steps=2, output_dir=str(tmp_path / "b"))),
            "grad_norm",
        )
        assert norms == pytest.approx(told)

    def test_seeds(self, config, tmp_path):
        runs = iter(range(10))

        def course(**settings):
            folder = str(tmp_path / str(next(runs)))
            return losses(loop.train(config(max_steps=3, output_dir=folder, **settings)))

        usual = course()
        assert course() == usual
        # The first loss tells the rows alone: the adapter starts without effect.
        assert course(data_seed=7)[0] != usual[0]
        other_start = course(seed=7, data_seed=42)
        assert other_start[0] == usual[0]
        assert other_start[2] != usual[2]
        assert course(seed=7)[0] == course(data_seed=7)[0]

    def test_the_optimiser_gets_its_settings(self, config, monkeypatch):
        seen, build_state = [], loop.build_state
        monkeypatch.setattr(
            loop, "build_state", lambda *args: seen.append(build_state(*args)) or seen[0]
        )
        settings = {"adam_beta1": 0.8, "adam_beta2": 0.9, "adam_epsilon": 1e-6, "weight_decay": 0.1}
        loop.train(config(max_steps=1, **settings))
        (group,) = seen[0].optimizer.param_groups
        assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.8, 0.9), 1e-6, 0.1)
        assert group["initial_lr"] == 1e-3

    def test_a_record_is_the_mean_of_the_steps_since_the_last(self, config, tmp_path):
        every = losses(loop.train(config()))
        third = losses(loop.train(config(logging_steps=3, output_dir=str(tmp_path / "b"))))
        # The first step is told at once.
        expected = [every[0], sum(every[1:3]) / 2, sum(every[3:]) / 3]
        assert third == pytest.approx(expected, abs=1e-6)

    def test_epochs_count_when_steps_do_not(self, config, tmp_path):
        assert loop.train(config(max_steps=-1, num_train_epochs=1.5)).global_step == 6
        assert loop.train(config(max_steps=5, output_dir=str(tmp_path / "b"))).global_step == 5


class TestEvaluation:
    def test_it_is_the_mean_over_the_label_tokens_held_out(self, config, dataset_path, tiny_folder):
        settings = {"learning_rate": 0.05, "lora_dropout": 0.5, "per_device_eval_batch_size": 2}
        result = loop.train(config(eval_ratio=0.3, **settings))
        _, held_out = split_rows(NUM_ROWS, 0.3, 42)
        rows = datasets.load_from_disk(dataset_path)
        model = load_adapter(load_base_model(str(tiny_folder)), config().output_dir)
        total, count = 0.0, 0
        for row in rows.select(held_out):
            ids = torch.tensor([row["input_ids"]])
            labels = ids.clone()
            labels[:, : row["seq_len"] - 1] = -100
            num_labels = int((labels[:, 1:] != -100).sum())
            total += model(ids, labels=labels).loss.item() * num_labels
            count += num_labels
        assert losses(result, "eval_loss") == pytest.approx([total / count], abs=1e-5)

    def test_rows_held_out_are_not_trained_on(self, config, monkeypatch):
        seen = set()
        collate = passes.collate
        monkeypatch.setattr(
            passes,
            "collate",
            lambda rows, ids, pad: (seen.update(ids.tolist()), collate(rows, ids, pad))[1],
        )
        monkeypatch.setattr(held_out, "mean_loss", lambda *_: 0.0)
        loop.train(config(eval_ratio=0.3, max_steps=-1, num_train_epochs=2))
        train, kept_back = split_rows(NUM_ROWS, 0.3, 42)
        assert seen == set(train)
        assert not seen & set(kept_back)


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
    def unbroken(self, config, tmp_path):
        return loop.train(config(output_dir=str(tmp_path / "unbroken"), **self.SETTINGS))

    def test_a_resumed_run_is_the_unbroken_run(self, config, unbroken, tmp_path):
        """Bit for bit: from step 5, amid an epoch, amid three steps that are logged together."""
        checkpoint = tmp_path / "unbroken" / "checkpoint-5"
        resumed = loop.train(config(resume_from_checkpoint=str(checkpoint), **self.SETTINGS))
        assert resumed.global_step == 9
        assert [r["step"] for r in records(unbroken)] == [1, 3, 6, 9]
        assert records(resumed) == records(unbroken)
        assert records(resumed, "eval_loss") == records(unbroken, "eval_loss")
        ours, theirs = adapter(tmp_path / "run"), adapter(tmp_path / "unbroken")
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
        states = [
            json.loads((tmp_path / name / "trainer_state.json").read_text())
            for name in ("run", "unbroken")
        ]
        assert states[0]["num_input_tokens_seen"] == states[1]["num_input_tokens_seen"]

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl+C", "SIGTERM"])
    def test_a_signal_stops_between_two_passes_with_a_checkpoint(
        self, config, unbroken, tmp_path, monkeypatch, capsys, number
    ):
        go_on = stop_at(7, monkeypatch, number)
        handler = signal.getsignal(number)
        stopped = loop.train(config(**self.SETTINGS))
        assert signal.getsignal(number) == handler
        assert (stopped.interrupted, stopped.global_step) == (True, 6)  # one pass of 7 is undone
        checkpoint = tmp_path / "run" / "checkpoint-6"
        assert checkpoint.is_dir()
        out = capsys.readouterr().out
        recipe = tmp_path / "run" / "recipe.yaml"
        assert f"glmtune train {recipe} --resume_from_checkpoint {checkpoint}\n" in out
        go_on()
        flags = {"resume_from_checkpoint": str(checkpoint)}
        resumed = loop.train(read_config(TrainSettings, "train", str(recipe), flags))
        assert not resumed.interrupted
        assert records(resumed) == records(unbroken)
        assert records(resumed, "eval_loss") == records(unbroken, "eval_loss")
        lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == [1, 3, 4, 6, 8, 9, 9]

    def test_a_second_ctrl_c_does_not_wait(self, config, monkeypatch):
        def step(*_):
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

        monkeypatch.setattr(loop, "train_step", step)
        with pytest.raises(KeyboardInterrupt):
            loop.train(config())

    def test_true_takes_the_newest_and_says_what_it_passes_over(self, config, tmp_path, capsys):
        settings = {"max_steps": 6, "save_steps": 2, "lr_scheduler_type": "constant"}
        loop.train(config(**settings))
        (tmp_path / "run" / "checkpoint-6" / "optimizer.pt").write_bytes(b"cut short")
        capsys.readouterr()
        loop.train(config(resume_from_checkpoint="true", **settings | {"max_steps": 7}))
        out, err = capsys.readouterr()
        assert "7, which is" in out
        assert "4 of them done" in out
        assert "passed over" in err
        assert "optimizer.pt is damaged" in err

    def test_a_run_without_an_end_in_its_schedule_can_be_made_longer(self, config):
        settings = {"lr_scheduler_type": "constant", "max_steps": 2}
        loop.train(config(**settings))
        longer = loop.train(config(resume_from_checkpoint="true", **settings | {"max_steps": 4}))
        assert len(losses(longer)) == 4

    def test_another_recipe_is_refused_with_each_difference(self, config, tmp_path):
        loop.train(config(max_steps=2))
        with pytest.raises(UserError) as error:
            loop.train(
                config(
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

    def test_other_data_under_the_same_path_are_refused(self, config, tmp_path):
        path = write_rows(tmp_path / "data", seed=1)
        loop.train(config(max_steps=2, dataset_path=path))
        write_rows(tmp_path / "data", seed=2)
        with pytest.raises(UserError, match="data sha256"):
            loop.train(config(max_steps=2, dataset_path=path, resume_from_checkpoint="true"))

    def test_what_does_not_change_the_numbers_may_change(self, config):
        loop.train(config(max_steps=2, lr_scheduler_type="constant"))
        result = loop.train(
            config(
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


class TestCautions:
    """What is most likely a slip is said before the first step."""

    def test_many_epochs(self, config, capsys, monkeypatch):
        monkeypatch.setattr(loop, "fit", lambda run, *_: SimpleNamespace(global_step=0))
        loop.train(config(max_steps=2000))
        told = capsys.readouterr().err
        assert "2,000 steps are 500 epochs of 23 rows" in told
        fix = told.partition("little else; ")[2].split()[:4]
        flags = dict(zip(fix[::2], fix[1::2], strict=True))
        flags = {name.removeprefix("--"): float(value) for name, value in flags.items()}
        loop.train(config(overwrite_output_dir=True, **flags))
        assert "epochs" not in capsys.readouterr().err

    @pytest.mark.parametrize("schedule", ["linear", "constant_with_warmup"])
    def test_a_warm_up_without_an_end(self, config, capsys, monkeypatch, schedule):
        monkeypatch.setattr(loop, "fit", lambda run, *_: SimpleNamespace(global_step=0))
        settings = {"max_steps": 4, "lr_scheduler_type": schedule, "overwrite_output_dir": True}
        loop.train(config(warmup_steps=4, **settings))
        assert "never comes to 0.001; --warmup_steps 0.03" in capsys.readouterr().err
        loop.train(config(warmup_steps=0.03, **settings))
        assert "warmup_steps" not in capsys.readouterr().err

    @pytest.mark.parametrize("number", [1, 2])
    def test_accelerate_that_launches_one_process(self, number, monkeypatch, capsys, config):
        """With the environment that `accelerate launch --cpu --num_processes 2` makes."""
        words = ["--cpu", "--num_processes", str(number), "finetune.py"]
        arguments, *_ = _validate_launch_command(launch_command_parser().parse_args(words))
        _, environment = prepare_simple_launcher_cmd_env(arguments)
        for name in ("ACCELERATE_USE_CPU", "MASTER_ADDR", "MASTER_PORT"):
            if name in environment:
                monkeypatch.setenv(name, environment[name])
        start_accelerator(config())
        told = "accelerate launch has started one process" in capsys.readouterr().err
        assert told == (number == 2)


class TestRefusals:
    def test_a_folder_with_a_run_is_not_trained_over(self, config, tmp_path):
        loop.train(config(max_steps=1))
        before = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*")}
        with pytest.raises(UserError, match="holds a run already") as error:
            loop.train(config(max_steps=1))
        for fix in ("--resume_from_checkpoint true", "--overwrite_output_dir true", "another"):
            assert fix in str(error.value)
        assert {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*")} == before

    def test_overwriting_takes_the_run_away_and_nothing_else(self, config, tmp_path):
        loop.train(config(max_steps=3, save_steps=1, report_to="tensorboard"))
        (tmp_path / "run" / "notes.txt").write_text("mine")
        (tmp_path / "run" / "runs" / "mine.txt").write_text("mine")
        result = loop.train(config(max_steps=1, overwrite_output_dir=True))
        assert len(result.log_history) == 1
        assert [p.name for p in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-1"]
        assert (tmp_path / "run" / "notes.txt").read_text() == "mine"
        assert [p.name for p in (tmp_path / "run" / "runs").iterdir()] == ["mine.txt"]

    @pytest.mark.parametrize("wanted", ["true", "no/such/folder"])
    def test_nothing_to_resume_from(self, config, wanted, tmp_path):
        with pytest.raises(UserError, match="no folder"):
            loop.train(config(resume_from_checkpoint=wanted))
        assert not (tmp_path / "run").exists()

    def test_data_of_another_tokenizer(self, config, tmp_path, monkeypatch):
        other = SimpleNamespace(**vars(TOKENIZER) | {"eos_token_id": 1006})
        monkeypatch.setattr(prepare, "load_tokenizer", lambda base: other)
        with pytest.raises(UserError, match="another tokenizer"):
            loop.train(config())
        assert not (tmp_path / "run").exists()

    def test_a_bad_row_is_named_before_anything_is_written(self, config, tmp_path):
        def spoil(rows):
            rows[4]["input_ids"][-2] = VOCAB_SIZE
            return rows

        path = write_rows(tmp_path / "bad", seed=0, change=spoil)
        with pytest.raises(UserError, match="row 5 holds id 1024"):
            loop.train(config(dataset_path=path))
        assert not (tmp_path / "run").exists()

    def test_an_unwritable_folder(self, config, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(UserError, match=r"output_dir.*is a file"):
            loop.train(config(output_dir=str(tmp_path / "file")))
        with pytest.raises(UserError, match=r"output_dir.*cannot be written"):
            loop.train(config(output_dir=str(tmp_path / "file" / "run")))

    def test_a_diverged_run_stops_and_spoils_no_checkpoint(self, config, tmp_path):
        settings = {"learning_rate": 1e30, "lr_scheduler_type": "constant", "max_grad_norm": 0}
        with pytest.raises(UserError, match=r"logits are not finite, so it is not kept"):
            loop.train(config(save_steps=1, logging_steps=100, max_steps=50, **settings))
        with pytest.raises(UserError, match=r"step 2: .*learning_rate \(1e\+30\)"):
            loop.train(config(max_steps=50, overwrite_output_dir=True, **settings))
        for checkpoint in (tmp_path / "run").glob("checkpoint-*"):
            assert all(weight.isfinite().all() for weight in adapter(checkpoint).values())

    def test_a_checkpoint_that_is_not_what_was_trained_goes(self, config, tmp_path, monkeypatch):
        save = checkpoints.save_adapter

        def save_less(model, folder, base):
            save(model, folder, base)
            if "checkpoint-4" in str(folder):
                tensors = load_file(folder / "adapter_model.safetensors")
                tensors.pop(max(tensors))
                save_file(tensors, folder / "adapter_model.safetensors")

        monkeypatch.setattr(checkpoints, "save_adapter", save_less)
        with pytest.raises(UserError, match=r"checkpoint-4.*not what was trained.*is missing"):
            loop.train(config(save_steps=2, save_total_limit=1))
        assert [p.name for p in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-2"]

    def test_weights_that_learn_nothing(self, config, monkeypatch, capsys):
        """A gradient of zero on one of them is told, on all of them it ends the run."""
        run_pass = passes.PaddedPass.run
        silenced = ["layers.2.attention.query_key_value.lora_A"]

        def run(self, *args):
            loss = run_pass(self, *args)
            for name, weight in self.model.named_parameters():
                if weight.requires_grad and any(part in name for part in silenced):
                    weight.grad.zero_()
            return loss

        monkeypatch.setattr(passes.PaddedPass, "run", run)
        loop.train(config())
        told = capsys.readouterr().err
        assert told.count("they learn nothing") == 1
        assert "step 4: the gradient was exactly 0 in all of the first steps for 1 of 8" in told
        assert "layers.2.attention.query_key_value.lora_A" in told
        silenced[:] = [""]
        with pytest.raises(UserError, match="for 8 of 8 weights"):
            loop.train(config(overwrite_output_dir=True))

    def test_a_loss_that_explodes(self, config, monkeypatch, capsys):
        readings = iter([5.0, 4.0, 30.0, 40.0, 50.0, 60.0])
        take_loss = loop.take_loss
        monkeypatch.setattr(loop, "take_loss", lambda *args: take_loss(*args) * 0 + next(readings))
        with pytest.raises(UserError, match=r"step 5: the loss explodes: 50, .*learning_rate"):
            loop.train(config())
        assert capsys.readouterr().err.count("warning: step") == 2

    def test_a_loss_of_zero_keeps_what_was_learned(self, config, monkeypatch, tmp_path):
        readings = iter([5.0, 0.0, 0.0, 0.0])
        monkeypatch.setattr(loop, "take_loss", lambda *args: next(readings))
        with pytest.raises(UserError, match="step 4: the loss is exactly 0"):
            loop.train(config())
        assert [p.name for p in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-4"]

    def test_a_gpu_that_is_too_small(self, config, monkeypatch):
        def full(*_):
            raise torch.OutOfMemoryError("CUDA out of memory")

        monkeypatch.setattr(loop, "build_pass", full)
        with pytest.raises(UserError, match="too small for this: per_device_train_batch_size 1"):
            loop.train(config())
        with pytest.raises(UserError, match="too small for this: gradient_checkpointing true"):
            loop.train(
                config(layout="packed", tokens_per_step=64, output_dir=config().output_dir + "2")
            )


class TestPacking:
    PACKED = {"layout": "packed", "tokens_per_step": 64}  # noqa: RUF012
    EXACT = {"layout": "exact"}  # noqa: RUF012

    def test_rows_end_to_end_give_the_losses_of_padded_ones(self, config, tmp_path):
        padded = loop.train(config(lora_dropout=0, eval_ratio=0.2, eval_steps=2))
        exact = loop.train(
            config(
                lora_dropout=0, eval_ratio=0.2, eval_steps=2, output_dir=str(tmp_path / "exact"),
                **self.EXACT,
            )
        )  # fmt: skip
        assert losses(exact) == pytest.approx(losses(padded), abs=1e-5)
        assert losses(exact, "eval_loss") == pytest.approx(losses(padded, "eval_loss"), abs=1e-5)
        assert losses(exact, "grad_norm") == pytest.approx(losses(padded, "grad_norm"), rel=1e-4)

    def test_evaluation_in_packs_sees_every_row_held_out(self, config, tmp_path):
        same = {"lora_dropout": 0, "learning_rate": 1e-12, "eval_ratio": 0.4, "max_steps": 1}
        padded = loop.train(config(**same))
        packed = loop.train(config(output_dir=str(tmp_path / "packed"), **same, **self.PACKED))
        assert losses(packed, "eval_loss") == pytest.approx(losses(padded, "eval_loss"), abs=1e-5)

    def test_every_pass_drops_other_inputs(self):
        seeds = {
            pass_seed(seed, step, number)
            for seed in range(3) for step in range(5) for number in range(4)
        }  # fmt: skip
        assert len(seeds) == 60

    def test_a_run_of_packs(self, config, capsys):
        settings = {"max_steps": -1, "num_train_epochs": 12, "learning_rate": 1e-2}
        result = loop.train(config(eval_ratio=0.2, **settings, **self.PACKED))
        out = capsys.readouterr().out
        for words in (
            "64 = packs of 64 x 2 pass(es)",
            "--layout exact",
            "checked: a pass over",
        ):
            assert words.replace("64 = packs of 64", "128 = packs of 64") in out, words
        curve = losses(result)
        assert curve[-1] < curve[0]
        assert losses(result, "eval_loss")[-1] < curve[0]
        assert load_adapter(load_base_model(config().chatglm_path), config().output_dir)

    def test_each_row_is_trained_on_once_an_epoch(self, config, monkeypatch):
        seen = []
        run = passes.PackedPass.run
        monkeypatch.setattr(loop, "check_first_step", lambda *args: None)
        monkeypatch.setattr(
            passes.PackedPass,
            "run",
            lambda self, ids, *rest: (seen.extend(ids), run(self, ids, *rest))[1],
        )
        loop.train(config(max_steps=-1, num_train_epochs=2, **self.PACKED))
        assert sorted(seen) == sorted([*range(NUM_ROWS)] * 2)

    @pytest.mark.parametrize("layout", [PACKED, EXACT])
    def test_a_resumed_run_is_the_unbroken_run(self, config, tmp_path, layout):
        """Bit for bit, with dropout and two passes a step: packs and order come back, too."""
        settings = {**layout, "max_steps": 7, "save_steps": 3, "lora_dropout": 0.1}
        unbroken = loop.train(config(output_dir=str(tmp_path / "unbroken"), **settings))
        loop.train(config(**settings))
        for name in ("checkpoint-6", "checkpoint-7"):
            shutil.rmtree(tmp_path / "run" / name)
        resumed = loop.train(config(resume_from_checkpoint="true", **settings))
        assert records(resumed) == records(unbroken)
        weights = [
            load_file(tmp_path / run / "adapter_model.safetensors") for run in ("run", "unbroken")
        ]
        assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])

    def test_packs_of_another_length_are_another_recipe(self, config):
        loop.train(config(max_steps=2, **self.PACKED))
        other = {**self.PACKED, "tokens_per_step": 128}
        with pytest.raises(UserError, match=r"tokens per step 128 \(now 256\)"):
            loop.train(config(max_steps=2, resume_from_checkpoint="true", **other))
        with pytest.raises(UserError, match=r"layout packed \(now padded\)"):
            loop.train(config(max_steps=2, resume_from_checkpoint="true"))

    def test_a_row_that_fits_into_no_pack_is_named(self, dataset_path, tiny_folder, tmp_path):
        long_row = {"input_ids": [5] * 70 + [GMASK, SOP, EOP], "seq_len": 72}
        path = tmp_path / "long"
        rows = [{"input_ids": [5, GMASK, SOP, EOP], "seq_len": 3}, long_row]
        datasets.Dataset.from_list(rows).save_to_disk(path)
        config = TrainSettings(
            dataset_path=str(path), output_dir=str(tmp_path / "run"), use_cpu=True,
            chatglm_path=str(tiny_folder), **self.PACKED,
        )  # fmt: skip
        with pytest.raises(UserError, match=r"long: row 2 has 73 tokens; 1 row"):
            loop.train(config)

    def test_a_pass_that_differs_from_its_rows_stops_the_run(self, config, monkeypatch):
        wrong = passes.PackedPass.gradients
        monkeypatch.setattr(
            passes.PackedPass,
            "gradients",
            lambda self, ids, weights: (lambda loss, grads: (1.01 * loss, grads))(
                *wrong(self, ids, weights)
            ),
        )
        with pytest.raises(UserError, match=r"loss off by 1\.0"):
            loop.train(config(**self.PACKED))
        assert not list(Path(config().output_dir).glob("checkpoint-*"))

    def test_the_recipe_as_run_says_what_the_card_chose(self, config, tmp_path):
        loop.train(config(max_steps=2, **{**self.PACKED, "tokens_per_step": None}))
        as_run = read_config(TrainSettings, "train", str(tmp_path / "run" / "recipe.yaml"), {})
        assert (as_run.layout, as_run.tokens_per_step) == ("packed", 2048)

    @pytest.mark.parametrize(
        ("kind", "settings", "expected"),
        [
            ("cpu", {}, "padded"),
            ("cpu", {"layout": "packed"}, "packed"),
            ("cpu", {"layout": "exact"}, "exact"),
            ("cuda", {}, "packed"),
            ("cuda", {"max_steps": 100}, "packed"),
            ("cuda", {"max_steps": 100, "per_device_train_batch_size": 6}, "exact"),
            (
                "cuda",
                {"max_steps": 9, "per_device_train_batch_size": 6, "tokens_per_step": 64},
                "packed",
            ),
            (
                "cuda",
                {"max_steps": 100, "per_device_train_batch_size": 6, "layout": "packed"},
                "packed",
            ),
            ("cuda", {"layout": "exact"}, "exact"),
            ("cuda", {"layout": "padded"}, "padded"),
        ],
    )
    def test_the_layout(self, kind, settings, expected):
        """The original's command, which says how many rows and steps, keeps both on a GPU."""
        config = TrainSettings(dataset_path="rows", output_dir="run", **settings)
        assert choose_layout(config, on_gpu=kind == "cuda") == expected

    def test_float8_needs_a_card_that_has_it(self, config):
        with pytest.raises(UserError, match="base_dtype fp8: CPU"):
            loop.train(config(base_dtype="fp8"))


class TestMemory:
    @pytest.fixture(params=["padded", "exact", "packed"])
    def layout(self, request):
        """Settings of each layout."""
        return {
            "padded": {},
            "exact": {"layout": "exact"},
            "packed": {"layout": "packed", "tokens_per_step": 64},
        }[request.param]

    def test_the_forecast_is_the_first_that_a_run_says(self, config, capsys, monkeypatch):
        load, said = prepare.load_base_model, []
        monkeypatch.setattr(
            prepare,
            "load_base_model",
            lambda *a, **k: (said.append(capsys.readouterr().out), load(*a, **k))[1],
        )
        loop.train(config(max_steps=1))
        first, *lines = said[0].splitlines()
        assert first.startswith("Memory for chatglm-6b-tiny with rank 8")
        assert [line.split()[0] for line in lines[:6]] == [
            "at", "weights", "adapter", "optimiser", "activations", "logits",
        ]  # fmt: skip
        assert "fits" in lines[-1]

    def test_what_the_card_has_free_is_asked_before_the_weights_are_on_it(
        self, config, monkeypatch
    ):
        """And not again: advice would take the weights for another program's."""
        card, asked, load = Card.of(torch.device("cpu")), [], prepare.load_base_model
        monkeypatch.setattr(Card, "of", lambda device: asked.append("card") or card)
        monkeypatch.setattr(
            prepare, "load_base_model", lambda *a, **k: asked.append("weights") or load(*a, **k)
        )
        loop.train(config(max_steps=1))
        assert asked == ["card", "weights"]

    def test_what_cannot_fit_is_refused_before_the_weights_are_loaded(self, config, monkeypatch):
        tiny = Card("a tiny card", 0.5, 0.5, (8, 0))
        monkeypatch.setattr(Card, "of", lambda device: tiny)
        monkeypatch.setattr(prepare, "load_base_model", lambda *a, **k: pytest.fail("loaded"))
        with pytest.raises(UserError, match=r"memory: 0\.\d GiB of 0\.5 .a tiny card.: does not"):
            loop.train(config(max_steps=1))
        assert not Path(config().output_dir).exists()

    def test_the_heaviest_pass_of_the_run_comes_first(self, config, layout, monkeypatch):
        """And changes none of its numbers, dropout's random ones among them."""
        asked = config(max_steps=8, lora_dropout=0.3, **layout)
        seen, check = [], loop.check_first_step

        def spy(run, state, step_pass):
            cls = type(step_pass)
            passed = cls.run
            monkeypatch.setattr(
                cls,
                "run",
                lambda self, ids, *rest, **named: (
                    seen.append(ids),
                    passed(self, ids, *rest, **named),
                )[1],
            )
            check(run, state, step_pass)
            assert all(weight.grad is None for weight in state.weights)

        with monkeypatch.context() as patch:
            patch.setattr(loop, "check_first_step", lambda *args: None)
            wanted = losses(loop.train(asked))
        monkeypatch.setattr(loop, "check_first_step", spy)
        asked = asked.model_copy(update={"overwrite_output_dir": True})
        assert losses(loop.train(asked)) == wanted
        rehearsed, *others = seen
        lengths = token_rows(asked.dataset_path).lengths_R

        def weight(ids):
            if layout or not len(ids):
                return lengths[ids].sum()
            return lengths[ids].max() * len(ids)

        assert len(others) > 8
        assert weight(rehearsed) == max(map(weight, others))

    def test_what_does_not_fit_is_told_with_advice_before_the_first_step(
        self, config, layout, monkeypatch
    ):
        monkeypatch.setattr(loop, "train_step", lambda *args: pytest.fail("a step was taken"))
        for cls in (passes.PaddedPass, passes.PackedPass):
            monkeypatch.setattr(cls, "run", no_memory)
        with pytest.raises(UserError, match=r"memory is too small for this: .* GiB"):
            loop.train(config(**layout))


def no_memory(*args, **settings):
    raise torch.OutOfMemoryError("CUDA out of memory")


def token_rows(path):
    return TokenRows.from_dataset(datasets.load_from_disk(path))


class TestTwoProcesses:
    SETTINGS = {  # noqa: RUF012
        "max_steps": -1,
        "num_train_epochs": 2,
        "eval_ratio": 0.17,  # 19 rows to train on: the last step of an epoch has one for the two
        "eval_steps": 3,
        "save_steps": 4,
    }
    DEALT = {  # noqa: RUF012  (a global batch of 6 in three ways)
        "one process": {"per_device_train_batch_size": 6, "gradient_accumulation_steps": 1},
        "two": {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 1},
        "two in passes": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 3},
    }

    @pytest.fixture(scope="class")
    def folder(self, dataset_path, tiny_folder, tmp_path_factory):
        """Where two processes did all that `run_in_two_processes` does, with what they printed."""
        folder = tmp_path_factory.mktemp("two")
        launch = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node=2",
        ]
        done = subprocess.run(
            [*launch, __file__, str(folder), dataset_path, str(tiny_folder)],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        (folder / "stdout").write_text(done.stdout)
        (folder / "stderr").write_text(done.stderr)
        return folder

    def history(self, run_folder):
        state = json.loads((run_folder / "trainer_state.json").read_text())
        return SimpleNamespace(log_history=state["log_history"])

    @pytest.mark.parametrize("dealt", ["two", "two in passes"])
    def test_they_are_one(self, folder, config, dealt):
        """They see the rows that one process sees, and end at the same losses."""
        single = loop.train(config(lora_dropout=0, **self.SETTINGS, **self.DEALT["one process"]))
        both = self.history(folder / dealt)
        assert len(losses(single)) == 8
        assert losses(both) == pytest.approx(losses(single), abs=1e-5)
        assert losses(both, "eval_loss") == pytest.approx(losses(single, "eval_loss"), abs=1e-5)
        assert losses(both, "grad_norm") == pytest.approx(losses(single, "grad_norm"), rel=1e-4)

    def test_dropout_is_the_same_whichever_process_makes_a_pass(self, folder, config):
        """Two processes of a pass each drop what one of two passes drops."""
        dealt = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2}
        single = loop.train(config(**self.SETTINGS, **dealt))
        both = self.history(folder / "dropout")
        assert losses(both) == pytest.approx(losses(single), abs=1e-5)
        without = loop.train(
            config(lora_dropout=0, overwrite_output_dir=True, **self.SETTINGS, **dealt)
        )
        assert losses(without) != pytest.approx(losses(single), abs=1e-4)

    def test_packs_are_shared_out(self, folder, config):
        """Two processes with a pack each train as one with two passes."""
        single = loop.train(
            config(
                lora_dropout=0, gradient_accumulation_steps=2, **self.SETTINGS,
                **TestPacking.PACKED,
            )
        )  # fmt: skip
        both = self.history(folder / "packs")
        assert len(losses(single)) > 4
        assert losses(both) == pytest.approx(losses(single), abs=1e-5)
        assert losses(both, "eval_loss") == pytest.approx(losses(single, "eval_loss"), abs=1e-5)
        assert losses(both, "grad_norm") == pytest.approx(losses(single, "grad_norm"), rel=1e-4)

    def test_a_signal_to_one_stops_both_and_they_go_on_as_if_unbroken(self, folder):
        stopped = json.loads((folder / "stopped.json").read_text())
        assert stopped == {"interrupted": True, "global_step": 4}  # agreed upon a step later
        assert records(self.history(folder / "stopped")) == records(
            self.history(folder / "dropout")
        )

    def test_only_one_talks_and_each_keeps_its_own_random_state(self, folder):
        out, err = (folder / "stdout").read_text(), (folder / "stderr").read_text()
        assert err.count("has no glmtune_data.json") == 6  # once a run
        assert out.count("LoRA of rank 8") == out.count("trained on") == 6
        command = "torchrun --nproc_per_node 2 -m glmtune train "
        assert out.count(command) == 1
        states = [folder / "dropout" / "checkpoint-4" / f"rng_state_{rank}.pth" for rank in (0, 1)]
        generators = [torch.Generator(), torch.Generator()]
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(torch.load(state, weights_only=True)["cpu"])
        assert [generator.initial_seed() for generator in generators] == [42, 43]


def run_in_two_processes(folder, dataset_path, base):
    """What each of two launched processes does: four runs, and one that is stopped and resumed."""
    prepare.load_tokenizer = lambda base: TOKENIZER
    test = TestTwoProcesses

    def settings(name, **changes):
        return TrainSettings(
            dataset_path=dataset_path,
            output_dir=f"{folder}/{name}",
            chatglm_path=base,
            learning_rate=1e-3,
            logging_steps=1,
            report_to="none",
            use_cpu=True,
            **test.SETTINGS | test.DEALT["two"] | changes,
        )

    loop.train(settings("two", lora_dropout=0))
    loop.train(settings("two in passes", lora_dropout=0, **test.DEALT["two in passes"]))
    loop.train(settings("dropout"))
    loop.train(settings("packs", lora_dropout=0, **TestPacking.PACKED))
    with pytest.MonkeyPatch.context() as patch:
        if os.environ["RANK"] == "1":
            stop_at(3, patch, signal.SIGTERM)
        result = loop.train(settings("stopped"))
    told = {"interrupted": result.interrupted, "global_step": result.global_step}
    Path(folder, "stopped.json").write_text(json.dumps(told))
    loop.train(settings("stopped", resume_from_checkpoint="true"))


if __name__ == "__main__":
    run_in_two_processes(*sys.argv[1:])
