"""The choices made for a card's memory, and the settings advised if it is too small."""

import json

import numpy as np
import pytest
import torch
from toys import draw_rows, save_rows

from glmtune.bench.rows import random_rows
from glmtune.cards import CARDS
from glmtune.cli import main
from glmtune.config.settings import TrainSettings
from glmtune.errors import UserError
from glmtune.hardware import Card
from glmtune.models.chatglm.configuration import ChatGLMConfig
from glmtune.training.plan import PackPlan, RowPlan
from glmtune.training.planning.advice import advise, check_fit, find_remedies, verdict
from glmtune.training.planning.forecast import forecast, rows_of_reference

CHATGLM_6B = ChatGLMConfig()
ROWS = random_rows(CHATGLM_6B, 2000)
SIX_ROWS = {"max_steps": 500, "per_device_train_batch_size": 6}


def forecast_on(gib, **settings):
    """The forecast of a run on a card of given memory."""
    return make_forecaster(Card.sized(gib))(make_config(**settings))


def make_forecaster(card):
    return lambda config: forecast(config, CHATGLM_6B, torch.bfloat16, card, ROWS)


def make_config(**settings):
    return TrainSettings(dataset_path="rows", output_dir="run", **settings)


class TestChoice:
    @pytest.mark.parametrize(
        ("gib", "length", "recompute"),
        [
            (140, 8192, 0),
            (48, 8192, 0),
            (24, 4096, 0),
            (20, 2048, 0),
            (16, 1024, 0),
            (12, 1024, 27),
        ],
    )
    def test_packs_and_layers_to_recompute_are_chosen_together(self, gib, length, recompute):
        result = forecast_on(gib)
        assert (result.pack_length, result.recompute) == (length, recompute)
        assert result.fits is (gib > 12)

    def test_only_as_many_layers_are_recomputed_as_the_card_needs(self):
        wished = {"tokens_per_step": 8192}
        counts = [forecast_on(gib, **wished).recompute for gib in (33, 30, 26, 22, 18)]
        assert counts == sorted(counts)
        assert counts[0] == 0 < counts[1] < counts[-1] < 27
        for gib, count in zip((30, 26, 22, 18), counts[1:], strict=True):
            assert forecast_on(gib, **wished).fits
            fewer = {"gradient_checkpointing": False, **wished}
            assert not forecast_on(gib, **fewer).fits, count
        any_number = {forecast_on(gib, **wished).recompute for gib in np.arange(29, 33, 0.1)}
        assert any_number == set(range(max(any_number) + 1))

    def test_six_rows_need_no_more_than_their_heaviest_batch(self):
        result = forecast_on(16, **SIX_ROWS)
        assert result.layout == "exact"
        sums = np.sort(ROWS.lengths_R)[-6:].sum()
        assert 500 < result.batch.num_tokens < sums
        assert result.recompute < forecast_on(14, **SIX_ROWS).recompute <= 27

    def test_gradient_checkpointing_is_as_the_user_says(self):
        assert forecast_on(24, gradient_checkpointing=True).pack_length == 8192
        assert forecast_on(24, gradient_checkpointing=True).recompute == 27
        assert forecast_on(13, gradient_checkpointing=False).recompute == 0

    def test_a_cpu_recomputes_only_when_told(self):
        cpu = Card("CPU", 4.0, 4.0, None)
        result = make_forecaster(cpu)(make_config())
        assert (result.layout, result.recompute, result.fits) == ("padded", 0, False)
        assert not result.cannot_fit  # there is the swap
        assert make_forecaster(cpu)(make_config(gradient_checkpointing=True)).recompute == 27

    def test_the_reference_takes_no_more_than_the_run(self):
        assert rows_of_reference(forecast_on(140), 200) == 6
        assert rows_of_reference(forecast_on(140, gradient_checkpointing=True, **SIX_ROWS), 200) < 3


class TestAdvice:
    def test_each_remedy_fits_by_its_own_forecast(self):
        on_card = make_forecaster(Card.sized(17))
        config = make_config(gradient_checkpointing=False, **SIX_ROWS, layout="exact")
        config = config.model_copy(update={"per_device_train_batch_size": 12})
        assert not on_card(config).fits
        remedies = find_remedies(config, on_card)
        assert [set(remedy.settings) for remedy in remedies] == [
            {"per_device_train_batch_size", "gradient_accumulation_steps"},
            {"gradient_checkpointing"},
            {"quantization_bit"},
            {"quantization_bit", "quantize_head"},
        ]
        for remedy in remedies:
            result = on_card(config.model_copy(update=remedy.settings))
            assert result.fits
            assert result.needed_gib == remedy.needed_gib
        first = remedies[0].settings
        assert np.prod(list(first.values())) == 12

    def test_an_eight_gib_card_is_told_to_take_four_bits(self):
        config, on_card = make_config(), make_forecaster(Card.sized(8))
        with pytest.raises(UserError, match=r"12\.\d GiB of 8\.0 .* quantization_bit 4 would take"):
            check_fit(on_card(config), config, on_card)

    def test_settings_are_joined_where_one_is_not_enough(self):
        config, on_card = (
            make_config(gradient_checkpointing=False),
            make_forecaster(Card.sized(5.5)),
        )
        (remedy,) = find_remedies(config, on_card)
        assert {"quantization_bit", "quantize_head", "gradient_checkpointing"} <= set(
            remedy.settings
        )

    def test_advice_counts_passes_as_the_settings_do(self):
        config = make_config(gradient_checkpointing=False, **SIX_ROWS, layout="exact")
        config = config.model_copy(update={"per_device_train_batch_size": 12, "passes_per_step": 4})
        on_card = make_forecaster(Card.sized(17))
        first = find_remedies(config, on_card)[0].settings
        assert set(first) == {"per_device_train_batch_size", "passes_per_step"}
        assert np.prod(list(first.values())) == 12 * 4

    def test_a_card_beyond_help(self):
        on_card = make_forecaster(Card.sized(2))
        assert advise(make_config(), on_card).startswith("no setting makes it fit")

    def test_a_run_within_the_error_of_the_estimate_is_tried(self):
        config, on_card = make_config(), make_forecaster(Card.sized(12.6))
        result = on_card(config)
        assert "may not fit" in verdict(result)
        check_fit(result, config, on_card)

    def test_memory_of_other_programs_counts(self):
        crowded = Card("a card", 24.0, 5.0, (8, 0))
        result = make_forecaster(crowded)(make_config())
        assert result.cannot_fit
        assert "19.0 taken by other programs" in verdict(result)


class TestHeaviest:
    LENGTHS = np.random.default_rng(0).integers(4, 200, 103)

    @pytest.mark.parametrize("padded", [True, False])
    @pytest.mark.parametrize(("num_steps", "num_processes"), [(1, 1), (5, 2), (30, 2), (40, 1)])
    def test_no_pass_of_the_run_is_heavier(self, padded, num_steps, num_processes):
        plan = RowPlan(np.arange(103), 7, True, self.LENGTHS, 4 * num_processes * 2, 4)

        def weight(part):
            lengths = self.LENGTHS[part]
            return len(part) * lengths.max() if padded else lengths.sum()

        parts = [p for step in range(num_steps) for p in plan.parts(step, num_processes) if len(p)]
        heaviest = plan.heaviest(num_steps, num_processes, padded)
        assert weight(heaviest) == max(map(weight, parts))
        assert any(np.array_equal(heaviest, part) for part in parts)

    def test_no_pack_of_the_run_is_fuller(self):
        plan = PackPlan(np.arange(103), 7, True, self.LENGTHS, 512, 1)
        fullest = plan.heaviest(10, 1, False)
        assert self.LENGTHS[fullest].sum() == max(self.LENGTHS[p].sum() for p in plan.packs(0)[:10])


class TestCards:
    @pytest.mark.parametrize("card", CARDS)
    def test_each_card_has_its_own_name(self, card):
        for name in (card, card.lower(), f"NVIDIA GeForce {card}", card.replace(" ", "-")):
            assert Card.named(name).name == card
        gib, capability, tflops = CARDS[card]
        assert Card.named(card) == Card(card, gib, gib, capability, tflops)

    @pytest.mark.parametrize(
        ("name", "card"),
        [
            ("4090", "RTX 4090"), ("RTX4090", "RTX 4090"), ("4090D", "RTX 4090 D"),
            ("4090 laptop", "RTX 4090 Laptop"), ("4090 mobile", "RTX 4090 Laptop"),
            ("NVIDIA GeForce RTX 3070 Laptop GPU", "RTX 3070 Laptop"),
            ("NVIDIA GeForce RTX 3090", "RTX 3090"), ("3090ti", "RTX 3090 Ti"),
            ("2080", "RTX 2080"), ("2080Ti", "RTX 2080 Ti"), ("1080 Ti", "GTX 1080 Ti"),
            ("3080 12GB", "RTX 3080 12GB"), ("3080-10g", "RTX 3080 10GB"),
            ("4060Ti 16G", "RTX 4060 Ti 16GB"), ("4070TiSuper", "RTX 4070 Ti Super"),
            ("tesla-t4", "T4"), ("T4 16GB", "T4"), ("Tesla P40", "P40"), ("L4 24 GB", "L4"),
            ("A100-80GB", "A100 80GB"), ("NVIDIA A100-SXM4-40GB", "A100 40GB"),
            ("Tesla V100-SXM2-32GB", "V100 32GB"), ("v100 16", "V100 16GB"),
            ("NVIDIA H100 80GB HBM3", "H100"), ("H100 PCIe", "H100 PCIe"),
            ("NVIDIA H100 PCIe 80GB", "H100 PCIe"), ("H20 96GB", "H20"),
            ("RTXA6000", "RTX A6000"), ("A6000", "RTX A6000"), ("6000 Ada", "RTX 6000 Ada"),
            ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada"),
        ],
    )  # fmt: skip
    def test_usual_names_of_a_card(self, name, card):
        assert Card.named(name).name == card
        assert Card.named(name).gib == CARDS[card][0]

    @pytest.mark.parametrize(
        ("card", "rated"),
        [("2080", 8), ("2080 Ti", 11), ("3070", 8), ("3080 12GB", 12), ("3090 Ti", 24),
         ("4070", 12), ("4070 Ti Super", 16), ("5060 Ti 8GB", 8), ("5070", 12), ("5090", 32),
         ("1080 Ti", 11),
         ("P40", 24), ("P100", 16), ("A800 80GB", 80), ("H20", 96), ("L40S", 48), ("A30", 24)],
    )  # fmt: skip
    def test_memory_is_a_little_less_than_what_is_on_the_box(self, card, rated):
        assert 0.92 * rated <= Card.named(card).gib <= rated

    @pytest.mark.parametrize(
        "name",
        [
            "3080",
            "RTX 4060 Ti",
            "5060ti",
            "V100",
            "a100",
            "A800",
            "3060",
            "3080 laptop",
            "RTX 6000",
        ],
    )
    def test_a_name_that_several_cards_have(self, name):
        with pytest.raises(
            UserError, match=r"may be .* or .*: say which, such as --card"
        ) as caught:
            Card.named(name)
        advised = str(caught.value).rpartition("--card ")[2].strip("'")
        assert Card.named(advised).name == advised

    @pytest.mark.parametrize("name", ["", "4", "banana", "NVIDIA", "4090 48GB", "T4 32G"])
    def test_unknown_names_of_cards_are_refused(self, name):
        with pytest.raises(UserError, match=r"is not known .* --memory_gib \d+$"):
            Card.named(name)


class TestPlanVerb:
    HUB = ("--base", "zai-org/chatglm-6b")

    def plan(self, tmp_path, *flags, code=0):
        path = tmp_path / "plan.jsonl"
        assert main(["plan", *flags, "--json_path", str(path)]) == code
        return json.loads(path.read_text(encoding="utf-8").splitlines()[-1])

    def test_the_plan_is_printed_and_recorded(self, tmp_path, capsys):
        record = self.plan(tmp_path, "--memory_gib", "8", *self.HUB, code=1)
        out = capsys.readouterr().out
        for word in ("weights", "adapter", "optimiser", "activations", "logits", "does not fit"):
            assert word in out
        assert "quantization_bit 4 would take" in out
        assert not record["fits"]
        assert record["weights_gib"] == pytest.approx(11.50, abs=0.01)
        assert record["remedies"][0]["settings"] == {"quantization_bit": "4"}
        tops = ("weights", "adapter", "optimiser", "activations", "logits", "way_back", "buffers")
        total = sum(record[f"{name}_gib"] for name in tops)
        assert record["allocated_gib"] == pytest.approx(total)

    def test_without_a_base_it_speaks_of_the_model_that_people_have(
        self, tmp_path, capsys, monkeypatch
    ):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
        monkeypatch.setattr(
            "glmtune.models.resolve._hub_has", lambda _: pytest.fail("needs no hub")
        )
        record = self.plan(tmp_path, "--memory_gib", "8", code=1)
        assert record["base"] == "zai-org/chatglm-6b"
        assert not record["fits"]
        out, err = capsys.readouterr()
        assert "does not fit" in out
        assert "this is of ChatGLM-6B" in err
        assert self.plan(tmp_path, "--card", "T4")["weights_gib"] > 11
        assert self.plan(tmp_path, "--card", "T4", "--base", "glm-tiny")["fits"]

    def test_the_least_memory_is_told_before_what_is_spent_for_speed(self, tmp_path, capsys):
        record = self.plan(tmp_path, "--memory_gib", "24", *self.HUB)
        lines = [line.split() for line in capsys.readouterr().out.splitlines()]
        assert lines[1][0] == "lora"
        assert lines[2][:3] == ["at", "least", f"{record['least_gib']:.2f}"]
        (spent,) = (float(line[1]) for line in lines if line[0] == "spent")
        assert spent == pytest.approx(record["needed_gib"] - record["least_gib"], abs=0.01)
        assert record["least_gib"] < 13 < 20 < record["needed_gib"]
        frugal = ["--gradient_checkpointing", "true", "--tokens_per_step", "1024"]
        as_told = self.plan(tmp_path, "--memory_gib", "24", *self.HUB, *frugal)
        assert as_told["needed_gib"] == as_told["least_gib"] == record["least_gib"]
        assert "spent" not in capsys.readouterr().out

    def test_what_a_remedy_takes_at_least(self, tmp_path, capsys):
        record = self.plan(tmp_path, "--memory_gib", "12", *self.HUB)
        remedy = record["remedies"][0]
        assert remedy["least_gib"] < remedy["needed_gib"] <= 12
        words = f"would take {remedy['least_gib']:.1f} GiB at least, {remedy['needed_gib']:.1f} to"
        assert words in capsys.readouterr().out

    def test_a_card_by_name_and_the_lengths_of_the_rows(self, tmp_path):
        rows = save_rows(draw_rows([(7, 11)] * 12, CHATGLM_6B), tmp_path / "rows")
        flags = ["--card", "3090", *self.HUB, "--layout", "exact"]
        record = self.plan(tmp_path, *flags, "--dataset_path", rows)
        assert record["tokens_per_pass"] == 128  # six rows of 20 tokens, in whole 64s
        assert record["card"] == "RTX 3090"
        assert self.plan(tmp_path, *flags)["tokens_per_pass"] == 1216
        assert self.plan(tmp_path, *flags, "--row_length", "50")["tokens_per_pass"] == 320

    def test_a_recipe_with_sections_is_read_as_training_reads_it(self, tmp_path):
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(
            "base: zai-org/chatglm-6b\nconvert:\n  data_path: a.json\n  save_path: b\n"
            "train:\n  tokens_per_step: 2048\n  lora_rank: 16\n  output_dir: out\n"
            "plan:\n  memory_gib: 24\n",
            encoding="utf-8",
        )
        record = self.plan(tmp_path, str(recipe))
        assert (record["tokens_per_pass"], record["card_gib"]) == (2048, 24)
        assert record["adapter_gib"] == pytest.approx(4 * 2 * 7_340_032 / 2**30)
        assert (
            self.plan(tmp_path, str(recipe), "--tokens_per_step", "1024")["tokens_per_pass"] == 1024
        )

    def test_a_base_on_disk_is_not_loaded(self, tmp_path, tiny_folder, monkeypatch):
        (tmp_path / "base").mkdir()
        config = (tiny_folder / "config.json").read_text(encoding="utf-8")
        (tmp_path / "base" / "config.json").write_text(config, encoding="utf-8")
        record = self.plan(tmp_path, "--base", str(tmp_path / "base"), "--use_cpu", "true")
        assert record["layout"] == "padded"
        assert record["num_layers"] == 4

    @pytest.mark.parametrize(
        ("flags", "words"),
        [
            (["--card", "foo"], "card 'foo' is not known"),
            (["--memory_gib", "0"], "--memory_gib '0' should be a number, above 0"),
            (["--memory_gib", "8", "--card", "T4"], "memory_gib and card both name a card"),
            (["--memori_gib", "8"], "did you mean --memory_gib"),
            (["--deepspeed", "x"], "or a share of it with --shard_base true"),
            (["--json_path", "no/such/folder.jsonl"], "cannot be written"),
        ],
    )
    def test_mistakes_of_plan_are_refused_in_one_line(self, flags, words, capsys):
        assert main(["plan", *flags]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert words in error
        assert error.count("\n") == 1
