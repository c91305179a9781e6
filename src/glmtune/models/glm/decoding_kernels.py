"""One layer of Glm or Glm4 on one new token of a few rows, in seven kernels.

The mathematics is that of `run_block` in `decoding`, in whose Block the weights are; a test holds
the two together.

Shapes: B rows of a batch, K columns of the cache, H hidden, N heads of queries, G of keys and
values, D head size.
"""

from typing import TYPE_CHECKING

from torch import Tensor

from glmtune.models.decoding import Angles, Place

if TYPE_CHECKING:
    from glmtune.models.glm.decoding import Block


def run_block_in_few_kernels(
    hidden_B1H: Tensor,
    block: "Block",
    keys_BGKD: Tensor,
    values_BGKD: Tensor,
    place: Place,
    mask_B11K: None,
    angles: Angles,
) -> Tensor:
    """`run_block` on one new token of a few rows, whose linears have kernels."""
    from glmtune.ops.decoding_attention import attend
    from glmtune.ops.decoding_kernels import project_three
    from glmtune.ops.decoding_norms import normalise

    dtype = block.query.input_dtype  # of all that lies between the kernels
    hidden, norm = hidden_B1H.to(dtype), block.input_norm
    linears = block.query, block.key, block.value
    mixed_B1X = project_three(hidden, [linear.factor(hidden, norm) for linear in linears], norm)
    heads_BXD = mixed_B1X.squeeze(1).unflatten(-1, (-1, keys_BGKD.shape[-1]))
    num_kv_heads = keys_BGKD.shape[1]
    num_heads = heads_BXD.shape[1] - 2 * num_kv_heads
    query, key, value = heads_BXD.split((num_heads, num_kv_heads, num_kv_heads), 1)
    context = attend(
        query, key, value, keys_BGKD, values_BGKD, place.column_B, *angles, interleaved=True
    )
    if block.attended_norm is None:
        hidden = block.output.fused(context, residual=hidden)
    else:
        attended = block.output.fused(context)
        hidden = normalise(attended, block.attended_norm, dtype, residual=hidden)
    inner = block.gate_up.fused(hidden, norm=block.mlp_norm, gated=True)
    if block.mlp_output_norm is None:
        return block.down.fused(inner, residual=hidden)
    return normalise(block.down.fused(inner), block.mlp_output_norm, dtype, residual=hidden)
