"""ChatGLM-6B and ChatGLM2-6B with a P-Tuning v2 prefix, in plain steps on the published tensors.

One row at a time, sequence first, without any module of the project: what `get_prompt`, the mask
and the attention of the published modeling_chatglm.py say, written out.
"""

import math

import torch
from torch.nn import functional as F


def encode_prefix(encoder):
    """`PrefixEncoder.forward` for places 0, 1, 2...: ``(P, 2 * layers * heads * size)``."""
    rows = encoder["embedding.weight"]
    if "trans.0.weight" in encoder:
        inner = torch.tanh(rows @ encoder["trans.0.weight"].T + encoder["trans.0.bias"])
        rows = inner @ encoder["trans.2.weight"].T + encoder["trans.2.bias"]
    return rows


def past_of(encoder, layer, num_layers, heads, size):
    """Keys and values of one layer, ``(P, heads, size)`` each."""
    rows = encode_prefix(encoder)
    of_layer = rows.view(len(rows), num_layers * 2, heads, size)
    return of_layer[:, 2 * layer], of_layer[:, 2 * layer + 1]


def softmax_attention(query, key, value, seen):
    """``(S, N, D)`` queries on ``(K, N, D)`` keys; `seen` is ``(S, K)``."""
    scores = torch.einsum("snd,knd->nsk", query, key) / math.sqrt(query.shape[-1])
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    return torch.einsum("nsk,knd->snd", weights, value).flatten(1)


def _turn_half(x, position, inv_freq):
    angle = position[:, None].float() * torch.cat((inv_freq, inv_freq))
    first, second = x.chunk(2, -1)
    turned = torch.cat((-second, first), -1)
    return x * angle.cos()[:, None] + turned * angle.sin()[:, None]


def chatglm_logits(tensors, config, ids, encoder=None):
    """Logits ``(S, V)`` of a row; its last prompt token is ``<sop>``."""
    t = {name: tensor.float() for name, tensor in tensors.items()}
    num_layers, heads = config["num_layers"], config["num_attention_heads"]
    size = config["hidden_size"] // heads
    context, mask_at = ids.index(config["bos_token_id"]), ids.index(config["gmask_token_id"])
    place = torch.arange(len(ids))
    position = torch.where(place < context, place, torch.tensor(mask_at))
    block = (place - context + 1).clamp(min=0)
    seen = (place[None] <= place[:, None]) | (place[None] < context)
    hidden = t["transformer.word_embeddings.weight"][ids]
    alpha = math.sqrt(2 * 28)
    for i in range(num_layers):
        at = f"transformer.layers.{i}."

        def linear(x, name, at=at):
            return F.linear(x, t[f"{at}{name}.weight"], t[f"{at}{name}.bias"])

        def norm(x, name):
            return F.layer_norm(x, x.shape[-1:], t[f"{name}.weight"], t[f"{name}.bias"], 1e-5)

        normed = norm(hidden, f"{at}input_layernorm")
        mixed = linear(normed, "attention.query_key_value").view(len(ids), heads, 3 * size)
        query, key, value = mixed.chunk(3, -1)
        inv_freq = t[f"{at}attention.rotary_emb.inv_freq"]

        def rotate(x, inv_freq=inv_freq):
            by_position, by_block = x.chunk(2, -1)
            return torch.cat(
                (
                    _turn_half(by_position, position, inv_freq),
                    _turn_half(by_block, block, inv_freq),
                ),
                -1,
            )

        query, key, visible = rotate(query), rotate(key), seen
        if encoder is not None:  # the keys of the prefix are not rotated
            past_key, past_value = past_of(encoder, i, num_layers, heads, size)
            key, value = torch.cat((past_key, key)), torch.cat((past_value, value))
            visible = torch.cat((torch.ones(len(ids), len(past_key), dtype=torch.bool), seen), 1)
        attended = linear(softmax_attention(query, key, value, visible), "attention.dense")
        normed = norm(normed * alpha + attended, f"{at}post_attention_layernorm")
        inner = F.gelu(linear(normed, "mlp.dense_h_to_4h"), approximate="tanh")
        hidden = normed * alpha + linear(inner, "mlp.dense_4h_to_h")
    hidden = norm(hidden, "transformer.final_layernorm")
    return hidden @ t["lm_head.weight"].T


def _rms(x, weight):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * weight


def chatglm2_logits(tensors, config, ids, encoder=None):
    """Logits ``(S, V)`` of a row of ChatGLM2-6B or ChatGLM3-6B, whose key heads are shared."""
    t = {name: tensor.float() for name, tensor in tensors.items()}
    num_layers, heads = config["num_layers"], config["num_attention_heads"]
    size, groups = config["kv_channels"], config["multi_query_group_num"]
    base = 10000 * config["rope_ratio"]
    turned = size // 2
    frequency = base ** -(torch.arange(0, turned, 2).float() / turned)
    angle = torch.arange(len(ids)).float()[:, None, None] * frequency
    seen = torch.ones(len(ids), len(ids), dtype=torch.bool).tril()

    def rotate(x):
        first, still = x[..., :turned], x[..., turned:]
        even, odd = first[..., 0::2], first[..., 1::2]
        pairs = (even * angle.cos() - odd * angle.sin(), odd * angle.cos() + even * angle.sin())
        return torch.cat((torch.stack(pairs, -1).flatten(-2), still), -1)

    hidden = t["transformer.embedding.word_embeddings.weight"][ids]
    for i in range(num_layers):
        at = f"transformer.encoder.layers.{i}."
        mixed = F.linear(
            _rms(hidden, t[f"{at}input_layernorm.weight"]),
            t[f"{at}self_attention.query_key_value.weight"],
            t[f"{at}self_attention.query_key_value.bias"],
        )
        parts = mixed.split((heads * size, groups * size, groups * size), -1)
        query, key, value = (part.unflatten(-1, (-1, size)) for part in parts)
        query, key, visible = rotate(query), rotate(key), seen
        if encoder is not None:
            past_key, past_value = past_of(encoder, i, num_layers, groups, size)
            key, value = torch.cat((past_key, key)), torch.cat((past_value, value))
            visible = torch.cat((torch.ones(len(ids), len(past_key), dtype=torch.bool), seen), 1)
        key, value = (x.repeat_interleave(heads // groups, 1) for x in (key, value))
        attended = softmax_attention(query, key, value, visible)
        hidden = hidden + attended @ t[f"{at}self_attention.dense.weight"].T
        normed = _rms(hidden, t[f"{at}post_attention_layernorm.weight"])
        gate, up = (normed @ t[f"{at}mlp.dense_h_to_4h.weight"].T).chunk(2, -1)
        hidden = hidden + (F.silu(gate) * up) @ t[f"{at}mlp.dense_4h_to_h.weight"].T
    hidden = _rms(hidden, t["transformer.encoder.final_layernorm.weight"])
    return hidden @ t["transformer.output_layer.weight"].T


def greedy(logits_of, ids, num):
    """The likeliest continuation of a row, without a cache."""
    ids = list(ids)
    for _ in range(num):
        ids.append(int(logits_of(ids)[-1].argmax()))
    return ids[-num:]
