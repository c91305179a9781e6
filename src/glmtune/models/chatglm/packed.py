"""ChatGLM-6B's layer on packed rows, as a plain function of tensors.

Shapes: T tokens of a pack, L supervised tokens, H hidden, N heads, D head size.
"""

import math
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from glmtune.models.chatglm.modeling import RESIDUAL_SCALE, ChatGLMBlock
from glmtune.models.family import PackedBlock
from glmtune.models.packed import Attention, LayerDropout, Linear, linear_of
from glmtune.ops.linear import frozen_linear
from glmtune.ops.lora import fork_factors
from glmtune.ops.norm import Norm
from glmtune.ops.rotary import rotary_angles


class BlockWeights(NamedTuple):
    """The weights of one layer."""

    input_layernorm: Norm
    query_key_value: Linear
    dense: Linear
    post_attention_layernorm: Norm
    dense_h_to_4h: Linear
    dense_4h_to_h: Linear


def block(
    hidden_TH: Tensor,
    weights: BlockWeights,
    attention: Attention,
    cos: Tensor,
    sin: Tensor,
    dropout: LayerDropout | None,
    wanted_L: Tensor | None = None,
) -> Tensor:
    """One layer, ``(T, H)`` to ``(T, H)``: what `ChatGLMBlock` computes.

    Args:
        hidden_TH: output of the previous layer.
        weights: of this layer.
        attention: the same for all layers, as are `cos` and `sin`.
        cos: ``(T, 2, D / 4)``, see `ops.rotary`.
        sin: of the same shape.
        dropout: of this layer; None for none.
        wanted_L: indices of the tokens to compute outputs ``(L, H)`` for: in the last layer only
            the supervised tokens. Keys and values are those of all tokens.
    """
    drop_1, drop_2, drop_3, drop_4 = dropout.each() if dropout else (None,) * 4
    normed_TH = weights.input_layernorm(hidden_TH)
    num_heads = normed_TH.shape[1] // (4 * cos.shape[-1])
    frozen, adapter = weights.query_key_value
    forked_TH, (update,) = fork_factors(normed_TH, [adapter], [drop_1])
    y_TN3D = frozen_linear(forked_TH, frozen).unflatten(-1, (num_heads, -1))
    context_TH = attention.attend_fused(y_TN3D, update, cos, sin).flatten(1)
    if wanted_L is not None:
        normed_TH, context_TH = normed_TH[wanted_L], context_TH[wanted_L]
    attended_TH = weights.dense(context_TH, drop_2)
    normed_TH = weights.post_attention_layernorm(normed_TH * RESIDUAL_SCALE + attended_TH)
    inner = gelu(weights.dense_h_to_4h(normed_TH, drop_3))
    return normed_TH * RESIDUAL_SCALE + weights.dense_4h_to_h(inner, drop_4)


def gelu(x: Tensor) -> Tensor:
    """Tanh form of GELU; on a GPU, where it is fused, as a sigmoid, which takes one exponential."""
    if not x.is_cuda:
        return F.gelu(x, approximate="tanh")
    y = x.float()
    return (y * torch.sigmoid(math.sqrt(8 / math.pi) * (y + 0.044715 * y**3))).to(x.dtype)


def weights_of(layer: nn.Module) -> BlockWeights:
    """A layer's weights, not copied."""
    layer = cast(ChatGLMBlock, layer)
    attention, mlp = layer.attention, layer.mlp
    return BlockWeights(
        Norm.of(layer.input_layernorm),
        linear_of(attention.query_key_value),
        linear_of(attention.dense),
        Norm.of(layer.post_attention_layernorm),
        linear_of(mlp.dense_h_to_4h),
        linear_of(mlp.dense_4h_to_h),
    )


def angles(position_ids_2T: Tensor, config: Any) -> tuple[Tensor, Tensor]:
    """Cosines and sines of a pack's positions, float32 ``(T, 2, D / 4)``."""
    cos, sin = rotary_angles(position_ids_2T[None], config.head_dim)
    return cos[0].contiguous(), sin[0].contiguous()


def _final_norm(model: PreTrainedModel) -> Norm:
    return Norm.of(cast(nn.LayerNorm, model.base_model.final_layernorm))


PACKED = PackedBlock(
    num_linears=4,
    weights_of=weights_of,
    block=block,
    angles=angles,
    final_norm=_final_norm,
)
