"""A model's weights for decoding: adapter applied or merged, in 16, 8 or 4 bits."""

import sys
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import is_dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from glmtune.errors import UserError
from glmtune.generation.linears import (
    Adapted,
    AdaptedByRow,
    DenseLinear,
    GroupQuantised,
    Int4,
    Int8,
    SeparateLinear,
    can_be_fused,
)
from glmtune.generation.mixed import MixedAdapters
from glmtune.models.decoding import DecodingBlock, Projection, Weights
from glmtune.models.family import layers_of
from glmtune.models.low_rank import split_lora
from glmtune.ops.lora import LowRank


def read_weights(
    model: Any,
    block: DecodingBlock,
    *,
    bits: int = 16,
    merge: bool = False,
    device: torch.device | None = None,
    known: dict[tuple[nn.Module, int], Projection] | None = None,
    separate: bool = False,
    adapters: MixedAdapters | None = None,
) -> Weights:
    """The current weights of a model: with its adapter, unless that is disabled.

    In 16 bits they are the model's own tensors, not copies, in the model's type, if they are on
    that device.

    Args:
        model: plain or in PEFT's wrapping. A linear of an unknown kind (from a quantised base, for
            example) is called as a module.
        block: the decoding block of the model's family.
        bits: 16; 8 or 4 round the linears, the head included, and keep copies of them.
        merge: add the adapter to copies of the weights it adapts, instead of applying it to each
            token; faster, and rounded to the weights' type.
        device: where the weights are to be; by default where the model is.
        known: linears read before in the same way, without their adapters; those read now are
            added. So the weights that base and tuned model share are rounded and held only once.
        separate: take forms of the products in which no row depends on the others, where there are
            any.
        adapters: adapters of the model, which has none on it, to lay beside its linears.

    Raises:
        UserError: the weights cannot be rounded to that many bits.
    """
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model
    device = device or plain.device
    linears: list[Projection] = []

    def read(linear: nn.Module) -> Projection:
        found = _read_projection(
            linear, bits, merge, device, {} if known is None else known, separate
        )
        linears.append(found if adapters is None else adapters.beside(linear, found, device))
        return linears[-1]

    read_norm = partial(_read_norm, device=device)
    final_norm = block.final_norm(plain, read_norm)
    return Weights(
        embed=_read_embedding(plain.get_input_embeddings(), final_norm.weight.dtype, device),
        blocks=[block.weights_of(layer, read, read_norm) for layer in layers_of(plain)],
        final_norm=final_norm,
        head=read(plain.get_output_embeddings()),
        linears=linears,
    )


def can_be_captured(weights: Weights) -> bool:
    """Whether every linear is of a known kind, none of which makes the host wait."""
    kinds = DenseLinear, Int8, Int4, GroupQuantised
    return all(isinstance(_base_of(linear), kinds) for linear in weights.linears)


def most_rows_for_kernels(
    weights: Weights, block: DecodingBlock, head_dim: int, compiled: bool
) -> int:
    """The most rows of a batch for which one-token steps use `ops.decoding_kernels`.

    Compiled layers take the batches whose products are torch's own either way.
    """
    if block.run_block_in_few_kernels is None or not weights.final_norm.weight.is_cuda:
        return 0
    if head_dim & (head_dim - 1) or find_spec("triton") is None:  # not a power of two
        return 0
    if not all(can_be_fused(linear) for linear in weights.linears):
        return 0
    if not compiled:
        return sys.maxsize
    return 4 if any(isinstance(_base_of(x), GroupQuantised) for x in weights.linears) else 1


def num_bytes(weights: Weights) -> int:
    """Bytes of weights that one step reads; of the embedding it reads next to nothing."""
    read = (*weights.blocks, weights.final_norm, weights.head)
    return sum(tensor.nbytes for tensor in _tensors(read))


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in nested tuples, linears and modules."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, nn.Module):
        yield from value.parameters()
    elif isinstance(value, tuple) or is_dataclass(value):
        for part in value if isinstance(value, tuple) else vars(value).values():
            yield from _tensors(part)


def _base_of(linear: Projection) -> Projection:
    return linear.base if isinstance(linear, (Adapted, AdaptedByRow)) else linear


def _read_norm(norm: nn.Module, device: torch.device) -> nn.Module:
    there = all(parameter.device == device for parameter in norm.parameters())
    return norm if there else deepcopy(norm).to(device)


def _read_embedding(
    embedding: nn.Embedding, dtype: torch.dtype, device: torch.device
) -> Callable[[Tensor], Tensor]:
    if type(embedding) is nn.Embedding:
        return partial(F.embedding, weight=embedding.weight.to(device))
    return lambda ids: embedding(ids).to(dtype)


def _read_projection(
    linear: nn.Module,
    bits: int,
    merge: bool,
    device: torch.device,
    known: dict[tuple[nn.Module, int], Projection],
    separate: bool,
) -> Projection:
    base, updates = split_lora(linear)
    if type(base) is not nn.Linear:
        if bits != 16:
            raise UserError(
                f"{bits} bits: the model has linears of another kind ({type(linear).__module__}."
                f"{type(linear).__name__}), which are not rounded again; leave the bits out"
            )
        return Adapted(base, updates) if updates else base
    updates = tuple(LowRank(a.to(device), b.to(device), scale) for a, b, scale in updates)
    if merge and updates:
        weight = base.weight.detach().to(device)
        total = weight.float()
        for a_RI, b_OR, scale in updates:
            total = total + b_OR.float() @ a_RI.float() * scale
        return _round(total.to(weight.dtype), base.bias, bits, device, separate)
    key = base, id(base.bias)  # an adapter may have a bias of its own
    if key not in known:  # do not copy it to the device for nothing
        known[key] = _round(base.weight.detach(), base.bias, bits, device, separate)
    return Adapted(known[key], updates) if updates else known[key]


def _round(
    weight: Tensor, bias: Tensor | None, bits: int, device: torch.device, separate: bool
) -> Projection:
    weight, bias = weight.to(device), None if bias is None else bias.to(device)
    if bits == 16:
        return (SeparateLinear if separate else DenseLinear)(weight, bias)
    if weight.is_cuda:
        return GroupQuantised.of(weight, bias, bits)
    return {8: Int8.of, 4: Int4.of}[bits](weight, bias)
