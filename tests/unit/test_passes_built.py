"""The forecast decides how a pass is computed, and `build_pass` builds that pass."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from glmtune import hardware
from glmtune.bench.rows import random_rows
from glmtune.config.settings import TrainSettings
from glmtune.hardware import Card, can_compile
from glmtune.models.chatglm.configuration import ChatGLMConfig
from glmtune.models.families import DEFAULT
from glmtune.training import run as run_module
from glmtune.training.passes import CapturedPass, PackedPass, PaddedPass
from glmtune.training.planning.forecast import forecast
from glmtune.training.run import build_pass

CHATGLM_6B = ChatGLMConfig()


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        (Card.named("T4"), False),
        (Card.named("A10"), True),
        (Card.named("H200"), True),
        (Card.of(torch.device("cpu")), False),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_kernels_need_an_ampere_card_or_a_newer_one(card, expected):
    assert can_compile(card, CHATGLM_6B.head_dim, DEFAULT.head_dims) is expected


def test_kernels_need_triton_where_the_gpu_is(monkeypatch):
    monkeypatch.setattr(hardware, "find_spec", lambda name: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert can_compile(Card.named("H200"), CHATGLM_6B.head_dim, DEFAULT.head_dims), (
        "a card that is elsewhere"
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert not can_compile(Card.named("H200"), CHATGLM_6B.head_dim, DEFAULT.head_dims)


def test_kernels_need_heads_of_their_sizes():
    assert not can_compile(Card.named("H200"), 32, DEFAULT.head_dims)


@pytest.mark.parametrize(
    ("layout", "compiled", "kind", "pack_length"),
    [
        ("padded", False, PaddedPass, None),
        ("exact", False, PackedPass, None),
        ("exact", True, CapturedPass, None),
        ("packed", False, PackedPass, None),
        ("packed", True, PackedPass, 8192),
    ],
)
def test_the_pass_built_is_the_one_forecast(layout, compiled, kind, pack_length, monkeypatch):
    built = []
    monkeypatch.setattr(run_module, "PackedModel", lambda model, block, **how: built.append(how))
    base = SimpleNamespace(config=CHATGLM_6B)
    monkeypatch.setattr(run_module, "base_of", lambda model: base)
    monkeypatch.setattr(PaddedPass, "__post_init__", lambda self: None)
    settings = TrainSettings(dataset_path="rows", output_dir="run")
    rows = random_rows(CHATGLM_6B, 500)
    planned = forecast(settings, CHATGLM_6B, torch.bfloat16, Card.named("H200"), rows)
    planned = replace(planned, setup=replace(planned.setup, layout=layout, compiled=compiled))
    run = SimpleNamespace(forecast=planned, settings=settings, accelerator=None, rows=rows)
    step_pass = build_pass(run, None, [])
    assert type(step_pass) is kind
    assert getattr(step_pass, "pack_length", None) == pack_length
    assert [how["compiled"] for how in built] == ([] if kind is PaddedPass else [compiled])


@pytest.mark.parametrize(
    ("bits", "length", "gib", "captured"),
    [(4, 2048, 24, True), (4, 4096, 24, False), (None, 2048, 24, False), (4, 2048, 12, False)],
)
def test_short_packs_of_few_bits_are_captured_where_memory_allows_it(bits, length, gib, captured):
    """12 GiB do not hold a second set of activations beside the first."""
    settings = TrainSettings(
        dataset_path="rows", output_dir="run", tokens_per_step=length,
        quantization_bit=bits and str(bits), gradient_checkpointing=False,
    )  # fmt: skip
    rows = random_rows(CHATGLM_6B, 500)
    card = replace(Card.named("H200"), gib=gib, free_gib=gib)
    planned = forecast(settings, CHATGLM_6B, torch.bfloat16, card, rows)
    assert planned.setup.compiled
    assert planned.setup.captured is captured
