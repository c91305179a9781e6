"""What a model's weights take in memory, told from its configuration alone."""

from collections.abc import Iterable

import torch

from glmtune.errors import UserError
from glmtune.models.chatglm.configuration import ChatGLMConfig

# In the order of `block_shapes`.
LINEARS = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")
# NF4 with double quantisation: half a byte a value; a byte for each block of values, the block's
# largest magnitude; and a float32 for each group of blocks, the group's.
NF4_BLOCK, NF4_GROUP = 64, 256


def check_targets(names: Iterable[str]) -> None:
    """Raise UserError where `lora_target` names a linear that no ChatGLM-6B has."""
    if unknown := [name for name in names if name not in LINEARS]:
        fused = " (q_proj, k_proj and v_proj are one here)" if "q_proj" in unknown else ""
        raise UserError(
            f"lora_target: ChatGLM-6B has no linear {', '.join(map(repr, unknown))}; choose from "
            f"{', '.join(LINEARS)}{fused}, or all for every one"
        )


def block_shapes(config: ChatGLMConfig) -> list[tuple[int, int]]:
    """Outputs and inputs of the four linears of a layer."""
    hidden, inner = config.hidden_size, config.inner_hidden_size
    return [(3 * hidden, hidden), (hidden, hidden), (inner, hidden), (hidden, inner)]


def adapter_parameters(config: ChatGLMConfig, rank: int, targets: Iterable[str]) -> int:
    """Numbers of a LoRA adapter on some of the four linears of each layer."""
    shapes = dict(zip(LINEARS, block_shapes(config), strict=True))
    return config.num_layers * sum(rank * sum(shapes[name]) for name in targets)


def weight_bytes(
    config: ChatGLMConfig,
    dtype: torch.dtype,
    bits: int | None = None,
    *,
    quantize_head: bool = False,
) -> int:
    """Bytes of a base model's weights, an adapter's not among them.

    Args:
        config: the model's shape, and whether its head is tied.
        dtype: the compute type, which biases and norms always have.
        bits: 8 or 4 where the layers' linears are quantised by bitsandbytes (`quantization_bit`).
        quantize_head: whether embedding and head are int8 (`quantize_head`).
    """
    vectors = 4 * config.hidden_size  # two norms
    matrices = 0
    for outputs, inputs in block_shapes(config):
        vectors += outputs  # a bias
        matrices += linear_bytes(outputs, inputs, dtype, bits)
    layer = matrices + vectors * dtype.itemsize
    table = config.vocab_size * config.hidden_size * dtype.itemsize
    if quantize_head:  # and a float16 scale a row
        table = config.vocab_size * (config.hidden_size + 2)
    tables = table if config.tie_word_embeddings else 2 * table
    return config.num_layers * layer + tables + 2 * config.hidden_size * dtype.itemsize


def linear_bytes(outputs: int, inputs: int, dtype: torch.dtype, bits: int | None) -> int:
    """Bytes of a linear's weight in a float type, in int8 with a float32 scale a row, or in NF4."""
    if bits is None:
        return outputs * inputs * dtype.itemsize
    if bits == 8:
        return outputs * inputs + 4 * outputs
    blocks = outputs * inputs // NF4_BLOCK
    return outputs * inputs // 2 + blocks + 4 * -(-blocks // NF4_GROUP)
