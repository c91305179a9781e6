"""A second model family as a contributor would write it: Llama's block, and bytes as vocabulary.

Shapes as in `models.packed` and `models.decoding`.
"""

from typing import Any, NamedTuple

import torch
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from glmtune.data.conversations import encode_rounds
from glmtune.data.row_rule import RowRule, Special
from glmtune.models.decoding import Angles, DecodingBlock, RowLayout, attend, put
from glmtune.models.family import ChatFormat, Family, Native, PackedBlock
from glmtune.models.packed import linear_of
from glmtune.models.shape import LinearShape, Shape
from glmtune.models.strict_loading import check_plain_folder

CONFIG = LlamaConfig(
    vocab_size=272, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=256,
    bos_token_id=1, eos_token_id=2, pad_token_id=0,
)  # fmt: skip
NAMES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ASK, ANSWER, END, FIRST_BYTE = 1, 3, 2, 16


class ByteTokenizer:
    vocab_hash, revision, vocab_size, pad_token_id = "b" * 64, "bytes", 272, 0
    unfinished = "(?!)"
    special_names, allow_special, opens_thoughts = {}, False, False
    row_rule = RowRule(
        before_prompt=(Special("ask", "<ask>", ASK),),
        after_prompt=(Special("answer", "<answer>", ANSWER),),
        end=(Special("end", "<end>", END),),
        pad_id=0,
    )

    @classmethod
    def from_pretrained(cls, folder):
        return cls()

    def encode_batch(self, texts, *, add_special_tokens=False, num_threads=None):
        rows = [[FIRST_BYTE + byte for byte in text.encode()] for text in texts]
        return [self.row_rule.prompt(row) for row in rows] if add_special_tokens else rows

    def encode_contexts(self, contexts, *, num_threads=None):
        return self.encode_batch(contexts)

    def encode_examples(self, examples, *, num_threads=None):
        return encode_rounds(self, examples, lambda rounds, question: str([*rounds, question]))

    def decode_batch(self, rows):
        return [self.decode(ids) for ids in rows]

    def decode(self, ids, skip_special_tokens=False):
        return bytes(i - FIRST_BYTE for i in ids if i >= FIRST_BYTE).decode(errors="replace")


def shape(c: LlamaConfig) -> Shape:
    hidden, kv, inner = c.hidden_size, c.num_key_value_heads * c.head_dim, c.intermediate_size
    sizes = [(hidden, hidden), (kv, hidden), (kv, hidden), (hidden, hidden)]
    sizes += [(inner, hidden), (inner, hidden), (hidden, inner)]
    linears = [LinearShape(n, *s, False, n[0] in "qkv") for n, s in zip(NAMES, sizes, strict=True)]
    return Shape(
        c.num_hidden_layers, hidden, c.vocab_size, c.num_attention_heads, c.num_key_value_heads,
        c.head_dim, c.max_position_embeddings, c.tie_word_embeddings, tuple(linears),
        norm_values=2 * hidden, final_norm_values=hidden, kept_by_mlp=2 * inner,
    )  # fmt: skip


class Block(NamedTuple):
    input_norm: Any
    query: Any
    key: Any
    value: Any
    output: Any
    inner_norm: Any
    gate: Any
    up: Any
    down: Any


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


# --- packed rows ---


def packed_angles(positions_1T, config):
    """Llama turns element i with i + D / 2, ops.rotary neighbouring quarters: see `_quarters`."""
    powers = torch.arange(0, config.head_dim, 2) / config.head_dim
    angle = positions_1T[0][:, None] / config.rope_parameters["rope_theta"] ** powers
    return angle.cos().unflatten(-1, (2, -1)), angle.sin().unflatten(-1, (2, -1))


def _quarters(x):
    """Heads with their second and third quarter exchanged."""
    return torch.cat([x.chunk(4, -1)[i] for i in (0, 2, 1, 3)], -1)


def packed_block(hidden_TH, block, attention, cos, sin, dropout, wanted_L=None):
    drops = [*dropout.each()] if dropout else [None] * len(NAMES)
    normed, size = block.input_norm(hidden_TH), (-1, 4 * cos.shape[-1])
    linears = block.query, block.key, block.value
    query, key, value = (
        linear(normed, drop).unflatten(-1, size)
        for linear, drop in zip(linears, drops[:3], strict=True)
    )
    turned = torch.cat((_quarters(query), _quarters(key), value), 1)
    context_TH = attention.attend(turned, key.shape[1], (None,) * 3, cos, sin).flatten(1)
    if wanted_L is not None:
        hidden_TH, context_TH = hidden_TH[wanted_L], context_TH[wanted_L]
    hidden_TH = hidden_TH + block.output(context_TH, drops[3])
    normed = block.inner_norm(hidden_TH)
    inner = F.silu(block.gate(normed, drops[4])) * block.up(normed, drops[5])
    return hidden_TH + block.down(inner, drops[6])


NATIVE = Native(
    config_class=LlamaConfig,
    model_class=LlamaForCausalLM,
    tokenizer_class=ByteTokenizer,
    check_folder=check_plain_folder,
    packed=PackedBlock(
        num_linears=len(NAMES),
        weights_of=lambda layer: weights_of(layer, linear_of, lambda norm: norm),
        block=packed_block,
        angles=packed_angles,
        final_norm=lambda model: model.base_model.norm,
    ),
    decoding=LLAMA,
)
TOY = Family(
    name="Toy",
    owns=lambda settings: settings.get("model_type") == "llama",
    model_type="llama",
    native=lambda: NATIVE,
    read_settings=LlamaConfig.from_dict,
    published=(),
    shape=shape,
    row_rule=lambda config: ByteTokenizer.row_rule,
    check_pair=lambda config, tokenizer: None,
    lora_target=("q_proj", "v_proj"),
    lora_rank=3,
    chat=ChatFormat("a question alone", lambda rounds, question: question, str, (), ""),
    probe_row=lambda config: [ASK, *range(20, 40), ANSWER, *range(40, 50)],
    head_dims=(64, 128),
)
