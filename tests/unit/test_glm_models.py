"""Glm and Glm4 against the published code's recorded numbers and transformers' own classes."""

import json
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from glm_folders import write_model
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from toys import randomise_adapter

from glmtune.adapters.lora import attach_lora
from glmtune.cli import main
from glmtune.data.packing import lay_out
from glmtune.data.token_rows import IGNORED, TokenRows
from glmtune.errors import UserError
from glmtune.generation import Decoder, EncodedPrompt, GenerationSettings
from glmtune.models.families import FAMILIES, family_of, find_family
from glmtune.models.glm import packed as glm_packed
from glmtune.models.glm.configuration import MappedGlm4Config, MappedGlmConfig
from glmtune.models.glm.mapping import to_glm
from glmtune.models.glm.modeling import Glm4ForCausalLM, GlmForCausalLM
from glmtune.models.glm.packed import PACKED
from glmtune.models.glm.rotary import pair_angles
from glmtune.models.glm.settings import GlmSettings
from glmtune.models.loading import load_base_model
from glmtune.models.packed import PackedModel, linear_of, to_fp8
from glmtune.ops.rotary import rotate_pairs, rotate_whole_pairs, whole_pair_angles

TINY = {
    "chatglm2": "chatglm2-6b-tiny",
    "chatglm3-32k": "chatglm3-6b-32k-tiny",
    "chatglm3-128k": "glm/models/chatglm3-6b-128k-tiny",
    "glm": "glm/models/glm-tiny",
    "glm4": "glm/models/glm4-tiny",
    "edge": "glm/models/glm-edge-tiny",
}
NAMES = {
    "chatglm2": "ChatGLM2-6B", "chatglm3-32k": "ChatGLM3-6B", "chatglm3-128k": "ChatGLM3-6B",
    "glm": "GLM-4-9B", "glm4": "GLM-4-0414", "edge": "GLM-Edge",
}  # fmt: skip
kinds = pytest.mark.parametrize("kind", TINY)


@pytest.fixture
def load(shared):
    def load(kind, **kwargs):
        model_class = Glm4ForCausalLM if kind == "glm4" else GlmForCausalLM
        folder = shared / "golden" / TINY[kind]
        return model_class.from_pretrained(folder, dtype=torch.float32, **kwargs).eval()

    return load


@pytest.mark.parametrize("kind", ["chatglm2", "chatglm3-32k"])
def test_logits_and_loss_are_the_published_codes(load, shared, kind):
    model = load(kind)
    recorded = load_file(shared / "golden" / TINY[kind] / "forward.safetensors")
    with torch.inference_mode():
        out = model(input_ids=recorded["input_ids"], labels=recorded["labels"])
    assert (out.logits - recorded["logits"]).abs().max() < 1e-5
    assert abs(out.loss - recorded["loss"]) < 1e-5


@kinds
def test_the_family_is_read_off_config_json(shared, kind):
    settings = json.loads((shared / "golden" / TINY[kind] / "config.json").read_text())
    assert find_family(settings).name == NAMES[kind]


@kinds
def test_a_saved_model_is_of_the_same_family_and_loads_in_transformers(load, tmp_path, kind):
    model = load(kind)
    model.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    assert settings["model_type"] in ("glm", "glm4")
    assert find_family(settings).name == NAMES[kind]
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ids = torch.arange(5, 25)[None]
    with torch.inference_mode():
        assert torch.equal(loaded(ids).logits, model(ids).logits)


@kinds
def test_greedy_continuations_are_the_recorded_ones(load, shared, kind):
    recorded = json.loads((shared / "golden/glm/generation.json").read_text())["models"]
    folder = TINY[kind].rsplit("/", 1)[-1]
    entry = next(value for name, value in recorded.items() if name.rsplit("/", 1)[-1] == folder)
    model = load(kind)
    decoder = Decoder(model, [])
    prompts = [EncodedPrompt(ids, 0) for ids in entry["prompts"]]
    rows = [[] for _ in prompts]
    for more in decoder.stream(prompts, GenerationSettings(max_new_tokens=32)):
        for row, ids in zip(rows, more, strict=True):
            row += ids
    assert rows == entry["tokens"]


@kinds
def test_the_shape_counts_what_the_model_holds(load, kind):
    model = load(kind)
    shape = family_of(model.config).shape(model.config)
    assert shape.weight_bytes(torch.float32) == 4 * sum(p.numel() for p in model.parameters())
    linears = {n.split(".")[-1]: m for n, m in model.named_modules() if ".layers.0." in n}
    for linear in shape.linears:
        module = linears[linear.name]
        assert module.weight.shape == (linear.outputs, linear.inputs)
        assert (module.bias is not None) is linear.has_bias


@pytest.mark.parametrize(
    "name, count",
    [("GLM-4-9B", 9_399_951_360), ("GLM-4-0414", 9_400_279_040), ("GLM-Edge", 1_472_055_296),
     ("ChatGLM3-6B", 6_243_584_000), ("ChatGLM2-6B", 6_243_584_000)],
)  # fmt: skip
def test_published_sizes(name, count):
    """As counted by others: see the model cards."""
    family = next(family for family in FAMILIES if family.name == name)
    shape = family.shape(family.read_settings(family.published_settings))
    assert shape.weight_bytes(torch.bfloat16) == 2 * count


def random_rows(config, shapes, seed=0):
    """Rows of random ids: how many in the prompt, how many in the answer."""
    random = np.random.default_rng(seed)
    lengths = [prompt + answer for prompt, answer in shapes]
    return TokenRows(
        ids_T=random.integers(5, config.vocab_size, sum(lengths)),
        starts_R1=np.concatenate(([0], np.cumsum(lengths))),
        prompt_lengths_R=np.array([prompt for prompt, _ in shapes]),
        rule=family_of(config).row_rule(config)._replace(pad_id=0),
    )


def with_adapter(base, targets=None):
    torch.manual_seed(0)
    return randomise_adapter(attach_lora(base, rank=4, dropout=0.0, targets=targets), std=0.1)


def plain_loss(model, rows, row_ids):
    """transformers' and PEFT's own loss of rows, each by itself."""
    total = 0
    for row in row_ids:
        ids = torch.tensor(rows[row])[None]
        labels = ids.clone()
        labels[:, : rows.prompt_lengths_R[row]] = IGNORED
        out = model(input_ids=ids, labels=labels, use_cache=False)
        total = total + out.loss * rows.num_labels_R[row]
    return total


@kinds
@pytest.mark.parametrize("targets", [None, "all"])
@pytest.mark.parametrize("recompute", [0, 1])
def test_packed_rows_have_the_loss_and_gradients_of_transformers(load, kind, targets, recompute):
    model = with_adapter(load(kind), targets)
    block = family_of(model.config).native().packed
    rows = random_rows(model.config, [(5, 9), (30, 2), (1, 17), (12, 12)])
    plain_loss(model, rows, range(4)).backward()
    wanted = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    packed = PackedModel(model, block, compiled=False, recompute=recompute)
    loss = packed.loss(packed.to_tensors(lay_out(rows, np.array([2, 0, 3, 1]), 100)))
    loss.backward()
    assert abs(loss - plain_loss(model, rows, range(4))) < 1e-4 * loss
    assert any(grad.abs().max() > 1e-3 for grad in wanted.values())
    for name, grad in wanted.items():
        off = (model.get_parameter(name).grad - grad).norm()
        assert off < 1e-4 * max(1.0, grad.norm()), name


@kinds
def test_queries_keys_and_values_in_float8_are_one_product(load, kind, monkeypatch):
    model = with_adapter(load(kind))
    to_fp8(model, PACKED.together)
    packed = PackedModel(model, PACKED, compiled=False)
    assert {len(block.qkv) for block in packed.blocks} == {1}
    each = lambda linears: tuple(linear_of(linear).frozen for linear in linears)
    monkeypatch.setattr(glm_packed, "frozen_together", each)
    apart = PackedModel(model, PACKED, compiled=False)
    assert {len(block.qkv) for block in apart.blocks} == {3}
    rows = random_rows(model.config, [(3, 4), (2, 5), (4, 4)])
    pack = lay_out(rows, np.arange(3), 64)
    losses = [way.loss(way.to_tensors(pack)) for way in (packed, apart)]
    torch.testing.assert_close(*losses, rtol=1e-6, atol=1e-6)


def test_rotating_in_few_kernels_is_rotating_pairs():
    x = torch.randn(2, 3, 5, 8, dtype=torch.float64)
    angle = torch.randn(2, 1, 5, 4, dtype=torch.float64)
    found = rotate_whole_pairs(x, *whole_pair_angles(angle.cos(), angle.sin()))
    torch.testing.assert_close(found, rotate_pairs(x, angle.cos(), angle.sin()))


@kinds
def test_twenty_steps_are_those_of_transformers(load, kind):
    ours, theirs = (with_adapter(load(kind), "all") for _ in range(2))
    packed = PackedModel(ours, family_of(ours.config).native().packed, compiled=False)
    rows = random_rows(ours.config, [(5, 9), (3, 12), (1, 17), (8, 8)])
    optimisers = [
        torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        for model in (ours, theirs)
    ]
    for step in range(20):
        row_ids = np.array([step % 4, (step + 1) % 4])
        pack = packed.to_tensors(lay_out(rows, row_ids, 64))
        losses = packed.loss(pack), plain_loss(theirs, rows, row_ids)
        for loss, optimiser in zip(losses, optimisers, strict=True):
            optimiser.zero_grad()
            (loss / rows.num_labels_R[row_ids].sum()).backward()
            optimiser.step()
    num_labels = rows.num_labels_R[row_ids].sum()
    assert abs(losses[0] - losses[1]) / num_labels < 1e-5


VARIANTS = st.fixed_dictionaries(
    {
        "num_key_value_heads": st.sampled_from([1, 2, 4]),
        "head_dim": st.sampled_from([8, 16]),
        "attention_bias": st.booleans(),
        "tie_word_embeddings": st.booleans(),
        "num_hidden_layers": st.sampled_from([1, 3]),
    }
)


@settings(deadline=None, max_examples=25)
@given(
    variant=VARIANTS,
    is_glm4=st.booleans(),
    factor=st.sampled_from([0.5, 1.0]),
    scaling=st.sampled_from([{}, {"rope_type": "yarn", "factor": 4.0,
                                  "original_max_position_embeddings": 64}]),
)  # fmt: skip
def test_any_variant_trains_and_answers_as_transformers(variant, is_glm4, factor, scaling):
    """The published ones among them: 32B has no bias, Edge rotates whole heads and is tied."""
    config_class, model_class = (
        (MappedGlm4Config, Glm4ForCausalLM) if is_glm4 else (MappedGlmConfig, GlmForCausalLM)
    )
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": factor} | scaling
    config = config_class(
        vocab_size=120, hidden_size=32, intermediate_size=40, num_attention_heads=4,
        max_position_embeddings=256, initializer_range=0.2, eos_token_id=[101, 108, 110],
        pad_token_id=101, rope_parameters=rope, **variant,
    )  # fmt: skip
    torch.manual_seed(0)
    base = model_class(config).eval()
    shape = family_of(config).shape(config)
    assert shape.weight_bytes(torch.float32) == 4 * sum(p.numel() for p in base.parameters())
    ids = torch.randint(0, 100, (1, 70))
    how = GenerationSettings(max_new_tokens=8)
    steps = Decoder(base, []).stream([EncodedPrompt(ids[0].tolist(), 0)], how)
    answer = [token for (more,) in steps for token in more]
    with torch.inference_mode():
        row = torch.cat((ids, torch.tensor([answer])), 1)
        logits = base(row, use_cache=False).logits[0, 69:-1]
    chosen = logits.gather(1, torch.tensor(answer)[:, None])[:, 0]
    assert (logits.max(1).values - chosen).max() < 1e-4  # the likeliest, or as likely
    model = with_adapter(base, "all")
    rows = random_rows(config, [(5, 9), (40, 30), (1, 17)])
    packed = PackedModel(model, family_of(config).native().packed, compiled=False)
    with torch.no_grad():
        loss = packed.loss(packed.to_tensors(lay_out(rows, np.arange(3), 128)))
        assert abs(loss / plain_loss(model, rows, range(3)) - 1) < 1e-5


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
def test_positions_that_depend_on_a_rows_length_are_refused(rope_type):
    rope = {"rope_type": rope_type, "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    config = SimpleNamespace(rope_parameters=rope, head_dim=16, max_position_embeddings=64)
    with pytest.raises(UserError, match=f"rope_type '{rope_type}' is not known here"):
        pair_angles(torch.arange(3), config)


@pytest.mark.parametrize(
    "name, vocabulary",
    [("ChatGLM3-6B", "glm3_tokenizer.model"), ("ChatGLM2-6B", "glm3_tokenizer.model"),
     ("GLM-4-9B", "glm/glm4_tokenizer.model")],
)  # fmt: skip
def test_both_layouts_hold_one_model(shared, tmp_path, name, vocabulary):
    family = next(family for family in FAMILIES if family.name == name)
    file = shared / "golden" / vocabulary
    folders = [
        write_model(tmp_path / layout, family, file, published=layout == "published")
        for layout in ("published", "transformers")
    ]
    published, plain = (
        family.native().model_class.from_pretrained(folder, dtype=torch.float16).float()
        for folder in folders
    )
    assert published.state_dict().keys() == plain.state_dict().keys()
    for key, tensor in published.state_dict().items():
        assert torch.equal(tensor, plain.state_dict()[key]), key
    ids = torch.randint(0, 60_000, (1, 30))
    with torch.inference_mode():
        assert torch.equal(published(ids).logits, plain(ids).logits)
    assert family_of(published.config) is family_of(plain.config) is family


def test_names_of_the_publishers_code_mean_our_linears(load):
    model = attach_lora(load("chatglm3-32k"), targets="query_key_value,dense_h_to_4h")
    adapted = {name.split(".")[-2] for name in model.state_dict() if "lora_A" in name}
    assert model.peft_config["default"].target_modules == {
        "q_proj", "k_proj", "v_proj", "gate_up_proj"
    }  # fmt: skip
    assert adapted


@pytest.mark.parametrize("name", ["gate_proj", "up_proj"])
def test_half_of_a_fused_linear_is_refused(load, name):
    with pytest.raises(UserError, match="gate_proj and up_proj are one here"):
        attach_lora(load("glm4"), targets=f"q_proj,{name}")


def test_a_folder_of_two_models_is_refused(shared, tmp_path):
    folder = shutil.copytree(shared / "golden" / TINY["chatglm3-32k"], tmp_path / "base")
    (folder / "config.json").chmod(0o644)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"multi_query_group_num": 4}))
    with pytest.raises(UserError, match=r"do not fit config\.json"):
        GlmForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("as_safetensors", [False, True])
def test_frequencies_of_another_base_are_refused(shared, tmp_path, as_safetensors):
    folder = shutil.copytree(shared / "golden" / TINY["chatglm3-32k"], tmp_path / "base")
    file = folder / "pytorch_model.bin"
    weights = torch.load(file)
    step = torch.arange(4) / 4
    weights["transformer.rotary_pos_emb.inv_freq"] = (1 / 5e6**step).half()
    for path in (folder, file):
        path.chmod(0o755)
    if as_safetensors:
        file.unlink()
        save_file(weights, folder / "model.safetensors")
    else:
        torch.save(weights, file)
    with pytest.raises(UserError, match="rope_ratio 50, the weights were made for about 499"):
        GlmForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("theta", [{"rope_theta": 1e4}, {"rope_parameters": {"rope_theta": 1e4}}])
def test_a_ratio_and_a_base_that_differ_are_refused(theta):
    with pytest.raises(UserError, match="rope_ratio 500 means rope_theta 5e"):
        MappedGlmConfig.from_dict({"model_type": "glm", "rope_ratio": 500, **theta})


@pytest.mark.parametrize(
    "change, word",
    [({"rmsnorm": False}, "rmsnorm is False"), ({"num_layers": 0}, "num_hidden_layers is 0"),
     ({"pre_seq_len": 128}, "P-Tuning v2"), ({"quantization_bit": 3}, "quantization_bit 3"),
     ({"rope_ratio": "x"}, "rope_ratio is 'x'"), ({"multi_query_group_num": 3}, "cannot share")],
)  # fmt: skip
def test_settings_that_no_model_has_are_refused(shared, change, word):
    settings = json.loads((shared / "golden" / TINY["chatglm2"] / "config.json").read_text())
    for read in (MappedGlmConfig.from_dict, GlmSettings.read):
        with pytest.raises(UserError, match=word):
            read(settings | change)


@pytest.mark.parametrize("bits", [8, 4])
def test_published_integers_load_as_they_are(load, shared, tmp_path, bits):
    """A folder as the publisher quantises: rows of int8 or two int4 a byte, a scale for each."""
    folder = shutil.copytree(shared / "golden" / TINY["chatglm2"], tmp_path / "base")
    weights = torch.load(folder / "pytorch_model.bin")
    floats = {}
    for name in [
        name for name in weights if re.search(r"layers.*(key_value|dense\w*)\.weight", name)
    ]:
        weight = weights[name].float()
        scale = weight.abs().amax(1) / (127 if bits == 8 else 7)
        integers = (weight / scale[:, None]).round().to(torch.int8)
        floats[name] = (integers * scale.half()[:, None].float()).half()
        packed = integers if bits == 8 else (integers[:, ::2] << 4) | (integers[:, 1::2] & 15)
        weights[name], weights[f"{name}_scale"] = packed, scale.half()
    for path in folder.iterdir():
        path.chmod(0o644)
    torch.save(weights, folder / "pytorch_model.bin")
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"quantization_bit": bits}))
    model = load_base_model(str(folder), dtype=torch.float32, keep_integers=True)
    as_floats = load_base_model(str(folder), dtype=torch.float32)
    assert type(model.model.layers[0].self_attn.k_proj).__name__ == "IntegerLinear"
    plain = load("chatglm2")
    plain.load_state_dict(
        to_glm({n: w.float() for n, w in floats.items()}, plain.config), strict=False
    )
    ids = torch.arange(5, 30)[None]
    with torch.inference_mode():
        wanted = plain(ids).logits
        assert (model(ids).logits - wanted).abs().max() < 2e-3
        assert (as_floats(ids).logits - wanted).abs().max() < 2e-3
        assert (load("chatglm2")(ids).logits - wanted).abs().max() > 1e-2


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"model_type": "glm4_moe"}, "is GLM-4.5, 4.6 or 4.7, a mixture of experts"),
        ({"model_type": "glm4_moe_lite"}, "is GLM-4.7-Flash, a mixture of experts"),
        ({"model_type": "glm_moe_dsa"}, "is GLM-5, a mixture of experts"),
        ({"model_type": "glm4v"}, "is GLM-4.1V, which sees pictures"),
        ({"model_type": "chatglm", "padded_vocab_size": 151_552, "vision_config": {}},
         "is GLM-4V-9B, which sees pictures"),
        ({"model_type": "glm", "block_position_encoding": True}, "is an older GLM"),
        ({"model_type": "qwen3"}, "is of model_type 'qwen3', no model that is known here"),
        ({}, "is of model_type 'None'"),
    ],
)  # fmt: skip
def test_another_model_is_named_for_what_it_is(tmp_path, settings, words, capsys):
    (tmp_path / "config.json").write_text(json.dumps(settings))
    for verb in ("plan", "chat", "tokenize --jsonl_path a --save_path b"):
        assert main([*verb.split(), "--base", str(tmp_path)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert words in line
        assert "pass ChatGLM-6B, ChatGLM3-6B, ChatGLM2-6B, GLM-4-0414, GLM-4-9B or GLM-Edge" in line
