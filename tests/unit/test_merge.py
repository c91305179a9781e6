"""Base and adapter merged into one folder."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from adapter_files import fails
from safetensors.torch import load_file
from torch import nn

from glmtune.adapters import (
    load_adapter,
    merge,
    merge_adapter,
)
from glmtune.config.settings import MergeSettings
from glmtune.models.loading import load_base_model
from glmtune.models.resolve import GLM_TINY


def tie_head(source: Path, target: Path) -> Path:
    """A copy of the tiny base whose head is its embedding, with tokenizer files beside it."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("adapter*", "*.safetensors"))
    tensors = torch.load(target / "pytorch_model.bin", weights_only=True)
    tensors["lm_head.weight"] = tensors["transformer.word_embeddings.weight"]
    torch.save(tensors, target / "pytorch_model.bin")
    (target / "tokenizer_config.json").write_bytes(b'{"name_or_path":  "\xe4\xbd\xa0"}\r\n')
    (target / "tokenization_chatglm.py").write_text("raise SystemExit")
    return target


@pytest.mark.parametrize("tied", [False, True])
def test_a_merged_folder_is_a_plain_model_with_the_same_logits(
    tiny_folder, fused_adapter, tmp_path, tied
):
    folder = tie_head(tiny_folder, tmp_path / "tied") if tied else tiny_folder
    config = MergeSettings(
        adapter=str(fused_adapter), base=str(folder), save_path=str(tmp_path / "merged")
    )
    assert merge_adapter(config) < 1e-5

    tiny_base = load_base_model(str(folder), dtype=torch.float32)
    merged = load_base_model(str(tmp_path / "merged"), dtype=torch.float32)
    plain_names = [name for name, _ in tiny_base.named_parameters()]
    expected = merge.probe(load_adapter(tiny_base, fused_adapter))
    torch.testing.assert_close(merge.probe(merged), expected, atol=1e-5, rtol=0)
    assert [name for name, _ in merged.named_parameters()] == plain_names
    assert merged.config.tie_word_embeddings is tied

    stored = load_file(tmp_path / "merged" / "model.safetensors")
    wide = {name for name, tensor in stored.items() if tensor.dtype == torch.float32}
    assert wide == {f"transformer.layers.{i}.attention.query_key_value.weight" for i in range(4)}
    assert ("lm_head.weight" in stored) is not tied


def test_merge_copies_the_tokenizer_byte_for_byte_and_no_code_but_its_own(
    tiny_folder, fused_adapter, tmp_path
):
    folder = tie_head(tiny_folder, tmp_path / "tied")
    merged = tmp_path / "merged"
    merge_adapter(
        MergeSettings(adapter=str(fused_adapter), base=str(folder), save_path=str(merged))
    )
    name = "tokenizer_config.json"
    assert (merged / name).read_bytes() == (folder / name).read_bytes()
    (code,) = merged.glob("*.py")
    assert code.read_text().startswith("from glmtune.models import *")
    assert str(tmp_path) not in (merged / "config.json").read_text(encoding="utf-8")


LOADING = """
import sys
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
how, folder, target = sys.argv[1:]
trust = {"trust_remote_code": True} if how == "trust" else {}
if how == "import":
    import glmtune.models
kinds = [AutoConfig, AutoModelForCausalLM, AutoTokenizer]
kinds = kinds[::-1] if how == "trust" else kinds
loaded = {kind.__name__: kind.from_pretrained(folder, **trust) for kind in kinds}
print(*sorted(type(thing).__module__ for thing in loaded.values()))
for name in ("AutoModelForCausalLM", "AutoTokenizer"):
    loaded[name].save_pretrained(target)
"""


@pytest.mark.parametrize("how", ["trust", "import"])
def test_a_merged_folder_is_loaded_by_those_who_know_transformers_alone(
    tiny_folder, strange_adapter, tmp_path, how
):
    tiny_base = shutil.copytree(GLM_TINY, tmp_path / "base")
    for name, published in [
        ("config.json", {"AutoConfig": "configuration_chatglm.ChatGLMConfig"}),
        ("tokenizer_config.json", {"AutoTokenizer": ["tokenization_chatglm.Tokenizer", None]}),
    ]:
        settings = json.loads((tiny_base / name).read_text()) | {"auto_map": published}
        (tiny_base / name).write_text(json.dumps(settings))
    merged = tmp_path / "merged"
    merge_adapter(
        MergeSettings(adapter=strange_adapter, base=str(tiny_base), save_path=str(merged))
    )
    for name in ("config.json", "tokenizer_config.json"):
        for target in json.loads((merged / name).read_text())["auto_map"].values():
            file, _, _ = (target if isinstance(target, str) else target[0]).partition(".")
            assert (merged / f"{file}.py").is_file()

    command = [sys.executable, "-c", LOADING, how, str(merged), str(tmp_path / "saved")]
    environment = os.environ | {"HF_HOME": str(tmp_path / "hub")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    room = "glmtune.models.chatglm"
    assert done.stdout.split() == [
        f"{room}.{m}" for m in ("configuration", "modeling", "tokenization")
    ]
    assert not list((tmp_path / "saved").glob("*.py"))
    assert "auto_map" not in (tmp_path / "saved" / "config.json").read_text()
    assert "auto_map" not in (tmp_path / "saved" / "tokenizer_config.json").read_text()


def test_a_merge_that_went_wrong_leaves_nothing(tiny_folder, fused_adapter, tmp_path, monkeypatch):
    def damage(model, dtype):
        model.transformer.layers[0].attention.dense.weight.data.zero_()

    config = MergeSettings(
        adapter=str(fused_adapter),
        base=str(tiny_folder),
        save_path=str(tmp_path / "merged"),
    )
    monkeypatch.setattr(merge, "downcast_lossless", damage)
    with fails("logits differ .*nothing was written"):
        merge_adapter(config)
    assert [path.name for path in tmp_path.iterdir()] == ["fused"]


def test_merge_never_overwrites(tiny_folder, fused_adapter):
    config = MergeSettings(
        adapter=str(fused_adapter),
        base=str(tiny_folder),
        save_path=str(fused_adapter.parent),
    )
    with fails("there already and not empty"):
        merge_adapter(config)


def test_shrinking_loses_nothing():
    model = nn.Linear(2, 2)
    model.weight.data = torch.tensor([[1.0, 0.5], [2.0, 1 / 3]])
    model.bias.data = torch.tensor([0.25, -8.0])
    merge.downcast_lossless(model, torch.float16)
    assert (model.weight.dtype, model.bias.dtype) == (torch.float32, torch.float16)
    assert model.bias.tolist() == [0.25, -8.0]
