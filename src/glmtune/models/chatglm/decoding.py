"""ChatGLM-6B as two plain functions, for answering: `prefill` a prompt, `decode` a token.

The mathematics is `modeling`'s (a test holds them together); what differs is what surrounds it.
Keys and values are written in place into tensors of fixed size, at columns that a tensor names, so
that one step is the same sequence of kernels whatever its place: it can be captured and replayed.
Positions and mask come ready made; nothing is read off the ids while decoding.

Shapes: B rows of a batch, S new tokens, K key columns, H hidden, N heads, D head size,
V vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from glmtune.models.chatglm.configuration import ChatGLMConfig
from glmtune.models.chatglm.modeling import RESIDUAL_SCALE
from glmtune.ops.attention import additive_mask, right_kernels
from glmtune.ops.norm import Norm
from glmtune.ops.rotary import rotate, rotate_whole, whole_angles

Projection = Any
"""A linear with all that belongs to it, to be called: ``(..., in)`` to ``(..., out)``."""


class Block(NamedTuple):
    """What one layer computes with."""

    input_norm: Norm
    query_key_value: Projection
    dense: Projection
    post_attention_norm: Norm
    dense_h_to_4h: Projection
    dense_4h_to_h: Projection


class Weights(NamedTuple):
    """What the whole model computes with."""

    embed: Callable[[Tensor], Tensor]
    """Ids ``(B, S)`` to hidden states in the compute type, ``(B, S, H)``."""
    blocks: Sequence[Block]
    final_norm: Norm
    head: Projection


class KeyValueCache(NamedTuple):
    """Keys and values of every layer, ``(layers, B, N, K, D)`` each, in columns of K.

    Columns that are masked must still hold finite numbers, hence the zeros at the start.
    """

    keys: Tensor
    values: Tensor

    @classmethod
    def zeros(
        cls, config: ChatGLMConfig, num_rows: int, num_columns: int, like: Tensor
    ) -> "KeyValueCache":
        """An empty cache, of the type and on the device of another tensor."""
        shape = (
            config.num_layers, num_rows, config.num_attention_heads, num_columns, config.head_dim
        )  # fmt: skip
        return cls(like.new_zeros(shape), like.new_zeros(shape))


class Angles(NamedTuple):
    """Cosines and sines of the new tokens' positions, ``(B, S, 2, D/4)``; see `rotary_angles`."""

    cos: Tensor
    sin: Tensor


def read_block(
    hidden_BSH: Tensor,
    block: Block,
    keys_BNSD: Tensor,
    values_BNSD: Tensor,
    mask_B1SS: Tensor,
    cos_B11SD: Tensor,
    sin_B11SD: Tensor,
) -> Tensor:
    """One layer on whole prompts; their keys and values are written into the given tensors.

    For a short prompt the host launches kernels more slowly than a GPU runs them, so they are few.

    Args:
        hidden_BSH: into the layer.
        block: the layer.
        keys_BNSD: written.
        values_BNSD: written.
        mask_B1SS: as `additive_mask` gives it.
        cos_B11SD: as `whole_angles` gives them.
        sin_B11SD: likewise.
    """
    normed, mixed_BN3SD = _project(hidden_BSH, block, keys_BNSD.shape[-1])
    query_key_BN2SD, value_BNSD = mixed_BN3SD[:, :, :2], mixed_BN3SD[:, :, 2]
    query_BNSD, key_BNSD = rotate_whole(query_key_BN2SD, cos_B11SD, sin_B11SD).unbind(2)
    keys_BNSD.copy_(key_BNSD)
    values_BNSD.copy_(value_BNSD)
    context = F.scaled_dot_product_attention(query_BNSD, keys_BNSD, values_BNSD, mask_B1SS)
    return _finish(_join_heads(context), normed, block)


def run_block(
    hidden_B1H: Tensor,
    block: Block,
    keys_BNKD: Tensor,
    values_BNKD: Tensor,
    column_1: Tensor,
    mask_B11K: Tensor,
    angles: Angles,
) -> Tensor:
    """One layer on one new token; its keys and values are written into the given column."""
    normed, mixed_BN31D = _project(hidden_B1H, block, keys_BNKD.shape[-1])
    # Both at once: a step is made of many small kernels.
    turned = rotate(mixed_BN31D[:, :, :2], *(angle[:, None] for angle in angles))
    query_BN1D, key_BN1D = turned.unbind(2)
    keys_BNKD.index_copy_(2, column_1, key_BN1D)
    values_BNKD.index_copy_(2, column_1, mixed_BN31D[:, :, 2])
    return _finish(attend(query_BN1D, keys_BNKD, values_BNKD, mask_B11K), normed, block)


def attend(query_BN1D: Tensor, keys_BNKD: Tensor, values_BNKD: Tensor, mask_B11K: Tensor) -> Tensor:
    """Attention of one new token to K columns: ``(B, 1, H)``.

    For one query the fused kernels start one thread block a head and are slow; these are two
    matrix-vector products that a compiler turns into reductions.
    """
    scores = (query_BN1D @ keys_BNKD.transpose(-1, -2)).float() * keys_BNKD.shape[-1] ** -0.5
    seen = scores.masked_fill(~mask_B11K, -torch.inf).softmax(-1).to(values_BNKD.dtype)
    return _join_heads(seen @ values_BNKD)


def _project(hidden_BSH: Tensor, block: Block, head_dim: int) -> tuple[Tensor, Tensor]:
    """A layer up to its attention: what the residual takes, and the heads ``(B, N, 3, S, D)``."""
    normed_BSH = block.input_norm(hidden_BSH)
    heads_BSN3D = block.query_key_value(normed_BSH).unflatten(-1, (-1, 3, head_dim))
    return normed_BSH, heads_BSN3D.movedim(1, 3)


def _join_heads(context_BNSD: Tensor) -> Tensor:
    return context_BNSD.transpose(1, 2).flatten(2)


def _finish(context_BSH: Tensor, normed_BSH: Tensor, block: Block) -> Tensor:
    """A layer from its attention on."""
    attended = block.dense(context_BSH)
    normed = block.post_attention_norm(torch.add(attended, normed_BSH, alpha=RESIDUAL_SCALE))
    inner = F.gelu(block.dense_h_to_4h(normed), approximate="tanh")
    return torch.add(block.dense_4h_to_h(inner), normed, alpha=RESIDUAL_SCALE)


def run_block_in_few_kernels(
    hidden_B1H: Tensor,
    block: Block,
    keys_BNKD: Tensor,
    values_BNKD: Tensor,
    column_1: Tensor,
    mask_B11K: Tensor,
    angles: Angles,
) -> Tensor:
    """`run_block` on one new token of a few rows, whose linears have kernels."""
    from glmtune.ops import decoding_kernels as kernels
    from glmtune.ops.decoding_attention import attend

    dtype = block.query_key_value.input_dtype  # of all that lies between the kernels
    normed = kernels.normalise(hidden_B1H, block.input_norm, dtype)
    mixed = block.query_key_value.fused(normed)
    context = attend(mixed, keys_BNKD, values_BNKD, column_1, mask_B11K, *angles)
    hidden = block.dense.fused(context, residual=normed, alpha=RESIDUAL_SCALE)
    normed = kernels.normalise(hidden, block.post_attention_norm, dtype)
    inner = block.dense_h_to_4h.fused(normed, gelu=True)
    return block.dense_4h_to_h.fused(inner, residual=normed, alpha=RESIDUAL_SCALE)


def run_head_in_few_kernels(hidden_B1H: Tensor, final_norm: Norm, head: Projection) -> Tensor:
    """`run_head` of a few rows."""
    from glmtune.ops import decoding_kernels as kernels

    normed = kernels.normalise(hidden_B1H, final_norm, head.input_dtype)
    return head.fused(normed, dtype=final_norm.weight.dtype).squeeze(1)


def run_head(hidden_B1H: Tensor, final_norm: Norm, head: Projection) -> Tensor:
    """Logits ``(B, V)`` of the last tokens' hidden states."""
    return head(final_norm(hidden_B1H)).squeeze(1)


def prefill(
    weights: Weights,
    input_ids_BS: Tensor,
    mask_B1SS: Tensor,
    angles: Angles,
    cache: KeyValueCache,
) -> Tensor:
    """Read whole prompts into the first S columns of a cache; logits ``(B, V)`` of what follows.

    Args:
        weights: of the model.
        input_ids_BS: padded at the left, so that every prompt ends in the last column.
        mask_B1SS: as `prefix_lm_mask` gives it.
        angles: of these tokens.
        cache: is written into.
    """
    num_columns = input_ids_BS.shape[1]
    hidden_BSH = weights.embed(input_ids_BS)
    mask = additive_mask(mask_B1SS, hidden_BSH.dtype)
    whole = [angle[:, None, None].to(hidden_BSH.dtype) for angle in whole_angles(*angles)]
    with right_kernels():
        for i, block in enumerate(weights.blocks):
            keys, values = cache.keys[i, :, :, :num_columns], cache.values[i, :, :, :num_columns]
            hidden_BSH = read_block(hidden_BSH, block, keys, values, mask, *whole)
    return run_head(hidden_BSH[:, -1:], weights.final_norm, weights.head)


def decode(
    weights: Weights,
    token_B1: Tensor,
    column_1: Tensor,
    mask_B11K: Tensor,
    angles: Angles,
    cache: KeyValueCache,
    block_function: Callable[..., Tensor] = run_block,
    head_function: Callable[..., Tensor] = run_head,
) -> Tensor:
    """Read one more token a row into a cache; logits ``(B, V)`` of what follows it.

    Args:
        weights: of the model.
        token_B1: the newest tokens.
        column_1: where they go in the cache, a tensor.
        mask_B11K: true for columns that hold a real token, these included; the cache is looked at
            as far as the mask reaches.
        angles: of these tokens.
        cache: is written into.
        block_function: `run_block`, or a compiled form of it.
        head_function: `run_head`, likewise.
    """
    num_columns = mask_B11K.shape[-1]
    hidden_B1H = weights.embed(token_B1)
    for i, block in enumerate(weights.blocks):
        keys, values = cache.keys[i, :, :, :num_columns], cache.values[i, :, :, :num_columns]
        hidden_B1H = block_function(hidden_B1H, block, keys, values, column_1, mask_B11K, angles)
    return head_function(hidden_B1H, weights.final_norm, weights.head)
