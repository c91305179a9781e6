"""The commands on folders of the form of chatglm-6b-int8 and -int4-qe, made from glm-tiny."""

import json

import pytest
import torch
from safetensors.torch import load_file

from glmtune.adapters import load_adapter
from glmtune.adapters.merge import probe
from glmtune.cli import main
from glmtune.models.loading import load_base_model
from glmtune.models.resolve import GLM_TINY

RECORDS = [
    {"instruction": "说出一种水果。", "input": "", "output": "苹果。"},
    {"instruction": "Name a colour.", "input": "", "output": "Red."},
] * 4


@pytest.fixture(params=[(8, False), (4, True)], ids=["int8", "int4-qe"])
def base(request, write_quantised, tmp_path, monkeypatch):
    """A base named in the environment, and the working folder with records in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GLMTUNE_MODEL", "base")
    text = json.dumps(RECORDS, ensure_ascii=False)
    (tmp_path / "records.json").write_text(text, encoding="utf-8")
    return write_quantised(GLM_TINY, tmp_path / "base", *request.param)


def run(command, capsys):
    """The stderr of a command."""
    assert main(command.split()) == 0, command
    return capsys.readouterr().err


def test_train_answer_compare_and_merge(base, tmp_path, capsys):
    run("convert --data_path records.json --save_path rows.jsonl", capsys)
    run("tokenize --jsonl_path rows.jsonl --save_path rows", capsys)
    few_steps = "--max_steps 3 --lora_target all --learning_rate 0.01 --use_cpu true"
    told = run(f"train --dataset_path rows --output_dir run {few_steps}", capsys)
    assert "weights of base are dequantised to float32" in told

    answer = "--data_path records.json --adapter run --max_new_tokens 4 --use_cpu true"
    for verb in ("infer", "compare --limit 2"):
        told = run(f"{verb} {answer}", capsys)
        assert "weights of base stay packed" in told

    told = run("merge --adapter run --save_path merged", capsys)
    assert "weights of base are dequantised to float16" in told
    settings = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert not settings.get("quantization_bit")
    types = {name: t.dtype for name, t in load_file("merged/model.safetensors").items()}
    # As in any merge, what the adapter changed is kept in float32.
    adapted = {name for name in types if "dense" in name or "query_key_value" in name}
    changed = {name for name in adapted if name.endswith(".weight")}
    assert {name for name, dtype in types.items() if dtype == torch.float32} == changed
    assert {types[name] for name in types.keys() - changed} == {torch.float16}

    packed = load_base_model("base", dtype=torch.float32, keep_integers=True)
    expected = probe(load_adapter(packed, "run"))
    merged = probe(load_base_model("merged", dtype=torch.float32))
    # The dequantised weights of the merged folder are rounded to float16.
    torch.testing.assert_close(merged, expected, rtol=0, atol=1e-3 * expected.abs().max().item())
