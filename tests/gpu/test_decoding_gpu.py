"""The captured step on a CUDA device; run by name: pytest -m gpu tests/gpu."""

import pytest
import torch
from toys import recorded_prompts

from glmtune.errors import UserError
from glmtune.generation import Decoder, EncodedPrompt, GenerationSettings
from glmtune.generation.linears import Adapted, DenseLinear, GroupQuantised
from glmtune.generation.reference import generate_ids
from glmtune.generation.slots import Slots
from glmtune.generation.streaming import before_stop
from glmtune.models.chatglm.configuration import ChatGLMConfig
from glmtune.models.chatglm.modeling import ChatGLMForConditionalGeneration
from glmtune.models.decoding import Place, attend, put
from glmtune.models.loading import load_base_model
from glmtune.ops.lora import LowRank
from glmtune.ops.norm import Norm, RmsNorm
from glmtune.ops.rotary import rotate

if torch.cuda.is_available():
    from glmtune.ops import decoding_attention
    from glmtune.ops import decoding_kernels as kernels
    from glmtune.ops.decoding_norms import normalise

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]
GREEDY = GenerationSettings(max_new_tokens=24)
SETTINGS = [
    GREEDY,
    GenerationSettings(max_new_tokens=24, repetition_penalty=1.3),
    GenerationSettings(max_new_tokens=24, do_sample=True, temperature=0.9, top_p=0.9),
    GenerationSettings(max_new_tokens=24, do_sample=True, top_k=20, repetition_penalty=1.3),
]


@pytest.fixture(scope="module")
def model(tiny_folder):
    return load_base_model(str(tiny_folder), dtype=torch.float32, device="cuda")


@pytest.fixture(scope="module")
def prompts(tiny_folder, model):
    return recorded_prompts(tiny_folder, model.config)


@pytest.fixture(scope="module")
def wide():
    """Wide enough for every kind of weights, in bfloat16."""
    torch.manual_seed(0)
    config = ChatGLMConfig(
        hidden_size=512, num_layers=3, num_attention_heads=4, inner_hidden_size=2048,
        vocab_size=2048, bos_token_id=2030, eos_token_id=2031, initializer_range=0.05,
    )  # fmt: skip
    with torch.device("cuda"):
        return ChatGLMForConditionalGeneration._from_config(config, dtype=torch.bfloat16).eval()


def decode(decoder, prompts, settings=GREEDY):
    rows = [[] for _ in prompts]
    for more in decoder.stream(prompts, settings):
        for row, ids in zip(rows, more, strict=True):
            row += ids
    return rows


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("compiled", [False, True])
def test_ids_are_those_of_generate(model, prompts, settings, compiled):
    stops = [model.config.eos_token_id, 244, *range(300, 390)]
    decoder = Decoder(model, stops, compiled=compiled)
    for batch in (prompts[:1], prompts, prompts[::-1]):
        expected = generate_ids(model, batch, settings, stops)
        found = decode(decoder, batch, settings)
        assert decoder._slots._replays, "the step must be captured"
        for row, whole in zip(found, expected, strict=True):
            assert row == whole[: len(before_stop(whole, stops)) + 1]


def test_a_captured_step_waits_for_nothing(model, prompts):
    for settings in SETTINGS:
        decoder = Decoder(model, [model.config.eos_token_id])
        decode(decoder, prompts, settings)
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(4):
                for replay in decoder._slots._replays.values():
                    replay()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_one_capture_serves_batches_of_one_size(model, prompts, monkeypatch):
    captures = []
    capture = Slots._capture
    monkeypatch.setattr(Slots, "_capture", lambda *given: captures.append(1) or capture(*given))
    decoder = Decoder(model, [])
    for batch in (prompts[:2], prompts[1:3], prompts[:2]):
        decode(decoder, batch)
    assert len(captures) == 1


@pytest.mark.parametrize("settings", SETTINGS)
def test_logits_that_are_not_finite_are_told(tiny_folder, prompts, settings):
    broken = load_base_model(str(tiny_folder), dtype=torch.float32, device="cuda")
    broken.transformer.final_layernorm.weight.data[3] = torch.nan
    with pytest.raises(UserError, match="not finite"):
        decode(Decoder(broken, []), prompts, settings)
    torch.cuda.synchronize()  # the device is still there


@pytest.mark.parametrize("bits, tolerance", [(8, 0.02), (4, 0.2)])
@torch.inference_mode()
def test_fewer_bits_give_nearly_the_same_product(bits, tolerance):
    torch.manual_seed(0)
    weight, bias, x = draw(1024, 512), draw(1024), draw(5, 1, 512)
    exact = torch.nn.functional.linear(x, weight, bias).float()
    rounded = GroupQuantised.of(weight, bias, bits)(x).float()
    assert 0 < (exact - rounded).norm() / exact.norm() < tolerance


def draw(*shape, dtype=torch.bfloat16):
    return torch.randn(shape, device="cuda", dtype=dtype)


@pytest.mark.parametrize("num_rows", [1, 3, 20])
@pytest.mark.parametrize("shape", [(48, 512), (8208, 1024), (4096, 16384)])
@pytest.mark.parametrize("bits", [16, 8, 4])
@torch.inference_mode()
def test_a_product_in_one_kernel_is_what_its_parts_are(bits, shape, num_rows):
    """With bias, adapter, GELU and residual, and without; in float32, whose rounding is known."""
    torch.manual_seed(0)
    (num_outputs, num_inputs), kind = shape, torch.float32
    weight, bias = 0.02 * draw(*shape, dtype=kind), draw(num_outputs, dtype=kind)
    linear = DenseLinear(weight, bias) if bits == 16 else GroupQuantised.of(weight, bias, bits)
    if bits < 16:
        plain = linear.weight.unpack(kind)
        assert torch.allclose(kernels.unpack(linear.weight, kind), plain, rtol=1e-6, atol=1e-7)
        weight = plain
    x = draw(num_rows, 1, num_inputs, dtype=kind)
    product = torch.nn.functional.linear(x.double(), weight.double(), bias.double())
    assert torch.allclose(linear.fused(x).double(), product, atol=1e-4)
    low, up = draw(num_rows, 6, dtype=kind), draw(num_outputs, 6, dtype=kind)
    residual = draw(num_rows, 1, num_outputs, dtype=kind)
    expected = torch.nn.functional.gelu(product + 0.5 * (low @ up.T)[:, None], approximate="tanh")
    found = linear.fused(x, update=(low, up, 0.5), gelu=True, residual=residual, alpha=7.5)
    assert torch.allclose(found.double(), expected + 7.5 * residual, atol=1e-4)


def linear_and_weight(num_outputs, num_inputs, bits, rank=0, bias=True):
    """A linear with kernels, and the weight and bias in float64 of what it computes."""
    weight = 0.02 * draw(num_outputs, num_inputs, dtype=torch.float32)
    bias = draw(num_outputs, dtype=torch.float32) if bias else None
    linear = DenseLinear(weight, bias) if bits == 16 else GroupQuantised.of(weight, bias, bits)
    whole = weight.double() if bits == 16 else linear.weight.unpack(torch.float32).double()
    if rank:
        shape = (rank, num_inputs), (num_outputs, rank)
        a, b = (0.1 * draw(*size, dtype=torch.float32) for size in shape)
        linear, whole = (
            Adapted(linear, (LowRank(a, b, 0.5),)),
            whole + 0.5 * b.double() @ a.double(),
        )
    return linear, whole, None if bias is None else bias.double()


@pytest.mark.parametrize("num_rows", [1, 3, 20])
@pytest.mark.parametrize("num_outputs", [48, 80, 8208])
@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("rank", [0, 6])
@torch.inference_mode()
def test_a_gated_product(bits, num_outputs, num_rows, rank):
    torch.manual_seed(0)
    linear, weight, _ = linear_and_weight(num_outputs, 512, bits, rank, bias=False)
    x = draw(num_rows, 1, 512, dtype=torch.float32)
    gate, up = torch.nn.functional.linear(x.double(), weight).chunk(2, -1)
    found = linear.fused(x, gated=True)
    assert torch.allclose(found.double(), torch.nn.functional.silu(gate) * up, atol=1e-4)


@pytest.mark.parametrize("num_rows", [1, 3, 20])
@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("ranks", [(0, 0, 0), (6, 0, 3)])
@torch.inference_mode()
def test_three_products_in_one_kernel(bits, num_rows, ranks):
    torch.manual_seed(0)
    sizes = 8192, 48, 80
    parts = [
        linear_and_weight(size, 512, bits, rank) for size, rank in zip(sizes, ranks, strict=True)
    ]
    x = draw(num_rows, 1, 512, dtype=torch.float32)
    found = kernels.project_three(x, [linear.factor(x) for linear, _, _ in parts])
    expected = [torch.nn.functional.linear(x.double(), w, bias) for _, w, bias in parts]
    assert torch.allclose(found.double(), torch.cat(expected, -1), atol=1e-4)


@torch.inference_mode()
def test_norms_in_one_kernel():
    torch.manual_seed(0)
    x, residual = 3 * draw(3, 1, 500), draw(3, 1, 500)
    weight, bias = draw(500, dtype=torch.float32), draw(500, dtype=torch.float32)
    for norm in (RmsNorm(weight, 1e-5), Norm(weight, bias, 1e-5)):
        expected = norm(x.float())
        assert torch.allclose(normalise(x, norm, torch.float32), expected, atol=1e-5)
        found = normalise(x, norm, torch.float32, residual)
        assert torch.allclose(found, expected + residual, atol=1e-5)


@pytest.mark.parametrize("columns", [(0,), (70, 3), (600, 65), (31, 703), (200,) * 40])
@pytest.mark.parametrize("heads, kv_heads", [(3, 3), (6, 2), (4, 1), (32, 2)])
@pytest.mark.parametrize("interleaved", [False, True])
@torch.inference_mode()
def test_attention_in_one_kernel_is_what_its_parts_are(columns, heads, kv_heads, interleaved):
    """Each row with a column of its own, and heads of queries that share those of keys."""
    torch.manual_seed(0)
    rows, size, num_columns, kind = len(columns), 64, 704, torch.float32
    query, key, value = draw(rows, heads + 2 * kv_heads, 1, size, dtype=kind).split(
        (heads, kv_heads, kv_heads), dim=1
    )
    cache = [draw(rows, kv_heads, num_columns, size, dtype=kind) for _ in range(2)]
    cos, sin = (draw(rows, 1, 2, size // 4, dtype=kind) for _ in range(2))
    place = Place(*torch.tensor([range(rows), columns], device="cuda"))
    filled = [tensor.clone() for tensor in cache]
    put(filled[0], place, rotate(key, cos, sin, interleaved))
    put(filled[1], place, value)
    seen = torch.arange(num_columns, device="cuda") <= place.column_B[:, None]
    expected = attend(rotate(query, cos, sin, interleaved), *filled, seen[:, None, None])
    for _ in range(3):  # what is counted must be set back
        found = decoding_attention.attend(
            query[:, :, 0], key[:, :, 0], value[:, :, 0], *cache, place.column_B, cos, sin,
            interleaved,
        )  # fmt: skip
        assert torch.allclose(found, expected, atol=1e-5)
    assert all(torch.allclose(*pair, atol=1e-6) for pair in zip(cache, filled, strict=True))


def test_rows_that_join_a_captured_batch_answer_as_alone(model, prompts):
    """Also when the first sampling row joins, or a longer row for which the buffers grow."""
    stops = [model.config.eos_token_id]
    each = [
        GREEDY,
        GenerationSettings(max_new_tokens=40, do_sample=True, top_p=0.9),
        GenerationSettings(max_new_tokens=140),
    ]
    asked = list(zip(prompts, each, strict=False))
    alone = [decode(Decoder(model, stops), [prompt], settings)[0] for prompt, settings in asked]
    slots, found = Slots(Decoder(model, stops), 3), [[], [], []]
    joins = {0: 0, 2: 1, 5: 2}
    for turn in range(200):
        if turn in joins:
            prompt, settings = asked[joins[turn]]
            slots.admit(joins[turn], [prompt], [settings])
        for row, ids in zip(found, slots.look(), strict=True):
            row += ids
        if turn > max(joins) and not slots.num_live:
            break
        slots.step(3)
    assert found == alone


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("num_rows", [1, 3, 5])
def test_every_kind_of_weights_is_captured(wide, bits, compiled, num_rows):
    config = wide.config
    specials = [config.gmask_token_id, config.bos_token_id]
    prompts = [EncodedPrompt([5 + n, 6, 7, *specials], n) for n in range(num_rows)]
    decoder = Decoder(wide, [], bits=bits, compiled=compiled)
    rows = decode(decoder, prompts)
    assert decoder._slots._replays
    assert [len(row) for row in rows] == [24] * num_rows
    assert all(0 <= i < config.vocab_size for row in rows for i in row)


def test_a_model_in_cpu_memory_answers_on_the_gpu_in_its_rounded_size(wide):
    """The same answer as with the model on the GPU, where no full weights are stored."""
    config = wide.config
    prompts = [EncodedPrompt([5, 6, 7, config.gmask_token_id, config.bos_token_id], 0)]
    expected = decode(Decoder(wide, [], bits=4), prompts)
    waiting = ChatGLMForConditionalGeneration._from_config(config, dtype=torch.bfloat16).eval()
    waiting.load_state_dict(wide.state_dict())
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    decoder = Decoder(waiting, [], bits=4, device=torch.device("cuda"))
    embedding = waiting.get_input_embeddings().weight.nbytes
    held = torch.cuda.memory_allocated() - before - embedding
    assert held < 0.3 * (sum(p.nbytes for p in waiting.parameters()) - embedding)
    assert decode(decoder, prompts) == expected
