"""The publisher's tensors under transformers' names, and back.

Rows of the fused ``query_key_value`` are those of queries, keys and values, one after another. What
is cut is cut by views: neither copies nor reads a tensor that lies in a file.

Shapes: N heads of queries, G of keys and values, D size of a head.
"""

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

PUBLISHED_LAYER = "transformer.encoder.layers."
FUSED = "self_attention.query_key_value"
QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
# Values that the model computes from its settings.
INV_FREQ = "transformer.rotary_pos_emb.inv_freq"
_TOP = {
    "transformer.embedding.word_embeddings.": "model.embed_tokens.",
    "transformer.encoder.final_layernorm.": "model.norm.",
    "transformer.output_layer.": "lm_head.",
}
MODULES = {
    "self_attention.dense": "self_attn.o_proj",
    "mlp.dense_h_to_4h": "mlp.gate_up_proj",
    "mlp.dense_4h_to_h": "mlp.down_proj",
}
"""Linears of a layer whose weights are the same tensor in both layouts: published name to ours."""
GATE_UP = MODULES["mlp.dense_h_to_4h"]
HALVES = ("mlp.gate_proj", "mlp.up_proj")
"""What other code has apart, and `GATE_UP` as one, in this order."""
OWN_LAYER = "model.layers."
_LAYER = re.compile(rf"{re.escape(PUBLISHED_LAYER)}(\d+)\.(.+)\.(\w+)")


def sizes_of_qkv(config: Any) -> tuple[int, int, int]:
    """Rows of queries, keys and values in the fused linear: ``N D, G D, G D``."""
    of_keys = config.num_key_value_heads * config.head_dim
    return config.num_attention_heads * config.head_dim, of_keys, of_keys


def to_glm(tensors: "Mapping[str, Tensor]", config: Any) -> "dict[str, Tensor]":
    """Tensors of the publisher's layout under transformers' names; others keep theirs.

    Args:
        tensors: by name; on the meta device, too.
        config: of the model.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name == INV_FREQ:
            continue
        if (layer := _LAYER.fullmatch(name)) is None:
            begin = next((begin for begin in _TOP if name.startswith(begin)), None)
            found[name if begin is None else _TOP[begin] + name.removeprefix(begin)] = tensor
            continue
        number, module, kind = layer.groups()
        place = f"{OWN_LAYER}{number}."
        if module == FUSED and len(tensor) == sum(sizes_of_qkv(config)):
            parts = tensor.split(sizes_of_qkv(config))
            found |= {f"{place}{ours}.{kind}": part for ours, part in zip(QKV, parts, strict=True)}
        else:
            found[f"{place}{MODULES.get(module, module)}.{kind}"] = tensor
    return found


def to_published(tensors: "Mapping[str, Tensor]") -> "Iterator[tuple[str, Tensor]]":
    """The reverse: transformers' tensors under the publisher's names, one after another.

    Queries, keys and values become one tensor, in the widest of their types.
    """
    import torch

    top = {ours: theirs for theirs, ours in _TOP.items()}
    modules = {ours: theirs for theirs, ours in MODULES.items()}
    parts: dict[tuple[str, str], dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in tensors.items():
        if not name.startswith(OWN_LAYER):
            begin = next(begin for begin in top if name.startswith(begin))
            yield top[begin] + name.removeprefix(begin), tensor
            continue
        number, _, rest = name.removeprefix(OWN_LAYER).partition(".")
        module, _, kind = rest.rpartition(".")
        if module not in QKV:
            yield f"{PUBLISHED_LAYER}{number}.{modules.get(module, module)}.{kind}", tensor
            continue
        fused = parts[number, kind]
        fused[module] = tensor
        if len(fused) == len(QKV):
            widest = max((part.dtype for part in fused.values()), key=lambda one: one.itemsize)
            joined = torch.cat([fused.pop(part).to(widest) for part in QKV])
            yield f"{PUBLISHED_LAYER}{number}.{FUSED}.{kind}", joined
