"""A layer of Glm or Glm4 on packed rows, as a plain function of tensors.

Shapes: T tokens of a pack, L supervised tokens, H hidden, X heads of queries, keys and values
together, D head size.
"""

from typing import Any, NamedTuple, cast

from torch import Tensor, nn
from transformers import PreTrainedModel

from glmtune.models.family import PackedBlock
from glmtune.models.glm.rotary import pair_angles
from glmtune.models.packed import Attention, LayerDropout, Linear, frozen_together, linear_of
from glmtune.ops.linear import Frozen, products
from glmtune.ops.lora import LowRank, fork_factors, gated_linears
from glmtune.ops.norm import RmsNorm


class BlockWeights(NamedTuple):
    """The weights of one layer; Glm has no norms of what attention and MLP give."""

    input_norm: RmsNorm
    qkv: tuple[Frozen, ...]
    """Frozen linears of queries, keys and values, as one where that takes no memory."""
    qkv_adapters: tuple[LowRank | None, ...]
    num_kv_heads: int
    output: Linear
    attended_norm: RmsNorm | None
    mlp_norm: RmsNorm
    gate_up: Linear
    down: Linear
    mlp_output_norm: RmsNorm | None


def block(
    hidden_TH: Tensor,
    weights: BlockWeights,
    attention: Attention,
    cos: Tensor,
    sin: Tensor,
    dropout: LayerDropout | None,
    wanted_L: Tensor | None = None,
) -> Tensor:
    """One layer, ``(T, H)`` to ``(T, H)``: what transformers' decoder layer computes.

    Args:
        hidden_TH: what the layer before gives.
        weights: of this layer.
        attention: of all layers, as the next two.
        cos: ``(T, 2, D / 4)``, of the pairs of a head in their order.
        sin: of the same shape.
        dropout: of this layer; None for none.
        wanted_L: places of the tokens whose output is wanted, which makes it ``(L, H)``: the last
            layer gives the supervised tokens alone. Keys and values are those of all tokens.
    """
    drops = list(dropout.each(together=3)) if dropout else [None] * NUM_LINEARS
    normed_TH, updates = fork_factors(
        weights.input_norm(hidden_TH), weights.qkv_adapters, drops[:3]
    )
    heads_TXD = products(normed_TH, weights.qkv).unflatten(-1, (-1, 4 * cos.shape[-1]))
    context_TH = attention.attend(
        heads_TXD, weights.num_kv_heads, updates, cos, sin, interleaved=True
    ).flatten(1)
    if wanted_L is not None:
        hidden_TH, context_TH = hidden_TH[wanted_L], context_TH[wanted_L]
    attended_TH = weights.output(context_TH, drops[3])
    if weights.attended_norm is not None:
        attended_TH = weights.attended_norm(attended_TH)
    hidden_TH = hidden_TH + attended_TH
    made_TH = gated_linears(
        weights.mlp_norm(hidden_TH), weights.gate_up, weights.down, (drops[4], drops[5])
    )
    if weights.mlp_output_norm is not None:
        made_TH = weights.mlp_output_norm(made_TH)
    return hidden_TH + made_TH


NUM_LINEARS = 6
_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


def weights_of(layer: nn.Module) -> BlockWeights:
    """A layer's weights, not copied."""
    get = layer.get_submodule
    has_four_norms = hasattr(layer, "post_self_attn_layernorm")

    def optional_norm(name: str) -> RmsNorm | None:
        return RmsNorm.of(get(name)) if has_four_norms else None

    qkv = [get(name) for name in _QKV]
    return BlockWeights(
        RmsNorm.of(get("input_layernorm")),
        frozen_together(qkv),
        tuple(linear_of(module).adapter for module in qkv),
        cast(Any, get("self_attn")).config.num_key_value_heads,
        linear_of(get("self_attn.o_proj")),
        optional_norm("post_self_attn_layernorm"),
        RmsNorm.of(get("post_attention_layernorm")),
        linear_of(get("mlp.gate_up_proj")),
        linear_of(get("mlp.down_proj")),
        optional_norm("post_mlp_layernorm"),
    )


def angles(position_ids_1T: Tensor, config: Any) -> tuple[Tensor, Tensor]:
    """Cosines and sines of a pack's positions, float32 ``(T, 2, D / 4)``."""
    cos, sin = pair_angles(position_ids_1T[0], config)
    return cos.unflatten(-1, (2, -1)).contiguous(), sin.unflatten(-1, (2, -1)).contiguous()


def _final_norm(model: PreTrainedModel) -> RmsNorm:
    return RmsNorm.of(model.base_model.get_submodule("norm"))


PACKED = PackedBlock(
    num_linears=NUM_LINEARS,
    weights_of=weights_of,
    block=block,
    angles=angles,
    final_norm=_final_norm,
    together=(_QKV,),
)
