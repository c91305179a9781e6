"""Write GGUF files by the gguf package: a model, or an adapter alone.

Matrices are in the number type that is wished, vectors in float32, as llama.cpp wants them. One
tensor at a time is converted and written.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, quants
from torch import Tensor

from glmtune.adapters.formats import Adapter
from glmtune.adapters.naming import updates_of
from glmtune.errors import UserError
from glmtune.models.gguf_form import GgufForm

TYPES = {
    "f32": GGMLQuantizationType.F32,
    "f16": GGMLQuantizationType.F16,
    "q8_0": GGMLQuantizationType.Q8_0,
}
FILE_TYPES = {"f32": 0, "f16": 1, "q8_0": 7}
"""llama.cpp's numbers for what most of a file is in."""
_BLOCK = 32
"""Numbers of a row that share a scale in q8_0."""


def write_model(
    path: Path, name: str, form: GgufForm, config: Any, tensors: Mapping[str, Tensor], quant: str
) -> None:
    """Write a model.

    Args:
        path: of the file.
        name: of the model.
        form: what the family says of it.
        config: its configuration.
        tensors: by the names of the model class; a tied head may be left out.
        quant: number type of the matrices: f32, f16 or q8_0.

    Raises:
        UserError: a weight is not finite in that type, or rows do not divide into blocks.
    """
    writer = GGUFWriter(str(path), form.arch)
    writer.add_name(name)
    writer.add_file_type(FILE_TYPES[quant])
    writer.add_quantization_version(2)
    _add_sizes(writer, form, config)
    _add_vocabulary(writer, form)
    renamed = {}
    for key, tensor in tensors.items():
        module, _, kind = key.rpartition(".")
        renamed[f"{form.name_of(module)}.{kind}"] = tensor
    _write(writer, renamed, quant)


def write_adapter_file(
    path: Path, name: str, form: GgufForm, adapter: Adapter, quant: str = "f32"
) -> None:
    """Write an adapter alone, for llama.cpp's --lora.

    llama.cpp scales an update by alpha over its own rank; B takes what another scale would.

    Args:
        path: of the file.
        name: of the adapter.
        form: what the family says of the base.
        adapter: plain LoRA, in the names of the model class.
        quant: f32 or f16.
    """
    alpha = float(adapter.config.lora_alpha)
    writer = GGUFWriter(str(path), form.arch)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", alpha)
    writer.add_name(name)
    tensors = {}
    for module, update in updates_of(adapter).items():
        rank = len(update.a_RI)
        stem = f"{form.name_of(module)}.weight"
        tensors[f"{stem}.lora_a"] = update.a_RI
        tensors[f"{stem}.lora_b"] = update.b_OR * (update.scale * rank / alpha)
    _write(writer, tensors, quant)


def _add_sizes(writer: GGUFWriter, form: GgufForm, config: Any) -> None:
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_dimension_count(form.rotary_dims)
    writer.add_rope_freq_base(form.rope_base)
    if scaling := form.rope_scaling:
        arch = form.arch
        writer.add_string(f"{arch}.rope.scaling.type", str(scaling["type"]))
        writer.add_float32(f"{arch}.rope.scaling.factor", float(scaling["factor"]))
        writer.add_uint32(f"{arch}.rope.scaling.original_context_length", int(scaling["original"]))


def _add_vocabulary(writer: GGUFWriter, form: GgufForm) -> None:
    vocabulary = form.vocabulary
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(list(vocabulary.tokens))
    writer.add_token_types(list(vocabulary.kinds))
    if vocabulary.scores is not None:
        writer.add_token_scores(list(vocabulary.scores))
    if vocabulary.merges is not None:
        writer.add_token_merges(list(vocabulary.merges))
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(vocabulary.adds_blank)
    writer.add_bool("tokenizer.ggml.remove_extra_whitespaces", False)
    for kind, key in _SPECIAL.items():
        if kind in form.special:
            writer.add_uint32(f"tokenizer.ggml.{key}", form.special[kind])
    writer.add_chat_template(form.chat_template)


_SPECIAL = {
    "eos": "eos_token_id",
    "eot": "eot_token_id",
    "eom": "eom_token_id",
    "bos": "bos_token_id",
    "unk": "unknown_token_id",
    "pad": "padding_token_id",
}


def _write(writer: GGUFWriter, tensors: Mapping[str, Tensor], quant: str) -> None:
    kinds = {name: _kind(name, tensor, quant) for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        shape = list(tensor.shape)
        kind = kinds[name]
        if kind is GGMLQuantizationType.Q8_0:
            size = tensor.numel() // _BLOCK * (_BLOCK + 2)
            shape_of_bytes = [*shape[:-1], shape[-1] // _BLOCK * (_BLOCK + 2)]
            writer.add_tensor_info(name, shape_of_bytes, np.dtype(np.uint8), size, raw_dtype=kind)
            continue
        dtype = np.dtype(np.float32 if kind is GGMLQuantizationType.F32 else np.float16)
        writer.add_tensor_info(name, shape, dtype, tensor.numel() * dtype.itemsize)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, tensor in tensors.items():
        writer.write_tensor_data(_as_type(name, tensor, kinds[name]))
    writer.close()


def _kind(name: str, tensor: Tensor, quant: str) -> GGMLQuantizationType:
    if tensor.ndim < 2:
        return GGMLQuantizationType.F32
    if quant == "q8_0" and tensor.shape[-1] % _BLOCK:
        raise UserError(
            f"--quant q8_0: {name} has rows of {tensor.shape[-1]} numbers, which do not divide by "
            f"{_BLOCK}; use --quant f16"
        )
    return TYPES[quant]


def _as_type(name: str, tensor: Tensor, kind: GGMLQuantizationType) -> np.ndarray:
    values = tensor.detach().to(torch.float32).contiguous().numpy()
    if kind is GGMLQuantizationType.F16:
        with np.errstate(over="ignore"):
            values = values.astype(np.float16)
    elif kind is GGMLQuantizationType.Q8_0:
        return quants.quantize(values, kind)
    if not np.isfinite(values).all():
        raise UserError(
            f"--quant {kind.name.lower()}: {name} has values that are not finite in this type; "
            "use --quant f32"
        )
    return values


class Reader(GGUFReader):
    """The gguf package's reader of a file, over a plain array.

    It slices the file for each word of a vocabulary, and a slice of numpy's memmap takes several
    times as long as one of the same bytes as an array.
    """

    @property
    def data(self) -> Any:
        """The file as an array, ``(bytes,)`` uint8, read from disk as it is used."""
        return self._data

    @data.setter
    def data(self, file: Any) -> None:
        self._data = np.asarray(file)


def read_tensors(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of a file as float32, by the names in it."""
    for tensor in Reader(str(path)).tensors:
        values = quants.dequantize(tensor.data, tensor.tensor_type)
        yield tensor.name, np.asarray(values, dtype=np.float32).reshape(*reversed(tensor.shape))
