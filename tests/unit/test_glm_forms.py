"""The younger family in other forms: 8 and 4 bits, and positions scaled for longer rows."""

import json

import numpy as np
import pytest
import torch
import transformers
from glm_folders import SIZES, as_published

from glmtune.adapters.lora import attach_lora
from glmtune.data.packing import lay_out
from glmtune.data.token_rows import TokenRows
from glmtune.generation import Decoder, EncodedPrompt, GenerationSettings
from glmtune.models.families import FAMILIES, family_of
from glmtune.models.loading import load_base_model
from glmtune.models.packed import PackedModel
from glmtune.models.precision import dequantise

IDS = torch.arange(20, 84)[None]


def family(name):
    return next(family for family in FAMILIES if family.name == name)


def make(name, **changes):
    """A tiny model with a small vocabulary."""
    entry = family(name)
    native = entry.native()
    sizes = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
    ends = {"eos_token_id": [400, 407, 409], "pad_token_id": 400}
    settings = dict(entry.published_settings) | SIZES | sizes | ends
    torch.manual_seed(0)
    return native.model_class(native.config_class.from_dict(settings | changes)).eval()


def answer(model):
    """Six greedy ids behind the prompt."""
    stream = Decoder(model, [511]).stream(
        [EncodedPrompt(IDS[0].tolist(), 0)], GenerationSettings(max_new_tokens=6)
    )
    return [id_ for (new,) in stream for id_ in new]


def logits_of(model):
    with torch.inference_mode():
        return model(IDS).logits.float()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One model in transformers' layout and in the publisher's, both float16."""
    place = tmp_path_factory.mktemp("forms")
    model = make("GLM-4-9B").half()
    for name, bias in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(bias, std=0.1)
    model.save_pretrained(place / "hf")
    (place / "published").mkdir()
    torch.save(as_published(model), place / "published" / "pytorch_model.bin")
    sizes = model.config
    settings = {
        "model_type": "chatglm", "_name_or_path": "THUDM/glm-4-9b", "padded_vocab_size": 512,
        "hidden_size": sizes.hidden_size, "ffn_hidden_size": sizes.intermediate_size,
        "num_layers": sizes.num_hidden_layers, "num_attention_heads": sizes.num_attention_heads,
        "multi_query_attention": True, "multi_query_group_num": sizes.num_key_value_heads,
        "kv_channels": sizes.head_dim, "seq_length": 512, "add_qkv_bias": True,
        "layernorm_epsilon": sizes.rms_norm_eps, "eos_token_id": sizes.eos_token_id,
        "pad_token_id": 400,
    }  # fmt: skip
    (place / "published" / "config.json").write_text(json.dumps(settings))
    return place


@pytest.mark.parametrize("bits", [8, 4])
def test_both_layouts_are_quantised_to_the_same(folders, bits):
    models = [
        load_base_model(str(folders / layout), bits=bits, dtype=torch.float32)
        for layout in ("hf", "published")
    ]
    kinds = {type(layer.mlp.down_proj).__name__ for m in models for layer in m.model.layers}
    assert kinds == {"Linear8bitLt" if bits == 8 else "Linear4bit"}
    ours, theirs = map(logits_of, models)
    assert theirs.equal(ours)
    answers = [*map(answer, models)]
    assert answers[0] == answers[1]
    assert len(answers[0]) == 6
    plain = load_base_model(str(folders / "hf"), dtype=torch.float32).state_dict()
    for name, weight in dequantise(models[1]).state_dict().items():
        off = (weight - plain[name]).norm() / plain[name].norm()
        is_rounded = "layers" in name and weight.dim() == 2
        assert (1e-3 if is_rounded else 0) <= off < (0.02 if bits == 8 else 0.15), name


@pytest.mark.parametrize("name", ["GLM-4-9B", "GLM-4-0414", "GLM-Edge"])
@pytest.mark.parametrize("bits", [8, 4])
def test_a_folder_that_bitsandbytes_saved_loads_as_it_is(name, bits, tmp_path):
    make(name).half().save_pretrained(tmp_path / "float")
    quantised = load_base_model(str(tmp_path / "float"), bits=bits, dtype=torch.float32)
    expected = logits_of(quantised)
    quantised.save_pretrained(tmp_path / "saved")
    again = load_base_model(str(tmp_path / "saved"), dtype=torch.float32)
    assert (logits_of(again) - expected).abs().max() < 1e-4
    kind = type(again.model.layers[0].mlp.gate_up_proj).__name__
    assert kind == ("Linear8bitLt" if bits == 8 else "Linear4bit")


ROPES = {
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    "yarn, its own factor": {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32,
        "attention_factor": 0.8, "beta_fast": 8.0,
    },
    "linear": {"rope_type": "linear", "factor": 3.0},
    "llama3": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", ["GLM-4-0414", "GLM-Edge"])
@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("kind", ROPES)
def test_scaled_positions_are_those_of_transformers(name, key, kind, tmp_path):
    """As the page of GLM-4-0414 advises for rows beyond 32,768 tokens: an edited config.json."""
    model = make(name)
    model.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    rope = settings.pop("rope_parameters") | ROPES[kind]
    settings["partial_rotary_factor"] = rope["partial_rotary_factor"]
    (tmp_path / "config.json").write_text(json.dumps(settings | {key: rope}))
    ours = load_base_model(str(tmp_path), dtype=torch.float32)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert type(theirs).__module__.startswith("transformers.models")
    expected = logits_of(theirs)
    assert logits_of(ours).equal(expected)
    assert (expected - logits_of(model)).abs().max() > 0.05

    config, native = ours.config, family_of(ours.config).native()
    made = theirs.generate(IDS, max_new_tokens=6, do_sample=False, eos_token_id=511)
    assert answer(ours) == made[0, IDS.shape[1] :].tolist()

    rows = TokenRows(
        ids_T=IDS[0].numpy(), starts_R1=np.array([0, 24, 64]),
        prompt_lengths_R=np.array([7, 9]), rule=family_of(config).row_rule(config),
    )  # fmt: skip
    adapted = attach_lora(ours, dropout=0.0)  # without effect so far
    packed = PackedModel(adapted, native.packed, compiled=False)
    loss = packed.loss(packed.to_tensors(lay_out(rows, np.array([0, 1]), 64)))
    total = 0.0
    for start, end, prompt in ((0, 24, 7), (24, 64, 9)):
        ids = IDS[:, start:end]
        labels = ids.clone()
        labels[:, :prompt] = -100
        total += theirs(input_ids=ids, labels=labels).loss.item() * (end - start - prompt)
    assert loss.item() == pytest.approx(total, rel=1e-5)
