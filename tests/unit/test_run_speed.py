"""A plan's time against measured steps, and the pages on cards against the code."""

import json
import re
from functools import partial
from pathlib import Path

import pytest
import torch

from glmtune.bench.rows import random_rows
from glmtune.cards import CARDS
from glmtune.cli import main
from glmtune.config.settings import TrainSettings
from glmtune.hardware import Card
from glmtune.models.chatglm.configuration import ChatGLMConfig
from glmtune.training.plan import make_plan
from glmtune.training.planning.forecast import PACK_SPEEDS, forecast
from glmtune.training.planning.ranks import ALONE
from glmtune.training.planning.scaling import run_time
from glmtune.training.planning.speed import flops_per_token, no_speed

ROOT = Path(__file__).parents[2]
CHATGLM_6B = ChatGLMConfig()
ROWS = random_rows(CHATGLM_6B, 20_000)
SETTINGS = ("tokens_per_step", "base_dtype", "quantization_bit", "lora_target")


def forecast_of(card, dtype=torch.bfloat16, config=CHATGLM_6B, **settings):
    """The forecast of a run on a card, and its settings."""
    settings = TrainSettings(dataset_path="rows", output_dir="run", **settings)
    return forecast(settings, config, dtype, Card.named(card), ROWS), settings


def speed_on(card, **settings):
    """The speed of such a run, on one card."""
    found, settings = forecast_of(card, **settings)
    plan = make_plan(settings, ROWS, found.pack_length, 1)
    return run_time(found, (plan, plan), ROWS, settings, ALONE)


def records():
    """(where, card, settings, ms a step) of each step of the 6B shape that was measured."""
    for path in sorted((ROOT / "benchmarks").glob("*.jsonl")):
        for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
            record = json.loads(line)
            card = record.get("device", "").removeprefix("NVIDIA ")
            if record.get("layout") not in ("packed", "exact") or record["shape"] != "6b":
                continue
            given = {k: v for k, v in record["settings"].items() if k in SETTINGS}
            yield f"{path.stem}:{number}", card, given | {"layout": record["layout"]}, record["ms"]


class TestMeasured:
    @pytest.mark.parametrize(("where", "card", "settings", "ms"), records())
    def test_every_recorded_step_is_met_within_a_tenth(self, where, card, settings, ms):
        computed = 3600e3 * speed_on(card, **settings).hours_per_step
        assert computed == pytest.approx(ms, rel=0.1), where

    def test_there_are_records_of_each_kind(self):
        kinds = {
            (s["layout"], s.get("quantization_bit"), s.get("base_dtype")) for *_, s, _ in records()
        }
        packed, exact = ("packed", None, None), ("exact", None, None)
        assert kinds >= {packed, ("packed", None, "fp8"), ("packed", "4", None)}
        assert kinds >= {("packed", "8", None), exact, ("exact", "4", None)}

    @pytest.mark.parametrize(
        ("settings", "tokens_per_second"),
        [({}, 24_240), ({"base_dtype": "fp8"}, 37_800), ({"layout": "exact"}, 18_096)],
    )
    def test_tokens_a_second_of_an_h200(self, settings, tokens_per_second):
        speed = speed_on("H200", **settings)
        assert speed.tokens_per_second == pytest.approx(tokens_per_second, rel=0.03)
        assert speed.measured

    @pytest.mark.parametrize(
        ("bits", "ms"), [(None, 31.7), ("4", 54.1), ("8", 99.3)]
    )  # benchmarks/2026-11-26-memory.md
    def test_six_recomputed_rows_of_an_h100(self, bits, ms):
        speed = speed_on("H100", layout="exact", quantization_bit=bits, gradient_checkpointing=True)
        assert 3600e3 * speed.hours_per_step == pytest.approx(ms, rel=0.1)
        assert not speed.measured

    def test_packs_are_chosen_by_speeds_like_these(self):
        """The forecast's measured table agrees for shorter packs."""
        longest = speed_on("H200", tokens_per_step=8192).tokens_per_second
        for length, share in PACK_SPEEDS.items():
            speed = speed_on("H200", tokens_per_step=length)
            assert speed.tokens_per_second / longest == pytest.approx(share, rel=0.03)


class TestComputed:
    def test_flops_are_those_of_the_products(self):
        setup = forecast_of("H200")[0].setup
        layer, head = 4096 * (3 * 4096 + 4096 + 2 * 4 * 4096), 130_528 * 4096
        assert flops_per_token(setup, 0) == 4 * (28 * layer + head)
        assert flops_per_token(setup, 5) - flops_per_token(setup, 0) == 2 * 5 * layer

    def test_another_card_is_computed_by_its_rating(self):
        here, there = speed_on("H200"), speed_on("A100 80GB")
        assert there.rows_per_second / here.rows_per_second == pytest.approx(312 / 989)
        assert (here.measured, there.measured) == (True, False)

    @pytest.mark.parametrize(
        "other",
        [{"dtype": torch.float16}, {"gradient_checkpointing": True}, {"quantization_bit": "4"},
         {"config": ChatGLMConfig(num_layers=27)}],
    )  # fmt: skip
    def test_what_was_not_measured_is_computed_even_on_an_h200(self, other):
        assert not speed_on("H200", **other).measured

    @pytest.mark.parametrize("layout", ["packed", "exact"])
    def test_passes_accumulated_take_as_long_as_steps(self, layout):
        once = speed_on("H200", layout=layout)
        twice = speed_on("H200", layout=layout, gradient_accumulation_steps=2)
        assert twice.rows_per_second == pytest.approx(once.rows_per_second)
        assert twice.hours_per_step == pytest.approx(2 * once.hours_per_step, rel=0.01)

    def test_rows_held_out_take_no_time(self):
        assert speed_on("H200", eval_ratio=0.5).rows_per_second == pytest.approx(
            speed_on("H200").rows_per_second, rel=0.02
        )

    def test_a_time_that_is_not_known_is_not_computed(self):
        settings = TrainSettings(dataset_path="rows", output_dir="run")
        of = partial(forecast, settings, CHATGLM_6B, torch.float16, rows=ROWS)
        assert "CPU" in no_speed(of(card=Card("CPU", 4.0, 4.0, None)))
        assert "a card of 24 GiB" in no_speed(of(card=Card.sized(24)))
        assert "before Ampere" in no_speed(of(card=Card.named("T4")))
        assert "padded" in no_speed(forecast_of("H200", layout="padded")[0])
        assert no_speed(forecast_of("H200")[0]) is None

    def test_ratings_are_of_16_bits(self):
        """No card that runs the kernels does more in 16 bits than a B200, or less than an A2."""
        for name, (_, capability, tflops) in CARDS.items():
            if capability >= (8, 0) and "Laptop" not in name:
                assert 13 < (tflops or 0) <= 2250, name


class TestPlanVerb:
    FLAGS = ("--base", "zai-org/chatglm-6b", "--card", "H200")

    def plan(self, tmp_path, *flags):
        path = tmp_path / "plan.jsonl"
        main(["plan", *self.FLAGS, *flags, "--json_path", str(path)])
        return json.loads(path.read_text(encoding="utf-8").splitlines()[-1])

    def test_time_is_printed_and_recorded(self, tmp_path, capsys):
        time = self.plan(tmp_path, "--row_length", "66", "--num_rows", "8000")["time"]
        assert time["hours"] == pytest.approx(time["num_steps"] * time["hours_per_step"])
        assert time["hours"] == pytest.approx(3 * 8000 / time["rows_per_second"] / 3600, rel=0.02)
        out = capsys.readouterr().out
        assert f"{time['rows_per_second']:.1f} rows a second" in out
        assert "measured on an H200" in out
        assert f"{60 * time['hours']:.1f} minutes for {time['num_steps']} steps, 3 x 8,000" in out

    def test_a_number_of_steps_is_taken_as_given(self, tmp_path, capsys):
        time = self.plan(tmp_path, "--max_steps", "50000", "--card", "4090")["time"]
        assert (time["num_steps"], time["measured"]) == (50_000, False)
        assert f"{time['hours']:.1f} hours for 50,000 steps" in capsys.readouterr().out

    def test_a_card_without_a_rating_gets_no_time_and_is_told_why(self, tmp_path, capsys):
        record = self.plan(tmp_path, "--card", "3080 Laptop 16GB")
        assert record["time"] == {}
        assert "Time: not computed: TFLOP/s of RTX 3080 Laptop 16GB" in capsys.readouterr().out

    def test_what_cannot_fit_has_no_time(self, tmp_path):
        assert "time" not in self.plan(tmp_path, "--card", "4060")


class TestPages:
    @pytest.fixture
    def tool(self, monkeypatch):
        monkeypatch.syspath_prepend(ROOT / "tools")
        import cards

        return cards

    def test_the_tables_are_what_the_code_says(self, tool):
        for path, words in tool.PAGES.items():
            page = (ROOT / path).read_text(encoding="utf-8")
            assert page == tool.with_table(page, *words), "run: python tools/cards.py"

    def test_the_model_beside_measurements_is_what_the_code_says(self, tool):
        six = {"layout": "exact", "gradient_checkpointing": True}
        runs = [
            ("H200", {}), ("H200", {"tokens_per_step": 16384}), ("H200", {"base_dtype": "fp8"}),
            ("H200", {"layout": "exact"}), ("H200", {"lora_target": "all"}),
            ("H100", {"quantization_bit": "4"}), ("H100", {"quantization_bit": "8"}),
            *(("H100", six | {"quantization_bit": bits}) for bits in (None, "8", "4")),
        ]  # fmt: skip
        figures = [f"{speed_on(card, **given).tokens_per_second:,.0f}" for card, given in runs]
        for path in tool.PAGES:
            lines = (ROOT / path).read_text(encoding="utf-8").splitlines()
            cells = [line.split("|")[-2] for line in lines if line.startswith(("| H200", "| H100"))]
            assert re.findall(r"\d+,\d{3}", " ".join(cells)) == figures
