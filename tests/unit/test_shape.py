"""Sizes of weights, compared with real models."""

import pytest
import torch

from glmtune.models.chatglm.configuration import ChatGLMConfig
from glmtune.models.chatglm.modeling import ChatGLMForConditionalGeneration
from glmtune.models.families import family_of

GIB = 1024**3
BF16 = torch.bfloat16


@pytest.mark.parametrize("tied", [True, False])
def test_the_weights_of_a_model_that_was_made(tied):
    config = ChatGLMConfig(
        vocab_size=1024, hidden_size=64, num_layers=3, num_attention_heads=4, inner_hidden_size=96,
        bos_token_id=500, eos_token_id=501, tie_word_embeddings=tied,
    )  # fmt: skip
    model = ChatGLMForConditionalGeneration(config)
    assert family_of(config).shape(config).weight_bytes(torch.float32) == sum(
        p.nbytes for p in model.parameters()
    )


@pytest.mark.parametrize(
    ("bits", "quantize_head", "gib"),
    [(None, False, 11.50), (8, False, 6.25), (4, False, 3.71), (4, True, 3.21)],
)
def test_chatglm_6b(bits, quantize_head, gib):
    shape = family_of(ChatGLMConfig()).shape(ChatGLMConfig())
    size = shape.weight_bytes(BF16, bits, quantize_head=quantize_head)
    assert size / GIB == pytest.approx(gib, abs=0.01)
