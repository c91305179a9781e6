"""Attention of padded rows on a CUDA device: the right kernels, forward and backward.

A base after some training has heads whose every score is far below zero; cuDNN's backward pass then
gives NaN at some lengths (see `ops.attention.right_kernels`).
"""

import copy

import pytest
import torch
from torch.nn import functional as F

from glmtune.models import ChatGLMConfig, ChatGLMForConditionalGeneration
from glmtune.ops.attention import prefix_lm_mask, right_kernels
from glmtune.ops.loss import IGNORED

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]
CONFIG = ChatGLMConfig(
    vocab_size=4096, hidden_size=512, num_layers=2, num_attention_heads=4, inner_hidden_size=1024,
    bos_token_id=3572, eos_token_id=3573,
)  # fmt: skip
NUM_BATCHES = 300
TOLERANCES = {torch.bfloat16: 0.03, torch.float16: 0.01}


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("length", [1, 63, 64, 65, 128, 192, 320, 576])
def test_rows_whose_scores_are_very_low(length, dtype):
    generator = torch.Generator("cuda").manual_seed(0)
    noise = torch.randn(3, 1, 2, length, 128, device="cuda", generator=generator)
    query, key, value = 3 + 0.05 * noise[0], -3 + 0.05 * noise[1], noise[2]  # scores about -102
    rows = [x.to(dtype).requires_grad_() for x in (query, key, value)]
    valid = torch.ones(1, length, dtype=torch.bool, device="cuda")
    mask = prefix_lm_mask(torch.tensor([length // 3], device="cuda"), valid)
    with right_kernels():
        output = F.scaled_dot_product_attention(*rows, attn_mask=mask)
    exact = [x.detach().double().requires_grad_() for x in rows]
    scores = (exact[0] @ exact[1].transpose(-1, -2)) * 128**-0.5
    wanted = scores.masked_fill(~mask, -torch.inf).softmax(-1) @ exact[2]
    assert scores.max() < -89
    upstream = torch.randn(output.shape, device="cuda", generator=generator)
    found = torch.autograd.grad(output, rows, upstream.to(dtype))
    expected = torch.autograd.grad(wanted, exact, upstream.double())
    for ours, theirs in zip((output, *found), (wanted, *expected), strict=True):
        # Of one token alone the gradient of query and key is 0.
        assert (ours - theirs).norm() <= TOLERANCES[dtype] * (theirs.norm() + 0.05 * length**0.5)


def batch(random, config):
    """Six rows of mixed lengths, padded at the right; labels as training has them."""
    lengths = torch.randint(8, 260, (6,), generator=random)
    if torch.rand((), generator=random) < 0.5:  # the lengths at which cuDNN's kernels fail
        lengths = lengths.clamp(max=64 if lengths[0] < 130 else 192)
        lengths[0] = 64 if lengths[0] < 130 else 192
    ids = torch.full((6, int(lengths.max())), config.pad_token_id)
    labels = torch.full_like(ids, IGNORED)
    for row, length in enumerate(lengths.tolist()):
        prompt = max(2, length // 3)
        ids[row, :length] = torch.randint(5, 3000, (length,), generator=random)
        ids[row, prompt - 2], ids[row, prompt - 1] = config.gmask_token_id, config.bos_token_id
        labels[row, prompt - 1 : length] = ids[row, prompt - 1 : length]
    return {"input_ids": ids.cuda(), "labels": labels.cuda()}


def loss_and_gradient(model, rows):
    model.zero_grad()
    loss = model(**rows, use_cache=False).loss
    loss.backward()
    grads = [p.grad.float() for p in model.parameters() if p.grad is not None]
    return loss.detach().float(), torch.cat([grad.flatten() for grad in grads])


@pytest.fixture(scope="module")
def trained():
    """A model after some steps, and with scores as low as a trained base's lowest."""
    torch.manual_seed(0)
    model = ChatGLMForConditionalGeneration._from_config(copy.copy(CONFIG)).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    random = torch.Generator().manual_seed(1)
    for _ in range(100):
        model(**batch(random, CONFIG), use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        for layer in model.transformer.layers:
            bias = layer.attention.query_key_value.bias.view(-1, 3, CONFIG.head_dim)
            bias[:, 0] += 4
            bias[:, 1] -= 4
    return model


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_batches_of_mixed_lengths_agree_with_the_plain_form(trained, dtype):
    fused = copy.deepcopy(trained).to(dtype)
    plain = copy.deepcopy(fused)
    plain.set_attn_implementation("eager")
    assert (fused.config._attn_implementation, plain.config._attn_implementation) == (
        "sdpa", "eager",
    )  # fmt: skip
    random = torch.Generator().manual_seed(2)
    for number in range(NUM_BATCHES):
        rows = batch(random, CONFIG)
        (loss, grad), (wanted, expected) = (loss_and_gradient(m, rows) for m in (fused, plain))
        assert grad.isfinite().all(), (number, rows["input_ids"].shape)
        assert abs(loss - wanted) < TOLERANCES[dtype]
        assert (grad - expected).norm() < TOLERANCES[dtype] * expected.norm(), number
