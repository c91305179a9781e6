"""Adapters are read in every form, of 2023 and of today, and refused when they are wrong."""

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from adapter_files import BIN, CONFIG, STEM, WEIGHTS, edit_config, edit_weights, fails, rename
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from glmtune.adapters import (
    convert_adapter,
    load_adapter,
    merge,
    read_adapter,
)
from glmtune.adapters.formats import dense_pair
from glmtune.models.loading import load_base_model


@pytest.mark.parametrize("enabled", [[True, False, True], [True] * 3, [False, True, False]])
@pytest.mark.parametrize("ndim", [2, 3])
def test_a_dense_pair_does_what_the_blocks_did(enabled, ndim):
    """The reference: a grouped convolution whose output goes to the enabled thirds."""
    blocks, rank, hidden = sum(enabled), 3, 8
    x, lora_a = torch.randn(5, hidden), torch.randn(blocks * rank, hidden)
    lora_b = torch.randn(blocks * hidden, rank, 1)
    within = F.conv1d((x @ lora_a.T).T[None], lora_b, groups=blocks)[0].T
    expected = torch.zeros(5, 3, hidden)
    expected[:, torch.tensor(enabled)] = within.unflatten(-1, (blocks, hidden))

    dense_a, dense_b = dense_pair(lora_a, lora_b if ndim == 3 else lora_b[..., 0], enabled)
    assert dense_b.shape == (3 * hidden, blocks * rank)
    torch.testing.assert_close(x @ dense_a.T @ dense_b.T, expected.flatten(1))


def test_fused_form_is_read_as_dense_with_the_same_scaling(fused_adapter):
    adapter = read_adapter(fused_adapter)
    assert (adapter.config.r, adapter.config.lora_alpha) == (16, 64)
    assert adapter.weights[f"{STEM}.lora_A.weight"].shape == (16, 64)
    assert adapter.weights[f"{STEM}.lora_B.weight"].shape == (192, 16)
    assert not adapter.notices


@pytest.mark.parametrize(
    "change",
    [
        rename(".weight", ".default.weight"),
        rename("base_model.model.", ""),
        rename("base_model", "module.base_model"),
        lambda tensors: {key: t.flatten(1) for key, t in tensors.items()},
        lambda tensors: {key: nn.Parameter(t) for key, t in tensors.items()},
    ],
    ids=["default", "no prefix", "wrapped", "flat lora_B", "parameters"],
)
@pytest.mark.parametrize("kind", ["merged", "plain"])
def test_spellings_of_2023_read_as_one(tiny_folder, tmp_path, kind, change):
    original = tiny_folder / f"adapter_peft_0_2_{kind}"
    folder = shutil.copytree(original, tmp_path / kind)
    edit_weights(folder, change)
    expected, found = read_adapter(original).weights, read_adapter(folder).weights
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_float16_weights_are_read_as_float32(fused_adapter):
    edit_weights(fused_adapter, lambda tensors: {key: t.half() for key, t in tensors.items()})
    assert {t.dtype for t in read_adapter(fused_adapter).weights.values()} == {torch.float32}


@pytest.mark.parametrize("kind, rank, alpha", [("merged", 16, 64), ("plain", 8, 32)])
def test_weights_alone_are_read_with_a_word_about_alpha(
    tiny_folder, tmp_path, kind, rank, alpha, tiny_base, capsys
):
    folder = shutil.copytree(tiny_folder / f"adapter_peft_0_2_{kind}", tmp_path / "checkpoint-20")
    (folder / CONFIG).unlink()
    adapter = read_adapter(folder)
    assert (adapter.config.r, adapter.config.lora_alpha) == (rank, alpha)
    load_adapter(tiny_base, folder)
    assert "rank 8 is read off the tensors and lora_alpha 32" in capsys.readouterr().err


def test_a_checkpoint_without_config_takes_that_of_its_run(fused_adapter, tmp_path):
    edit_config(fused_adapter, lora_alpha=16)
    checkpoint = tmp_path / "run" / "checkpoint-20"
    checkpoint.mkdir(parents=True)
    shutil.move(fused_adapter / BIN, checkpoint)
    shutil.move(fused_adapter / CONFIG, checkpoint.parent)
    adapter = read_adapter(checkpoint)
    assert (adapter.config.r, adapter.config.lora_alpha) == (16, 32)
    assert "run folder above" in adapter.notices[0]


def test_a_folder_that_is_no_checkpoint_takes_no_config_from_above(fused_adapter, tmp_path):
    folder = tmp_path / "run" / "best"
    folder.mkdir(parents=True)
    shutil.move(fused_adapter / BIN, folder)
    shutil.move(fused_adapter / CONFIG, folder.parent)
    assert "is read off the tensors" in read_adapter(folder).notices[0]


def test_settings_of_a_newer_peft_are_named(todays_adapter):
    edit_config(todays_adapter, use_magic=True, magic_size=None)
    assert "does not know use_magic: ignored" in read_adapter(todays_adapter).notices[0]


class Trap:
    """An object whose pickle, when loaded, creates a folder."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_pickle_with_code_is_refused_and_not_run(fused_adapter, tmp_path):
    trap = Trap(tmp_path / "sprung")
    (fused_adapter / BIN).write_bytes(pickle.dumps({f"{STEM}.lora_A.weight": trap}, 2))
    with fails(rf"{BIN}: has code in it \(posix\.mkdir\)"):
        read_adapter(fused_adapter)
    torch.save({f"{STEM}.lora_A.weight": trap}, fused_adapter / BIN)
    with fails(rf"{BIN}: has code in it \(posix\.mkdir\)"):
        read_adapter(fused_adapter)
    assert not (tmp_path / "sprung").exists()


def test_damaged_files_are_named(fused_adapter, todays_adapter):
    (fused_adapter / BIN).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with fails(rf"{BIN}: is a Git-LFS pointer"):
        read_adapter(fused_adapter)
    (todays_adapter / WEIGHTS).write_bytes((todays_adapter / WEIGHTS).read_bytes()[:-10])
    with fails(rf"{WEIGHTS}: cannot be read"):
        read_adapter(todays_adapter)
    torch.save({}, fused_adapter / BIN)
    with fails("holds no tensors"):
        read_adapter(fused_adapter)


def test_configs_that_are_no_lora_config_are_named(todays_adapter):
    edit_config(todays_adapter, peft_type="IA3")
    with fails("peft_type is 'IA3'"):
        read_adapter(todays_adapter)
    edit_config(todays_adapter, peft_type="LORA", r=0)
    with fails(rf"{CONFIG}: r is 0, not above 0"):
        read_adapter(todays_adapter)
    (todays_adapter / CONFIG).write_text('{"r": 8,\n oops')
    with fails(rf"{CONFIG}:2: not JSON"):
        read_adapter(todays_adapter)


def set_tensor(key: str, value):
    def change(tensors):
        tensors[key] = value(tensors[key])

    return change


A, B = f"{STEM}.lora_A.weight", f"{STEM}.lora_B.weight"


@pytest.mark.parametrize(
    "change, fragment",
    [
        (set_tensor(A, lambda t: t[:8]), r"shape \[8, 64\].*means \[16, in\]"),
        (set_tensor(B, lambda t: t[:, :4]), r"shape \[128, 4, 1\].*means \[rows, 8, 1\]"),
        (set_tensor(B, lambda t: t[:127]), "means a multiple of 2 rows"),
        (set_tensor(B, lambda t: t[:, 0, 0]), r"lora_B.weight has shape \[128\], no matrix"),
        (set_tensor(A, lambda t: t * torch.nan), "not finite"),
        (lambda t: {key: t[key] for key in t if key != B}, "lora_B.weight is missing"),
        (lambda t: t | rename(".weight", ".other.weight")(t), "twice, from two adapters"),
    ],
)
def test_tensors_that_contradict_each_other_are_named(fused_adapter, change, fragment):
    edit_weights(fused_adapter, change)
    with fails(fragment):
        read_adapter(fused_adapter)


def test_weights_alone_that_fit_no_known_form(fused_adapter):
    (fused_adapter / CONFIG).unlink()
    edit_weights(fused_adapter, set_tensor(f"{STEM}.lora_B.weight", lambda t: t[:, :4]))
    with fails(rf"without {CONFIG}.*ranks \[4, 8\]"):
        read_adapter(fused_adapter)


def test_settings_are_those_that_a_peft_of_any_age_knows(todays_adapter, tmp_path):
    """PEFT 0.10 refuses every name that came after it, such as corda_config."""
    written = json.loads((todays_adapter / CONFIG).read_text(encoding="utf-8"))
    of_0_2 = {
        *("peft_type", "task_type", "base_model_name_or_path", "r", "lora_alpha", "lora_dropout"),
        *("target_modules", "bias", "fan_in_fan_out", "modules_to_save", "init_lora_weights"),
        "inference_mode",
    }
    assert set(written) == of_0_2
    edit_config(todays_adapter, use_rslora=True, rank_pattern={"dense": 2})
    convert_adapter(todays_adapter, tmp_path / "new")
    told = json.loads((tmp_path / "new" / CONFIG).read_text(encoding="utf-8"))
    assert set(told) == of_0_2 | {"use_rslora", "rank_pattern"}
    assert read_adapter(tmp_path / "new").config.use_rslora


@pytest.mark.parametrize("name", ["pytorch_model.bin", "chatglm-lora.pt"])
@pytest.mark.parametrize("with_base", [False, True])
def test_lora_in_a_file_of_another_name(
    tiny_folder, tiny_base, todays_adapter, tmp_path, name, with_base, capsys
):
    """A checkpoint of a Trainer of 2023, with the optimiser beside the adapter."""
    folder = tmp_path / "run" / "checkpoint-200"
    folder.mkdir(parents=True)
    tensors = load_file(todays_adapter / WEIGHTS)
    tensors = {key.replace(".weight", ".default.weight"): t for key, t in tensors.items()}
    if with_base:
        tensors |= {f"base_model.model.{key}": t for key, t in tiny_base.state_dict().items()}
    torch.save(tensors, folder / name)
    torch.save({"state": {}, "param_groups": []}, folder / "optimizer.pt")
    (folder / CONFIG).write_bytes((todays_adapter / CONFIG).read_bytes())
    adapter = read_adapter(tmp_path / "run")
    assert all(
        torch.equal(adapter.weights[key], tensor)
        for key, tensor in read_adapter(todays_adapter).weights.items()
    )
    assert "LoRA tensors are used" in adapter.notices[0]
    assert ("the 52 others are not" in adapter.notices[0]) == with_base
    expected = merge.probe(load_adapter(load_base_model(str(tiny_folder)).float(), todays_adapter))
    assert torch.equal(merge.probe(load_adapter(tiny_base, tmp_path / "run")), expected)
    convert_adapter(tmp_path / "run", tmp_path / "new")
    assert (
        load_file(tmp_path / "new" / WEIGHTS).keys() == load_file(todays_adapter / WEIGHTS).keys()
    )
    shutil.copy(folder / name, folder / "second.pt")
    with fails("second.pt all hold adapters; leave one"):
        read_adapter(folder)


def test_a_base_is_no_adapter(tiny_folder, tmp_path, tiny_base):
    torch.save(tiny_base.state_dict(), tmp_path / "pytorch_model.bin")
    with fails("no adapter here, wanted .* found pytorch_model.bin"):
        read_adapter(tmp_path)


def test_thirds_of_the_fused_linear_are_read_as_the_whole(tiny_base, tmp_path):
    """As ChatGLM-finetune-LoRA cut it: thirds of its rows, PEFT's LoRA on each, saved as a .pt."""
    torch.manual_seed(0)
    tensors, expected = {}, load_base_model(tiny_base.config._name_or_path, dtype=torch.float32)
    for number, layer in enumerate(expected.transformer.layers):
        stem = f"transformer.layers.{number}.attention.query_key_value.model."
        weight = layer.attention.query_key_value.weight.data
        for name, third in (("linear_q", weight[:64]), ("linear_v", weight[128:])):
            lora_a, lora_b = torch.randn(8, 64) / 8, torch.randn(64, 8) / 4
            tensors[f"{stem}{name}.lora_A.weight"] = lora_a
            tensors[f"{stem}{name}.lora_B.weight"] = lora_b
            third += 32 / 8 * lora_b @ lora_a
    torch.save(tensors, tmp_path / "chatglm-6b_alpaca_5.pt")
    model = load_adapter(tiny_base, tmp_path)
    assert {name.rpartition(".")[2] for name in model.targeted_module_names} == {"query_key_value"}
    torch.testing.assert_close(merge.probe(model), merge.probe(expected))
    tensors = {key: t for key, t in tensors.items() if "linear_v.lora_B" not in key}
    torch.save(tensors, tmp_path / "chatglm-6b_alpaca_5.pt")
    with fails("linear_v.lora_B.weight is missing"):
        read_adapter(tmp_path)


@pytest.mark.parametrize("enabled", [[True, False, True], [True] * 3])
def test_loralib_names_no_weight_and_says_nothing_of_the_parts(enabled, tiny_base, tmp_path):
    torch.manual_seed(0)
    num, tensors, whole = sum(enabled), {}, {}
    for number in range(4):
        stem = f"transformer.layers.{number}.attention.query_key_value."
        tensors[f"{stem}lora_A"] = torch.randn(num * 4, 64)
        tensors[f"{stem}lora_B"] = torch.randn(num * 64, 4)
        whole[stem] = dense_pair(tensors[f"{stem}lora_A"], tensors[f"{stem}lora_B"], enabled)
    torch.save(tensors, tmp_path / "finetune_0.pt")
    adapter = read_adapter(tmp_path)
    assert (adapter.config.r, adapter.config.lora_alpha) == (4 * num, 32 * num)
    for stem, (lora_a, lora_b) in whole.items():
        assert torch.equal(adapter.weights[f"base_model.model.{stem}lora_A.weight"], lora_a)
        assert torch.equal(adapter.weights[f"base_model.model.{stem}lora_B.weight"], lora_b)
    assert load_adapter(tiny_base, tmp_path)


@pytest.mark.parametrize(
    "with_config, with_base, kept",
    [(True, True, 4), (True, False, 4), (False, True, 0), (False, False, 4)],
)
def test_trained_biases_in_a_file_of_another_name(
    tiny_base, todays_adapter, tmp_path, with_config, with_base, kept
):
    """Without settings, biases beside their weights are those of the base."""
    tensors = load_file(todays_adapter / WEIGHTS)
    of_base = {f"base_model.model.{key}": t for key, t in tiny_base.state_dict().items()}
    biases = {key: t + 1 for key, t in of_base.items() if key.endswith("query_key_value.bias")}
    folder = tmp_path / "checkpoint-200"
    folder.mkdir()
    torch.save((of_base if with_base else {}) | tensors | biases, folder / "pytorch_model.bin")
    if with_config:
        (folder / CONFIG).write_bytes((todays_adapter / CONFIG).read_bytes())
        edit_config(folder, bias="lora_only")
    adapter = read_adapter(folder)
    found = {key: t for key, t in adapter.weights.items() if key.endswith(".bias")}
    assert len(found) == kept
    assert adapter.config.bias == ("lora_only" if kept else "none")
    assert (f"and {kept} biases are used" in adapter.notices[0]) == bool(kept)
    for key, tensor in found.items():
        assert torch.equal(tensor, biases[key.replace(".base_layer", "")])


def test_an_adapter_of_2023_by_its_hub_id(todays_adapter, tmp_path, monkeypatch):
    """Files of other names are fetched where today's are not there."""
    on_hub = tmp_path / "hub"
    on_hub.mkdir()
    torch.save(load_file(todays_adapter / WEIGHTS), on_hub / "pytorch_model.bin")
    asked, here = [], tmp_path / "here"
    here.mkdir()

    def fetch(name, only):
        asked.append((name, only))
        for file in on_hub.iterdir():
            if any(file.match(pattern) for pattern in only):
                shutil.copy(file, here)
        return here

    monkeypatch.setattr("glmtune.adapters.find.fetch", fetch)
    adapter = read_adapter("somebody/chatglm-lora")
    assert adapter.weights.keys() == read_adapter(todays_adapter).weights.keys()
    assert [name for name, _ in asked] == ["somebody/chatglm-lora"] * 2
