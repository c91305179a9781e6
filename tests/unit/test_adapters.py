"""Adapters are attached, found, loaded, saved and converted."""

import json
import shutil

import pytest
import torch
from adapter_files import CONFIG, STEM, WEIGHTS, edit_config, edit_weights, fails, rename
from peft import PeftModel
from safetensors.torch import load_file
from torch.nn import functional as F

from glmtune.adapters import (
    attach_lora,
    convert_adapter,
    find_adapter,
    load_adapter,
    merge,
    read_adapter,
    restore_adapter,
    save_adapter,
)
from glmtune.adapters.formats import write_adapter
from glmtune.models.loading import load_base_model

ALL_LINEARS = ["dense", "dense_4h_to_h", "dense_h_to_4h", "query_key_value"]


# Attach


def test_only_the_adapter_trains_in_float32_whatever_the_base_is(tiny_folder):
    model = attach_lora(load_base_model(str(tiny_folder), dtype=torch.bfloat16), rank=4)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 8
    assert all("query_key_value.lora_" in name for name in trained)
    assert {p.dtype for p in trained.values()} == {torch.float32}
    config = model.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout) == (4, 32, 0.1)


@pytest.mark.parametrize(
    "targets, expected",
    [
        ("all", ALL_LINEARS),
        (["all"], ALL_LINEARS),
        ("query_key_value, dense", ["dense", "query_key_value"]),
        (["dense_h_to_4h"], ["dense_h_to_4h"]),
    ],
)
def test_targets_by_name_and_all(tiny_base, targets, expected):
    model = attach_lora(tiny_base, targets=targets)
    adapted = {name.rpartition(".")[2] for name in model.targeted_module_names}
    assert sorted(adapted) == expected
    assert len(model.targeted_module_names) == 4 * len(expected)


def test_an_unknown_target_is_told_the_real_names(tiny_base):
    with fails("no linear 'q_proj'; choose from query_key_value, dense, dense_h_to_4h"):
        attach_lora(tiny_base, targets="q_proj,dense")
    with fails("no linear 'lm_head'"):
        attach_lora(tiny_base, targets=["lm_head"])


def test_a_second_adapter_on_one_model_is_refused(tiny_base, todays_adapter):
    load_adapter(tiny_base, todays_adapter)
    with fails("has an adapter on it already"):
        load_adapter(tiny_base, todays_adapter)


# Find


def test_find_takes_the_folder_itself_else_the_newest_checkpoint_by_number(
    todays_adapter, tmp_path
):
    run = tmp_path / "run"
    for step in (900, 1000):
        shutil.copytree(todays_adapter, run / f"checkpoint-{step}")
    (run / "checkpoint-best").mkdir()
    assert find_adapter(run) == run / "checkpoint-1000"
    shutil.copytree(todays_adapter, run, dirs_exist_ok=True)
    assert find_adapter(run) == run


def test_find_lists_what_lies_there_instead(tmp_path):
    with fails("no such folder"):
        find_adapter(tmp_path / "nothing")
    with fails("no adapter here.* found nothing"):
        find_adapter(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    with fails(r"found pytorch_model\.bin"):
        find_adapter(tmp_path)
    with fails("is a file"):
        find_adapter(tmp_path / "pytorch_model.bin")
    (tmp_path / "checkpoint-7").mkdir()
    with fails("checkpoint-7: no adapter here"):
        find_adapter(tmp_path)


# Load


def test_an_adapter_stays_float32_and_still_on_a_bfloat16_base(tiny_folder, todays_adapter):
    model = load_adapter(load_base_model(str(tiny_folder), dtype=torch.bfloat16), todays_adapter)
    dtypes = {p.dtype for name, p in model.named_parameters() if "lora_" in name}
    assert dtypes == {torch.float32}
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    stored = load_file(todays_adapter / WEIGHTS)[f"{STEM}.lora_B.weight"]
    loaded = model.get_submodule(f"{STEM}.lora_B.default").weight
    assert torch.equal(loaded, stored)


def widen(tensors):
    return {key: F.pad(t, (0, 64)) if "lora_A" in key else t for key, t in tensors.items()}


@pytest.mark.parametrize(
    "change, fragment",
    [
        (rename("query_key_value", "q_proj"), "fits no module of this base.*query_key_value"),
        (rename("layers.3", "layers.27"), "2 tensors that this base has no place for.*layers.27"),
        (widen, r"lora_A.weight has shape \[2, 128\], but \[2, 64\] is wanted.*hidden size"),
        (lambda t: {k: v for k, v in t.items() if ".3." not in k}, "2 tensors too few.*layers.3"),
        (
            lambda t: {k: v * ("lora_A" in k) for k, v in t.items()},
            "changes nothing: lora_B is zero",
        ),
    ],
    ids=["no module", "extra", "hidden size", "missing", "zero"],
)
def test_an_adapter_that_does_not_fit_is_refused_and_leaves_the_base_free(
    tiny_base, todays_adapter, tmp_path, change, fragment
):
    broken = shutil.copytree(todays_adapter, tmp_path / "broken")
    edit_weights(broken, change)
    with fails(fragment):
        load_adapter(tiny_base, broken)
    load_adapter(tiny_base, todays_adapter)


def test_a_rank_that_the_config_does_not_have_is_refused(tiny_base, todays_adapter):
    edit_config(todays_adapter, r=4)
    with fails(r"lora_A has 2 rows.*says rank \[4\]"):
        load_adapter(tiny_base, todays_adapter)


@pytest.mark.parametrize(
    "settings",
    [
        {"rank_pattern": {"layers.3.attention.query_key_value": -1}},
        {"modules_to_save": ["transformer", "layers"]},
        {"modules_to_save": ["", "layers"]},
    ],
)
def test_an_adapter_that_fails_half_way_leaves_the_base_as_it_was(
    tiny_base, todays_adapter, settings
):
    names = [name for name, _ in tiny_base.named_modules()]
    good = json.loads((todays_adapter / "adapter_config.json").read_text())
    edit_config(todays_adapter, **settings)
    with fails("the adapter cannot be put on this model"):
        load_adapter(tiny_base, todays_adapter)
    assert [name for name, _ in tiny_base.named_modules()] == names
    (todays_adapter / "adapter_config.json").write_text(json.dumps(good))
    load_adapter(tiny_base, todays_adapter).unload()


def test_restore_goes_on_from_weights_that_changed_nothing_yet(tiny_folder, tmp_path):
    models = [attach_lora(load_base_model(str(tiny_folder), dtype=torch.float32)) for _ in "ab"]
    save_adapter(models[0], tmp_path / "checkpoint-1", "chatglm-6b")
    restore_adapter(models[1], tmp_path / "checkpoint-1")
    saved, restored = (dict(m.named_parameters()) for m in models)
    assert all(torch.equal(saved[name], restored[name]) for name in saved)
    assert any(p.requires_grad for p in models[1].parameters())
    with fails("changes nothing"):
        load_adapter(load_base_model(str(tiny_folder)), tmp_path / "checkpoint-1")


# Save and convert


def test_a_saved_adapter_loads_with_plain_peft(tiny_base, todays_adapter, tiny_folder):
    config = json.loads((todays_adapter / CONFIG).read_text(encoding="utf-8"))
    assert sorted(file.name for file in todays_adapter.iterdir()) == [CONFIG, WEIGHTS]
    assert config["base_model_name_or_path"] == "zai-org/chatglm-6b"
    assert config["inference_mode"] is True
    expected = merge.probe(load_adapter(tiny_base, todays_adapter))
    plain = PeftModel.from_pretrained(
        load_base_model(str(tiny_folder), dtype=torch.float32), todays_adapter
    )
    assert torch.equal(merge.probe(plain), expected)


@pytest.mark.parametrize(
    "name, written",
    [
        ("THUDM/chatglm-6b", "THUDM/chatglm-6b"),
        ("chatglm-6b", "chatglm-6b"),
        ("/home/someone/models/chatglm-6b/", "chatglm-6b"),
        ("~/chatglm-6b", "chatglm-6b"),
        (r"C:\models\chatglm-6b", "chatglm-6b"),
        ("", None),
    ],
)
def test_no_private_path_is_written(todays_adapter, tmp_path, name, written):
    edit_config(todays_adapter, base_model_name_or_path=name)
    convert_adapter(todays_adapter, tmp_path / "new")
    config = json.loads((tmp_path / "new" / CONFIG).read_text(encoding="utf-8"))
    assert config["base_model_name_or_path"] == written


def test_saving_into_a_folder_replaces_two_files_and_no_more(todays_adapter, tmp_path):
    (todays_adapter / "trainer_state.json").write_text("{}")
    adapter = read_adapter(todays_adapter)
    write_adapter(
        adapter.config, {k: 2 * t for k, t in adapter.weights.items()}, todays_adapter, "x"
    )
    assert sorted(f.name for f in todays_adapter.iterdir()) == [
        CONFIG,
        WEIGHTS,
        "trainer_state.json",
    ]
    key = f"{STEM}.lora_B.weight"
    assert torch.equal(load_file(todays_adapter / WEIGHTS)[key], 2 * adapter.weights[key])


def test_a_save_that_fails_leaves_nothing(todays_adapter, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    adapter = read_adapter(todays_adapter)
    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    for folder in (tmp_path / "new", todays_adapter):
        before = sorted(tmp_path.rglob("*"))
        with fails("No space left"):
            write_adapter(adapter.config, adapter.weights, folder, "x")
        assert sorted(tmp_path.rglob("*")) == before


def test_convert_takes_the_newest_checkpoint_and_never_overwrites(fused_adapter, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(fused_adapter, run / "checkpoint-8")
    assert convert_adapter(run, tmp_path / "new") == run / "checkpoint-8"
    assert "4 modules, rank 16" in capsys.readouterr().out
    with fails("there already and not empty"):
        convert_adapter(run, tmp_path / "new")
    edit_weights(fused_adapter, lambda tensors: {key: 0 * t for key, t in tensors.items()})
    with fails("changes nothing"):
        convert_adapter(fused_adapter, tmp_path / "zero")
    assert not (tmp_path / "zero").exists()
