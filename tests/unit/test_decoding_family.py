"""The decoder runs another family given only its `DecodingBlock`.

Llama's: causal rows, one stream of positions, RMSNorm, SwiGLU, separate projections, and heads of
queries that share those of keys.
"""

import pytest
import torch
from toy_family import TOY
from transformers import LlamaConfig, LlamaForCausalLM

from glmtune.adapters import attach_lora
from glmtune.generation import Decoder, EncodedPrompt, GenerationSettings
from glmtune.generation import decoder as room
from glmtune.generation.reference import generate_ids
from glmtune.generation.weights import num_bytes


@pytest.fixture
def model(monkeypatch):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, eos_token_id=2,
        initializer_range=0.2,
    )  # fmt: skip
    monkeypatch.setattr(room, "family_of", lambda _: TOY)
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize(
    "settings",
    [
        GenerationSettings(max_new_tokens=16),
        GenerationSettings(max_new_tokens=16, do_sample=True, repetition_penalty=1.3),
    ],
)
def test_another_family_answers_as_generate_does(model, settings):
    prompts = [EncodedPrompt(list(range(5, 5 + n)), n) for n in (3, 9, 6)]
    for asked in (model, attach_lora(model, targets="q_proj,down_proj").eval()):
        for name, parameter in asked.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.2)
        decoder, rows = Decoder(asked, []), [[], [], []]
        for more in decoder.stream(prompts, settings):
            rows = [row + ids for row, ids in zip(rows, more, strict=True)]
        assert rows == generate_ids(asked, prompts, settings, [])
        assert decoder._slots._buffers.cache.keys.shape[2] == 2, "heads of keys and values"


def test_its_linears_are_rounded_and_its_bytes_are_counted(model):
    embedding = model.get_input_embeddings().weight.nbytes
    assert num_bytes(Decoder(model, []).weights) == model.get_memory_footprint() - embedding - sum(
        buffer.nbytes for buffer in model.buffers()
    )
    rounded = Decoder(model, [], bits=8)
    assert len(rounded.weights.linears) == 2 * 7 + 1
    assert num_bytes(rounded.weights) < 0.3 * num_bytes(Decoder(model, []).weights)
