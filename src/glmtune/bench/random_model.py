"""The models that are measured: shapes by name, filled with random weights."""

from copy import copy

import torch

from glmtune.bench.limits import matmul_parameters
from glmtune.errors import UserError
from glmtune.hardware import GIB, device_name, total_memory_gib
from glmtune.models.chatglm.configuration import ChatGLMConfig
from glmtune.models.chatglm.modeling import ChatGLMForConditionalGeneration
from glmtune.models.quantised import check_quantising

SHAPES = {
    "6b": ChatGLMConfig(),
    "wide": ChatGLMConfig(
        hidden_size=1024, num_layers=2, num_attention_heads=8, inner_hidden_size=4096
    ),
    "small": ChatGLMConfig(
        vocab_size=4096, hidden_size=256, num_layers=4, num_attention_heads=4,
        inner_hidden_size=1024, bos_token_id=3572, eos_token_id=3573,
    ),
}  # fmt: skip
"""Of a token, `wide` spends its time on reading weights, and `small` on all that surrounds them."""


def check_room(name: str, device: torch.device, dtype: torch.dtype) -> None:
    """Make sure that a device has room for the weights of a shape.

    Raises:
        UserError: it has not.
    """
    needed, total = matmul_parameters(SHAPES[name]) * dtype.itemsize / GIB, total_memory_gib(device)
    if total and needed > 0.9 * total:
        raise UserError(
            f"shape {name}: the weights alone take {needed:,.1f} GiB in "
            f"{str(dtype).removeprefix('torch.')}, and {device_name(device)} has {total:,.1f} GiB; "
            "pass --shape small"
        )


def random_model(
    shape: ChatGLMConfig,
    device: torch.device,
    dtype: torch.dtype,
    *,
    bits: int | None = None,
    quantize_head: bool = False,
) -> ChatGLMForConditionalGeneration:
    """A model of a shape, made where it will be; quantised or not, from the same weights each time.

    Raises:
        UserError: bits that the device or the installation does not have.
    """
    if bits:
        check_quantising(f"quantization_bit {bits}", bits, device)
    torch.manual_seed(0)
    with torch.device(device):
        model = ChatGLMForConditionalGeneration._from_config(copy(shape), dtype=dtype)
    if bits:
        model.quantize(bits)
    if quantize_head:
        model.quantize_head()
    return model
