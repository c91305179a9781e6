"""The commands with a base that is quantised while it loads."""

import json
import shutil

import pytest
import torch
import yaml

from glmtune.adapters import load_adapter
from glmtune.adapters.merge import probe
from glmtune.cli import main
from glmtune.models.loading import load_base_model
from glmtune.models.resolve import GLM_TINY

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: make test does it")

RECORDS = [
    {"instruction": "说出一种水果。", "input": "", "output": "苹果。"},
    {"instruction": "Name a colour.", "input": "", "output": "Red."},
] * 4


def run(command, capsys, status=0):
    """The stderr of a command."""
    assert main(command.split()) == status, command
    return capsys.readouterr().err


@pytest.fixture
def rows(tmp_path, monkeypatch, capsys):
    """A working folder with records and token rows; the base is glm-tiny."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GLMTUNE_MODEL", "glm-tiny")
    text = json.dumps(RECORDS, ensure_ascii=False)
    (tmp_path / "records.json").write_text(text, encoding="utf-8")
    run("convert --data_path records.json --save_path rows.jsonl", capsys)
    run("tokenize --jsonl_path rows.jsonl --save_path rows", capsys)


@pytest.mark.parametrize(("bits", "layout"), [(8, "packed"), (4, "padded")])
def test_train_go_on_answer_compare_and_merge(rows, tmp_path, capsys, bits, layout):
    base = f"--quantization_bit {bits} --quantize_head true --use_cpu true"
    settings = f"--layout {layout} --lr_scheduler_type constant --learning_rate 0.01"
    train = f"train --dataset_path rows --output_dir run {settings}"
    run(f"{train} {base} --max_steps 2", capsys)
    recipe = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text(encoding="utf-8"))
    assert (recipe["quantization_bit"], recipe["quantize_head"]) == (str(bits), True)

    run(f"{train} {base} --max_steps 3 --resume_from_checkpoint true", capsys)
    other = f"{train} --use_cpu true --max_steps 4 --resume_from_checkpoint true"
    told = run(other, capsys, status=2)
    assert f"quantization_bit {bits} (now " in told
    assert "quantize_head True (now False)" in told

    answer = f"--data_path records.json --adapter run --max_new_tokens 4 {base}"
    run(f"infer {answer} --limit 2", capsys)
    run(f"compare {answer} --limit 2", capsys)
    plain = "--data_path records.json --adapter run --max_new_tokens 4 --use_cpu true --limit 3"
    told = run(f"infer {plain}", capsys, status=2)
    assert f"its answers were made with quantization_bit {bits}" in told

    # Merged into the unquantised base, not into its rounded weights.
    run("merge --adapter run --save_path merged", capsys)
    settings = json.loads((tmp_path / "merged" / "config.json").read_text(encoding="utf-8"))
    assert "quantization_config" not in settings


@pytest.mark.parametrize("bits", [8, 4])
def test_train_on_and_merge_into_a_folder_that_was_saved_quantised(rows, tmp_path, capsys, bits):
    base = load_base_model(GLM_TINY, dtype=torch.float32, bits=bits)
    base.save_pretrained(tmp_path / "base")
    for name in ("ice_text.model", "tokenizer_config.json"):
        shutil.copy(f"{GLM_TINY}/{name}", tmp_path / "base")
    settings = "--max_steps 2 --learning_rate 0.01 --layout packed --use_cpu true"
    run(f"train --base base --dataset_path rows --output_dir run {settings}", capsys)
    told = run("merge --base base --adapter run --save_path merged", capsys)
    assert "dequantised to float16" in told
    settings = json.loads((tmp_path / "merged" / "config.json").read_text(encoding="utf-8"))
    assert "quantization_config" not in settings
    tuned = probe(load_adapter(load_base_model("base", dtype=torch.float32).dequantize(), "run"))
    merged = probe(load_base_model("merged", dtype=torch.float32))
    torch.testing.assert_close(merged, tuned, rtol=0, atol=1e-3 * tuned.abs().max().item())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--quantization_bit 5", "--quantization_bit '5' should be 8 or 4"),
        ("--quantization_bit 4 --base_dtype fp8", "base_dtype fp8 and quantization_bit 4"),
    ],
)
def test_bits_that_cannot_be_are_refused_in_one_line(rows, tmp_path, capsys, flags, message):
    told = run(f"train --dataset_path rows --output_dir run {flags}", capsys, status=2)
    assert message in told
    assert told.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_answers_round_their_weights_once(rows, capsys):
    flags = "--quantize_head true --decode_bits 8"
    told = run(f"infer --data_path records.json {flags}", capsys, status=2)
    assert "quantize_head and decode_bits 8 would both round the weights" in told
