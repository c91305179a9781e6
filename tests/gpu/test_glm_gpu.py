"""Glm's and Glm4's layers by kernels on a CUDA device; run by name: pytest -m gpu tests/gpu."""

import pytest
import torch
from transformers import Glm4Config, Glm4ForCausalLM, GlmConfig, GlmForCausalLM

from glmtune.adapters import attach_lora
from glmtune.generation.weights import read_weights
from glmtune.models.decoding import Place
from glmtune.models.glm.decoding import DECODING

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]
SIZES = {
    "vocab_size": 512, "hidden_size": 256, "intermediate_size": 384, "num_hidden_layers": 1,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "attention_bias": True,
    "pad_token_id": 0, "eos_token_id": 2, "initializer_range": 0.05,
}  # fmt: skip
KINDS = {
    "half of a head": (GlmForCausalLM, GlmConfig, 0.5),
    "whole heads": (GlmForCausalLM, GlmConfig, 1.0),
    "four norms": (Glm4ForCausalLM, Glm4Config, 0.5),
}


def make_model(kind):
    model_class, config_class, partial = KINDS[kind]
    rope = {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": partial}
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = model_class(config_class(**SIZES, rope_parameters=rope)).eval()
    for name, weight in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(weight, 0.5, 1.5)
        if "bias" in name:
            torch.nn.init.normal_(weight)
    return model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("num_rows", [1, 3])
@torch.no_grad()
def test_a_layer_in_few_kernels_is_the_plain_one(kind, bits, adapted, num_rows):
    model, columns = make_model(kind), 70
    config = model.config
    if adapted:
        model = attach_lora(model, targets="q_proj,v_proj,gate_up_proj,down_proj").eval()
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.1)
    weights = read_weights(model, DECODING, bits=bits)
    shape = num_rows, config.num_key_value_heads, columns, config.head_dim
    cache = [torch.randn(shape, device="cuda") for _ in range(2)]
    copies = [tensor.clone() for tensor in cache]
    place = Place(*torch.tensor([range(num_rows), [41, 0, 69][:num_rows]], device="cuda"))
    angles = DECODING.angles(place.column_B[:, None], config)
    hidden = torch.randn(num_rows, 1, config.hidden_size, device="cuda")
    seen = torch.arange(columns, device="cuda") <= place.column_B[:, None]
    (block,) = weights.blocks
    expected = DECODING.run_block(hidden, block, *cache, place, seen[:, None, None], angles)
    found = DECODING.run_block_in_few_kernels(hidden, block, *copies, place, None, angles)
    assert (found - expected).norm() / expected.norm() < 1e-5
    for ours, theirs in zip(copies, cache, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)
