"""The memory of a pass, against an H200's measurements and the CPU allocator's counts."""

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch.autograd.profiler import profile

from glmtune.adapters import attach_lora
from glmtune.bench.random_model import shape_of as bench_shape
from glmtune.bench.rows import random_rows
from glmtune.hardware import GIB
from glmtune.models.chatglm.configuration import ChatGLMConfig
from glmtune.models.chatglm.family import shape
from glmtune.models.chatglm.modeling import ChatGLMForConditionalGeneration
from glmtune.models.chatglm.packed import PACKED
from glmtune.models.packed import PackedModel
from glmtune.training.passes import PackedPass, PaddedPass
from glmtune.training.planning.memory import Batch, Setup, estimate

CHATGLM_6B, BF16 = shape(ChatGLMConfig()), torch.bfloat16
CHATGLM3 = bench_shape("chatglm3-6b")
GLM4_0414 = bench_shape("glm-4-9b-0414")
QKV = ("q_proj", "k_proj", "v_proj")
FUSED, LINEARS = ("query_key_value",), CHATGLM_6B.linear_names


def on_h200(layout, targets=FUSED, model=CHATGLM_6B, **changes):
    compiled = layout != "padded"
    return Setup(model, BF16, layout, compiled, is_hopper=True, targets=targets, **changes)


@pytest.mark.parametrize(
    ("setup", "batch", "measured"),
    [
        (on_h200("packed", QKV, CHATGLM3), Batch(8192, 5400), 31.05),
        (on_h200("packed", QKV, CHATGLM3, is_fp8=True), Batch(8192, 5400), 31.05),
        # The longest of the first 18 batches of six has 132 tokens.
        (on_h200("padded"), Batch(6 * 132, 500), 15.28),
    ],
)
def test_the_estimate_is_what_an_h200_took(setup, batch, measured):
    """See benchmarks/2026-11-24-training-step.md and 2026-11-29-glm.md."""
    assert estimate(setup, batch).allocated / GIB == pytest.approx(measured, rel=0.01)


@pytest.mark.parametrize(
    ("setup", "batch", "measured", "kept"),
    [
        # Half a value a token in each of 28 layers: the mask of dropout.
        (on_h200("packed"), Batch(8192, 5400), 30.29, 28 * 0.5),
        (on_h200("packed"), Batch(16384, 10800), 48.78, 28 * 0.5),
        # What the gate gives, in each of 40 layers.
        (on_h200("packed", GLM4_0414.linear_names, GLM4_0414), Batch(8192, 5400), 60.99,
         40 * 13696 / 4096),
    ],
)  # fmt: skip
def test_the_estimate_lacks_what_is_no_longer_kept(setup, batch, measured, kept):
    """What an H200 took when the compiler kept it, and how much that was."""
    less = kept * setup.value_bytes * batch.num_tokens / GIB
    assert estimate(setup, batch).allocated / GIB == pytest.approx(measured - less, rel=0.01)


def test_the_estimate_of_captured_steps_of_six_rows():
    """14.64 GiB were measured with 42 workspaces of cuBLAS (21 streams); 4 are left of them."""
    of_workspaces = (42 - 4) * 32 / 1024
    gib = estimate(on_h200("exact"), Batch(768, 576)).allocated / GIB
    assert gib == pytest.approx(14.64 - of_workspaces, rel=0.02)


@pytest.mark.parametrize(
    ("changes", "to_reach"), [({"bits": 4}, 5.0), ({"bits": 8}, 7.5), ({}, 12.5)]
)
def test_the_estimate_of_six_rows_of_200_tokens_with_recomputing(changes, to_reach):
    setup = on_h200("exact", **changes)
    assert estimate(setup, Batch(1216, 1216), recompute=27).allocated / GIB < to_reach


def test_each_layer_that_is_recomputed_takes_less():
    setup, batch = on_h200("packed"), Batch(8192, 5400)
    sizes = [estimate(setup, batch, k).allocated for k in range(28)]
    differences = np.diff(sizes) / (batch.num_tokens * setup.value_bytes)
    assert differences.max() < 0
    # A recomputed layer keeps only its input.
    assert differences[:20] == pytest.approx(-9.0, abs=0.05)


def peak_bytes(work):
    """Peak CPU memory that was allocated during some work."""
    with profile(use_cpu=True, profile_memory=True, use_kineto=True) as seen:
        work()
    events = [e for e in seen.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return np.cumsum([event.nbytes() for event in events]).max()


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize(
    ("targets", "dropout", "recompute", "vocab_size"),
    [
        (FUSED, 0.1, 0, 1024),
        (FUSED, 0.0, 0, 4096),
        (FUSED, 0.1, 3, 4096),
        (FUSED, 0.1, 7, 1024),
        (LINEARS, 0.1, 0, 4096),
        (LINEARS, 0.0, 4, 1024),
    ],
)
def test_the_estimate_is_near_what_the_cpu_allocates(
    layout, targets, dropout, recompute, vocab_size
):
    torch.manual_seed(0)
    config = ChatGLMConfig(
        vocab_size=vocab_size, hidden_size=256, num_layers=8, num_attention_heads=4,
        inner_hidden_size=1024, bos_token_id=vocab_size - 500, eos_token_id=vocab_size - 499,
    )  # fmt: skip
    base = ChatGLMForConditionalGeneration._from_config(config, dtype=torch.float32)
    model = attach_lora(base, rank=8, dropout=dropout, targets=targets)
    rows, row_ids, accelerator = random_rows(config, 60), np.arange(6), Accelerator(cpu=True)
    num_supervised = int(rows.num_labels_R[row_ids].sum())
    if layout == "padded":
        step_pass = PaddedPass(accelerator, model, rows, recompute)
        batch = Batch(6 * int(rows.lengths_R[row_ids].max()), num_supervised)
    else:
        packed = PackedModel(model, PACKED, compiled=False, recompute=recompute)
        step_pass = PackedPass(accelerator, packed, rows, dropout, None)
        batch = Batch(int(rows.lengths_R[row_ids].sum()), num_supervised)
    step_pass.run(row_ids, 100, 0)  # gradients are there from here on
    measured = peak_bytes(lambda: step_pass.run(row_ids, 100, 0))
    setup = Setup(
        shape(config), torch.float32, layout, on_gpu=False, targets=targets, has_dropout=dropout > 0
    )
    assert estimate(setup, batch, recompute).of_the_pass == pytest.approx(measured, rel=0.1)
