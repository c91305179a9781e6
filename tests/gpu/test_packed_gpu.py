"""Compiled passes, their kernels and their captured form on a GPU: pytest -m gpu tests/gpu."""

import itertools

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch.nn import functional as F
from toys import randomise_adapter

from glmtune.adapters import attach_lora
from glmtune.data.packing import plan_packs
from glmtune.hardware import Card, can_compile
from glmtune.models.chatglm.configuration import ChatGLMConfig
from glmtune.models.chatglm.modeling import ChatGLMForConditionalGeneration
from glmtune.models.chatglm.packed import PACKED
from glmtune.models.families import DEFAULT
from glmtune.models.packed import PackedModel, to_fp8
from glmtune.ops import linear
from glmtune.ops.attention import PaddedRows
from glmtune.ops.rotary import rotary_angles
from glmtune.training.first_step import check_agreement
from glmtune.training.passes import CapturedPass, PackedPass, PaddedPass

CUDA = torch.device("cuda")
CONFIG = ChatGLMConfig(
    vocab_size=8192, hidden_size=512, num_layers=3, num_attention_heads=4,
    inner_hidden_size=1024, bos_token_id=7668, eos_token_id=7669,
)  # fmt: skip
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("fresh_compiler"),
    pytest.mark.skipif(
        not torch.cuda.is_available()
        or not can_compile(Card.of(CUDA), CONFIG.head_dim, DEFAULT.head_dims),
        reason="no CUDA device of the Ampere generation or newer here, or no Triton",
    ),
]
LENGTH = 1024


def make_model(dtype, targets="all", rank=8):
    torch.manual_seed(0)
    with CUDA:
        base = ChatGLMForConditionalGeneration._from_config(CONFIG, dtype=dtype)
    model = attach_lora(base, rank=rank, dropout=0.1, targets=targets)
    randomise_adapter(model, std=0.05)
    return model, [weight for weight in model.parameters() if weight.requires_grad]


@pytest.mark.parametrize(
    ("dtype", "targets", "rank"),
    [
        (torch.float32, "all", 8),
        (torch.bfloat16, "all", 8),
        (torch.float16, "query_key_value", 5),
        (torch.float32, "dense", 64),
    ],
)
def test_a_compiled_pack_equals_its_rows(rows, dtype, targets, rank):
    model, weights = make_model(dtype, targets, rank)
    accelerator = Accelerator()
    fast = PackedPass(accelerator, PackedModel(model, PACKED, compiled=True), rows, 0.1, LENGTH)
    plain = PaddedPass(accelerator, model, rows)
    packs = plan_packs(rows.lengths_R, np.arange(len(rows)), LENGTH)
    for row_ids in (packs[0], packs[1][:3], packs[2][:1]):  # full, and mostly filler
        off_loss, off_grad = check_agreement(fast, plain, row_ids, weights, dtype)
        if dtype == torch.float32:
            assert off_loss < 1e-5
            assert off_grad < 1e-5


def test_a_compiled_pack_recomputes_layers_with_equal_gradients(rows):
    model, weights = make_model(torch.float32)
    row_ids = plan_packs(rows.lengths_R, np.arange(len(rows)), LENGTH)[0]
    grads = []
    for recompute in (0, 1, 2):
        packed = PackedModel(model, PACKED, compiled=True, recompute=recompute)
        PackedPass(Accelerator(), packed, rows, 0.1, LENGTH).run(row_ids, 100, seed=3)
        grads.append(torch.cat([weight.grad.flatten() for weight in weights]))
        for weight in weights:
            weight.grad = None
    torch.testing.assert_close(grads[1], grads[0], atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(grads[2], grads[0], atol=1e-6, rtol=1e-4)


def test_a_captured_pass_recomputes(rows):
    results = []
    for recompute in (0, 2):
        model, weights = make_model(torch.bfloat16, "query_key_value")
        packed = PackedModel(model, PACKED, compiled=True, any_length=True, recompute=recompute)
        captured = CapturedPass(Accelerator(), packed, rows, 0.1, None, weights)
        for start in (0, 40):
            captured.run(np.arange(start, start + 6), 300, seed=1)
        results.append(torch.cat([weight.grad.flatten() for weight in weights]))
    assert (results[0] - results[1]).norm() / results[0].norm() < 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_captured_pass_equals_the_packed_pass(rows, dtype):
    """Lengths alternate, gradients of two passes add up, and dropout follows the seed."""
    model, weights = make_model(dtype)
    packed = PackedModel(model, PACKED, compiled=True, any_length=True)
    plain = PackedPass(Accelerator(), packed, rows, 0.1, None)
    captured = CapturedPass(Accelerator(), packed, rows, 0.1, None, weights)
    for step in range(4):
        results = []
        for way in (captured, plain):
            losses = [way.run(np.arange(i, i + 6), 300, i) for i in (step, step + 50)]
            results.append((sum(losses), torch.cat([w.grad.flatten() for w in weights])))
            for weight in weights:
                weight.grad = None
        (loss, grad), (wanted_loss, wanted) = results
        torch.testing.assert_close(loss, wanted_loss, rtol=1e-5, atol=1e-5)
        assert (grad - wanted).norm() / wanted.norm() < (1e-5 if dtype == torch.float32 else 1e-2)


HEADS = 6


@pytest.mark.parametrize(
    "num_kv_heads", [None, 6, 2, 1], ids=["fused", "own", "shared by 3", "one"]
)
@pytest.mark.parametrize(("head_dim", "rank"), itertools.product([64, 128], [0, 8]))
def test_attention_kernels_equal_dense_attention(head_dim, rank, num_kv_heads):
    """Rows of one token, prefixes of one, answers of none, rows that no block holds whole."""
    compare_attention(head_dim, rank, num_kv_heads, interleaved=False)


@pytest.mark.parametrize("num_kv_heads", [6, 2, 1])
@pytest.mark.parametrize(("head_dim", "rank"), [(64, 8), (128, 0), (128, 8)])
def test_attention_kernels_rotate_neighbours(head_dim, rank, num_kv_heads):
    compare_attention(head_dim, rank, num_kv_heads, interleaved=True)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("programs", "shares"), [(1, 1), (40, 3), (10_000, 6)])
def test_gradients_of_shared_heads_do_not_depend_on_the_programs(
    monkeypatch, programs, shares, interleaved
):
    from glmtune.ops import attention_kernels

    monkeypatch.setattr(attention_kernels, "_PROGRAMS", programs)
    assert attention_kernels._num_shares(HEADS, 15) == shares  # 15 blocks of keys
    compare_attention(64, 8, 1, interleaved)


def compare_attention(head_dim, rank, num_kv_heads, interleaved):
    from glmtune.ops.packed_attention import RowSpans

    torch.manual_seed(0)
    lengths, prefixes = [1, 70, 3, 300, 20, 64], [1, 30, 0, 300, 1, 63]
    spans = []
    for values in (np.cumsum(lengths) - lengths, prefixes, lengths):
        spans.append(np.repeat(values, lengths))
    start, prefix, length = (torch.tensor(span, dtype=torch.int32, device=CUDA) for span in spans)
    tokens = sum(lengths)
    positions = torch.randint(0, 300, (1, 2, tokens), device=CUDA)
    cos, sin = (x[0].contiguous() for x in rotary_angles(positions, head_dim))

    def leaf(*shape, size=1.0):
        return (size * torch.randn(shape, device=CUDA)).requires_grad_()

    if num_kv_heads is None:
        sizes = [(HEADS, 3 * head_dim)]
    else:
        sizes = [(heads, head_dim) for heads in (HEADS, num_kv_heads, num_kv_heads)]
    parts = [leaf(tokens, *size) for size in sizes]
    updates = [
        (leaf(tokens, rank), leaf(heads * width, rank, size=0.1)) if rank else None
        for heads, width in sizes
    ]
    if rank and num_kv_heads is not None:
        updates[1] = None  # an adapter on two of the three
    inputs = [*parts, *(factor for update in updates if update for factor in update)]
    upstream = torch.randn(tokens, HEADS, head_dim, device=CUDA)
    results = []
    for way in (RowSpans, PaddedRows):
        rows = way.of(start, start + prefix, start + length)
        if num_kv_heads is None:
            context = rows.attend_fused(parts[0], updates[0], cos, sin)
        else:
            heads = torch.cat(parts, 1)
            context = rows.attend(heads, num_kv_heads, updates, cos, sin, interleaved)
        results.append([context, *torch.autograd.grad(context, inputs, upstream)])
    for fast, plain in zip(*results, strict=True):
        assert (fast - plain).norm() / plain.norm() < 1e-5


@pytest.mark.parametrize("vocab", [1000, 8192, 130528])
def test_loss_kernel_equals_the_plain_loss(vocab):
    from glmtune.ops.loss import IGNORED, softmax_loss_
    from glmtune.ops.loss_kernels import softmax_loss_ as fast

    torch.manual_seed(0)
    logits = 5 * torch.randn(50, vocab, device=CUDA)
    targets = torch.randint(0, vocab, (50,), device=CUDA)
    targets[::7] = IGNORED
    mine, plain = logits.clone(), logits.clone()
    torch.testing.assert_close(fast(mine, targets), softmax_loss_(plain, targets))
    torch.testing.assert_close(mine, plain, atol=1e-6, rtol=1e-4)


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0),
    reason="float8 matrix units are of the Hopper generation and newer",
)
class TestFloat8:
    def test_a_float8_product_equals_its_reference(self):
        torch.manual_seed(0)
        x = torch.randn(128, 512, device=CUDA, dtype=torch.bfloat16)
        weight = torch.randn(256, 512, device=CUDA, dtype=torch.bfloat16)
        bias = torch.randn(256, device=CUDA, dtype=torch.bfloat16)
        eight = linear.quantise(weight, bias)
        result = linear.frozen_linear(x, eight).float()
        x8, scale = linear.quantise_rows(x)
        wanted = (x8.float() * scale) @ (eight.by_row_NK.float() * eight.row_scale_N[:, None]).T
        wanted += bias.float()
        assert (result - wanted).norm() / wanted.norm() < 5e-3
        exact = F.linear(x.float(), weight.float(), bias.float())
        assert (result - exact).norm() / exact.norm() < 0.05

    def test_a_compiled_pack_equals_its_rows(self, rows):
        model, weights = make_model(torch.bfloat16, "query_key_value")
        to_fp8(model)
        fast = PackedPass(
            Accelerator(), PackedModel(model, PACKED, compiled=True), rows, 0.1, LENGTH
        )
        plain = PaddedPass(Accelerator(), model, rows)
        row_ids = plan_packs(rows.lengths_R, np.arange(len(rows)), LENGTH)[0]
        check_agreement(fast, plain, row_ids, weights, torch.bfloat16)
