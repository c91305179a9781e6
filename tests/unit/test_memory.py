"""How long packs are made for a card's memory, against peaks that were measured on one."""

import pytest
import torch

from glmtune.models.chatglm.configuration import ChatGLMConfig
from glmtune.training.memory import Room, pass_gib

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


def room(card_gib):
    return Room(CHATGLM_6B, card_gib - WEIGHTS_GIB, BF16)


@pytest.mark.parametrize(
    ("card_gib", "length", "without_recompute"),
    [(140, 8192, True), (48, 8192, True), (24, 4096, True), (16, 4096, False), (12, 1024, False)],
)
def test_the_longest_pack_that_fits(card_gib, length, without_recompute):
    assert room(card_gib).longest_pack() == length
    assert room(card_gib).holds(length, recompute=False) is without_recompute


def test_recomputing_as_the_user_wishes():
    assert room(24).longest_pack(recompute=True) == 8192
    assert room(16).longest_pack(recompute=False) == 1024


def test_the_originals_six_rows_fit_into_a_16_gib_card_without_recomputing():
    assert room(16).holds(6 * 200, recompute=False)
    assert not room(14).holds(6 * 200, recompute=False)
