"""What one layer of ChatGLM-6B computes while answering, as plain functions.

The mathematics is `modeling`'s (a test holds them together); see `models.decoding` for what
surrounds it.

Shapes: B rows of a batch, S columns of the longest prompt, K columns of the cache, H hidden,
N heads, D head size.
"""

from collections.abc import Callable
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from glmtune.models.chatglm.configuration import ChatGLMConfig
from glmtune.models.chatglm.layout import read_layout
from glmtune.models.chatglm.modeling import RESIDUAL_SCALE
from glmtune.models.decoding import (
    Angles,
    DecodingBlock,
    Place,
    Projection,
    RowLayout,
    attend,
    put,
)
from glmtune.ops.norm import Norm
from glmtune.ops.rotary import rotary_angles, rotate, rotate_whole, whole_angles


class Block(NamedTuple):
    """What one layer computes with."""

    input_norm: Norm
    query_key_value: Projection
    dense: Projection
    post_attention_norm: Norm
    dense_h_to_4h: Projection
    dense_4h_to_h: Projection


def weights_of(
    layer: nn.Module,
    read: Callable[[nn.Module], Projection],
    read_norm: Callable[[nn.Module], nn.Module],
) -> Block:
    """The weights of a `ChatGLMBlock`, in PEFT's wrapping or plain."""
    get = layer.get_submodule
    return Block(
        input_norm=_norm(read_norm(get("input_layernorm"))),
        query_key_value=read(get("attention.query_key_value")),
        dense=read(get("attention.dense")),
        post_attention_norm=_norm(read_norm(get("post_attention_layernorm"))),
        dense_h_to_4h=read(get("mlp.dense_h_to_4h")),
        dense_4h_to_h=read(get("mlp.dense_4h_to_h")),
    )


def final_norm(model: PreTrainedModel, read_norm: Callable[[nn.Module], nn.Module]) -> Norm:
    """The LayerNorm before the head."""
    return _norm(read_norm(model.base_model.get_submodule("final_layernorm")))


def _norm(module: nn.Module) -> Norm:
    return Norm.of(cast(nn.LayerNorm, module))


def layout(ids_BK: Tensor, config: ChatGLMConfig) -> RowLayout:
    """Prefix and both position streams of rows that begin with a prompt, ``<sop>`` included."""
    found = read_layout(ids_BK, config, torch.ones_like(ids_BK, dtype=torch.bool))
    return RowLayout(found.prefix_end_B, found.position_ids_B2S)


def angles(position_ids_B2K: Tensor, config: ChatGLMConfig) -> Angles:
    """``(B, K, 2, D/4)``; see `rotary_angles`."""
    return Angles(*rotary_angles(position_ids_B2K, config.head_dim))


def prompt_angles(angles: Angles, dtype: torch.dtype) -> Angles:
    """``(B, 1, 1, S, D)``; see `whole_angles`."""
    return Angles(*(angle[:, None, None].to(dtype) for angle in whole_angles(*angles)))


def read_block(
    hidden_BSH: Tensor,
    block: Block,
    keys_BNSD: Tensor,
    values_BNSD: Tensor,
    mask_B1SS: Tensor,
    angles: Angles,
) -> Tensor:
    """One layer on whole prompts, see `DecodingBlock.read_block`.

    For a short prompt the host launches kernels more slowly than a GPU runs them, so they are few.
    """
    normed, mixed_BN3SD = _project(hidden_BSH, block, keys_BNSD.shape[-1])
    query_key_BN2SD, value_BNSD = mixed_BN3SD[:, :, :2], mixed_BN3SD[:, :, 2]
    query_BNSD, key_BNSD = rotate_whole(query_key_BN2SD, *angles).unbind(2)
    num_before = keys_BNSD.shape[2] - hidden_BSH.shape[1]
    keys_BNSD[:, :, num_before:].copy_(key_BNSD)
    values_BNSD[:, :, num_before:].copy_(value_BNSD)
    context = F.scaled_dot_product_attention(query_BNSD, keys_BNSD, values_BNSD, mask_B1SS)
    return _finish(context.transpose(1, 2).flatten(2), normed, block)


def run_block(
    hidden_B1H: Tensor,
    block: Block,
    keys_BNKD: Tensor,
    values_BNKD: Tensor,
    place: Place,
    mask_B11K: Tensor,
    angles: Angles,
) -> Tensor:
    """One layer on one new token a row, see `DecodingBlock.run_block`."""
    normed, mixed_BN31D = _project(hidden_B1H, block, keys_BNKD.shape[-1])
    # Both at once: a step is made of many small kernels.
    cos, sin = (angle[:, None] for angle in angles)
    turned = rotate(mixed_BN31D[:, :, :2], cos, sin)
    query_BN1D, key_BN1D = turned.unbind(2)
    put(keys_BNKD, place, key_BN1D)
    put(values_BNKD, place, mixed_BN31D[:, :, 2])
    return _finish(attend(query_BN1D, keys_BNKD, values_BNKD, mask_B11K), normed, block)


def _project(hidden_BSH: Tensor, block: Block, head_dim: int) -> tuple[Tensor, Tensor]:
    """A layer up to its attention: what the residual takes, and the heads ``(B, N, 3, S, D)``."""
    normed_BSH = block.input_norm(hidden_BSH)
    heads_BSN3D = block.query_key_value(normed_BSH).unflatten(-1, (-1, 3, head_dim))
    return normed_BSH, heads_BSN3D.movedim(1, 3)


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
    place: Place,
    mask_B11K: None,
    angles: Angles,
) -> Tensor:
    """`run_block` on one new token a row, whose linears have kernels."""
    from glmtune.ops.decoding_attention import attend

    def attend_to_all(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query, key, value = (x_B1ND.squeeze(1) for x_B1ND in (query, key, value))
        return attend(query, key, value, keys_BNKD, values_BNKD, place.column_B, *angles)

    return _in_few_kernels(hidden_B1H, block, keys_BNKD.shape[-1], attend_to_all)


def read_block_in_few_kernels(
    hidden_BSH: Tensor,
    block: Block,
    keys_BNKD: Tensor,
    values_BNKD: Tensor,
    row_B: Tensor,
    mask_B1SS: Tensor,
    angles: Angles,
) -> Tensor:
    """`read_block` for slots, whose linears have kernels."""
    from glmtune.ops.prompt_attention import attend

    def attend_to_prompt(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return attend(query, key, value, keys_BNKD, values_BNKD, row_B, *angles, mask_B1SS)

    return _in_few_kernels(hidden_BSH, block, keys_BNKD.shape[-1], attend_to_prompt)


def _in_few_kernels(
    hidden_BSH: Tensor, block: Block, head_dim: int, attend: Callable[..., Tensor]
) -> Tensor:
    """One layer around its attention, which takes queries, keys and values ``(B, S, N, D)``."""
    from glmtune.ops.decoding_norms import normalise

    # Of all that lies between the kernels.
    num_tokens = hidden_BSH[..., 0].numel()
    dtype = block.query_key_value.input_dtype(num_tokens, block.input_norm.weight.dtype)
    normed = normalise(hidden_BSH, block.input_norm, dtype)
    heads_BSN3D = block.query_key_value.fused(normed).unflatten(-1, (-1, 3, head_dim))
    context = attend(*heads_BSN3D.unbind(3))
    hidden = block.dense.fused(context, residual=normed, alpha=RESIDUAL_SCALE)
    normed = normalise(hidden, block.post_attention_norm, dtype)
    inner = block.dense_h_to_4h.fused(normed, gelu=True)
    return block.dense_4h_to_h.fused(inner, residual=normed, alpha=RESIDUAL_SCALE)


DECODING = DecodingBlock(
    weights_of=weights_of,
    final_norm=final_norm,
    layout=layout,
    angles=angles,
    prompt_angles=prompt_angles,
    read_block=read_block,
    run_block=run_block,
    run_block_in_few_kernels=run_block_in_few_kernels,
    read_block_in_few_kernels=read_block_in_few_kernels,
)
