"""The published int8 and int4 folders against the recorded logits of the published code."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import glmtune.models  # noqa: F401
from glmtune.models.loading import load_base_model

TOLERANCE = 1e-4


@pytest.fixture(scope="module", params=[8, 4])
def bits(request):
    return request.param


@pytest.fixture(scope="module")
def folder(shared, bits):
    return shared / "golden" / f"chatglm-6b-tiny-int{bits}"


@pytest.mark.parametrize("keep_integers", [True, False])
def test_logits_and_loss(tiny_folder, folder, keep_integers):
    model = load_base_model(str(folder), dtype=torch.float32, keep_integers=keep_integers)
    given = load_file(tiny_folder / "forward.safetensors")
    expected = load_file(folder / "expected_logits.safetensors")
    with torch.no_grad():
        output = model(given["input_ids"], labels=given["labels"])
    difference = (output.logits - expected["logits"])[given["valid"]].abs().max()
    assert difference < TOLERANCE
    assert abs(output.loss - expected["loss"].item()) < 1e-5
    of_float = (given["logits"] - expected["logits"])[given["valid"]].abs().max()
    assert of_float > 10 * TOLERANCE, "the quantisation must show"


def test_auto_classes_load_it_as_it_lies_there(folder, bits):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    stored = torch.load(folder / "pytorch_model.bin", weights_only=True)
    assert model.config.quantization_bit == bits
    names = [name for name in stored if name.endswith("weight_scale")]
    assert len(names) == 4 * 4
    names += [name.removesuffix("_scale") for name in names]
    kept = model.state_dict()
    for name in names:
        assert kept[name].dtype == stored[name].dtype
        assert torch.equal(kept[name], stored[name])


def test_folders_made_by_the_tests_are_of_the_published_form(
    tiny_folder, folder, bits, write_quantised, tmp_path
):
    ours, published = (
        torch.load(path / "pytorch_model.bin", weights_only=True)
        for path in (write_quantised(tiny_folder, tmp_path / "ours", bits), folder)
    )
    for name, tensor in ours.items():
        assert tensor.dtype == published[name].dtype
        assert torch.equal(tensor, published[name]), name
