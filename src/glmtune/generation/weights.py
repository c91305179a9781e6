"""A model's weights as decoding wants them: adapter applied or merged, in 16, 8 or 4 bits.

Shapes: O output rows of a linear, I inputs, R rank of an adapter, G groups of inputs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from glmtune.adapters.lora import Update, split_lora
from glmtune.errors import UserError
from glmtune.models.chatglm.decoding import Block, Projection, Weights
from glmtune.ops.norm import Norm

GROUP_SIZE = 128
"""Inputs that share a scale in 4 bits."""


def _goes_through_onednn(x: Tensor) -> bool:
    # For a few rows MKL, which `F.linear` takes on a CPU, uses one thread, oneDNN all of them.
    if torch.compiler.is_compiling() or x.device.type != "cpu" or x.dtype != torch.float32:
        return False
    return torch.backends.mkldnn.is_available() and torch.get_num_threads() > 1


@dataclass(frozen=True)
class Plain:
    """A linear as it stands."""

    weight_OI: Tensor
    bias_O: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        """``(..., I)`` to ``(..., O)``."""
        if _goes_through_onednn(x):
            return torch.ops.mkldnn._linear_pointwise(
                x, self.weight_OI, self.bias_O, "none", [], ""
            )
        return F.linear(x, self.weight_OI, self.bias_O)


@dataclass(frozen=True)
class Int8:
    """A linear whose rows are whole numbers up to 127, times a scale a row.

    A compiler fuses the conversion into the product, which then reads half of what bfloat16 reads.
    """

    weight_OI: Tensor
    scale_O: Tensor
    bias_O: Tensor | None

    @classmethod
    def of(cls, weight_OI: Tensor, bias_O: Tensor | None) -> "Int8":
        """Round each row to 255 steps between its largest element and the opposite of it."""
        scale_O1 = weight_OI.abs().amax(1, keepdim=True).float().clamp(min=1e-12) / 127
        rounded = (weight_OI / scale_O1).round().to(torch.int8)
        return cls(rounded, scale_O1.flatten().to(weight_OI.dtype), bias_O)

    def __call__(self, x: Tensor) -> Tensor:
        """``(..., I)`` to ``(..., O)``."""
        y = F.linear(x, self.weight_OI.to(x.dtype)) * self.scale_O
        return y if self.bias_O is None else y + self.bias_O


@dataclass(frozen=True)
class Int4:
    """A linear of 4-bit groups, each with a scale and a middle, through torch's own packed product.

    An element q of 0..15 means ``(q - 8) * scale + middle``.
    """

    packed: Tensor
    scale_middle_GO2: Tensor
    bias_O: Tensor | None
    on_gpu: bool

    @classmethod
    def of(cls, weight_OI: Tensor, bias_O: Tensor | None) -> "Int4":
        """Round each group of inputs to 16 steps between its smallest and largest element.

        Raises:
            UserError: a width or a type that the packed product does not take.
        """
        num_outputs, num_inputs = weight_OI.shape
        on_gpu = weight_OI.is_cuda
        if num_inputs % GROUP_SIZE or num_outputs % 16:
            raise UserError(
                f"4 bits: a linear of {num_inputs} inputs and {num_outputs} outputs cannot be "
                f"packed, which goes by {GROUP_SIZE} and 16; choose 8 or 16 bits"
            )
        if on_gpu and weight_OI.dtype != torch.bfloat16:
            raise UserError(
                f"4 bits: on a GPU they go with bfloat16 only, and the model is in "
                f"{str(weight_OI.dtype).removeprefix('torch.')}; pass --bf16 true, or choose 8 bits"
            )
        groups_OGI = weight_OI.float().unflatten(1, (-1, GROUP_SIZE))
        low, high = groups_OGI.amin(-1), groups_OGI.amax(-1)
        scale_OG = (high - low).clamp(min=1e-6) / 15
        steps = ((groups_OGI - low[..., None]) / scale_OG[..., None]).round().clamp(0, 15)
        quantised_OI = steps.flatten(1).to(torch.int32)
        scale_middle = torch.stack((scale_OG, low + 8 * scale_OG), -1).transpose(0, 1)
        if on_gpu:
            pairs = (quantised_OI[:, ::2] << 4 | quantised_OI[:, 1::2]).to(torch.uint8)
            packed = torch._convert_weight_to_int4pack(pairs, 8)
        else:
            packed = torch._convert_weight_to_int4pack_for_cpu(quantised_OI, 1)
        return cls(packed, scale_middle.to(weight_OI.dtype).contiguous(), bias_O, on_gpu)

    def __call__(self, x: Tensor) -> Tensor:
        """``(..., I)`` to ``(..., O)``."""
        product = torch._weight_int4pack_mm if self.on_gpu else torch._weight_int4pack_mm_for_cpu
        y = product(x.flatten(0, -2), self.packed, GROUP_SIZE, self.scale_middle_GO2)
        y = y.unflatten(0, x.shape[:-1])
        return y if self.bias_O is None else y + self.bias_O


@dataclass(frozen=True)
class Adapted:
    """A linear with low-rank updates beside it, computed in their own type as PEFT does."""

    base: Projection
    updates: tuple[Update, ...]

    def __call__(self, x: Tensor) -> Tensor:
        """``(..., I)`` to ``(..., O)``."""
        y = self.base(x)
        total = y
        for a_RI, b_OR, scale in self.updates:
            total = total + F.linear(F.linear(x.to(a_RI.dtype), a_RI), b_OR) * scale
        return total.to(y.dtype)


def read_weights(model: Any, *, bits: int = 16, merge: bool = False) -> Weights:
    """The weights of a model as it stands: with its adapter, unless that is disabled.

    In 16 bits they are the model's own tensors, not copies, in whatever type it has.

    Args:
        model: a ChatGLM-6B, plain or in PEFT's wrapping. A linear of a kind unknown here (of a
            quantised base, say) is called as it is.
        bits: 16; 8 or 4 round the linears, the head included, and keep copies of them.
        merge: add the adapter to copies of the weights it adapts, instead of applying it anew to
            each token; faster, and rounded to the weights' type.

    Raises:
        UserError: the weights cannot be had in so few bits.
    """
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model
    body = plain.transformer

    def read(linear: nn.Module) -> Projection:
        return _read_projection(linear, bits, merge)

    blocks = [
        Block(
            input_norm=Norm.of(layer.input_layernorm),
            query_key_value=read(layer.attention.query_key_value),
            dense=read(layer.attention.dense),
            post_attention_norm=Norm.of(layer.post_attention_layernorm),
            dense_h_to_4h=read(layer.mlp.dense_h_to_4h),
            dense_4h_to_h=read(layer.mlp.dense_4h_to_h),
        )
        for layer in body.layers
    ]
    return Weights(
        embed=_read_embedding(body.word_embeddings, body.final_layernorm.weight.dtype),
        blocks=blocks,
        final_norm=Norm.of(body.final_layernorm),
        head=read(plain.lm_head),
    )


def can_be_captured(weights: Weights) -> bool:
    """Whether every linear is of a kind known here, and so waits for nothing but the GPU."""
    return all(isinstance(linear, (Plain, Int8, Int4, Adapted)) for linear in _linears(weights))


def num_bytes(weights: Weights) -> int:
    """What one step reads of the weights. Of the embedding that is next to nothing."""
    tensors = [*weights.final_norm[:2]]
    for block in weights.blocks:
        tensors += [*block.input_norm[:2], *block.post_attention_norm[:2]]
    for linear in _linears(weights):
        updates = linear.updates if isinstance(linear, Adapted) else ()
        found = [*vars(linear).values(), *(tensor for update in updates for tensor in update)]
        tensors += [tensor for tensor in found if isinstance(tensor, Tensor)]
    return sum(tensor.nbytes for tensor in tensors)


def _linears(weights: Weights) -> list[Projection]:
    """Every linear, and what adapters lie on."""
    projections = [weights.head]
    for block in weights.blocks:
        projections += [
            block.query_key_value,
            block.dense,
            block.dense_h_to_4h,
            block.dense_4h_to_h,
        ]
    return projections + [linear.base for linear in projections if isinstance(linear, Adapted)]


def _read_embedding(embedding: nn.Embedding, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    if type(embedding) is nn.Embedding:
        return partial(F.embedding, weight=embedding.weight)
    return lambda ids: embedding(ids).to(dtype)


def _read_projection(linear: nn.Module, bits: int, merge: bool) -> Projection:
    base, updates = split_lora(linear)
    if type(base) is not nn.Linear:
        if bits != 16:
            raise UserError(
                f"{bits} bits: the model has linears of another kind ({type(linear).__module__}."
                f"{type(linear).__name__}), which are not rounded again; leave the bits out"
            )
        return linear
    weight, bias = base.weight.detach(), base.bias
    if merge and updates:
        total = weight.float()
        for a_RI, b_OR, scale in updates:
            total = total + b_OR.float() @ a_RI.float() * scale
        weight, updates = total.to(weight.dtype), ()
    kinds: dict[int, Callable[[Tensor, Tensor | None], Projection]]
    kinds = {16: Plain, 8: Int8.of, 4: Int4.of}
    projection = kinds[bits](weight, bias)
    return Adapted(projection, updates) if updates else projection
