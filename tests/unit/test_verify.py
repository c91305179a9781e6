"""A saved adapter is read back: what was trained, or an error that names the difference."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from toys import randomise_adapter

from glmtune.adapters import attach_lora, save_adapter, verify_saved
from glmtune.errors import UserError
from glmtune.models.loading import load_base_model
from glmtune.run_files import ADAPTER_CONFIG_FILE, WEIGHTS_FILE


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def model(request, tiny_folder):
    """A model with a changed adapter, in training mode."""
    torch.manual_seed(0)
    model = attach_lora(load_base_model(str(tiny_folder), dtype=request.param), rank=4)
    return randomise_adapter(model, std=1.0).train()


@pytest.fixture
def saved(model, tmp_path):
    save_adapter(model, tmp_path / "saved", "tiny")
    return tmp_path / "saved"


def test_the_saved_adapter_is_the_trained_one_and_nothing_is_changed(model, saved):
    torch.manual_seed(1)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    trained = [name for name, weight in model.named_parameters() if weight.requires_grad]
    random_state = torch.get_rng_state()
    assert verify_saved(model, saved) == 0
    assert torch.equal(torch.get_rng_state(), random_state)
    after = dict(model.named_parameters())
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert [name for name, weight in after.items() if weight.requires_grad] == trained
    assert list(model.peft_config) == ["default"]
    assert model.active_adapter == "default"
    assert model.training


def rename(tensors):
    tensors["base_model.model.transformer.other.lora_A.weight"] = tensors.pop(min(tensors))


def halve(tensors):
    key = min(tensors)
    tensors[key] = tensors[key][: len(tensors[key]) // 2].contiguous()


def flip_a_bit(tensors):
    tensors[min(tensors)].view(torch.int32)[0, 0] ^= 1


def leave_out(tensors):
    tensors.pop(max(tensors))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (rename, r"layers\.0\.attention\.query_key_value\.lora_A\.weight is missing"),
        (halve, r"lora_A\.weight has shape \[2, 64\] instead of \[4, 64\]"),
        (flip_a_bit, r"lora_A\.weight differs in 1 of 256 numbers"),
        (leave_out, r"layers\.3\.attention\.query_key_value\.lora_B\.weight is missing"),
    ],
)
def test_other_tensors_are_named(model, saved, spoil, words):
    tensors = load_file(saved / WEIGHTS_FILE)
    spoil(tensors)
    save_file(tensors, saved / WEIGHTS_FILE, metadata={"format": "pt"})
    with pytest.raises(UserError, match=rf"adapter_model\.safetensors: .*{words}; check the disk"):
        verify_saved(model, saved)


def test_right_tensors_that_load_to_other_logits(model, saved):
    settings = json.loads((saved / ADAPTER_CONFIG_FILE).read_text())
    (saved / ADAPTER_CONFIG_FILE).write_text(json.dumps(settings | {"lora_alpha": 8}))
    with pytest.raises(UserError, match=r"the logits of a fresh load differ by"):
        verify_saved(model, saved)
    assert list(model.peft_config) == ["default"]
    assert model.training


def test_weights_that_make_logits_of_nothing(model, tmp_path):
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.fill_(1e38)
    save_adapter(model, tmp_path / "saved", "tiny")
    with pytest.raises(UserError, match="logits are not finite, so it is not kept"):
        verify_saved(model, tmp_path / "saved")


def test_a_file_cut_off(model, saved):
    whole = (saved / WEIGHTS_FILE).read_bytes()
    (saved / WEIGHTS_FILE).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="cannot be read"):
        verify_saved(model, saved)
