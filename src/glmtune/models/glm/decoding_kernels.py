"""One layer of Glm or Glm4 on one new token a row, or on prompts of slots, in few kernels.

The mathematics is that of `run_block` and `read_block` in `decoding`, in whose Block the weights
are; a test holds them together. For a few rows a new token takes seven kernels or nine.

Shapes: B rows of a batch, S columns of the longest prompt, K columns of the cache, H hidden,
N heads of queries, G of keys and values, D head size.
"""

from collections.abc import Callable
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

    def attend_to_all(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query, key, value = (x_B1XD.squeeze(1) for x_B1XD in (query, key, value))
        return attend(query, key, value, keys_BGKD, values_BGKD, place.column_B, *angles, True)

    return _in_few_kernels(hidden_B1H, block, keys_BGKD, attend_to_all)


def read_block_in_few_kernels(
    hidden_BSH: Tensor,
    block: "Block",
    keys_BGKD: Tensor,
    values_BGKD: Tensor,
    row_B: Tensor,
    mask_B1SS: Tensor,
    angles: Angles,
) -> Tensor:
    """`read_block` for slots, whose linears have kernels; rows are causal."""
    from glmtune.ops.prompt_attention import attend

    def attend_to_prompt(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return attend(query, key, value, keys_BGKD, values_BGKD, row_B, *angles, None, True)

    return _in_few_kernels(hidden_BSH, block, keys_BGKD, attend_to_prompt)


def _in_few_kernels(
    hidden_BSH: Tensor, block: "Block", keys_BGKD: Tensor, attend: Callable[..., Tensor]
) -> Tensor:
    """One layer around its attention, which takes queries ``(B, S, N, D)``, keys and values."""
    from glmtune.ops.decoding_kernels import project_three
    from glmtune.ops.decoding_norms import normalise

    # Of all that lies between the kernels.
    dtype = block.query.input_dtype(hidden_BSH[..., 0].numel(), block.input_norm.weight.dtype)
    normed = normalise(hidden_BSH, block.input_norm, dtype)
    linears = block.query, block.key, block.value
    mixed_BSX = project_three(normed, [linear.factor(normed) for linear in linears])
    heads_BSXD = mixed_BSX.unflatten(-1, (-1, keys_BGKD.shape[-1]))
    num_kv_heads = keys_BGKD.shape[1]
    num_heads = heads_BSXD.shape[2] - 2 * num_kv_heads
    context = attend(*heads_BSXD.split((num_heads, num_kv_heads, num_kv_heads), 2))
    if block.attended_norm is None:
        hidden = block.output.fused(context, residual=hidden_BSH)
    else:
        attended = block.output.fused(context)
        hidden = normalise(attended, block.attended_norm, dtype, residual=hidden_BSH)
    normed = normalise(hidden, block.mlp_norm, dtype)
    inner = block.gate_up.fused(normed, gated=True)
    if block.mlp_output_norm is None:
        return block.down.fused(inner, residual=hidden)
    return normalise(block.down.fused(inner), block.mlp_output_norm, dtype, residual=hidden)
