"""Adapters of Glm and Glm4 in every naming: loaded, merged, and converted in both directions."""

import json
import math
import re
import shutil

import pytest
import torch
import transformers
from adapter_files import CONFIG, WEIGHTS, edit_config, edit_weights, fails, rename
from peft import LoraConfig, PeftModel, inject_adapter_in_model, set_peft_model_state_dict
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file
from torch import nn
from toys import randomise_adapter

from glmtune.adapters import (
    attach_lora,
    convert_adapter,
    load_adapter,
    merge,
    merge_adapter,
    read_adapter,
    save_adapter,
)
from glmtune.config.settings import MergeSettings, PlanSettings
from glmtune.models.loading import load_base_model
from glmtune.models.low_rank import cut_update, join_updates
from glmtune.models.resolve import GLM_TINY
from glmtune.ops.lora import LowRank
from glmtune.training.loop import train
from glmtune.training.planning.preview import plan

REMOTE = {
    "chatglm2-6b-tiny/peft_0_4_query_key_value": "chatglm2-6b-tiny",
    "chatglm3-6b-32k-tiny/peft_0_6_query_key_value": "chatglm3-6b-32k-tiny",
    "chatglm3-6b-32k-tiny/peft_0_7_all": "chatglm3-6b-32k-tiny",
}
ALL = "chatglm3-6b-32k-tiny/peft_0_7_all"
FUSED = "transformer.encoder.layers.0.self_attention.query_key_value"
OWN = [
    ("glm-tiny", "lora-all", "lora_all"),
    ("glm-tiny", "lora-qkv", "lora_qkv"),
    ("glm-tiny", "lora-patterns", "lora_patterns"),
    ("glm-tiny", "lora-all-split", "lora_all"),
    ("glm-tiny", "lora-split-free", "lora_split_free"),
    ("glm4-tiny", "lora-all", "lora_all"),
    ("glm4-tiny", "lora-qkv", "lora_qkv"),
    ("glm4-tiny", "lora-all-split", "lora_all"),
]
remote = pytest.mark.parametrize("name", REMOTE)
own = pytest.mark.parametrize("model, name, logits", OWN)


@pytest.fixture
def base_folder(shared):
    """A function to the folder of a tiny base."""

    def find(name):
        within = (
            "golden" if name.startswith("chatglm") and "128k" not in name else "golden/glm/models"
        )
        return shared / within / name

    return find


@pytest.fixture
def load(base_folder):
    return lambda name: load_base_model(str(base_folder(name)), dtype=torch.float32)


@pytest.fixture
def copy_of(shared, tmp_path):
    """A function that makes a copy of a recorded adapter, to be changed."""

    def copy(name):
        folder = shutil.copytree(shared / "golden/glm/adapters" / name, tmp_path / "copy")
        for path in folder.iterdir():
            path.chmod(0o644)
        return folder

    return copy


def off(model, recorded, logits):
    """The largest difference from recorded logits, padding left out."""
    valid = recorded["attention_mask"].bool()
    with torch.inference_mode():
        found = model(
            input_ids=recorded["input_ids"], attention_mask=recorded["attention_mask"]
        ).logits
    return (found - recorded[logits])[valid].abs().max()


def probe_with(base, folder):
    return merge.probe(load_adapter(base, folder))


# The publisher's naming


@remote
def test_adapters_of_the_remote_code_give_the_recorded_logits(load, shared, name):
    folder = shared / "golden/glm/adapters" / name
    recorded = load_file(folder / "expected.safetensors")
    model = load_adapter(load(REMOTE[name]), folder)
    assert off(model, recorded, "logits_adapter") < 1e-5
    with model.disable_adapter():
        assert off(model, recorded, "logits_base") < 1e-5
        assert off(model, recorded, "logits_adapter") > 1
    assert off(model.merge_and_unload(), recorded, "logits_merged") < 1e-5


@remote
def test_they_merge_into_a_plain_model(base_folder, shared, tmp_path, name):
    folder = shared / "golden/glm/adapters" / name
    settings = MergeSettings(
        adapter=str(folder), base=str(base_folder(REMOTE[name])), save_path=str(tmp_path / "new")
    )
    assert merge_adapter(settings) < 1e-5
    recorded = load_file(folder / "expected.safetensors")
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "new", dtype=torch.float32)
    assert off(plain, recorded, "logits_merged") < 1e-5


@remote
def test_they_convert_to_what_peft_loads_on_transformers_class(
    load, shared, tmp_path, capsys, name
):
    folder = shared / "golden/glm/adapters" / name
    convert_adapter(folder, tmp_path / "new")
    load(REMOTE[name]).save_pretrained(tmp_path / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    recorded = load_file(folder / "expected.safetensors")
    assert off(PeftModel.from_pretrained(base, tmp_path / "new"), recorded, "logits_adapter") < 1e-5
    settings = json.loads((folder / CONFIG).read_text())
    assert f"rank {settings['r']}\n" in capsys.readouterr().out
    assert "rank_pattern" not in json.loads((tmp_path / "new" / CONFIG).read_text())


def with_adapter_name(tensors):
    return {key.replace(".weight", ".default.weight"): t for key, t in tensors.items()}


def without_prefix(tensors):
    return {key.removeprefix("base_model.model."): t for key, t in tensors.items()}


@pytest.mark.parametrize("name", [n for n in REMOTE if n != ALL])
@pytest.mark.parametrize("change", [with_adapter_name, without_prefix, None])
def test_old_checkpoints_need_neither_names_nor_settings(load, copy_of, capsys, name, change):
    folder = copy_of(name)
    recorded = load_file(folder / "expected.safetensors")
    if change:
        edit_weights(folder, change)
    else:
        (folder / CONFIG).unlink()
    assert off(load_adapter(load(REMOTE[name]), folder), recorded, "logits_adapter") < 1e-5
    assert ("lora_alpha 32" in capsys.readouterr().err) is (change is None)


# gate_proj and up_proj apart


@own
def test_every_naming_of_glm_gives_the_recorded_logits(load, shared, model, name, logits):
    recorded = load_file(shared / "golden/glm/adapters" / model / "expected.safetensors")
    adapted = load_adapter(load(model), shared / "golden/glm/adapters" / model / name)
    assert off(adapted, recorded, f"logits_{logits}") < 1e-5
    assert off(adapted, recorded, "logits_base") > 1


@own
def test_all_of_them_convert_to_what_peft_loads(
    load, base_folder, shared, tmp_path, model, name, logits
):
    convert_adapter(shared / "golden/glm/adapters" / model / name, tmp_path / "new")
    base = transformers.AutoModelForCausalLM.from_pretrained(
        base_folder(model), dtype=torch.float32
    )
    recorded = load_file(shared / "golden/glm/adapters" / model / "expected.safetensors")
    adapted = PeftModel.from_pretrained(base, tmp_path / "new")
    assert off(adapted, recorded, f"logits_{logits}") < 1e-5


@pytest.mark.parametrize("name, rank", [("lora-all-split", 4), ("lora-split-free", 8)])
def test_the_rank_grows_only_where_halves_have_factors_of_their_own(shared, tmp_path, name, rank):
    convert_adapter(shared / "golden/glm/adapters/glm-tiny" / name, tmp_path / "new")
    adapter = read_adapter(tmp_path / "new")
    ranks = {key.split(".")[-3]: len(t) for key, t in adapter.weights.items() if "lora_A" in key}
    assert ranks == dict.fromkeys(["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"], 4) | {
        "gate_up_proj": rank
    }
    pattern = {} if rank == 4 else {"gate_up_proj": 8}
    assert (adapter.config.r, adapter.config.rank_pattern) == (4, pattern)


def test_half_of_a_linear_alone_changes_half_of_it(load, copy_of):
    folder = copy_of("glm-tiny/lora-all-split")
    edit_weights(folder, lambda tensors: {k: t for k, t in tensors.items() if "gate_proj" in k})
    edit_config(folder, target_modules=["gate_proj"])
    linear = load_adapter(load("glm-tiny"), folder).model.model.layers[1].mlp.gate_up_proj
    gate, up = linear.get_delta_weight("default").chunk(2)
    assert gate.abs().max() > 1e-3
    assert not up.any()
    assert len(linear.lora_A.default.weight) == 4


# Back into the publisher's naming


def deltas(folder):
    """What an adapter's file adds to each linear, as PEFT scales it, in float64."""
    settings, tensors = json.loads((folder / CONFIG).read_text()), load_file(folder / WEIGHTS)
    found = {}
    for key in (key for key in tensors if "lora_A" in key):
        module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        values = []
        for pattern, default in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha")):
            pattern = settings.get(pattern) or {}
            values.append(pattern.get(get_pattern_key(pattern, module), settings[default]))
        rank, alpha = values
        a, b = tensors[key].double(), tensors[key.replace("lora_A", "lora_B")].double()
        assert len(a) == rank
        scale = alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)
        found[module] = scale * b @ a
    return found


def in_one(found, num_layers=2):
    """The updates of transformers' linears as the publisher's layout has them."""
    fused = {}
    for i in range(num_layers):
        ours, theirs = f"model.layers.{i}.", f"transformer.encoder.layers.{i}."
        parts = [found.get(f"{ours}self_attn.{n}_proj") for n in "qkv"]
        if any(part is not None for part in parts):
            width = next(part.shape[1] for part in parts if part is not None)
            rows = [64, 32, 32]
            parts = [
                torch.zeros(n, width).double() if part is None else part
                for n, part in zip(rows, parts, strict=True)
            ]
            fused[f"{theirs}self_attention.query_key_value"] = torch.cat(parts)
        for name, other in (("self_attn.o_proj", "self_attention.dense"),
                            ("mlp.gate_up_proj", "mlp.dense_h_to_4h"),
                            ("mlp.down_proj", "mlp.dense_4h_to_h")):  # fmt: skip
            if f"{ours}{name}" in found:
                fused[f"{theirs}{other}"] = found[f"{ours}{name}"]
    return fused


@pytest.fixture
def ours(load, tmp_path):
    """A function that trains an adapter of ours, so to speak, and saves it."""

    def make(model, targets, share_a=False, rank=3):
        torch.manual_seed(0)
        adapted = randomise_adapter(
            attach_lora(load(model), rank=rank, alpha=5, targets=targets), std=0.3
        )
        if share_a:
            for layer in adapted.model.model.layers:
                of_query = layer.self_attn.q_proj.lora_A.default.weight.data
                for linear in (layer.self_attn.k_proj, layer.self_attn.v_proj):
                    if hasattr(linear, "lora_A"):
                        linear.lora_A.default.weight.data = of_query.clone()
        save_adapter(adapted, tmp_path / "ours", "glm-tiny")
        return tmp_path / "ours"

    return make


def same(found, wanted):
    assert found.keys() == wanted.keys()
    for module, delta in wanted.items():
        assert (found[module] - delta).abs().max() < 1e-6 * delta.abs().max(), module


@pytest.mark.parametrize(
    "targets, share_a, rank_of_qkv",
    [("all", False, 9), ("all", True, 3), ("q_proj,v_proj", False, 6), ("v_proj", False, 3),
     ("q_proj,k_proj,v_proj", False, 9), ("q_proj,o_proj,k_proj", True, 3),
     ("gate_up_proj,down_proj", False, None)],
)  # fmt: skip
def test_an_adapter_of_ours_is_written_in_the_published_naming(
    ours, load, tmp_path, targets, share_a, rank_of_qkv
):
    folder = ours("glm-tiny", targets, share_a)
    convert_adapter(folder, tmp_path / "theirs", "chatglm")
    same(deltas(tmp_path / "theirs"), in_one(deltas(folder)))
    adapter = read_adapter(tmp_path / "theirs")
    ranks = {len(t) for k, t in adapter.weights.items() if "key_value.lora_A" in k}
    assert ranks == ({rank_of_qkv} if rank_of_qkv else set())
    assert all(len(t) == 3 for k, t in adapter.weights.items() if "dense.lora_A" in k)
    if targets == "q_proj,k_proj,v_proj":  # one rank for all: settings that any PEFT reads
        settings = json.loads((tmp_path / "theirs" / CONFIG).read_text())
        assert (settings["r"], settings["lora_alpha"]) == (9, 15)
        assert settings["target_modules"] == ["query_key_value"]
        assert settings.keys().isdisjoint({"rank_pattern", "alpha_pattern"})

    # and back: equal logits, the ranks as they were
    convert_adapter(tmp_path / "theirs", tmp_path / "back")
    wanted = probe_with(load("glm-tiny"), folder)
    for name in ("theirs", "back"):
        assert (probe_with(load("glm-tiny"), tmp_path / name) - wanted).abs().max() < 2e-5
    back = read_adapter(tmp_path / "back").weights
    assert all(len(t) == 3 for k, t in back.items() if "q_proj.lora_A" in k or "v_proj.lora_A" in k)


@remote
def test_the_published_naming_survives_the_round_trip(shared, tmp_path, name):
    folder = shared / "golden/glm/adapters" / name
    convert_adapter(folder, tmp_path / "ours")
    convert_adapter(tmp_path / "ours", tmp_path / "theirs", "chatglm")
    before, after = read_adapter(folder), read_adapter(tmp_path / "theirs")
    assert before.weights.keys() == after.weights.keys()
    assert all(torch.equal(after.weights[key], t) for key, t in before.weights.items())
    assert (before.config.r, before.config.lora_alpha) == (after.config.r, after.config.lora_alpha)
    assert before.config.target_modules == after.config.target_modules


@pytest.mark.parametrize("name", ["lora-patterns", "lora-split-free"])
def test_patterns_are_written_as_each_linears_rank_and_scale(shared, tmp_path, name):
    folder = shared / "golden/glm/adapters/glm-tiny" / name
    convert_adapter(folder, tmp_path / "ours")
    convert_adapter(folder, tmp_path / "theirs", "chatglm")
    same(deltas(tmp_path / "theirs"), in_one(deltas(tmp_path / "ours")))


def test_peft_itself_reads_what_was_written(ours, tmp_path):
    """On modules with the names that the publisher's code has."""
    folder = ours("glm-tiny", "all")
    convert_adapter(folder, tmp_path / "theirs", "chatglm")
    wanted = in_one(deltas(folder))
    tree = nn.Module()
    for module, delta in wanted.items():
        place = tree
        *path, last = module.split(".")
        for part in path:
            if part not in dict(place.named_children()):
                place.add_module(part, nn.Module())
            place = place.get_submodule(part)
        place.add_module(last, nn.Linear(*reversed(delta.shape), bias=False))
    tree = inject_adapter_in_model(LoraConfig.from_pretrained(str(tmp_path / "theirs")), tree)
    weights = {
        key.removeprefix("base_model.model."): t
        for key, t in load_file(tmp_path / "theirs" / WEIGHTS).items()
    }
    loaded = set_peft_model_state_dict(tree, weights)
    assert not [key for key in loaded.missing_keys if "lora" in key] + loaded.unexpected_keys
    for module, delta in wanted.items():
        found = tree.get_submodule(module).get_delta_weight("default")
        torch.testing.assert_close(found.double(), delta, atol=1e-6, rtol=1e-5)


def test_sizes_that_no_tensor_says_come_from_the_base(ours, base_folder, tmp_path):
    folder = ours("glm-tiny", "q_proj")
    with fails("q_proj alone, which does not say how many rows.* pass the base .* as --base"):
        convert_adapter(folder, tmp_path / "theirs", "chatglm")
    convert_adapter(folder, tmp_path / "theirs", "chatglm", str(base_folder("glm-tiny")))
    same(deltas(tmp_path / "theirs"), in_one(deltas(folder)))


@pytest.mark.parametrize(
    "settings, word",
    [({"use_dora": True}, "use_dora"), ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
     ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa'"),
     ({"trainable_token_indices": [3]}, "trainable_token_indices")],
)  # fmt: skip
def test_what_is_more_than_lora_has_no_other_naming(ours, copy_of, tmp_path, load, settings, word):
    folder = ours("glm-tiny", "q_proj,v_proj")
    edit_config(folder, **settings)
    with fails(f"has {word}.*only plain LoRA"):
        convert_adapter(folder, tmp_path / "theirs", "chatglm")
    foreign = copy_of(ALL)
    edit_config(foreign, **settings)
    with fails(f"has {word}.*only plain LoRA"):
        load_adapter(load("chatglm3-6b-32k-tiny"), foreign)


def with_bias(tensors):
    stem = "base_model.model.model.layers.0.self_attn.q_proj"
    return tensors | {f"{stem}.bias": torch.ones(64)}


def with_magnitude(tensors):
    stem = "base_model.model.model.layers.0.self_attn.q_proj"
    return tensors | {f"{stem}.lora_magnitude_vector": torch.ones(64)}


def with_embedding(tensors):
    stem = "base_model.model.model.embed_tokens"
    return tensors | {f"{stem}.lora_A.weight": torch.ones(3, 256),
                      f"{stem}.lora_B.weight": torch.ones(64, 3)}  # fmt: skip


@pytest.mark.parametrize(
    "change, fragment",
    [
        (with_bias, "has bias"),
        (with_magnitude, "has .*lora_magnitude_vector, but only plain"),
        (with_embedding, "embed_tokens, which the publisher's code has no"),
    ],
)
def test_what_the_published_naming_has_no_place_for_is_refused(ours, tmp_path, change, fragment):
    folder = ours("glm-tiny", "q_proj,v_proj")
    edit_weights(folder, change)
    with fails(fragment):
        convert_adapter(folder, tmp_path / "theirs", "chatglm")
    assert not (tmp_path / "theirs").exists()


@pytest.mark.parametrize("is_named", [False, True])
@pytest.mark.parametrize(
    "model, name", [("glm4-tiny", "GLM-4-0414"), ("glm-edge-tiny", "GLM-Edge")]
)
def test_models_with_one_naming_have_no_other(ours, base_folder, tmp_path, model, name, is_named):
    """Whether the base is given, or a run's recipe names it."""
    folder, base = ours(model, "q_proj,v_proj"), str(base_folder(model))
    if is_named:
        (folder / "recipe.yaml").write_text(f"base: {base}\n")
    with fails(f"is of {name}, whose published code has no names but these"):
        convert_adapter(folder, tmp_path / "theirs", "chatglm", None if is_named else base)
    assert not (tmp_path / "theirs").exists()


def test_v1_and_strangers_are_refused_where_another_naming_is_asked_for(
    todays_adapter, ours, tmp_path
):
    with fails("is of ChatGLM-6B, whose published code has no names but these"):
        convert_adapter(todays_adapter, tmp_path / "theirs", "chatglm")
    folder = ours("glm-tiny", "q_proj,v_proj")
    edit_weights(folder, rename("self_attn", "attention"))
    edit_config(folder, base_model_name_or_path=None)
    with fails("attention.q_proj, which is of no model that is known here"):
        convert_adapter(folder, tmp_path / "theirs", "chatglm")


# Adapters that do not fit


@pytest.mark.parametrize(
    "change, fragment",
    [
        (lambda t: t | rename(FUSED, "model.layers.0.self_attn.q_proj")(
            {k: v.clone() for k, v in t.items() if FUSED in k}),
         r"adapts model\.layers\.0\.self_attn\.q_proj twice, under two names"),
        (lambda t: {k: v[1:] if "value.lora_B" in k else v for k, v in t.items()},
         "query_key_value has 127 rows, but queries, keys and values of this base have 128"),
        (lambda t: {k: v for k, v in t.items() if "layers.1.self_attention.query_key_value.lora_B"
                    not in k}, "query_key_value.lora_B.weight is missing"),
        (lambda t: {k: v[:2] if "h_to_4h.lora_A" in k else v for k, v in t.items()},
         r"h_to_4h.lora_A.weight has shape \[2, 64\], but adapter_config.json says rank 4"),
        (lambda t: {k: v for k, v in t.items() if ".2." not in k}, "tensors too few.*layers.2"),
        (lambda t: {k: v for k, v in t.items() if "lora_A" not in k or ".2.mlp" not in k},
         "dense_4h_to_h.lora_B.weight is there without its lora_A"),
    ],
    ids=["twice", "rows", "no B", "rank", "layers", "no A"],
)  # fmt: skip
def test_damage_is_named_and_leaves_the_base_free(load, copy_of, shared, change, fragment):
    base, folder = load("chatglm3-6b-32k-tiny"), copy_of(ALL)
    edit_weights(folder, change)
    with fails(fragment) as caught:
        load_adapter(base, folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)
    load_adapter(base, shared / "golden/glm/adapters" / ALL)


def test_rows_that_are_no_queries_keys_and_values_are_not_guessed_at(copy_of, tmp_path):
    folder = copy_of("chatglm2-6b-tiny/peft_0_4_query_key_value")
    edit_weights(folder, lambda t: {k: v[1:] if "lora_B" in k else v for k, v in t.items()})
    with fails("has 127 rows, which are not 64 of queries"):
        convert_adapter(folder, tmp_path / "new")


def test_an_adapter_of_another_family_is_named(load, tiny_base, todays_adapter, shared):
    with fails("was trained on zai-org/chatglm-6b, the base is GLM-4-9B; pass --base zai-org"):
        load_adapter(load("glm-tiny"), todays_adapter)
    edit_config(todays_adapter, base_model_name_or_path=None)
    with fails("is an adapter of ChatGLM-6B or .*, as it adapts transformer.layers.0.attention"):
        load_adapter(load("glm-tiny"), todays_adapter)
    glm = shared / "golden/glm/adapters/glm-tiny/lora-qkv"
    with fails("is an adapter of ChatGLM3-6B or .*the base is ChatGLM-6B: pass the base"):
        load_adapter(tiny_base, glm)
    remote = shared / "golden/glm/adapters" / ALL
    with fails("is an adapter of ChatGLM3-6B or ChatGLM2-6B or GLM-4-9B, .* base is GLM-4-0414"):
        load_adapter(load("glm4-tiny"), remote)


def test_the_base_that_an_adapter_names_tells_equal_layers_apart(load, copy_of, capsys):
    folder = copy_of("glm-tiny/lora-qkv")
    edit_config(folder, base_model_name_or_path="THUDM/glm-4-9b-chat-hf")
    load_adapter(load("glm-tiny"), folder)
    assert capsys.readouterr().err == ""
    with fails("was trained on THUDM/glm-4-9b-chat-hf, the base is GLM-4-0414; pass --base THUDM"):
        load_adapter(load("glm4-tiny"), folder)
    edit_config(folder, base_model_name_or_path="THUDM/chatglm3-6b")
    load_adapter(load("glm-tiny"), folder)
    assert "THUDM/chatglm3-6b, the base is GLM-4-9B, whose layers" in capsys.readouterr().err


def test_an_adapter_of_other_sizes_says_which_base_it_wants(load, copy_of):
    folder = copy_of("glm-tiny/lora-all")
    with fails(r"tensors that|has shape \[.*it was trained on glm-tiny"):
        load_adapter(load("chatglm3-6b-32k-tiny"), folder)
    folder = folder.parent / "wide"
    shutil.copytree(folder.parent / "copy", folder)
    edit_weights(folder, lambda t: {k: torch.cat([v, v], 1) if "q_proj.lora_A" in k else v
                                    for k, v in t.items()})  # fmt: skip
    with fails(r"has shape \[4, 128\], but \[4, 64\].*hidden size.*trained on glm-tiny"):
        load_adapter(load("glm-tiny"), folder)


# Some layers


def test_an_adapter_of_some_layers_loads_and_says_so(load, copy_of, capsys):
    folder = copy_of(ALL)
    edit_weights(folder, lambda t: {k: v for k, v in t.items() if ".2." in k})
    edit_config(folder, layers_to_transform=[2])
    model = load_adapter(load("chatglm3-6b-32k-tiny"), folder)
    assert len(model.targeted_module_names) == 6
    assert (
        "adapts only q_proj, k_proj, v_proj, o_proj, gate_up_proj, down_proj in 1 of 3"
        in capsys.readouterr().err
    )
    load_adapter(load("chatglm3-6b-32k-tiny"), folder.parents[0] / "copy")


def test_a_whole_adapter_says_nothing(load, shared, capsys):
    load_adapter(load("chatglm3-6b-32k-tiny"), shared / "golden/glm/adapters" / ALL)
    assert capsys.readouterr().err == ""


def test_a_linear_that_only_some_layers_have_is_refused(load):
    model = load("glm-tiny")
    model.model.layers[1].mlp.down_proj = nn.Identity()
    with fails("lora_target: down_proj in 1 of 2 layers"):
        attach_lora(model, targets="all")
    attach_lora(model, targets="q_proj,gate_up_proj").unload()


# In PEFT


@pytest.mark.parametrize("model", ["chatglm2-6b-tiny", "glm-tiny", "glm4-tiny", "glm-edge-tiny"])
def test_adapters_of_ours_load_in_peft_on_transformers_class(ours, load, tmp_path, model):
    folder = ours(model, "all")
    base = load(model)
    base.save_pretrained(tmp_path / "base")
    plain = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", dtype=torch.float32
    )
    assert type(plain).__module__.startswith("transformers.models.glm")
    ids = torch.arange(5, 25)[None]
    with torch.inference_mode():
        before = plain(ids).logits
        found = PeftModel.from_pretrained(plain, folder)(ids).logits
        wanted = load_adapter(base, folder)(ids).logits
    assert torch.equal(found, wanted)
    assert (found - before).abs().max() > 0.1


# Tensors


def test_parts_that_scale_otherwise_are_joined_at_one_scale():
    generator = torch.Generator().manual_seed(0)
    a, b, c, d = (torch.randn(*s, generator=generator) for s in ((2, 5), (3, 2), (2, 5), (4, 2)))
    parts = [LowRank(a, b, 2.0), None, LowRank(c, d, -8.0), LowRank(a, b, 0.5)]
    joined = join_updates(parts, [3, 2, 4, 3])
    assert len(joined.a_RI) == 4
    wanted = torch.cat([2 * b @ a, torch.zeros(2, 5), -8 * d @ c, 0.5 * b @ a])
    torch.testing.assert_close(joined.scale * joined.b_OR @ joined.a_RI, wanted)
    nothing = join_updates([LowRank(a, b, 0.0), None], [3, 1])
    assert not (nothing.scale * nothing.b_OR @ nothing.a_RI).any()
    first, zeros, _, _ = cut_update(joined, [3, 2, 4, 3])
    assert torch.equal(first.a_RI, a)
    assert len(zeros.a_RI) == 4
    assert not zeros.b_OR.any()


# What a wish reaches


def test_a_plan_says_what_lora_target_reaches(base_folder, capsys):
    small = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"]
    folder = str(base_folder("glm4-tiny"))
    plan(PlanSettings(base=folder, lora_target=("all",), lora_rank=4, use_cpu=True))
    assert f"reaches 7,680 of 7,680: {', '.join(small)} in 2 layers" in capsys.readouterr().out
    plan(PlanSettings(base=folder, lora_rank=4, use_cpu=True))
    first = capsys.readouterr().out.splitlines()[1].split()
    assert " ".join(first) == "lora reaches 2,560 of 7,680: q_proj, k_proj, v_proj in 2 layers"
    plan(PlanSettings(base="zai-org/GLM-4-9B-0414", lora_target=("all",), use_cpu=True))
    assert f"reaches 23.8 M of 23.8 M: {', '.join(small)} in 40 layers" in capsys.readouterr().out


def test_a_run_says_it_too_whatever_the_family(toy_run, no_curve, capsys):
    train(toy_run(max_steps=1, lora_target="query_key_value,dense"))
    model = attach_lora(load_base_model(GLM_TINY), targets="all")
    most = model.get_nb_trainable_parameters()[0]
    said = capsys.readouterr().out
    (line,) = (line for line in said.splitlines() if line.strip().startswith("lora "))
    reached, of_all = re.search(r"reaches ([\d,]+) of ([\d,]+): ", line).groups()
    assert re.search(rf"trainable +{reached} of", said)
    assert of_all == f"{most:,}"
    assert line.endswith(f"query_key_value, dense in {model.config.num_layers} layers")


@pytest.mark.parametrize("spelled", [".bias", ".base_layer.bias"])
def test_trained_biases_of_the_fused_linear_are_cut_as_it_is(
    load, base_folder, copy_of, tmp_path, spelled
):
    """`bias: lora_only` on the publisher's names: q_proj, k_proj and v_proj get their parts."""
    folder = copy_of("chatglm2-6b-tiny/peft_0_4_query_key_value")
    plain = shutil.copytree(folder, tmp_path / "plain")
    torch.manual_seed(0)
    stem = "transformer.encoder.layers.{}.self_attention.query_key_value"
    biases = [torch.randn(128) / 4 for _ in range(3)]
    more = {f"base_model.model.{stem.format(n)}{spelled}": b for n, b in enumerate(biases)}
    edit_weights(folder, lambda tensors: tensors | more)
    edit_config(folder, bias="lora_only")

    by_hand = load("chatglm2-6b-tiny")
    for layer, bias in zip(by_hand.model.layers, biases, strict=True):
        linears = [getattr(layer.self_attn, f"{name}_proj") for name in "qkv"]
        for linear, part in zip(linears, bias.split((64, 32, 32)), strict=True):
            linear.bias.data.copy_(part)
    expected = merge.probe(load_adapter(by_hand, plain))
    model = load_adapter(load("chatglm2-6b-tiny"), folder)
    torch.testing.assert_close(merge.probe(model), expected)
    convert_adapter(folder, tmp_path / "new", base=str(base_folder("chatglm2-6b-tiny")))
    assert json.loads((tmp_path / "new" / CONFIG).read_text())["bias"] == "lora_only"
    theirs = PeftModel.from_pretrained(load("chatglm2-6b-tiny"), str(tmp_path / "new"))
    torch.testing.assert_close(merge.probe(theirs), expected)
