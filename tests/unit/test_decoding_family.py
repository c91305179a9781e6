"""The decoder reads another family by its `DecodingBlock` alone.

Llama's: causal rows, one stream of positions, RMSNorm, SwiGLU, separate projections, and heads of
queries that share those of keys. Shapes as in `models.decoding`.
"""

from typing import Any, NamedTuple

import pytest
import torch
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from glmtune.adapters import attach_lora
from glmtune.generation import Decoder, EncodedPrompt, GenerationSettings
from glmtune.generation import decoder as room
from glmtune.generation.reference import generate_ids
from glmtune.generation.weights import num_bytes
from glmtune.models.decoding import (
    Angles,
    DecodingBlock,
    Normalisation,
    Projection,
    RowLayout,
    attend,
    put,
)
from glmtune.models.families import DEFAULT
from glmtune.models.shape import Shape


class Block(NamedTuple):
    input_norm: Normalisation
    query: Projection
    key: Projection
    value: Projection
    output: Projection
    inner_norm: Normalisation
    gate: Projection
    up: Projection
    down: Projection


def weights_of(layer: Any, read: Any, read_norm: Any) -> Block:
    attention, mlp = layer.self_attn, layer.mlp
    return Block(
        read_norm(layer.input_layernorm),
        *map(read, (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)),
        read_norm(layer.post_attention_layernorm),
        *map(read, (mlp.gate_proj, mlp.up_proj, mlp.down_proj)),
    )


def layout(ids_BK: torch.Tensor, config: LlamaConfig) -> RowLayout:
    causal_B = torch.zeros(len(ids_BK), dtype=torch.long)
    return RowLayout(causal_B, torch.arange(ids_BK.shape[1]).expand(ids_BK.shape))


def angles(positions_BK: torch.Tensor, config: LlamaConfig) -> Angles:
    exponent = torch.arange(0, config.head_dim, 2) / config.head_dim
    angle = positions_BK[..., None] / config.rope_parameters["rope_theta"] ** exponent
    whole = torch.cat((angle, angle), -1)
    return Angles(whole.cos(), whole.sin())


def rotate(x_BMSD: torch.Tensor, angles: Angles) -> torch.Tensor:
    first, second = x_BMSD.chunk(2, -1)
    turned = torch.cat((-second, first), -1)
    return x_BMSD * angles.cos[:, None] + turned * angles.sin[:, None]


def project(hidden: torch.Tensor, block: Block, size: int, angles: Angles) -> list[torch.Tensor]:
    normed = block.input_norm(hidden)
    query, key, value = (
        linear(normed).unflatten(-1, (-1, size)).transpose(1, 2)
        for linear in (block.query, block.key, block.value)
    )
    return [rotate(query, angles), rotate(key, angles), value]


def finish(hidden: torch.Tensor, context: torch.Tensor, block: Block) -> torch.Tensor:
    hidden = hidden + block.output(context)
    normed = block.inner_norm(hidden)
    return hidden + block.down(F.silu(block.gate(normed)) * block.up(normed))


def read_block(hidden, block, keys, values, mask, angles):
    query, key, value = project(hidden, block, keys.shape[-1], angles)
    keys.copy_(key)
    values.copy_(value)
    context = F.scaled_dot_product_attention(query, keys, values, mask, enable_gqa=True)
    return finish(hidden, context.transpose(1, 2).flatten(2), block)


def run_block(hidden, block, keys, values, place, mask, angles):
    query, key, value = project(hidden, block, keys.shape[-1], angles)
    put(keys, place, key)
    put(values, place, value)
    return finish(hidden, attend(query, keys, values, mask), block)


LLAMA = DecodingBlock(
    weights_of=weights_of,
    final_norm=lambda model, read_norm: read_norm(model.base_model.norm),
    layout=layout,
    angles=angles,
    prompt_angles=lambda angles, dtype: Angles(*(angle.to(dtype) for angle in angles)),
    read_block=read_block,
    run_block=run_block,
)


def shape(config: LlamaConfig) -> Shape:
    return Shape(
        num_layers=config.num_hidden_layers, hidden_size=config.hidden_size,
        vocab_size=config.vocab_size, num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads, head_dim=config.head_dim,
        max_positions=config.max_position_embeddings, tied_head=False, linears=(),
        norm_values=2 * config.hidden_size, final_norm_values=config.hidden_size, kept_by_mlp=2,
    )  # fmt: skip


@pytest.fixture
def model(monkeypatch):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, eos_token_id=2,
        initializer_range=0.2,
    )  # fmt: skip
    llama = DEFAULT._replace(name="Llama", decoding=LLAMA, shape=shape)
    monkeypatch.setattr(room, "family_of", lambda _: llama)
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
