"""The captured step on a CUDA device; run by name: pytest -m gpu tests/gpu."""

import json

import pytest
import torch

from glmtune.errors import UserError
from glmtune.generation import Decoder, EncodedPrompt, GenerationSettings
from glmtune.generation import decoder as room
from glmtune.generation.reference import generate_ids
from glmtune.generation.weights import Int4, Int8
from glmtune.models.chatglm.configuration import ChatGLMConfig
from glmtune.models.chatglm.modeling import ChatGLMForConditionalGeneration
from glmtune.models.checkpoints import load_base_model

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
    rows = json.loads((tiny_folder / "expected.json").read_text())["generate_greedy_24"]
    ids = [row[: row.index(model.config.bos_token_id) + 1] for row in rows]
    return [EncodedPrompt(row, number) for number, row in enumerate(ids)]


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
        assert decoder._buffers.replay is not None, "the step must be captured"
        assert [row[: len(expected[0])] for row in found] == expected


def test_a_captured_step_waits_for_nothing(model, prompts):
    for settings in SETTINGS:
        decoder = Decoder(model, [model.config.eos_token_id])
        decode(decoder, prompts, settings)
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(4):
                decoder._buffers.replay()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_one_capture_serves_batches_of_one_size(model, prompts, monkeypatch):
    captures = []
    capture = room.Decoder._capture
    monkeypatch.setattr(
        room.Decoder, "_capture", lambda *given: captures.append(given) or capture(*given)
    )
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


@pytest.mark.parametrize("kind, tolerance", [(Int8, 0.02), (Int4, 0.2)])
@pytest.mark.parametrize("num_rows", [1, 5])
@torch.inference_mode()
def test_fewer_bits_give_nearly_the_same_product(kind, tolerance, num_rows):
    torch.manual_seed(0)
    weight = torch.randn(1024, 512, device="cuda", dtype=torch.bfloat16)
    bias = torch.randn(1024, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(num_rows, 1, 512, device="cuda", dtype=torch.bfloat16)
    exact = torch.nn.functional.linear(x, weight, bias).float()
    rounded = kind.of(weight, bias)(x).float()
    assert rounded.shape == exact.shape
    assert 0 < (exact - rounded).norm() / exact.norm() < tolerance


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("num_rows", [1, 3])
def test_every_kind_of_weights_is_captured(wide, bits, compiled, num_rows):
    config = wide.config
    specials = [config.gmask_token_id, config.bos_token_id]
    prompts = [EncodedPrompt([5 + n, 6, 7, *specials], n) for n in range(num_rows)]
    decoder = Decoder(wide, [], bits=bits, compiled=compiled)
    rows = decode(decoder, prompts)
    assert decoder._buffers.replay is not None
    assert [len(row) for row in rows] == [24] * num_rows
    assert all(0 <= i < config.vocab_size for row in rows for i in row)
