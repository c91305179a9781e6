"""Adapters of 2023 give the logits that the published code gave with them, within 1e-4."""

import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file

from glmtune.adapters import convert_adapter, load_adapter
from glmtune.adapters.formats import write_adapter
from glmtune.models.loading import load_base_model

TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def golden(tiny_folder):
    return load_file(tiny_folder / "forward.safetensors")


@pytest.fixture
def base(tiny_folder):
    return load_base_model(str(tiny_folder), dtype=torch.float32)


def largest_difference(model, golden, expected) -> float:
    with torch.inference_mode():
        logits = model(input_ids=golden["input_ids"]).logits
    return (logits - expected)[golden["valid"]].abs().max().item()


def strip_config(folder):
    (folder / "adapter_config.json").unlink()
    return folder


def name_keys(folder):
    """As PEFT 0.3-dev wrote them, with the adapter's name."""
    path = folder / "adapter_model.bin"
    tensors = torch.load(path, weights_only=True)
    torch.save({key.replace(".weight", ".default.weight"): t for key, t in tensors.items()}, path)
    return folder


def convert(folder):
    convert_adapter(folder, folder.with_name("converted"))
    return folder.with_name("converted")


@pytest.mark.parametrize("kind", ["merged", "plain"])
@pytest.mark.parametrize("change", [lambda folder: folder, strip_config, name_keys, convert])
def test_both_kinds_in_every_spelling(base, golden, tiny_folder, tmp_path, kind, change):
    folder = shutil.copytree(tiny_folder / f"adapter_peft_0_2_{kind}", tmp_path / "checkpoint-1")
    expected = load_file(folder / "expected_logits.safetensors")["logits"]
    assert largest_difference(base, golden, expected) > 100 * TOLERANCE, "the adapter must matter"
    model = load_adapter(base, change(folder))
    assert largest_difference(model, golden, expected) < TOLERANCE
    with model.disable_adapter():
        assert largest_difference(model, golden, golden["logits"]) < TOLERANCE


@pytest.mark.parametrize("kind", ["merged", "plain"])
def test_a_converted_adapter_serves_plain_peft(base, golden, tiny_folder, tmp_path, kind):
    folder = tiny_folder / f"adapter_peft_0_2_{kind}"
    expected = load_file(folder / "expected_logits.safetensors")["logits"]
    convert_adapter(folder, tmp_path / "new")
    model = PeftModel.from_pretrained(base, tmp_path / "new")
    assert largest_difference(model, golden, expected) < TOLERANCE


def test_the_trained_adapter_of_the_reference_run(base, golden, tiny_folder, tmp_path):
    weights = load_file(tiny_folder / "lora_trained.safetensors")
    config = LoraConfig(
        task_type="CAUSAL_LM", r=4, lora_alpha=32, target_modules=["query_key_value"]
    )
    write_adapter(config, weights, tmp_path / "trained", "chatglm-6b-tiny")
    model = load_adapter(base, tmp_path / "trained")
    assert largest_difference(model, golden, golden["logits_after_lora"]) < TOLERANCE
