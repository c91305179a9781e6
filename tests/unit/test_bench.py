"""The benchmark of a training step, run small on a CPU."""

import json
from typing import get_args

import numpy as np
import pytest
import torch

from glmtune.bench import limits
from glmtune.bench.random_model import CONFIGS, shape_of
from glmtune.bench.rows import random_rows
from glmtune.cli import main
from glmtune.config.settings import BenchTrainSettings


def bench(tmp_path, *flags):
    path = tmp_path / "bench.jsonl"
    small = ["--shape", "small", "--use_cpu", "true", "--steps", "2", "--warmup", "0"]
    assert main(["bench", "train", *small, "--json_path", str(path), *flags]) == 0
    return json.loads(path.read_text(encoding="utf-8").splitlines()[-1])


def test_a_record_has_all_figures(tmp_path, capsys):
    flags = ["--layout", "packed", "--tokens_per_step", "512", "--compare", "true"]
    record = bench(tmp_path, *flags, "--kernel_table", str(tmp_path / "kernels.txt"))
    assert record["layout"] == "packed"
    assert 0.3 < record["supervised_tokens_per_second"] / record["real_tokens_per_second"] < 0.9
    assert record["real_tokens_per_second"] < record["matmul_limit_tokens_per_second"]
    limit = record["matmul_limit_tokens_per_second"]
    assert record["share_of_limit"] == record["real_tokens_per_second"] / limit
    assert record["plain"]["real_tokens_per_second"] > 0
    assert record["glm_peft_real_tokens_per_second"] > 0
    assert record["copy_bytes_per_second"] > 1e8
    assert record["mfu_4n"] is None  # no rating is known of this CPU
    assert record["loss"] == pytest.approx(np.log(4096), abs=1)
    assert "aten::" in (tmp_path / "kernels.txt").read_text(encoding="utf-8")
    assert record["torch"] in torch.__version__
    out = capsys.readouterr().out
    assert "of the limit" in out
    assert "padded rows" in out


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_a_quantised_base_beside_bitsandbytes_own_modules(tmp_path, layout):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: make test does it")
    bits = ["--quantization_bit", "4", "--quantize_head", "true", "--layout", layout]
    record = bench(tmp_path, *bits, "--limits", "false", "--plain", "false", "--compare", "true")
    assert record["settings"]["quantization_bit"] == "4"
    assert record["real_tokens_per_second"] > 0
    assert record["glm_peft_real_tokens_per_second"] > 0
    assert record["loss"] == pytest.approx(np.log(4096), abs=1)


def test_lines_are_added_and_each_layout_has_its_own(tmp_path):
    few = ["--limits", "false", "--plain", "false"]
    assert bench(tmp_path, *few, "--layout", "exact")["layout"] == "exact"
    assert bench(tmp_path, *few)["layout"] == "padded"
    assert len((tmp_path / "bench.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize("layout", ["padded", "exact"])
def test_the_ceiling_has_the_heads_products_of_every_token_it_meets(layout, tmp_path, monkeypatch):
    asked = []

    def limit(shape, num_tokens, num_supervised, *where, **how):
        asked.append((num_tokens, num_supervised))
        return 1.0

    monkeypatch.setattr(limits, "matmul_limit", limit)
    bench(tmp_path, "--plain", "false", "--layout", layout)
    ((num_tokens, num_supervised),) = asked
    assert num_tokens > 6 * 20
    if layout == "padded":
        assert num_supervised == num_tokens
    else:
        assert 6 < num_supervised < num_tokens


def test_settings_that_exclude_each_other_are_refused_in_one_line(capsys):
    assert main(["bench", "train", "--layout", "exact", "--tokens_per_step", "64"]) == 2
    assert (
        "error: tokens_per_step is the length of packs, but layout is exact"
        in capsys.readouterr().err
    )


def test_float8_is_refused_on_a_cpu(tmp_path, capsys):
    flags = ["--shape", "small", "--use_cpu", "true", "--base_dtype", "fp8"]
    assert main(["bench", "train", *flags]) == 2
    assert "error: base_dtype fp8: CPU" in capsys.readouterr().err


def test_a_device_too_small_for_the_weights(monkeypatch, capsys):
    monkeypatch.setattr("glmtune.bench.random_model.total_memory_gib", lambda device: 16)
    assert main(["bench", "train", "--use_cpu", "true"]) == 2
    assert "error: shape 6b: the weights alone take 23.0 GiB" in capsys.readouterr().err


def test_random_rows_are_as_long_as_real_ones():
    rows = random_rows(CONFIGS["small"], 5000)
    rows.check(CONFIGS["small"].vocab_size, "random")
    assert np.median(rows.lengths_R) == pytest.approx(57, abs=2)
    assert rows.lengths_R.mean() == pytest.approx(66, abs=2)
    assert rows.lengths_R.max() <= 200


def test_the_weights_that_a_token_meets():
    assert shape_of("6b").matmul_parameters() == 6_171_787_264


def test_shapes_are_those_of_the_families():
    assert set(get_args(BenchTrainSettings.model_fields["shape"].annotation)) == set(CONFIGS)


@pytest.mark.parametrize("targets", ["q_proj,k_proj,v_proj", "all"])
def test_the_younger_models_step_is_measured_beside_transformers(tmp_path, targets):
    flags = ["--shape", "glm-small", "--layout", "packed", "--tokens_per_step", "512"]
    record = bench(tmp_path, *flags, "--lora_target", targets, "--compare", "true")
    assert record["layout"] == "packed"
    assert record["glm_peft_real_tokens_per_second"] > 0
    assert record["plain"]["loss"] == pytest.approx(record["loss"], abs=0.5)
    assert record["loss"] == pytest.approx(np.log(4096), abs=1)


def test_the_younger_models_answers_are_measured(tmp_path):
    path = tmp_path / "bench.jsonl"
    flags = ["--shape", "glm-small", "--use_cpu", "true", "--prompt_length", "8"]
    flags += ["--max_new_tokens", "4", "--compare", "true", "--json_path", str(path)]
    assert main(["bench", "decode", *flags]) == 0
    record = json.loads(path.read_text())
    assert record["decode_tokens_per_second"] > 0
    assert record["generate_tokens_per_second"] > 0
