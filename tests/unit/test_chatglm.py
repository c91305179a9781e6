"""The native model in transformers, PEFT and Accelerate, and its own invariants."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, StaticCache

import glmtune.models  # noqa: F401
from glmtune.errors import UserError
from glmtune.models.chatglm.configuration import ChatGLMConfig
from glmtune.models.chatglm.layout import read_layout
from glmtune.models.chatglm.modeling import (
    ChatGLMForConditionalGeneration,
    ChatGLMMLP,
    ChatGLMModel,
)
from glmtune.ops.rotary import rotary_angles, rotate, rotate_whole, whole_angles

PAD, MASK, GMASK, SOP, EOP = 3, 1000, 1001, 1004, 1005


@pytest.fixture
def config():
    return ChatGLMConfig(
        vocab_size=1024,
        hidden_size=32,
        num_layers=2,
        num_attention_heads=2,
        inner_hidden_size=64,
        max_sequence_length=128,
        bos_token_id=SOP,
        eos_token_id=EOP,
    )


@pytest.fixture
def model(config):
    torch.manual_seed(0)
    return ChatGLMForConditionalGeneration(config).eval()


def row(num_prompt, num_answer, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(10, 900, (num_prompt + num_answer,), generator=generator).tolist()
    return [*ids[:num_prompt], GMASK, SOP, *ids[num_prompt:], EOP]


def pad(rows, side):
    longest = max(map(len, rows))
    fill = [[PAD] * (longest - len(r)) for r in rows]
    pairs = zip(fill, rows, strict=True)
    return torch.tensor([f + r if side == "left" else r + f for f, r in pairs])


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding_changes_no_real_token(model, side):
    rows = [row(3, 9), row(12, 1, seed=1), row(1, 4, seed=2)]
    batch = pad(rows, side)
    logits = model(batch).logits
    for i, ids in enumerate(rows):
        alone = model(torch.tensor([ids])).logits[0]
        together = logits[i, -len(ids) :] if side == "left" else logits[i, : len(ids)]
        torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
    given = model(batch, attention_mask=(batch != PAD).long()).logits
    torch.testing.assert_close(given, logits)


def test_layout_of_a_row(config):
    ids = torch.tensor([[PAD, 7, 8, GMASK, SOP, 9, EOP]])
    layout = read_layout(ids, config)
    assert layout.prefix_end_B.tolist() == [4]
    assert layout.position_ids_B2S[0, 0, 1:].tolist() == [0, 1, 2, 2, 2, 2]
    assert layout.position_ids_B2S[0, 1, 1:].tolist() == [0, 0, 0, 1, 2, 3]


def test_layout_prefers_gmask_to_mask(config):
    layout = read_layout(
        torch.tensor([[7, MASK, 8, GMASK, SOP, 9], [7, MASK, 8, 9, SOP, 9]]), config
    )
    assert layout.position_ids_B2S[:, 0, 4].tolist() == [3, 1]


@pytest.mark.parametrize(
    "ids, what", [([7, GMASK, 8], "row 1 has no <sop>"), ([7, 8, SOP], r"row 1 has no \[gMASK\]")]
)
def test_a_row_without_its_specials_is_named(model, ids, what):
    with pytest.raises(ValueError, match=what):
        model(torch.tensor([[7, GMASK, SOP], ids]))


def test_a_cache_cannot_be_continued_blindly(model):
    ids = torch.tensor([row(3, 2)])
    cache = model(ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="position_ids"):
        model(ids[:, -1:], past_key_values=cache)


@torch.no_grad()
def test_a_cached_step_equals_the_whole_row(model):
    ids = torch.tensor([row(4, 6), row(4, 6, seed=1)])
    whole = model(ids).logits
    for cache in (None, StaticCache(config=model.config, max_cache_len=32)):
        step = model.prepare_inputs_for_generation(
            ids[:, :7], past_key_values=cache, use_cache=True
        )
        cache = model(**step).past_key_values
        step = model.prepare_inputs_for_generation(
            ids[:, :8], next_sequence_length=1, past_key_values=cache, use_cache=True
        )
        torch.testing.assert_close(model(**step).logits[:, 0], whole[:, 7], atol=1e-5, rtol=0)


def test_generate_in_beams_and_samples(model):
    prompts = pad([row(5, 0)[:-1], row(2, 0)[:-1]], "left")
    beams = model.generate(prompts, max_new_tokens=6, num_beams=3, do_sample=False)
    samples = model.generate(prompts, max_new_tokens=6, do_sample=True, num_return_sequences=2)
    assert beams.shape[0] == 2
    assert samples.shape[0] == 4


def test_generation_stops_at_the_models_own_end(model):
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.transformer.final_layernorm.bias.fill_(1.0)
        model.lm_head.weight[EOP] = 1.0
    out = model.generate(torch.tensor([row(4, 0)[:-1]]), max_new_tokens=9, do_sample=False)
    assert out[0, -1] == EOP
    assert out.shape[1] == 7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rotary_angles_are_right_in_every_dtype(dtype):
    position = torch.tensor([0, 1, 255, 256, 2047, 2049, 4095])
    ids = torch.stack((position, position.flip(0)))[None]
    cos, sin = rotary_angles(ids, 128)
    exponent = torch.arange(0, 64, 2, dtype=torch.float64) / 64
    frequency = (1 / 10000**exponent).half().double()
    exact = ids.transpose(1, 2)[..., None].double() * frequency
    assert (cos - exact.cos()).abs().max() < 5e-4
    x = torch.randn(1, 2, 7, 128, generator=torch.Generator().manual_seed(0)).to(dtype)
    reference = rotate(x.double(), exact.cos(), exact.sin())
    error = (rotate(x, cos, sin).double() - reference).abs().max()
    most = {torch.float32: 2e-3, torch.bfloat16: 5e-2, torch.float16: 8e-3}[dtype]
    assert error < most
    whole = (angle[:, None].to(dtype) for angle in whole_angles(cos, sin))
    assert (rotate_whole(x, *whole).double() - reference).abs().max() < most


def test_to_rotate_in_few_kernels_is_to_rotate():
    x, position = torch.randn(2, 3, 5, 16, dtype=torch.double), torch.randint(0, 2048, (2, 2, 5))
    cos, sin = (angle.double() for angle in rotary_angles(position, 16))
    whole = (angle[:, None] for angle in whole_angles(cos, sin))
    assert torch.allclose(rotate_whole(x, *whole), rotate(x, cos, sin), rtol=0, atol=1e-12)


@torch.no_grad()
def test_the_gelu_is_the_tanh_form(config):
    """The two forms differ by up to 5e-4, which random weights are too small to show in logits."""
    mlp = ChatGLMMLP(config)
    mlp.dense_h_to_4h.weight.copy_(torch.eye(64, 32))
    mlp.dense_4h_to_h.weight.copy_(torch.eye(32, 64))
    mlp.dense_h_to_4h.bias.zero_()
    mlp.dense_4h_to_h.bias.zero_()
    x = torch.linspace(-4, 4, 32)
    inner = (2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)
    torch.testing.assert_close(mlp(x), 0.5 * x * (1 + inner.tanh()), atol=1e-6, rtol=0)


def test_loss_is_float32_and_weighted_by_the_caller(model):
    ids = torch.tensor([row(4, 5)])
    labels = ids.masked_fill(torch.arange(ids.shape[1]) < 5, -100)
    count = int((labels[:, 1:] != -100).sum())
    mean = model.bfloat16()(ids, labels=labels).loss
    summed = model(ids, labels=labels, num_items_in_batch=1).loss
    assert mean.dtype == torch.float32
    torch.testing.assert_close(summed, mean * count)


def test_auto_classes_run_no_remote_code(tiny_folder):
    # The folder's auto_map names files that do not exist.
    assert "auto_map" in json.loads((tiny_folder / "config.json").read_text())
    assert type(AutoConfig.from_pretrained(tiny_folder)) is ChatGLMConfig
    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    assert type(model) is ChatGLMForConditionalGeneration
    assert type(AutoModel.from_pretrained(tiny_folder)) is ChatGLMModel


def test_float32_on_a_cpu_unless_asked_otherwise(tiny_folder):
    assert AutoModelForCausalLM.from_pretrained(tiny_folder).dtype == torch.float32
    assert AutoModelForCausalLM.from_pretrained(tiny_folder, dtype="auto").dtype == torch.float16


@pytest.mark.parametrize("tied", [True, False])
def test_save_and_load(model, tmp_path, tied):
    if not tied:
        model.config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() * 2)
    ids = torch.tensor([row(4, 5)])
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert (loaded.lm_head.weight is loaded.transformer.word_embeddings.weight) == tied
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits)


def test_a_published_separate_head_stays_separate(tiny_folder, tmp_path):
    """config.json does not mention the tie; the files hold two different tensors."""
    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    assert not model.config.tie_word_embeddings
    model.save_pretrained(tmp_path)
    head = AutoModelForCausalLM.from_pretrained(tmp_path).lm_head.weight
    assert torch.equal(head, model.lm_head.weight)


def write_sharded_bin(model, folder):
    """The published layout: float16 .bin shards, an index, both names of a tied head, buffers."""
    model.config.save_pretrained(folder)
    tensors = {name: t.half().clone() for name, t in model.state_dict().items()}
    tensors["transformer.layers.0.attention.rotary_emb.inv_freq"] = torch.ones(4).half()
    names = sorted(tensors)
    weight_map = {}
    for i, part in enumerate((names[: len(names) // 2], names[len(names) // 2 :]), start=1):
        shard = f"pytorch_model-0000{i}-of-00002.bin"
        torch.save({name: tensors[name] for name in part}, folder / shard)
        weight_map |= dict.fromkeys(part, shard)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return weight_map


def test_sharded_float16_bin(model, tmp_path):
    write_sharded_bin(model, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids = torch.tensor([row(4, 5)])
    assert loaded.lm_head.weight is loaded.transformer.word_embeddings.weight
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, atol=1e-2, rtol=0)


def change_weights(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda t: t.pop("transformer.layers.1.mlp.dense_4h_to_h.bias"),
            r"missing transformer\.layers\.1\.mlp\.dense_4h_to_h\.bias",
        ),
        (
            lambda t: t.update(stray=torch.ones(1)),
            "extra stray",
        ),
        (
            lambda t: t.update({"transformer.final_layernorm.bias": torch.ones(3)}),
            r"misshapen transformer\.final_layernorm\.bias \(3,\) instead of \(32,\)",
        ),
    ],
)
def test_weights_that_do_not_fit_are_named(model, tmp_path, change, message):
    model.save_pretrained(tmp_path)
    change_weights(tmp_path, change)
    with pytest.raises(UserError, match=message) as caught:
        AutoModelForCausalLM.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)


def test_folders_that_hold_no_usable_weights(model, tmp_path):
    model.config.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="holds no weights"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(UserError, match="Git-LFS pointer"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"PK\x03\x04 cut short")
    with pytest.raises(UserError, match="is damaged"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_pickle_with_code_in_it_is_not_run(model, tmp_path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    model.config.save_pretrained(tmp_path)
    torch.save({"weight": Bomb()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"has code in it \(io\.open\)"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_a_missing_shard_and_an_index_that_points_elsewhere(model, tmp_path):
    weight_map = write_sharded_bin(model, tmp_path)
    (tmp_path / "pytorch_model-00002-of-00002.bin").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"00002\.bin: a shard that the index names is missing"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    stolen = dict.fromkeys(weight_map, "../secret.bin")
    index = json.dumps({"weight_map": stolen})
    (tmp_path / "pytorch_model.bin.index.json").write_text(index)
    with pytest.raises(UserError, match=r"no \.bin file inside the folder"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"padded_vocab_size": 65024, "vision_config": {}}, "is GLM-4V-9B"),
        ({"quantization_bit": 3}, r"quantization_bit 3 is not known, only the 8 and 4"),
        ({"quantization_bit": "int8"}, "quantization_bit 'int8' is not known"),
        ({"quantization_bit": True}, "quantization_bit True is not known"),
        (
            {"quantization_config": {"quant_method": "gptq", "bits": 4}},
            r"\(gptq\) is not a supported",
        ),
        ({"quantization_config": {"w_bit": 4}}, r"\(without quant_method\) is not a supported"),
        ({"position_encoding_2d": False}, "GLM-10B"),
    ],
)
def test_relatives_are_refused_by_name(tiny_folder, tmp_path, change, message):
    settings = json.loads((tiny_folder / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=message) as caught:
        AutoConfig.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)


def test_config_and_weights_of_different_revisions(config, tmp_path):
    config.vocab_size, config.hidden_size, config.inner_hidden_size = 150528, 8, 8
    ChatGLMForConditionalGeneration(config).half().save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text()) | {"vocab_size": 130528}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match="different revisions"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("reentrant", [False, True])
def test_lora_with_gradient_checkpointing(model, reentrant):
    settings = LoraConfig(r=4, target_modules=["query_key_value"], task_type="CAUSAL_LM")
    tuned = get_peft_model(model, settings).train()
    ids = torch.tensor([row(4, 5)])
    labels = ids.masked_fill(torch.arange(ids.shape[1]) < 5, -100)

    def gradients():
        tuned.zero_grad()
        torch.manual_seed(1)
        tuned(ids, labels=labels).loss.backward()
        return {n: p.grad.clone() for n, p in tuned.named_parameters() if p.requires_grad}

    plain = gradients()
    tuned.gradient_checkpointing_enable({"use_reentrant": reentrant})
    tuned.enable_input_require_grads()
    recomputed = gradients()
    assert len(plain) == 4
    assert any(grad.abs().max() > 0 for grad in plain.values())
    for name, grad in plain.items():
        torch.testing.assert_close(recomputed[name], grad)


@torch.no_grad()
def test_hidden_states_and_attention_weights(model):
    model.set_attn_implementation("eager")
    output = model(torch.tensor([row(4, 5)]), output_hidden_states=True, output_attentions=True)
    assert len(output.hidden_states) == 3
    assert output.attentions[1].shape == (1, 2, 12, 12)
