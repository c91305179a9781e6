"""What one layer of Glm or Glm4 computes while answering, as plain functions.

Shapes: B rows of a batch, S columns of the longest prompt, K columns of the cache, H hidden,
N heads of queries, G of keys and values, D head size.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from glmtune.models.decoding import (
    Angles,
    DecodingBlock,
    Place,
    Projection,
    RowLayout,
    attend,
    put,
)
from glmtune.models.glm.decoding_kernels import (
    read_block_in_few_kernels,
    run_block_in_few_kernels,
)
from glmtune.models.glm.rotary import pair_angles
from glmtune.models.low_rank import split_lora
from glmtune.ops.linear import lay_together
from glmtune.ops.norm import RmsNorm
from glmtune.ops.rotary import rotate_pairs, rotate_whole_pairs, whole_pair_angles


class Block(NamedTuple):
    """What one layer computes with; Glm has no norms of what attention and MLP give."""

    input_norm: RmsNorm
    query: Projection
    key: Projection
    value: Projection
    output: Projection
    attended_norm: RmsNorm | None
    mlp_norm: RmsNorm
    gate_up: Projection
    down: Projection
    mlp_output_norm: RmsNorm | None


def weights_of(
    layer: nn.Module,
    read: Callable[[nn.Module], Projection],
    read_norm: Callable[[nn.Module], nn.Module],
) -> Block:
    """The weights of a layer, in PEFT's wrapping or plain."""
    get = layer.get_submodule

    def norm(name: str) -> RmsNorm:
        return RmsNorm.of(read_norm(get(name)))

    has_four_norms = hasattr(layer, "post_self_attn_layernorm")
    qkv = [get(f"self_attn.{name}_proj") for name in "qkv"]
    bases = [split_lora(module)[0] for module in qkv]
    if all(type(base) is nn.Linear and base.weight.is_cuda for base in bases):
        lay_together(cast("list[nn.Linear]", bases))  # one product for many rows
    query, key, value, output = map(read, [*qkv, get("self_attn.o_proj")])
    return Block(
        norm("input_layernorm"),
        query,
        key,
        value,
        output,
        norm("post_self_attn_layernorm") if has_four_norms else None,
        norm("post_attention_layernorm"),
        read(get("mlp.gate_up_proj")),
        read(get("mlp.down_proj")),
        norm("post_mlp_layernorm") if has_four_norms else None,
    )


def final_norm(model: PreTrainedModel, read_norm: Callable[[nn.Module], nn.Module]) -> RmsNorm:
    """The norm before the head."""
    return RmsNorm.of(read_norm(model.base_model.get_submodule("norm")))


def layout(ids_BK: Tensor, config: Any) -> RowLayout:
    """Rows are causal, and their positions count from 0."""
    causal_B = torch.zeros(len(ids_BK), dtype=torch.long, device=ids_BK.device)
    columns_K = torch.arange(ids_BK.shape[1], device=ids_BK.device)
    return RowLayout(causal_B, columns_K.expand(ids_BK.shape))


def angles(positions_BK: Tensor, config: Any) -> Angles:
    """``(B, K, D / 2)``, of the pairs of a head."""
    return Angles(*pair_angles(positions_BK, config))


def prompt_angles(angles: Angles, dtype: torch.dtype) -> Angles:
    """``(B, 1, S, D)``, to broadcast over heads; see `whole_pair_angles`."""
    return Angles(*(angle[:, None].to(dtype) for angle in whole_pair_angles(*angles)))


def read_block(
    hidden_BSH: Tensor,
    block: Block,
    keys_BGSD: Tensor,
    values_BGSD: Tensor,
    mask_B1SS: Tensor,
    angles: Angles,
) -> Tensor:
    """One layer on whole prompts, see `DecodingBlock.read_block`.

    Rows are causal and padded at their ends, so without a prefix the mask says nothing more.
    Without it torch has a kernel for shared heads, which with it are copied. For a short prompt the
    host launches kernels more slowly than a GPU runs them, so they are few.
    """
    query, key, value = _project(hidden_BSH, block, keys_BGSD.shape[-1])
    query, key = rotate_whole_pairs(query, *angles), rotate_whole_pairs(key, *angles)
    num_before = keys_BGSD.shape[2] - hidden_BSH.shape[1]
    keys_BGSD[:, :, num_before:].copy_(key)
    values_BGSD[:, :, num_before:].copy_(value)
    # The first row of torch's causal mask would see one column of a prefix, where it sees all.
    mask = mask_B1SS if num_before else None
    context = F.scaled_dot_product_attention(
        query, keys_BGSD, values_BGSD, mask, is_causal=mask is None, enable_gqa=True
    )
    return _finish(hidden_BSH, context.transpose(1, 2).flatten(2), block)


def run_block(
    hidden_B1H: Tensor,
    block: Block,
    keys_BGKD: Tensor,
    values_BGKD: Tensor,
    place: Place,
    mask_B11K: Tensor,
    angles: Angles,
) -> Tensor:
    """One layer on one new token a row, see `DecodingBlock.run_block`."""
    query, key, value = _project(hidden_B1H, block, keys_BGKD.shape[-1])
    cos, sin = (angle[:, None].to(query.dtype) for angle in angles)
    put(keys_BGKD, place, rotate_pairs(key, cos, sin))
    put(values_BGKD, place, value)
    context = attend(rotate_pairs(query, cos, sin), keys_BGKD, values_BGKD, mask_B11K)
    return _finish(hidden_B1H, context, block)


def _project(hidden_BSH: Tensor, block: Block, head_dim: int) -> list[Tensor]:
    """Queries ``(B, N, S, D)``, keys and values ``(B, G, S, D)``, not rotated."""
    normed_BSH = block.input_norm(hidden_BSH)
    return [
        linear(normed_BSH).unflatten(-1, (-1, head_dim)).transpose(1, 2)
        for linear in (block.query, block.key, block.value)
    ]


def _finish(hidden_BSH: Tensor, context_BSH: Tensor, block: Block) -> Tensor:
    """A layer from its attention on."""
    attended = block.output(context_BSH)
    if block.attended_norm is not None:
        attended = block.attended_norm(attended)
    hidden_BSH = hidden_BSH + attended
    gate, up = block.gate_up(block.mlp_norm(hidden_BSH)).chunk(2, -1)
    made = block.down(F.silu(gate) * up)
    if block.mlp_output_norm is not None:
        made = block.mlp_output_norm(made)
    return hidden_BSH + made


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
