"""A model as plain numbers, from which memory plans, limits and sizes are computed."""

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from glmtune.errors import UserError
from glmtune.hardware import NumberFormat

# NF4 with double quantisation: half a byte a value; a byte for each block of values, the block's
# largest magnitude; and a float32 for each group of blocks, the group's.
NF4_BLOCK, NF4_GROUP = 64, 256
ALL = "all"
"""The value of `lora_target` for every linear of a layer."""


# Linears that other code has apart, and some models have as one.
_FUSED = {
    "q_proj, k_proj and v_proj": {"q_proj", "k_proj", "v_proj"},
    "gate_proj and up_proj": {"gate_proj", "up_proj"},
}


class LinearShape(NamedTuple):
    """A linear of a layer: ``(outputs, inputs)``."""

    name: str
    outputs: int
    inputs: int
    has_bias: bool
    makes_qkv: bool = False
    """Whether it computes queries, keys or values: such linears read the layer's first norm."""


class Shape(NamedTuple):
    """The sizes of a model; a family derives them from its configuration."""

    num_layers: int
    hidden_size: int
    vocab_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    tied_head: bool
    linears: tuple[LinearShape, ...]
    """The linears of one layer, in the order of its block's weights, without the head."""
    norm_values: int
    """Weights of one layer's norms."""
    final_norm_values: int
    kept_by_mlp: int
    """Numbers a token kept for the backward pass between the linears of the MLP: the input of its
    activation, gate included."""
    output_norms: int = 0
    """Norms of a layer that read what attention or MLP gives, instead of the residual."""

    @property
    def linear_names(self) -> tuple[str, ...]:
        """The linears that an adapter can be put on."""
        return tuple(linear.name for linear in self.linears)

    @property
    def qkv_values(self) -> int:
        """Numbers a token of queries, keys and values."""
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim

    def matmul_parameters(self) -> int:
        """Weights that a token is multiplied with: the layers' linears and the head."""
        return self.num_layers * self.layer_parameters() + self.vocab_size * self.hidden_size

    def layer_parameters(self) -> int:
        """Weights of one layer's linears."""
        return sum(linear.outputs * linear.inputs for linear in self.linears)

    def adapter_parameters(self, rank: int, targets: Iterable[str]) -> int:
        """Numbers of a LoRA adapter on some of the linears of each layer."""
        sizes = {linear.name: linear.outputs + linear.inputs for linear in self.linears}
        return self.num_layers * sum(rank * sizes[name] for name in targets)

    def weight_bytes(
        self, dtype: NumberFormat, bits: int | None = None, *, quantize_head: bool = False
    ) -> int:
        """Bytes of a base model's weights, without an adapter's.

        Args:
            dtype: the compute type, which biases and norms always have.
            bits: 8 or 4 where the layers' linears are quantised by bitsandbytes.
            quantize_head: whether embedding and head are int8.
        """
        vectors = self.norm_values
        matrices = 0
        for linear in self.linears:
            vectors += linear.outputs * linear.has_bias
            matrices += linear_bytes(linear.outputs, linear.inputs, dtype, bits)
        layer = matrices + vectors * dtype.itemsize
        table = self.vocab_size * self.hidden_size * dtype.itemsize
        if quantize_head:  # and a float16 scale a row
            table = self.vocab_size * (self.hidden_size + 2)
        tables = table if self.tied_head else 2 * table
        return self.num_layers * layer + tables + self.final_norm_values * dtype.itemsize


def linear_bytes(outputs: int, inputs: int, dtype: NumberFormat, bits: int | None) -> int:
    """Bytes of a linear's weight in a float type, in int8 with a float32 scale a row, or in NF4."""
    if bits is None:
        return outputs * inputs * dtype.itemsize
    if bits == 8:
        return outputs * inputs + 4 * outputs
    blocks = outputs * inputs // NF4_BLOCK
    return outputs * inputs // 2 + blocks + 4 * -(-blocks // NF4_GROUP)


def bits_of(config: Any) -> int | None:
    """The bits of bitsandbytes' linears in a model of this configuration; None without any."""
    settings = getattr(config, "quantization_config", None)
    if settings is None:
        return None
    settings = settings if isinstance(settings, dict) else settings.to_dict()
    return 8 if settings.get("load_in_8bit") else 4


def check_quantisation(settings: Any, instead: str) -> None:
    """Make sure that a config.json's `quantization_config` is one of bitsandbytes that is read.

    Args:
        settings: a dictionary, or transformers' object of such settings.
        instead: what to pass otherwise, for the message.

    Raises:
        UserError: it is another.
    """
    if not isinstance(settings, dict):
        settings = (
            settings.to_dict() if hasattr(settings, "to_dict") else {"quant_method": settings}
        )
    method = settings.get("quant_method") or "without quant_method"
    in_8_bits, in_4_bits = (bool(settings.get(f"load_in_{bits}bit")) for bits in (8, 4))
    kind = settings.get("bnb_4bit_quant_type")
    is_known = method == "bitsandbytes" and in_8_bits != in_4_bits
    if is_known and in_4_bits and kind not in ("nf4", "fp4"):
        is_known, method = False, f"bitsandbytes' {kind}"
    if is_known and settings.get("llm_int8_has_fp16_weight"):
        is_known, method = False, "bitsandbytes' llm_int8_has_fp16_weight"
    if not is_known:
        raise UserError(
            f"config.json: quantization_config ({method}) is not a supported quantisation, "
            f"only bitsandbytes' 8 and 4 bits are; pass {instead}"
        )


def find_targets(
    wanted: Iterable[str],
    family: str,
    names: tuple[str, ...],
    other_names: Mapping[str, tuple[str, ...]] = MappingProxyType({}),
) -> tuple[str, ...]:
    """Resolve `lora_target` to linears: those named, or all for "all".

    Args:
        wanted: the setting.
        family: name of the model in messages.
        names: the linears that the model has.
        other_names: what else some of them are called, and which are meant.

    Raises:
        UserError: a name that no linear has.
    """
    wanted = tuple(wanted)
    if wanted == (ALL,):
        return names
    meant = [part for name in wanted for part in other_names.get(name, (name,))]
    if unknown := [name for name in meant if name not in names]:
        fused = "".join(
            f" ({parts} are one here)"
            for parts, some in _FUSED.items()
            if not some.isdisjoint(unknown)
        )
        raise UserError(
            f"lora_target: {family} has no linear {', '.join(map(repr, unknown))}; choose from "
            f"{', '.join(names)}{fused}, or {ALL} for every one"
        )
    return tuple(dict.fromkeys(meant))
