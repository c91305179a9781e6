"""Any model as two plain functions, for answering: `prefill` prompts, `decode` a token.

The family defines what one layer computes: its `DecodingBlock` has that as plain functions of a
tuple of weights. Keys and values are written in place into tensors of fixed size, at columns given
by a tensor, so that every step is the same sequence of kernels, which can be captured and replayed.
Positions and mask are computed beforehand; while decoding, nothing is derived from the ids.

Shapes: B rows of a batch, S columns of the longest prompt, K columns of a cache, H hidden, N heads
of queries, M of keys and values, D size of a head, V vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from glmtune.models.shape import Shape
from glmtune.ops.attention import additive_mask, right_kernels

Projection = Any
"""A callable linear with everything that belongs to it: ``(..., in)`` to ``(..., out)``."""
Normalisation = Any
"""A callable norm: ``(..., H)`` to ``(..., H)``. It has a `weight`; see `ops.norm.Norm`."""


class Weights(NamedTuple):
    """The weights of a whole model."""

    embed: Callable[[Tensor], Tensor]
    """Ids ``(B, S)`` to hidden states in the compute type, ``(B, S, H)``."""
    blocks: Sequence[Any]
    """The weights of each layer, from the family's `weights_of`."""
    final_norm: Normalisation
    head: Projection
    linears: Sequence[Projection]
    """Every linear of the model, for decisions that depend on their kinds."""


class KeyValueCache(NamedTuple):
    """Keys and values of every layer, ``(layers, B, M, K, D)`` each, in columns of K.

    Columns that are masked must still hold finite numbers, hence the zeros at the start.
    """

    keys: Tensor
    values: Tensor

    @classmethod
    def zeros(cls, shape: Shape, num_rows: int, num_columns: int, like: Tensor) -> "KeyValueCache":
        """Make an empty cache for a model, of the type and on the device of a tensor."""
        sizes = shape.num_layers, num_rows, shape.num_kv_heads, num_columns, shape.head_dim
        return cls(like.new_zeros(sizes), like.new_zeros(sizes))

    def part(self, rows: slice, num_columns: int | None) -> "KeyValueCache":
        """Some rows of the cache, up to a column; not a copy."""
        return KeyValueCache(*(tensor[:, rows, :, :num_columns] for tensor in self))


class Angles(NamedTuple):
    """Cosines and sines of some tokens' positions, ``(B, S, ...)``; the rest is the family's."""

    cos: Tensor
    sin: Tensor


class Place(NamedTuple):
    """Where in a cache the newest token of each row is written."""

    row_B: Tensor
    """Row indices 0, 1, 2..."""
    column_B: Tensor


class RowLayout(NamedTuple):
    """The layout of rows, derived from the ids of their prompts."""

    prefix_end_B: Tensor
    """The column where the bidirectional prefix ends; 0 for a causal row."""
    positions: Tensor
    """Positions of every column, as the family's `angles` takes them."""


class DecodingBlock(NamedTuple):
    """What a family provides for decoding."""

    weights_of: Callable[
        [nn.Module, Callable[[nn.Module], Projection], Callable[[nn.Module], nn.Module]], Any
    ]
    """``(layer, read, read_norm)`` to the weights of one layer, a tuple. Each linear of the layer
    is passed through `read`, each norm through `read_norm`, which moves it to the device."""
    final_norm: Callable[[PreTrainedModel, Callable[[nn.Module], nn.Module]], Normalisation]
    """``(model, read_norm)`` to the norm before the head."""
    layout: Callable[[Tensor, Any], RowLayout]
    """``(ids (B, K), config)`` to the layout of rows that begin with a whole prompt. The columns
    after a prompt belong to its answer: their ids are ignored, their positions are known."""
    angles: Callable[[Tensor, Any], Angles]
    """``(positions, config)`` to the angles of every column."""
    prompt_angles: Callable[[Angles, torch.dtype], Any]
    """Angles as `read_block` takes them, computed once for all layers, in a type of floats."""
    read_block: Callable[..., Tensor]
    """One layer on whole prompts: ``(hidden (B, S, H), weights, keys (B, M, P + S, D), values,
    mask, angles)`` to ``(B, S, H)``. Writes keys and values of the S columns behind a prefix of P,
    which is there already; the mask is `additive_mask`'s."""
    run_block: Callable[..., Tensor]
    """One layer on one new token a row: ``(hidden (B, 1, H), weights, keys (B, M, K, D), values,
    place, mask (B, 1, 1, K), angles)`` to ``(B, 1, H)``. Writes its key and value at `place`; the
    mask is true for visible columns."""
    run_block_in_few_kernels: Callable[..., Tensor] | None = None
    """`run_block` by `ops.decoding_kernels`, on a GPU; it ignores the mask."""
    read_block_in_few_kernels: Callable[..., Tensor] | None = None
    """`read_block` on a GPU, by `ops.prompt_attention`: ``(hidden (B, S, H), weights, keys (slots,
    M, K, D), values, row_B, mask, angles)`` to ``(B, S, H)``. Writes the first S columns of the
    slots in `row_B`; the angles are those of `angles`, contiguous."""


def prefill(
    weights: Weights,
    block: DecodingBlock,
    input_ids_BS: Tensor,
    length_B: Tensor,
    mask_B1SS: Tensor,
    angles: Angles,
    cache: KeyValueCache,
    row_B: Tensor | None = None,
    in_few_kernels: bool = False,
) -> Tensor:
    """Read whole prompts into a cache; return the next-token logits ``(B, V)``.

    Args:
        weights: weights of the model.
        block: decoding block of its family.
        input_ids_BS: prompts, each row padded at its end.
        length_B: tokens of each row without padding.
        mask_B1SS: from `prefix_lm_mask`; with a prefix ``(B, 1, S, P + S)``.
        angles: angles of these tokens.
        cache: the cache to write to, of B rows and S columns, behind those of a prefix.
        row_B: where the rows are in the cache, if it has others too; S columns of them are written,
            and there is no prefix. Rows that are in one place must be equal.
        in_few_kernels: use the family's `read_block_in_few_kernels`; `row_B` is given then.
    """
    hidden_BSH = weights.embed(input_ids_BS)
    mask = additive_mask(mask_B1SS, hidden_BSH.dtype)
    num_rows = len(input_ids_BS)
    with right_kernels():
        if in_few_kernels:
            assert block.read_block_in_few_kernels is not None, "the family has none"
            assert row_B is not None, "the rows have no slots"
            given = row_B.contiguous(), mask, Angles(*(angle.contiguous() for angle in angles))
            for layer, *kept in zip(weights.blocks, *cache, strict=True):
                hidden_BSH = block.read_block_in_few_kernels(hidden_BSH, layer, *kept, *given)
        else:
            ready = block.prompt_angles(angles, hidden_BSH.dtype)
            hidden_BSH = _read_blocks(hidden_BSH, weights, block, mask, ready, cache, row_B)
    last_B1H = hidden_BSH[torch.arange(num_rows, device=length_B.device), length_B - 1, None]
    return run_head(last_B1H, weights.final_norm, weights.head)


def _read_blocks(
    hidden_BSH: Tensor,
    weights: Weights,
    block: DecodingBlock,
    mask: Tensor,
    angles: Any,
    cache: KeyValueCache,
    row_B: Tensor | None,
) -> Tensor:
    """All layers on whole prompts, by the family's `read_block`."""
    num_rows, width = hidden_BSH.shape[:2]
    # One layer's at a time, so that a pass needs little memory of its own.
    sizes = num_rows, cache.keys.shape[2], width, cache.keys.shape[4]
    own = None if row_B is None else [tensor.new_empty(sizes) for tensor in cache]
    for layer, *kept in zip(weights.blocks, *cache, strict=True):
        written = own or kept
        hidden_BSH = block.read_block(hidden_BSH, layer, *written, mask, angles)
        if row_B is not None:
            for old, new in zip(kept, written, strict=True):
                old[:, :, :width].index_copy_(0, row_B, new)
    return hidden_BSH


def decode(
    weights: Weights,
    token_B1: Tensor,
    place: Place,
    mask_B11K: Tensor | None,
    angles: Angles,
    cache: KeyValueCache,
    run_block: Callable[..., Tensor],
    run_head: Callable[..., Tensor],
) -> Tensor:
    """Read one more token a row into a cache; return the next-token logits ``(B, V)``.

    Args:
        weights: weights of the model.
        token_B1: the newest tokens.
        place: where they are written in the cache.
        mask_B11K: true for columns that hold a real token, these included; None for functions in
            few kernels, which attend to all columns up to `place`.
        angles: angles of these tokens.
        cache: the cache to write to, of which K columns are attended to.
        run_block: `run_block` of the family's `DecodingBlock`, plain, compiled or in few kernels.
        run_head: the `run_head` of this module, or another form of it.
    """
    hidden_B1H = weights.embed(token_B1)
    for layer, keys, values in zip(weights.blocks, *cache, strict=True):
        hidden_B1H = run_block(hidden_B1H, layer, keys, values, place, mask_B11K, angles)
    return run_head(hidden_B1H, weights.final_norm, weights.head)


def run_head(hidden_B1H: Tensor, final_norm: Normalisation, head: Projection) -> Tensor:
    """Logits ``(B, V)`` of the last tokens' hidden states."""
    return head(final_norm(hidden_B1H)).squeeze(1)


def run_head_in_few_kernels(
    hidden_B1H: Tensor, final_norm: Normalisation, head: Projection
) -> Tensor:
    """`run_head` by `ops.decoding_kernels`."""
    from glmtune.ops.decoding_norms import normalise

    dtype = final_norm.weight.dtype
    normed = normalise(hidden_B1H, final_norm, head.input_dtype(len(hidden_B1H), dtype))
    return head.fused(normed, dtype=dtype).squeeze(1)


def put(columns_BMKD: Tensor, place: Place, new_BM1D: Tensor) -> None:
    """Write keys or values of one new token a row into a cache."""
    columns_BMKD[place.row_B, :, place.column_B] = new_BM1D[:, :, 0]


COLUMNS_A_PRODUCT = 128


def attend(query_BN1D: Tensor, keys_BMKD: Tensor, values_BMKD: Tensor, mask_B11K: Tensor) -> Tensor:
    """Attention of one new token to K columns: ``(B, 1, N D)``.

    Where queries have more heads than keys, neighbouring query heads share a key head. For one
    query torch's fused kernels start one thread block a head and are slow; these are two
    matrix-vector products that a compiler turns into reductions. On a CPU they are taken of 128
    columns at a time: what a row attends to is then summed in the same order however many columns
    its neighbours need. They are taken in float32 there: libraries' products of 16 bits sum by how
    columns lie in memory on some processors.
    """
    query_BMGD = query_BN1D.squeeze(2).unflatten(1, (keys_BMKD.shape[1], -1))
    on_cpu = query_BN1D.device.type == "cpu"
    size = COLUMNS_A_PRODUCT if on_cpu else keys_BMKD.shape[2]
    dtype = torch.float32 if on_cpu else values_BMKD.dtype
    query_BMGD = query_BMGD.to(dtype)
    products = [query_BMGD @ keys.to(dtype).transpose(-1, -2) for keys in keys_BMKD.split(size, 2)]
    scores = _joined(products).float() * keys_BMKD.shape[-1] ** -0.5
    seen = scores.masked_fill(~mask_B11K, -torch.inf).softmax(-1).to(dtype)
    total, *more = (
        part @ values.to(dtype)
        for part, values in zip(seen.split(size, -1), values_BMKD.split(size, 2), strict=True)
    )
    for summand in more:
        total = total + summand
    return total.to(values_BMKD.dtype).flatten(1)[:, None]


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), -1)
