"""The training loop on rows laid end to end."""

import shutil
from pathlib import Path

import pytest
import torch
from toys import (
    EXACT,
    NUM_ROWS,
    PACKED,
    ToyTokenizer,
    adapter_weights,
    draw_rows,
    losses,
    records,
    save_rows,
)

from glmtune.adapters import load_adapter
from glmtune.config.reading import read_config
from glmtune.config.settings import TrainSettings
from glmtune.errors import UserError
from glmtune.models.loading import load_base_model
from glmtune.training import loop, passes
from glmtune.training.plan import pass_seed
from glmtune.training.planning.forecast import choose_layout


class TestPacking:
    def test_rows_end_to_end_give_the_losses_of_padded_ones(self, tiny_run, tmp_path):
        padded = loop.train(tiny_run(lora_dropout=0, eval_ratio=0.2, eval_steps=2))
        exact = loop.train(
            tiny_run(
                lora_dropout=0, eval_ratio=0.2, eval_steps=2, output_dir=str(tmp_path / "exact"),
                **EXACT,
            )
        )  # fmt: skip
        assert losses(exact) == pytest.approx(losses(padded), abs=1e-5)
        assert losses(exact, "eval_loss") == pytest.approx(losses(padded, "eval_loss"), abs=1e-5)
        assert losses(exact, "grad_norm") == pytest.approx(losses(padded, "grad_norm"), rel=1e-4)

    def test_evaluation_in_packs_sees_every_row_held_out(self, tiny_run, tmp_path):
        same = {"lora_dropout": 0, "learning_rate": 1e-12, "eval_ratio": 0.4, "max_steps": 1}
        padded = loop.train(tiny_run(**same))
        packed = loop.train(tiny_run(output_dir=str(tmp_path / "packed"), **same, **PACKED))
        assert losses(packed, "eval_loss") == pytest.approx(losses(padded, "eval_loss"), abs=1e-5)

    def test_every_pass_drops_other_inputs(self):
        seeds = {
            pass_seed(seed, step, number)
            for seed in range(3) for step in range(5) for number in range(4)
        }  # fmt: skip
        assert len(seeds) == 60

    def test_a_run_of_packs_learns_and_says_what_it_is(self, tiny_run, capsys):
        settings = {"max_steps": -1, "num_train_epochs": 12, "learning_rate": 1e-2}
        result = loop.train(tiny_run(eval_ratio=0.2, **settings, **PACKED))
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
        assert load_adapter(load_base_model(tiny_run().base), tiny_run().output_dir)

    def test_each_row_is_trained_on_once_an_epoch(self, tiny_run, spy, monkeypatch):
        monkeypatch.setattr(loop, "check_first_step", lambda *args: None)
        calls = spy(passes.PackedPass, "run")
        loop.train(tiny_run(max_steps=-1, num_train_epochs=2, **PACKED))
        seen = [row_id for call in calls for row_id in call.args[1]]
        assert sorted(seen) == sorted([*range(NUM_ROWS)] * 2)

    @pytest.mark.parametrize("layout", [PACKED, EXACT])
    def test_a_resumed_run_is_the_unbroken_run(self, tiny_run, tmp_path, layout):
        """Bit for bit, with dropout and two passes a step; packs and order are restored."""
        settings = {**layout, "max_steps": 7, "save_steps": 3, "lora_dropout": 0.1}
        unbroken = loop.train(tiny_run(output_dir=str(tmp_path / "unbroken"), **settings))
        loop.train(tiny_run(**settings))
        for name in ("checkpoint-6", "checkpoint-7"):
            shutil.rmtree(tmp_path / "run" / name)
        resumed = loop.train(tiny_run(resume_from_checkpoint="true", **settings))
        assert records(resumed) == records(unbroken)
        ours, theirs = adapter_weights(tmp_path / "run"), adapter_weights(tmp_path / "unbroken")
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)

    def test_packs_of_another_length_are_another_recipe(self, tiny_run):
        loop.train(tiny_run(max_steps=2, **PACKED))
        other = {**PACKED, "tokens_per_step": 128}
        with pytest.raises(UserError, match=r"tokens per step 128 \(now 256\)"):
            loop.train(tiny_run(max_steps=2, resume_from_checkpoint="true", **other))
        with pytest.raises(UserError, match=r"layout packed \(now padded\)"):
            loop.train(tiny_run(max_steps=2, resume_from_checkpoint="true"))

    def test_a_row_that_fits_into_no_pack_is_named(self, tiny_run, tmp_path):
        path = save_rows(draw_rows([(1, 1), (70, 1)], ToyTokenizer), tmp_path / "long")
        with pytest.raises(UserError, match=r"long: row 2 has 73 tokens; 1 row"):
            loop.train(tiny_run(dataset_path=path, **PACKED))

    def test_a_pass_that_differs_from_its_rows_stops_the_run(self, tiny_run, monkeypatch):
        gradients = passes.PackedPass.gradients

        def wrong(self, *args):
            loss, grads = gradients(self, *args)
            return 1.01 * loss, grads

        monkeypatch.setattr(passes.PackedPass, "gradients", wrong)
        with pytest.raises(UserError, match=r"loss off by 1\.0"):
            loop.train(tiny_run(**PACKED))
        assert not list(Path(tiny_run().output_dir).glob("checkpoint-*"))

    def test_the_recipe_as_run_says_what_the_card_chose(self, tiny_run, tmp_path):
        loop.train(tiny_run(max_steps=2, **{**PACKED, "tokens_per_step": None}))
        as_run = read_config(TrainSettings, str(tmp_path / "run" / "recipe.yaml"), {})
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
    def test_the_layout_that_settings_and_device_choose(self, kind, settings, expected):
        """The original's command, which gives rows and steps, keeps both on a GPU."""
        asked = TrainSettings(dataset_path="rows", output_dir="run", **settings)
        assert choose_layout(asked, on_gpu=kind == "cuda") == expected

    def test_float8_needs_a_card_that_has_it(self, tiny_run):
        with pytest.raises(UserError, match="base_dtype fp8: CPU"):
            loop.train(tiny_run(base_dtype="fp8"))
