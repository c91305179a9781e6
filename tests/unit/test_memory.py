"""How long packs are made for a card's memory, against peaks that were measured on one."""

import pytest
import torch

from glmtune.models.chatglm.configuration import ChatGLMConfig
from glmtune.training.memory import choose_pack, pass_gib

CHATGLM_6B, BF16 = ChatGLMConfig(), torch.bfloat16
WEIGHTS_GIB = 11.51


@pytest.mark.parametrize(
    ("num_tokens", "more_adapters", "measured"),
    [(8192, False, 30.3), (16384, False, 48.8), (8192, True, 42.8)],
)
def test_the_estimate_is_near_what_an_h200_took(num_tokens, more_adapters, measured):
    """See benchmarks/2026-11-24-training-step.md."""
    gib = WEIGHTS_GIB + pass_gib(CHATGLM_6B, num_tokens, BF16, more_adapters=more_adapters)
    assert gib == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize(
    ("card_gib", "expected"),
    [(140, (8192, False)), (48, (8192, False)), (24, (4096, False)), (16, (4096, True)),
     (12, (1024, True))],
)  # fmt: skip
def test_the_longest_pack_that_fits(card_gib, expected):
    assert choose_pack(CHATGLM_6B, card_gib - WEIGHTS_GIB, BF16) == expected


def test_recomputing_as_the_user_wishes():
    assert choose_pack(CHATGLM_6B, 12.5, BF16, recompute=True) == (8192, True)
    assert choose_pack(CHATGLM_6B, 4, BF16, recompute=False) == (1024, False)
