"""The decoder gives the tokens that transformers' `generate` gives, step by step and at once."""

import functools
import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from toys import recorded_prompts

from glmtune.adapters import attach_lora
from glmtune.errors import UserError
from glmtune.generation import Decoder, EncodedPrompt, GenerationSettings, find_stop_ids
from glmtune.generation import decoder as room
from glmtune.generation.linears import _FEW_ROWS, DenseLinear, Int4, Int8
from glmtune.generation.reference import generate_ids
from glmtune.generation.slots import Slots
from glmtune.generation.streaming import before_stop
from glmtune.generation.weights import can_be_captured, read_weights
from glmtune.models.chatglm.configuration import ChatGLMConfig
from glmtune.models.chatglm.decoding import DECODING
from glmtune.models.chatglm.modeling import ChatGLMForConditionalGeneration
from glmtune.models.loading import load_base_model
from glmtune.ops.words import GROUP_SIZE

GREEDY = GenerationSettings(max_new_tokens=24)
DRAWN = GenerationSettings(max_new_tokens=12, do_sample=True, temperature=0.9, top_p=0.95)
SETTINGS = [
    GREEDY,
    DRAWN,
    GenerationSettings(max_new_tokens=16, repetition_penalty=1.3),
    GenerationSettings(max_new_tokens=16, do_sample=True, top_k=20, repetition_penalty=1.3),
]


@pytest.fixture(scope="module")
def model(tiny_folder):
    return load_base_model(str(tiny_folder), dtype=torch.float32)


@pytest.fixture(scope="module")
def prompts(tiny_folder, model):
    return recorded_prompts(tiny_folder, model.config)


@pytest.fixture
def stops(model, monkeypatch):
    """More stop ids than the model's own, so that answers end at different lengths."""
    stops = [model.config.eos_token_id, 244, *range(300, 390)]
    monkeypatch.setattr(model.generation_config, "eos_token_id", stops)
    return stops


@pytest.fixture
def adapted(tiny_folder):
    """A model with a fresh adapter that changes its answers."""
    torch.manual_seed(0)
    base = load_base_model(str(tiny_folder), dtype=torch.float32)
    model = attach_lora(base, rank=4, alpha=32, targets="query_key_value,dense").eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model


def ended(rows, stops):
    """The ids of `generate`, without the padding after a stop id."""
    return [[*before_stop(row, stops), *row[len(before_stop(row, stops)) :][:1]] for row in rows]


def decode(decoder, prompts, settings=GREEDY):
    rows = [[] for _ in prompts]
    for more in decoder.stream(prompts, settings):
        for row, ids in zip(rows, more, strict=True):
            row += ids
    return rows


def as_captured(decoder, monkeypatch):
    """Take the step over all columns, which a GPU would have captured."""
    monkeypatch.setattr(decoder, "captures", True)
    monkeypatch.setattr(
        Slots, "_capture", lambda slots, *given: functools.partial(slots._step, *given)
    )
    monkeypatch.setattr(Decoder, "tokens_per_look", 8)
    return decoder


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("captured", [False, True])
def test_ids_are_those_of_generate(model, prompts, stops, settings, captured, monkeypatch):
    decoder = Decoder(model, stops)
    if captured:
        as_captured(decoder, monkeypatch)
    for batch in (prompts[:1], prompts, prompts[1:2]):
        expected = generate_ids(model, batch, settings, stops)
        assert decode(decoder, batch, settings) == ended(expected, stops)


@pytest.mark.parametrize("settings", SETTINGS)
def test_ids_of_the_first_revision(shared, settings):
    folder = shared / "golden" / "chatglm-6b-v1.0-tiny"
    model = load_base_model(str(folder), dtype=torch.float32)
    golden = load_file(folder / "forward.safetensors")
    ids = [golden[name][0].tolist() for name in sorted(golden) if name.startswith("input_ids")]
    prompts = [EncodedPrompt(row, number) for number, row in enumerate(ids)]
    assert len({len(row) for row in ids}) > 1
    decoder, stops = Decoder(model, find_stop_ids(model)), find_stop_ids(model)
    for batch in (prompts[:1], prompts):
        expected = ended(generate_ids(model, batch, settings, stops), stops)
        assert decode(decoder, batch, settings) == expected
    if settings is GREEDY:
        recorded = json.loads((folder / "expected.json").read_text())["generate_greedy_16"]
        found = [
            (prompt.ids + row)[: len(prompt.ids) + 16]
            for prompt, row in zip(prompts, decode(decoder, prompts), strict=True)
        ]
        assert found == recorded


def test_steps_do_without_the_module(model, prompts, monkeypatch):
    """The decoder must not run the module's Python code for each token."""
    decoder = Decoder(model, [])
    expected = decode(decoder, prompts)
    monkeypatch.setattr(nn.Module, "__call__", lambda *_, **__: pytest.fail("a module was called"))
    calls = []
    layout = decoder.block.layout
    counted = decoder.block._replace(layout=lambda *a: calls.append(a) or layout(*a))
    monkeypatch.setattr(decoder, "block", counted)
    assert decode(decoder, prompts) == expected
    assert len(calls) == 1


@pytest.mark.parametrize("drawn", [False, True])
def test_buffers_are_kept_and_carry_nothing_over(model, prompts, stops, drawn):
    decoder = Decoder(model, stops)
    long = GenerationSettings(max_new_tokens=40, repetition_penalty=1.2, do_sample=drawn)
    short = long.model_copy(update={"max_new_tokens": 5, "seed": 1})
    decode(decoder, prompts, long)
    buffers = decoder._slots._buffers
    for batch, settings in ((prompts[::-1], short), (prompts, long)):
        assert decode(decoder, batch, settings) == decode(Decoder(model, stops), batch, settings)
        assert decoder._slots._buffers is buffers
    decode(decoder, prompts[:1], short)
    assert decoder._slots._buffers is not buffers


def test_tokens_come_as_they_are_made(model, prompts):
    stream = Decoder(model, []).stream(prompts[:1], GREEDY)
    first = next(stream)
    assert [len(row) for row in first] == [1]
    assert sum(len(row) for (row,) in stream) == 23


def test_a_row_can_be_ended_from_outside(model, prompts):
    decoder = Decoder(model, [])
    stream = decoder.stream(prompts[:2], GREEDY)
    next(stream)
    decoder.finish(0)
    ended, other = next(stream)
    assert ended == []
    assert len(other) == 1
    decoder.finish(1)
    assert list(stream) == []


def test_a_batch_that_was_left_half_way_leaves_nothing(model, prompts):
    decoder = Decoder(model, [])
    expected = decode(decoder, prompts)
    next(decoder.stream(prompts[::-1], GREEDY))
    assert decode(decoder, prompts) == expected


def test_a_decoder_answers_again_after_logits_that_are_not_finite(model, prompts, monkeypatch):
    decoder = Decoder(model, [])
    expected = decode(decoder, prompts)
    weight = model.transformer.layers[0].mlp.dense_4h_to_h.weight.data
    before = weight[0, 0].item()
    weight[0, 0] = torch.nan
    with pytest.raises(UserError, match="not finite"):
        decode(decoder, prompts)
    weight[0, 0] = before
    assert decode(decoder, prompts) == expected


@pytest.mark.parametrize("num_threads", [1, 2])
@torch.inference_mode()
def test_a_plain_linear_is_itself_on_any_number_of_threads(num_threads):
    linear, before = nn.Linear(96, 200), torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        for shape in ((1, 1, 96), (3, 1, 96), (2, 5, 96)):
            x = torch.randn(shape)
            assert torch.allclose(DenseLinear(linear.weight, linear.bias)(x), linear(x), atol=1e-6)
            assert torch.allclose(
                DenseLinear(linear.weight, None)(x), x @ linear.weight.T, atol=1e-6
            )
    finally:
        torch.set_num_threads(before)


# --- adapters ---


def test_an_adapter_is_applied_as_it_stands(adapted, prompts):
    stops = find_stop_ids(adapted)
    tuned = Decoder(adapted, stops)
    with adapted.disable_adapter():
        base = Decoder(adapted, stops)
        of_base = ended(generate_ids(adapted, prompts, GREEDY, stops), stops)
    of_tuned = ended(generate_ids(adapted, prompts, GREEDY, stops), stops)
    assert of_tuned != of_base, "the test needs an adapter that matters"
    assert decode(tuned, prompts) == of_tuned
    assert decode(base, prompts) == of_base


@pytest.mark.parametrize("bits", [None, 8, 4])
def test_an_adapter_on_a_quantised_base(tiny_folder, write_quantised, tmp_path, prompts, bits):
    """Published integers, and bitsandbytes' bits: the base's answers stay without the adapter."""
    if bits:
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
        base = load_base_model(str(tiny_folder), dtype=torch.float32, bits=bits)
    else:
        folder = write_quantised(tiny_folder, tmp_path / "int8", 8)
        base = load_base_model(str(folder), dtype=torch.float32, keep_integers=True)
    stops = find_stop_ids(base)
    of_base = decode(Decoder(base, stops), prompts)
    model = attach_lora(base, rank=4, alpha=32, targets="query_key_value,dense").eval()
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    with model.disable_adapter():
        without = Decoder(model, stops)
    of_tuned = ended(generate_ids(model, prompts, GREEDY, stops), stops)
    assert decode(Decoder(model, stops), prompts) == of_tuned
    assert decode(without, prompts) == of_base != of_tuned


def test_a_merged_adapter_answers_alike_and_leaves_the_base(adapted, prompts):
    before = {name: tensor.clone() for name, tensor in adapted.state_dict().items()}
    merged = Decoder(adapted, [], merge=True)
    assert all(
        isinstance(block.query_key_value, DenseLinear) and isinstance(block.dense, DenseLinear)
        for block in merged.weights.blocks
    )
    assert decode(merged, prompts) == decode(Decoder(adapted, []), prompts)
    after = adapted.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_an_adapter_that_peft_merged_is_not_applied_twice(adapted, prompts):
    expected = decode(Decoder(adapted, []), prompts)
    adapted.merge_adapter()
    assert decode(Decoder(adapted, []), prompts) == expected


def test_linears_and_embedding_of_another_kind_are_called_as_they_are(tiny_folder, prompts):
    """For example those of a quantised base."""

    class Halved(nn.Linear):
        def forward(self, x):
            return super().forward(x) / 2

    class Doubled(nn.Embedding):
        def forward(self, ids):
            return super().forward(ids).double() * 2

    model = load_base_model(str(tiny_folder), dtype=torch.float32)
    model.transformer.layers[1].mlp.dense_h_to_4h.__class__ = Halved
    halved = Decoder(model, [])
    assert not can_be_captured(halved.weights)
    assert decode(halved, prompts) == generate_ids(model, prompts, GREEDY, [])
    model.transformer.word_embeddings.__class__ = Doubled
    hidden = Decoder(model, []).weights.embed(torch.tensor([[5]]))
    assert torch.equal(hidden[0, 0], 2 * model.transformer.word_embeddings.weight[5])
    assert hidden.dtype == torch.float32


def test_another_kind_of_adapter_is_called_as_it_is(tiny_folder, prompts):
    torch.manual_seed(0)
    base = load_base_model(str(tiny_folder), dtype=torch.float32)
    config = LoraConfig(target_modules=["query_key_value"], use_dora=True, init_lora_weights=False)
    model = get_peft_model(base, config).eval()
    decoder = Decoder(model, find_stop_ids(model))
    assert not can_be_captured(decoder.weights)
    expected = generate_ids(model, prompts, GREEDY, decoder.stop_ids)
    assert decode(decoder, prompts) == ended(expected, decoder.stop_ids)
    with pytest.raises(UserError, match=r"8 bits: .* not rounded again"):
        Decoder(model, [], bits=8)


# --- fewer bits ---


@pytest.fixture
def linear():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(48, 2 * GROUP_SIZE, generator=generator)
    return weight * torch.logspace(-3, 0, 48)[:, None], torch.randn(48, generator=generator)


def off(found, wanted):
    return (found - wanted).norm() / wanted.norm()


def as_matrix(projection, num_inputs):
    zero = projection(torch.zeros(1, num_inputs))
    return (projection(torch.eye(num_inputs)) - zero).T, zero[0]


def test_eight_bits_round_each_row_to_its_own_scale(linear):
    weight, bias = linear
    found, offset = as_matrix(Int8.of(weight, bias), weight.shape[1])
    step = weight.abs().amax(1, keepdim=True) / 127
    assert ((found - weight).abs() <= 0.51 * step).all()
    assert torch.allclose(offset, bias)


def test_a_width_that_torch_s_product_does_not_take():
    """It would end the process."""
    weight, x = torch.randn(48, 100), torch.randn(3, 100)
    assert off(Int8.of(weight, None)(x), x @ weight.T) < 0.02


def test_many_rows_go_another_way_to_the_same_product(linear):
    rounded = Int8.of(*linear)
    x = torch.randn(_FEW_ROWS + 1, 2 * GROUP_SIZE)
    many, few = rounded(x), torch.cat([rounded(row[None]) for row in x])
    assert off(many, few) < 0.01
    assert off(few, torch.nn.functional.linear(x, *linear)) < 0.01


def test_four_bits_round_each_group_to_its_own_scale(linear):
    weight, bias = linear
    found, offset = as_matrix(Int4.of(weight, bias), weight.shape[1])
    groups = weight.unflatten(1, (-1, GROUP_SIZE))
    step = (groups.amax(-1) - groups.amin(-1)) / 15
    error = (found - weight).unflatten(1, (-1, GROUP_SIZE)).abs().amax(-1)
    assert (error <= 0.6 * step).all()  # scale and middle are bfloat16, and so is the product
    assert torch.allclose(offset, bias, atol=1e-6)


def test_a_linear_that_four_bits_cannot_pack_is_named():
    with pytest.raises(UserError, match="64 inputs and 32 outputs"):
        Int4.of(torch.zeros(32, 64), None)


@pytest.mark.parametrize("bits, tolerance", [(8, 0.01), (4, 0.15)])
@torch.inference_mode()
def test_fewer_bits_give_nearly_the_same_logits(bits, tolerance):
    torch.manual_seed(0)
    config = ChatGLMConfig(
        hidden_size=128, num_layers=2, num_attention_heads=2, inner_hidden_size=256,
        vocab_size=1024, bos_token_id=1004, eos_token_id=1005, initializer_range=0.1,
    )  # fmt: skip
    model = ChatGLMForConditionalGeneration(config).eval()
    hidden = torch.randn(3, 128)
    exact, rounded = (read_weights(model, DECODING, bits=n).head(hidden) for n in (16, bits))
    assert 0 < (exact - rounded).norm() / exact.norm() < tolerance
    prompt = EncodedPrompt([5, 6, config.gmask_token_id, config.bos_token_id], 0)
    assert len(decode(Decoder(model, [], bits=bits), [prompt])[0]) == 24


def test_compiling_without_a_gpu_is_refused(model):
    with pytest.raises(UserError, match="decode_compile true: needs a GPU"):
        Decoder(model, [], compiled=True)


# --- compiled ---


def test_layers_share_one_compiled_step(model, prompts, monkeypatch):
    """Compiling each of 28 layers separately would take many minutes."""
    compiled = []

    def backend(graph, _):
        compiled.append(graph)
        return graph.forward

    compile = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda function, options: compile(function, backend=backend)
    )
    monkeypatch.setattr(room, "check_decoding", lambda *_: None)
    decoder = Decoder(model, [], compiled=True)
    as_captured(decoder, monkeypatch)
    assert decode(decoder, prompts) == decode(Decoder(model, []), prompts)
    assert len(compiled) == 2, "one graph for the layers, one for the head"


def test_base_and_tuned_weights_share_what_is_rounded(adapted, prompts):
    """They answer like decoders that share nothing."""
    tuned = Decoder(adapted, [], bits=8)
    with adapted.disable_adapter():
        base, alone = Decoder(adapted, [], bits=8, beside=tuned), Decoder(adapted, [], bits=8)
    shared, changed = base.weights.blocks[0].query_key_value, tuned.weights.blocks[0]
    assert changed.query_key_value.base is shared
    assert changed.dense_h_to_4h is base.weights.blocks[0].dense_h_to_4h
    assert base.weights.head is tuned.weights.head is not alone.weights.head
    assert decode(base, prompts) == decode(alone, prompts) != decode(tuned, prompts)
