"""Adapter folders: found, read in every form, refused when they are wrong, converted and merged."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from glmtune.adapters import (
    attach_lora,
    convert_adapter,
    find_adapter,
    load_adapter,
    merge,
    merge_adapter,
    read_adapter,
    restore_adapter,
    save_adapter,
    verify_saved,
)
from glmtune.adapters.formats import dense_pair, write_adapter
from glmtune.config import MergeSettings
from glmtune.errors import UserError
from glmtune.generation import Decoder, EncodedPrompt, GenerationSettings
from glmtune.models.checkpoints import GLM_TINY, load_base_model

CONFIG, WEIGHTS, BIN = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
STEM = "base_model.model.transformer.layers.0.attention.query_key_value"
ALL_LINEARS = ["dense", "dense_4h_to_h", "dense_h_to_4h", "query_key_value"]


@pytest.fixture
def base(tiny_folder):
    return load_base_model(str(tiny_folder), dtype=torch.float32)


@pytest.fixture
def fused(tiny_folder, tmp_path) -> Path:
    """A copy of the adapter of 2023 with enable_lora."""
    return shutil.copytree(tiny_folder / "adapter_peft_0_2_merged", tmp_path / "fused")


@pytest.fixture
def today(tiny_folder, tmp_path) -> Path:
    """A small adapter in today's form, with weights that change something."""
    model = attach_lora(load_base_model(str(tiny_folder), dtype=torch.float32), rank=2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    save_adapter(model, tmp_path / "today", "zai-org/chatglm-6b")
    return tmp_path / "today"


def edit_weights(folder: Path, change) -> None:
    """Rewrite the weights file of a folder as `change` leaves its dict of tensors."""
    if (folder / WEIGHTS).exists():
        tensors = load_file(folder / WEIGHTS)
        save_file(change(tensors) or tensors, folder / WEIGHTS)
    else:
        tensors = torch.load(folder / BIN, weights_only=True)
        torch.save(change(tensors) or tensors, folder / BIN)


def edit_config(folder: Path, **settings) -> None:
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    (folder / CONFIG).write_text(json.dumps(config | settings), encoding="utf-8")


def fails(fragment: str):
    return pytest.raises(UserError, match=fragment)


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
def test_targets_by_name_and_all(base, targets, expected):
    model = attach_lora(base, targets=targets)
    adapted = {name.rpartition(".")[2] for name in model.targeted_module_names}
    assert sorted(adapted) == expected
    assert len(model.targeted_module_names) == 4 * len(expected)


def test_an_unknown_target_is_told_the_real_names(base):
    with fails("no linear 'q_proj'; choose from query_key_value, dense, dense_h_to_4h"):
        attach_lora(base, targets="q_proj,dense")
    with fails("no linear 'lm_head'"):
        attach_lora(base, targets=["lm_head"])


def test_a_second_adapter_on_one_model_is_refused(base, today):
    load_adapter(base, today)
    with fails("has an adapter on it already"):
        load_adapter(base, today)


# Find


def test_find_takes_the_folder_itself_else_the_newest_checkpoint_by_number(today, tmp_path):
    run = tmp_path / "run"
    for step in (900, 1000):
        shutil.copytree(today, run / f"checkpoint-{step}")
    (run / "checkpoint-best").mkdir()
    assert find_adapter(run) == run / "checkpoint-1000"
    shutil.copytree(today, run, dirs_exist_ok=True)
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


# Read


@pytest.mark.parametrize("enabled", [[True, False, True], [True] * 3, [False, True, False]])
@pytest.mark.parametrize("ndim", [2, 3])
def test_a_dense_pair_does_what_the_blocks_did(enabled, ndim):
    """The plain reference: a grouped convolution whose output goes to the enabled thirds."""
    blocks, rank, hidden = sum(enabled), 3, 8
    x, lora_a = torch.randn(5, hidden), torch.randn(blocks * rank, hidden)
    lora_b = torch.randn(blocks * hidden, rank, 1)
    within = F.conv1d((x @ lora_a.T).T[None], lora_b, groups=blocks)[0].T
    expected = torch.zeros(5, 3, hidden)
    expected[:, torch.tensor(enabled)] = within.unflatten(-1, (blocks, hidden))

    dense_a, dense_b = dense_pair(lora_a, lora_b if ndim == 3 else lora_b[..., 0], enabled)
    assert dense_b.shape == (3 * hidden, blocks * rank)
    torch.testing.assert_close(x @ dense_a.T @ dense_b.T, expected.flatten(1))


def test_fused_form_is_read_as_dense_with_the_same_scaling(fused):
    adapter = read_adapter(fused)
    assert (adapter.config.r, adapter.config.lora_alpha) == (16, 64)
    assert adapter.weights[f"{STEM}.lora_A.weight"].shape == (16, 64)
    assert adapter.weights[f"{STEM}.lora_B.weight"].shape == (192, 16)
    assert not adapter.notices


def rename(old: str, new: str):
    return lambda tensors: {key.replace(old, new): t for key, t in tensors.items()}


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


def test_float16_weights_are_read_as_float32(fused):
    edit_weights(fused, lambda tensors: {key: t.half() for key, t in tensors.items()})
    assert {t.dtype for t in read_adapter(fused).weights.values()} == {torch.float32}


@pytest.mark.parametrize("kind, rank, alpha", [("merged", 16, 64), ("plain", 8, 32)])
def test_weights_alone_are_read_with_a_word_about_alpha(
    tiny_folder, tmp_path, kind, rank, alpha, base, capsys
):
    folder = shutil.copytree(tiny_folder / f"adapter_peft_0_2_{kind}", tmp_path / "checkpoint-20")
    (folder / CONFIG).unlink()
    adapter = read_adapter(folder)
    assert (adapter.config.r, adapter.config.lora_alpha) == (rank, alpha)
    load_adapter(base, folder)
    assert "rank 8 is read off the tensors and lora_alpha 32" in capsys.readouterr().err


def test_a_checkpoint_without_config_takes_that_of_its_run(fused, tmp_path):
    edit_config(fused, lora_alpha=16)
    checkpoint = tmp_path / "run" / "checkpoint-20"
    checkpoint.mkdir(parents=True)
    shutil.move(fused / BIN, checkpoint)
    shutil.move(fused / CONFIG, checkpoint.parent)
    adapter = read_adapter(checkpoint)
    assert (adapter.config.r, adapter.config.lora_alpha) == (16, 32)
    assert "run folder above" in adapter.notices[0]


def test_settings_of_a_newer_peft_are_named(today):
    edit_config(today, use_magic=True, magic_size=None)
    assert "does not know use_magic: ignored" in read_adapter(today).notices[0]


class Trap:
    """Pickles as a call that leaves a folder behind."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_pickle_with_code_is_refused_and_not_run(fused, tmp_path):
    trap = Trap(tmp_path / "sprung")
    (fused / BIN).write_bytes(pickle.dumps({f"{STEM}.lora_A.weight": trap}, 2))
    with fails(rf"{BIN}: has code in it \(posix\.mkdir\)"):
        read_adapter(fused)
    torch.save({f"{STEM}.lora_A.weight": trap}, fused / BIN)
    with fails(rf"{BIN}: has code in it \(posix\.mkdir\)"):
        read_adapter(fused)
    assert not (tmp_path / "sprung").exists()


def test_damaged_files_are_named(fused, today):
    (fused / BIN).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with fails(rf"{BIN}: is a Git-LFS pointer"):
        read_adapter(fused)
    (today / WEIGHTS).write_bytes((today / WEIGHTS).read_bytes()[:-10])
    with fails(rf"{WEIGHTS}: cannot be read"):
        read_adapter(today)
    torch.save({}, fused / BIN)
    with fails("holds no tensors"):
        read_adapter(fused)


def test_configs_that_are_no_lora_config_are_named(today):
    edit_config(today, peft_type="PREFIX_TUNING")
    with fails("peft_type is 'PREFIX_TUNING'"):
        read_adapter(today)
    edit_config(today, peft_type="LORA", r=0)
    with fails(rf"{CONFIG}: r is 0, not above 0"):
        read_adapter(today)
    (today / CONFIG).write_text('{"r": 8,\n oops')
    with fails(rf"{CONFIG}:2: not JSON"):
        read_adapter(today)


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
def test_tensors_that_contradict_each_other_are_named(fused, change, fragment):
    edit_weights(fused, change)
    with fails(fragment):
        read_adapter(fused)


def test_weights_alone_that_fit_no_known_form(fused):
    (fused / CONFIG).unlink()
    edit_weights(fused, set_tensor(f"{STEM}.lora_B.weight", lambda t: t[:, :4]))
    with fails(rf"without {CONFIG}.*ranks \[4, 8\]"):
        read_adapter(fused)


# Load


def test_an_adapter_stays_float32_and_still_on_a_bfloat16_base(tiny_folder, today):
    model = load_adapter(load_base_model(str(tiny_folder), dtype=torch.bfloat16), today)
    dtypes = {p.dtype for name, p in model.named_parameters() if "lora_" in name}
    assert dtypes == {torch.float32}
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    stored = load_file(today / WEIGHTS)[f"{STEM}.lora_B.weight"]
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
    base, today, tmp_path, change, fragment
):
    broken = shutil.copytree(today, tmp_path / "broken")
    edit_weights(broken, change)
    with fails(fragment):
        load_adapter(base, broken)
    load_adapter(base, today)


def test_a_rank_that_the_config_does_not_have_is_refused(base, today):
    edit_config(today, r=4)
    with fails(r"lora_A has 2 rows.*says rank \[4\]"):
        load_adapter(base, today)


@pytest.mark.parametrize(
    "settings",
    [
        {"rank_pattern": {"layers.3.attention.query_key_value": -1}},
        {"modules_to_save": ["transformer", "layers"]},
        {"modules_to_save": ["", "layers"]},
    ],
)
def test_an_adapter_that_fails_half_way_leaves_the_base_as_it_was(base, today, settings):
    names = [name for name, _ in base.named_modules()]
    good = json.loads((today / "adapter_config.json").read_text())
    edit_config(today, **settings)
    with fails("the adapter cannot be put on this model"):
        load_adapter(base, today)
    assert [name for name, _ in base.named_modules()] == names
    (today / "adapter_config.json").write_text(json.dumps(good))
    load_adapter(base, today).unload()


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


def test_a_saved_adapter_loads_with_plain_peft(base, today, tiny_folder):
    config = json.loads((today / CONFIG).read_text(encoding="utf-8"))
    assert sorted(file.name for file in today.iterdir()) == [CONFIG, WEIGHTS]
    assert config["base_model_name_or_path"] == "zai-org/chatglm-6b"
    assert config["inference_mode"] is True
    expected = merge.probe(load_adapter(base, today))
    plain = PeftModel.from_pretrained(load_base_model(str(tiny_folder), dtype=torch.float32), today)
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
def test_no_private_path_is_written(today, tmp_path, name, written):
    edit_config(today, base_model_name_or_path=name)
    convert_adapter(today, tmp_path / "new")
    config = json.loads((tmp_path / "new" / CONFIG).read_text(encoding="utf-8"))
    assert config["base_model_name_or_path"] == written


def test_saving_into_a_folder_replaces_two_files_and_no_more(today, tmp_path):
    (today / "trainer_state.json").write_text("{}")
    adapter = read_adapter(today)
    write_adapter(adapter.config, {k: 2 * t for k, t in adapter.weights.items()}, today, "x")
    assert sorted(f.name for f in today.iterdir()) == [CONFIG, WEIGHTS, "trainer_state.json"]
    key = f"{STEM}.lora_B.weight"
    assert torch.equal(load_file(today / WEIGHTS)[key], 2 * adapter.weights[key])


def test_a_save_that_fails_leaves_nothing(today, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    adapter = read_adapter(today)
    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    for folder in (tmp_path / "new", today):
        before = sorted(tmp_path.rglob("*"))
        with fails("No space left"):
            write_adapter(adapter.config, adapter.weights, folder, "x")
        assert sorted(tmp_path.rglob("*")) == before


def test_convert_takes_the_newest_checkpoint_and_never_overwrites(fused, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(fused, run / "checkpoint-8")
    assert convert_adapter(run, tmp_path / "new") == run / "checkpoint-8"
    assert "4 modules, rank 16" in capsys.readouterr().out
    with fails("there already and not empty"):
        convert_adapter(run, tmp_path / "new")
    edit_weights(fused, lambda tensors: {key: 0 * t for key, t in tensors.items()})
    with fails("changes nothing"):
        convert_adapter(fused, tmp_path / "zero")
    assert not (tmp_path / "zero").exists()


def test_settings_are_those_that_a_peft_of_any_age_knows(today, tmp_path):
    """PEFT 0.10 refuses every name that came after it, such as corda_config."""
    written = json.loads((today / CONFIG).read_text(encoding="utf-8"))
    of_0_2 = {
        *("peft_type", "task_type", "base_model_name_or_path", "r", "lora_alpha", "lora_dropout"),
        *("target_modules", "bias", "fan_in_fan_out", "modules_to_save", "init_lora_weights"),
        "inference_mode",
    }
    assert set(written) == of_0_2
    edit_config(today, use_rslora=True, rank_pattern={"dense": 2})
    convert_adapter(today, tmp_path / "new")
    told = json.loads((tmp_path / "new" / CONFIG).read_text(encoding="utf-8"))
    assert set(told) == of_0_2 | {"use_rslora", "rank_pattern"}
    assert read_adapter(tmp_path / "new").config.use_rslora


@pytest.mark.parametrize("name", ["pytorch_model.bin", "chatglm-lora.pt"])
@pytest.mark.parametrize("with_base", [False, True])
def test_lora_in_a_file_of_another_name(
    tiny_folder, base, today, tmp_path, name, with_base, capsys
):
    """As a Trainer of 2023 left it in a checkpoint, with the optimiser beside it."""
    folder = tmp_path / "run" / "checkpoint-200"
    folder.mkdir(parents=True)
    tensors = load_file(today / WEIGHTS)
    tensors = {key.replace(".weight", ".default.weight"): t for key, t in tensors.items()}
    if with_base:
        tensors |= {f"base_model.model.{key}": t for key, t in base.state_dict().items()}
    torch.save(tensors, folder / name)
    torch.save({"state": {}, "param_groups": []}, folder / "optimizer.pt")
    (folder / CONFIG).write_bytes((today / CONFIG).read_bytes())
    adapter = read_adapter(tmp_path / "run")
    assert all(
        torch.equal(adapter.weights[key], tensor)
        for key, tensor in read_adapter(today).weights.items()
    )
    assert "LoRA tensors are used" in adapter.notices[0]
    assert ("the 52 others are not" in adapter.notices[0]) == with_base
    expected = merge.probe(load_adapter(load_base_model(str(tiny_folder)).float(), today))
    assert torch.equal(merge.probe(load_adapter(base, tmp_path / "run")), expected)
    convert_adapter(tmp_path / "run", tmp_path / "new")
    assert load_file(tmp_path / "new" / WEIGHTS).keys() == load_file(today / WEIGHTS).keys()
    shutil.copy(folder / name, folder / "second.pt")
    with fails("second.pt all hold LoRA weights; leave one"):
        read_adapter(folder)


def test_a_base_is_no_adapter(tiny_folder, tmp_path, base):
    torch.save(base.state_dict(), tmp_path / "pytorch_model.bin")
    with fails("no adapter here, wanted .* found pytorch_model.bin"):
        read_adapter(tmp_path)


# Biases


def biased(folder: Path, base, kind: str) -> dict[str, torch.Tensor]:
    """Turn an adapter into one that has biases, as PEFT 0.2 wrote them; returns these by module."""
    adapted = {"query_key_value"}
    biases = {
        name: torch.randn_like(parameter) / 4
        for name, parameter in base.named_parameters()
        if name.endswith(".bias") and (kind == "all" or name.split(".")[-2] in adapted)
    }
    edit_weights(
        folder, lambda tensors: tensors | {f"base_model.model.{n}": b for n, b in biases.items()}
    )
    edit_config(folder, bias=kind)
    return biases


@pytest.mark.parametrize("kind", ["lora_only", "all", "none"])
@pytest.mark.parametrize("form", ["today", "fused"])
def test_biases_are_in_effect_wherever_the_adapter_is(
    tiny_folder, tmp_path, request, base, kind, form, capsys
):
    """By hand, in our own loader, in plain PEFT and merged: the same logits, none the base's."""
    folder = request.getfixturevalue(form)
    bare = merge.probe(load_base_model(str(tiny_folder), dtype=torch.float32))
    without = merge.probe(load_adapter(base, folder))

    def fresh():
        return load_base_model(str(tiny_folder), dtype=torch.float32)

    torch.manual_seed(0)
    biases = biased(folder, fresh(), kind)
    plain = shutil.copytree(folder, tmp_path / "plain")
    edit_weights(plain, lambda t: {k: v for k, v in t.items() if not k.endswith(".bias")})
    edit_config(plain, bias="none")

    def by_hand():
        model = fresh()
        for name, bias in biases.items():
            model.get_parameter(name).data.copy_(bias)
        return load_adapter(model, plain)

    expected = merge.probe(by_hand())
    assert (expected - without).abs().max() > 1e-2

    ours = load_adapter(fresh(), folder)
    torch.testing.assert_close(merge.probe(ours), expected)
    with ours.disable_adapter():
        torch.testing.assert_close(merge.probe(ours), bare)
    torch.testing.assert_close(merge.probe(ours), expected)

    # Whoever answers with both sides reads them once, and what is alike only once.
    prompt = [EncodedPrompt([5, 6, 7, 8, base.config.gmask_token_id, base.config.bos_token_id], 1)]

    def ids(decoder):
        return [more[0] for more in decoder.stream(prompt, GenerationSettings(max_new_tokens=9))]

    for bits in (16, 8):
        tuned = Decoder(ours, [], bits=bits)
        with ours.disable_adapter():
            beside = Decoder(ours, [], bits=bits, beside=tuned)
        assert ids(beside) == ids(Decoder(fresh(), [], bits=bits))
        assert ids(tuned) == ids(Decoder(by_hand(), [], bits=bits))

    convert_adapter(folder, tmp_path / "new")
    with_peft = PeftModel.from_pretrained(fresh(), tmp_path / "new").eval()
    torch.testing.assert_close(merge.probe(with_peft), expected)
    again = load_adapter(fresh(), tmp_path / "new")
    torch.testing.assert_close(merge.probe(again), expected)
    save_adapter(again, tmp_path / "saved", "chatglm-6b")
    assert verify_saved(again, tmp_path / "saved") == 0
    assert (
        load_file(tmp_path / "saved" / WEIGHTS).keys()
        == load_file(tmp_path / "new" / WEIGHTS).keys()
    )

    config = MergeSettings(
        chatglm_path=str(tiny_folder),
        model_path=str(tmp_path / "new"),
        save_path=str(tmp_path / "m"),
    )
    merge_adapter(config)
    merged = load_base_model(str(tmp_path / "m"), dtype=torch.float32)
    torch.testing.assert_close(merge.probe(merged), expected, atol=1e-4, rtol=1e-4)


def test_biases_on_a_quantised_base_are_refused(tiny_folder, tmp_path, today, write_quantised):
    folder = write_quantised(tiny_folder, tmp_path / "int8", 8)
    biased(today, load_base_model(str(tiny_folder), dtype=torch.float32), "lora_only")
    base = load_base_model(str(folder), dtype=torch.float32, keep_packed=True)
    with fails("a quantised base has no place for; .*glmtune merge"):
        load_adapter(base, today)
    merge_adapter(
        MergeSettings(
            chatglm_path=str(folder), model_path=str(today), save_path=str(tmp_path / "merged")
        )
    )


def test_biases_that_a_file_lost_are_told(today, capsys):
    """As a PEFT of today writes an adapter of `bias: "lora_only"`."""
    edit_config(today, bias="lora_only")
    adapter = read_adapter(today)
    assert "trained with bias 'lora_only', but holds no bias" in adapter.notices[0]
    assert adapter.config.bias == "none"


# Merge


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
def test_a_merged_folder_is_a_plain_model_with_the_same_logits(tiny_folder, fused, tmp_path, tied):
    folder = tie_head(tiny_folder, tmp_path / "tied") if tied else tiny_folder
    config = MergeSettings(
        model_path=str(fused), chatglm_path=str(folder), save_path=str(tmp_path / "merged")
    )
    assert merge_adapter(config) < 1e-5

    base = load_base_model(str(folder), dtype=torch.float32)
    merged = load_base_model(str(tmp_path / "merged"), dtype=torch.float32)
    plain_names = [name for name, _ in base.named_parameters()]
    expected = merge.probe(load_adapter(base, fused))
    torch.testing.assert_close(merge.probe(merged), expected, atol=1e-5, rtol=0)
    assert [name for name, _ in merged.named_parameters()] == plain_names
    assert merged.config.tie_word_embeddings is tied

    stored = load_file(tmp_path / "merged" / "model.safetensors")
    wide = {name for name, tensor in stored.items() if tensor.dtype == torch.float32}
    assert wide == {f"transformer.layers.{i}.attention.query_key_value.weight" for i in range(4)}
    assert ("lm_head.weight" in stored) is not tied


def test_merge_copies_the_tokenizer_byte_for_byte_and_no_code_but_its_own(
    tiny_folder, fused, tmp_path
):
    folder = tie_head(tiny_folder, tmp_path / "tied")
    merged = tmp_path / "merged"
    merge_adapter(
        MergeSettings(model_path=str(fused), chatglm_path=str(folder), save_path=str(merged))
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
    base = shutil.copytree(GLM_TINY, tmp_path / "base")
    for name, published in [
        ("config.json", {"AutoConfig": "configuration_chatglm.ChatGLMConfig"}),
        ("tokenizer_config.json", {"AutoTokenizer": ["tokenization_chatglm.Tokenizer", None]}),
    ]:
        settings = json.loads((base / name).read_text()) | {"auto_map": published}
        (base / name).write_text(json.dumps(settings))
    merged = tmp_path / "merged"
    merge_adapter(
        MergeSettings(model_path=strange_adapter, chatglm_path=str(base), save_path=str(merged))
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


def test_a_merge_that_went_wrong_leaves_nothing(tiny_folder, fused, tmp_path, monkeypatch):
    def damage(model, dtype):
        model.transformer.layers[0].attention.dense.weight.data.zero_()

    config = MergeSettings(
        model_path=str(fused), chatglm_path=str(tiny_folder), save_path=str(tmp_path / "merged")
    )
    monkeypatch.setattr(merge, "shrink", damage)
    with fails("logits differ .*nothing was written"):
        merge_adapter(config)
    assert [path.name for path in tmp_path.iterdir()] == ["fused"]


def test_merge_never_overwrites(tiny_folder, fused):
    config = MergeSettings(
        model_path=str(fused), chatglm_path=str(tiny_folder), save_path=str(fused.parent)
    )
    with fails("there already and not empty"):
        merge_adapter(config)


def test_shrinking_loses_nothing():
    model = nn.Linear(2, 2)
    model.weight.data = torch.tensor([[1.0, 0.5], [2.0, 1 / 3]])
    model.bias.data = torch.tensor([0.25, -8.0])
    merge.shrink(model, torch.float16)
    assert (model.weight.dtype, model.bias.dtype) == (torch.float32, torch.float16)
    assert model.bias.tolist() == [0.25, -8.0]
