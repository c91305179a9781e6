"""The training loop, on a tiny model: what a step computes and what a run leaves."""

import json
import math

import datasets
import numpy as np
import pytest
import torch
from peft import PeftModel
from toys import NUM_ROWS, losses
from transformers import TrainerState

from glmtune.adapters import load_adapter
from glmtune.config.reading import read_config
from glmtune.config.settings import TrainSettings
from glmtune.data.split import split_rows
from glmtune.models.loading import load_base_model
from glmtune.training import held_out, loop, passes, prepare


class TestRunFolder:
    @pytest.fixture(scope="class")
    def run(self, tiny_rows, tiny_folder, word_tokenizer, tmp_path_factory):
        folder = tmp_path_factory.mktemp("whole") / "run"
        settings = TrainSettings(
            dataset_path=tiny_rows,
            output_dir=str(folder),
            base=str(tiny_folder),
            num_train_epochs=2,
            logging_steps=2,
            save_steps=2,
            save_total_limit=2,
            eval_ratio=0.2,  # 18 rows to train on, three steps of 6
            eval_steps=3,
            general_set=False,
            use_cpu=True,
        )
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(prepare, "load_tokenizer", lambda base: word_tokenizer)
            return settings, folder, loop.train(settings)

    def test_the_newest_checkpoints_are_kept(self, run):
        _, folder, result = run
        assert result.global_step == 6
        assert sorted(path.name for path in folder.glob("checkpoint-*")) == [
            "checkpoint-4",
            "checkpoint-6",
        ]

    @pytest.mark.parametrize("name", ["checkpoint-4", "."])
    def test_each_checkpoint_is_a_peft_adapter(self, run, name, tiny_folder):
        _, folder, _ = run
        base = load_base_model(str(tiny_folder))
        tuned = PeftModel.from_pretrained(base, folder / name)
        ids = torch.tensor([[5, 6, 1001, 1004, 9]])
        with torch.no_grad(), tuned.disable_adapter():
            without = tuned(ids).logits
        with torch.no_grad():
            assert not torch.equal(tuned(ids).logits, without)
        settings = json.loads((folder / name / "adapter_config.json").read_text())
        assert settings["base_model_name_or_path"] == "chatglm-6b-tiny"
        assert (settings["r"], settings["lora_alpha"]) == (8, 32)

    def test_a_checkpoint_holds_what_resuming_takes(self, run):
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

    def test_curve_events_and_recipe_are_written(self, run):
        settings, folder, _ = run
        assert (folder / "training_loss.png").read_bytes().startswith(b"\x89PNG")
        assert list(folder.glob("runs/events.out.tfevents.*"))
        as_run = settings.model_copy(
            update={"layout": "padded", "lora_target": ("query_key_value",), "lora_rank": 8}
        )
        assert read_config(TrainSettings, str(folder / "recipe.yaml"), {}) == as_run

    def test_nothing_half_written_is_left(self, run):
        _, folder, _ = run
        assert [p for p in folder.rglob("*") if p.name.startswith(".") or "tmp" in p.name] == []


def test_banner_and_summary_tell_the_run(tiny_run, capsys):
    loop.train(tiny_run(eval_ratio=0.2, max_steps=4))
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
        f"glmtune infer --data_path RECORDS.json --adapter {tiny_run().output_dir}",
    ):
        assert words in out, words


class TestStep:
    def test_the_number_of_passes_changes_no_loss(self, tiny_run, tmp_path):
        """The mean is over the label tokens of the global batch, not over its passes."""
        whole = loop.train(
            tiny_run(per_device_train_batch_size=6, gradient_accumulation_steps=1, lora_dropout=0)
        )
        for size, num_passes in ((3, 2), (1, 6)):
            other = loop.train(
                tiny_run(
                    output_dir=str(tmp_path / f"{size}x{num_passes}"),
                    per_device_train_batch_size=size,
                    gradient_accumulation_steps=num_passes,
                    lora_dropout=0,
                )
            )
            assert losses(other) == pytest.approx(losses(whole), abs=1e-5)
            assert losses(other, "grad_norm") == pytest.approx(losses(whole, "grad_norm"), rel=1e-4)

    def test_recomputing_changes_no_loss(self, tiny_run, tmp_path):
        kept = loop.train(tiny_run())
        again = loop.train(tiny_run(output_dir=str(tmp_path / "b"), gradient_checkpointing="true"))
        assert losses(again) == losses(kept)

    def test_the_base_stays_and_the_adapter_is_float32(self, tiny_run, spy, tiny_folder):
        calls = spy(loop, "fit")
        loop.train(tiny_run(bf16=True, lora_target="all"))
        model = calls[0].args[1]
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
    def test_learning_rates_of_each_schedule(self, tiny_run, schedule, warmup, expected):
        result = loop.train(tiny_run(max_steps=4, lr_scheduler_type=schedule, warmup_steps=warmup))
        rates = [rate / 1e-3 for rate in losses(result, "learning_rate")]
        assert rates == pytest.approx(expected)

    def test_clipping_bounds_the_update_and_tells_the_norm_before(
        self, tiny_run, tmp_path, monkeypatch
    ):
        norms = []
        step = torch.optim.AdamW.step

        def measured(optimizer, *args):
            grads = [w.grad for w in optimizer.param_groups[0]["params"]]
            norms.append(torch.nn.utils.get_total_norm(grads).item())
            return step(optimizer, *args)

        monkeypatch.setattr(torch.optim.AdamW, "step", measured)
        told = losses(loop.train(tiny_run(max_grad_norm=0.01, max_steps=2)), "grad_norm")
        assert norms == pytest.approx([0.01] * 2, rel=1e-3)
        assert min(told) > 0.02
        norms.clear()
        told = losses(
            loop.train(tiny_run(max_grad_norm=0, max_steps=2, output_dir=str(tmp_path / "b"))),
            "grad_norm",
        )
        assert norms == pytest.approx(told)

    def test_what_each_seed_decides(self, tiny_run, tmp_path):
        runs = iter(range(10))

        def course(**settings):
            folder = str(tmp_path / str(next(runs)))
            return losses(loop.train(tiny_run(max_steps=3, output_dir=folder, **settings)))

        usual = course()
        assert course() == usual
        # The first loss depends only on the rows: the adapter has no effect yet.
        assert course(data_seed=7)[0] != usual[0]
        other_start = course(seed=7, data_seed=42)
        assert other_start[0] == usual[0]
        assert other_start[2] != usual[2]
        assert course(seed=7)[0] == course(data_seed=7)[0]

    def test_the_optimiser_gets_its_settings(self, tiny_run, spy):
        calls = spy(loop, "build_state")
        settings = {"adam_beta1": 0.8, "adam_beta2": 0.9, "adam_epsilon": 1e-6, "weight_decay": 0.1}
        loop.train(tiny_run(max_steps=1, **settings))
        (group,) = calls[0].result.optimizer.param_groups
        assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.8, 0.9), 1e-6, 0.1)
        assert group["initial_lr"] == 1e-3

    def test_a_record_is_the_mean_of_the_steps_since_the_last(self, tiny_run, tmp_path):
        every = losses(loop.train(tiny_run()))
        third = losses(loop.train(tiny_run(logging_steps=3, output_dir=str(tmp_path / "b"))))
        # The first step is logged at once.
        expected = [every[0], sum(every[1:3]) / 2, sum(every[3:]) / 3]
        assert third == pytest.approx(expected, abs=1e-6)

    def test_epochs_count_when_steps_do_not(self, tiny_run, tmp_path):
        assert loop.train(tiny_run(max_steps=-1, num_train_epochs=1.5)).global_step == 6
        assert loop.train(tiny_run(max_steps=5, output_dir=str(tmp_path / "b"))).global_step == 5


class TestEvaluation:
    def test_evaluation_loss_is_the_mean_over_held_out_label_tokens(
        self, tiny_run, tiny_rows, tiny_folder
    ):
        settings = {"learning_rate": 0.05, "lora_dropout": 0.5, "per_device_eval_batch_size": 2}
        result = loop.train(tiny_run(eval_ratio=0.3, **settings))
        _, held_out = split_rows(NUM_ROWS, 0.3, 42)
        rows = datasets.load_from_disk(tiny_rows)
        model = load_adapter(load_base_model(str(tiny_folder)), tiny_run().output_dir)
        total, count = 0.0, 0
        for row in rows.select(held_out):
            ids = torch.tensor([row["input_ids"]])
            labels = ids.clone()
            labels[:, : row["seq_len"] - 1] = -100
            num_labels = int((labels[:, 1:] != -100).sum())
            total += model(ids, labels=labels).loss.item() * num_labels
            count += num_labels
        assert losses(result, "eval_loss") == pytest.approx([total / count], abs=1e-5)

    def test_rows_held_out_are_not_trained_on(self, tiny_run, spy, monkeypatch):
        calls = spy(passes, "collate")
        monkeypatch.setattr(
            held_out, "row_losses", lambda _, parts, row_ids, *more: np.zeros(len(row_ids))
        )
        loop.train(tiny_run(eval_ratio=0.3, max_steps=-1, num_train_epochs=2))
        train, kept_back = split_rows(NUM_ROWS, 0.3, 42)
        seen = {row_id for call in calls for row_id in call.args[1].tolist()}
        assert seen == set(train)
        assert not seen & set(kept_back)
