"""One layer of Glm or Glm4 on one new token a row: for a few rows in seven kernels or nine.

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
    """`run_block` on one new token a row, whose linears have kernels."""
    from glmtune.ops.decoding_attention import attend
    from glmtune.ops.decoding_kernels import project_three
    from glmtune.ops.decoding_norms import normalise

    # Of all that lies between the kernels.
    dtype = block.query.input_dtype(len(hidden_B1H), block.input_norm.weight.dtype)
    normed = normalise(hidden_B1H, block.input_norm, dtype)
    linears = block.query, block.key, block.value
    mixed_B1X = project_three(normed, [linear.factor(normed) for linear in linears])
    heads_BXD = mixed_B1X.squeeze(1).unflatten(-1, (-1, keys_BGKD.shape[-1]))
    num_kv_heads = keys_BGKD.shape[1]
    num_heads = heads_BXD.shape[1] - 2 * num_kv_heads
    query, key, value = heads_BXD.split((num_heads, num_kv_heads, num_kv_heads), 1)
    context = attend(
        query, key, value, keys_BGKD, values_BGKD, place.column_B, *angles, interleaved=True
    )
    if block.attended_norm is None:
        hidden = block.output.fused(context, residual=hidden_B1H)
    else:
        attended = block.output.fused(context)
        hidden = normalise(attended, block.attended_norm, dtype, residual=hidden_B1H)
    normed = normalise(hidden, block.mlp_norm, dtype)
    inner = block.gate_up.fused(normed, gated=True)
    if block.mlp_output_norm is None:
        return block.down.fused(inner, residual=hidden)
    return normalise(block.down.fused(inner), block.mlp_output_norm, dtype, residual=hidden)
