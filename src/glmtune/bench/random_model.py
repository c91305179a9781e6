"""The models that are measured: shapes by name, filled with random weights."""

import torch

from glmtune.models.chatglm.configuration import ChatGLMConfig
from glmtune.models.chatglm.modeling import ChatGLMForConditionalGeneration

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


def random_model(
    shape: ChatGLMConfig, device: torch.device, dtype: torch.dtype
) -> ChatGLMForConditionalGeneration:
    """A model of a shape, the same weights each time, made where it will be."""
    torch.manual_seed(0)
    with torch.device(device):
        return ChatGLMForConditionalGeneration._from_config(shape, dtype=dtype)
