"""A second model family, as a newcomer would write it: Llama's block, and bytes as vocabulary."""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from glmtune.data.row_rule import RowRule, Special
from glmtune.models.family import ChatFormat, Family, PackedBlock
from glmtune.models.packed import Linear, linear_of
from glmtune.models.reading import check_plain_folder
from glmtune.models.shape import LinearShape, Shape

CONFIG = LlamaConfig(
    vocab_size=272, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=256,
    bos_token_id=1, eos_token_id=2, pad_token_id=0,
)  # fmt: skip
NAMES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ASK, ANSWER, END, FIRST_BYTE = 1, 3, 2, 16


class ByteTokenizer:
    vocab_hash, revision, vocab_size, pad_token_id = "b" * 64, "bytes", 272, 0
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

    def decode(self, ids, skip_special_tokens=False):
        return bytes(i - FIRST_BYTE for i in ids if i >= FIRST_BYTE).decode(errors="replace")


def shape(c: LlamaConfig) -> Shape:
    h, kv, ff = c.hidden_size, c.num_key_value_heads * c.head_dim, c.intermediate_size
    sizes = (h, h), (kv, h), (kv, h), (h, h), (ff, h), (ff, h), (h, ff)
    linears = [LinearShape(n, *s, False, n[0] in "qkv") for n, s in zip(NAMES, sizes, strict=True)]
    return Shape(
        c.num_hidden_layers, h, c.vocab_size, c.num_attention_heads, c.num_key_value_heads,
        c.head_dim, c.max_position_embeddings, c.tie_word_embeddings, tuple(linears),
        norm_values=2 * h, final_norm_values=h, kept_by_mlp=2 * ff,
    )  # fmt: skip


class RmsNorm(NamedTuple):
    weight: Tensor
    epsilon: float

    @classmethod
    def of(cls, norm):
        return cls(norm.weight, norm.variance_epsilon)

    def __call__(self, x):
        return F.rms_norm(x, self.weight.shape, self.weight, self.epsilon)


class Weights(NamedTuple):
    norm: RmsNorm
    linears: tuple[Linear, ...]
    post_norm: RmsNorm


def weights_of(layer, read=linear_of, read_norm=RmsNorm.of) -> Weights:
    attention, mlp = layer.self_attn, layer.mlp
    linears = [read(getattr(attention, name)) for name in NAMES[:4]]
    linears += [read(getattr(mlp, name)) for name in NAMES[4:]]
    norms = layer.input_layernorm, layer.post_attention_layernorm
    return Weights(read_norm(norms[0]), tuple(linears), read_norm(norms[1]))


def angles(position_ids_1T, config):
    """Llama turns element i with i + D / 2; ours turn neighbouring quarters: see `_quarters`."""
    powers = torch.arange(0, config.head_dim, 2, device=position_ids_1T.device) / config.head_dim
    angle = position_ids_1T[0][:, None].float() * 10_000.0**-powers
    angle = angle.unflatten(-1, (2, -1))
    return angle.cos(), angle.sin()


def _quarters(x):
    """Heads with their second and third quarter exchanged."""
    return torch.cat([x.chunk(4, -1)[i] for i in (0, 2, 1, 3)], -1)


def block(hidden, weights, attention, cos, sin, dropout, wanted_L=None):
    drops = dropout.each() if dropout else [None] * len(NAMES)
    q, k, v, o, gate, up, down = (
        partial(linear, dropout=drop) for linear, drop in zip(weights.linears, drops, strict=True)
    )
    normed, size = weights.norm(hidden), (-1, 4 * cos.shape[-1])
    qkv = [project(normed).unflatten(-1, size) for project in (q, k, v)]
    qkv = [_quarters(qkv[0]), _quarters(qkv[1]), qkv[2]]
    context = attention.attend(qkv, (None,) * 3, cos, sin).flatten(1)
    if wanted_L is not None:
        hidden, context = hidden[wanted_L], context[wanted_L]
    hidden = hidden + o(context)
    normed = weights.post_norm(hidden)
    return hidden + down(F.silu(gate(normed)) * up(normed))


BLOCK = PackedBlock(7, weights_of, block, angles, lambda m: RmsNorm.of(m.model.norm), (64, 128))
TOY = Family(
    name="Toy",
    owns=lambda settings: settings.get("model_type") == "llama",
    config_class=LlamaConfig,
    model_class=LlamaForCausalLM,
    tokenizer_class=ByteTokenizer,
    published=(),
    shape=shape,
    row_rule=lambda config: ByteTokenizer.row_rule,
    check_folder=check_plain_folder,
    check_pair=lambda config, tokenizer: None,
    lora_target=("q_proj", "v_proj"),
    chat=ChatFormat("a question alone", lambda rounds, question: question, str, (), ""),
    probe_row=lambda config: [ASK, *range(20, 40), ANSWER, *range(40, 50)],
    packed=BLOCK,
)
