"""Convert a model's weights in place: linears to 8 or 4 bits, tables to int8, or all to floats.

This works for any family, through transformers' accessors of the embeddings.
"""

from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from glmtune.models.family import layers_of
from glmtune.models.integer_weights import dequantise_modules, quantise_tables
from glmtune.models.quantised import quantise
from glmtune.models.shape import bits_of


def integer_bits_of(config: Any) -> int:
    """8 or 4 if the linears are integers of a published folder; otherwise 0."""
    return getattr(config, "quantization_bit", 0) or 0


def has_integer_tables(config: Any) -> bool:
    """Whether embedding and head are integers."""
    return bool(getattr(config, "quantization_embeddings", False))


def quantise_layers(model: PreTrainedModel, bits: int) -> None:
    """Quantise the layers' linears with bitsandbytes to 8 or 4 bits.

    Those of a published int8 or int4 folder are requantised; a packed embedding and head become
    floats.
    """
    quantise(model, layers_of(model), bits)
    _unpack(model, model.dtype)


def quantise_head(model: PreTrainedModel) -> None:
    """Round embedding and head to 8 bits; if they share a tensor, they still do."""
    embedding = cast(nn.Embedding, model.get_input_embeddings())
    head = cast(nn.Linear, model.get_output_embeddings())
    packed_embedding, packed_head = quantise_tables(embedding, head)
    model.set_input_embeddings(packed_embedding)
    model.set_output_embeddings(packed_head)
    model.config.quantization_embeddings = True


def dequantise(model: Any, dtype: torch.dtype | None = None) -> Any:
    """Turn packed and bitsandbytes' weights into floats; floats stay unchanged.

    Args:
        model: a transformers model.
        dtype: type of the whole model afterwards; by default its compute type.

    Returns:
        The model.
    """
    dtype = dtype or model.dtype
    if bits_of(model.config):
        PreTrainedModel.dequantize(model, dtype)
        model._weight_conversions = None  # set by loading, to save in few bits again
    _unpack(model, dtype)
    return nn.Module.to(model, dtype)


def _unpack(model: PreTrainedModel, dtype: torch.dtype) -> None:
    dequantise_modules(model, dtype)
    for name, value in (("quantization_bit", 0), ("quantization_embeddings", False)):
        if getattr(model.config, name, value) != value:
            setattr(model.config, name, value)
    model.tie_weights()
