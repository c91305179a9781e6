"""Attention of padded rows on a CUDA device: the right kernels, forward and backward.

A base after some training has heads whose every score is far below zero; cuDNN's backward pass then
gives NaN at some lengths (see `ops.attention.right_kernels`).
"""

import copy

import pytest
import torch
from torch.nn import functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

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
# Relative error of the whole gradient, 16 bits against float64: low scores lose most digits.
LARGEST_DISTANCE = 1.2
LOW_BIAS = 9.0  # makes scores of about -16 * 9 * 9 / sqrt(128) = -115
TYPES = torch.bfloat16, torch.float16
# Factor by which a kernel's error may exceed that of the same steps in the same 16 bits.
FACTOR = 2.0


class RoundedAttention(torch.autograd.Function):
    """The steps of a fused kernel, one by one, rounded to 16 bits where it rounds.

    Its backward pass takes the sum over a row of the weights' gradients from the rounded output.
    Keys that have much in common let that rounding show: 6 % of the queries' gradient in a trained
    head. Source: FlashAttention-2, algorithm 2.
    """

    @staticmethod
    def forward(ctx, query, key, value, mask, scale):
        scores = query.float() @ key.float().transpose(-1, -2) * scale
        weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
        output = weights.to(query.dtype) @ value
        ctx.save_for_backward(query, key, value, weights, output)
        ctx.scale = scale
        return output

    @staticmethod
    def backward(ctx, grad):
        query, key, value, weights, output = ctx.saved_tensors
        total = (grad.float() * output.float()).sum(-1, keepdim=True)
        of_weights = grad.float() @ value.float().transpose(-1, -2)
        of_scores = (weights * (of_weights - total)).to(query.dtype)
        of_value = weights.to(query.dtype).transpose(-1, -2) @ grad
        of_query = of_scores @ key * ctx.scale
        of_key = of_scores.transpose(-1, -2) @ query * ctx.scale
        return of_query, of_key, of_value, None, None


def rounded(module, query, key, value, mask, scaling, **_):
    """`RoundedAttention` as an attention of transformers."""
    return RoundedAttention.apply(query, key, value, mask, scaling).transpose(1, 2), None


def exact_attention(query, key, value, mask, scale):
    scores = (query @ key.transpose(-1, -2)) * scale
    return scores.masked_fill(~mask, -torch.inf).softmax(-1) @ value


def fused_attention(query, key, value, mask, scale):
    with right_kernels():
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)


def errors(found, exact):
    pairs = zip(found, exact, strict=True)
    return [(ours.double() - theirs).norm().item() for ours, theirs in pairs]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 128, 192, 320, 576])
def test_rows_whose_scores_are_very_low(length, dtype):
    generator = torch.Generator("cuda").manual_seed(0)
    noise = torch.randn(4, 1, 8, length, 128, device="cuda", generator=generator)
    # Scores are about -102.
    rows = [x.to(dtype) for x in (3 + 0.05 * noise[0], -3 + 0.05 * noise[1], noise[2])]
    assert (rows[0].double() @ rows[1].double().transpose(-1, -2)).max() * 128**-0.5 < -89
    upstream = noise[3].to(dtype)
    valid = torch.ones(1, length, dtype=torch.bool, device="cuda")
    mask = prefix_lm_mask(torch.tensor([length // 3], device="cuda"), valid)

    def all_of(attend, dtype):
        leaves = [x.to(dtype).requires_grad_() for x in rows]
        output = attend(*leaves, mask, 128**-0.5)
        return [output, *torch.autograd.grad(output, leaves, upstream.to(dtype))]

    exact = all_of(exact_attention, torch.float64)
    allowed = errors(all_of(RoundedAttention.apply, dtype), exact)
    found = errors(all_of(fused_attention, dtype), exact)
    sizes = [x.norm().item() for x in exact]
    for name, error, limit, size in zip(
        ("output", "dq", "dk", "dv"), found, allowed, sizes, strict=True
    ):
        # Of one token alone the gradient of query and key is 0 but for rounding.
        assert error <= FACTOR * limit + 1e-3 * (size + length**0.5), name  # false of NaN


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
    grads = [p.grad.double() for p in model.parameters() if p.grad is not None]
    return loss.detach().double(), torch.cat([grad.flatten() for grad in grads])


@pytest.fixture(scope="module")
def trained():
    """A model after some steps, with scores as low as the lowest of a trained base."""
    torch.manual_seed(0)
    model = ChatGLMForConditionalGeneration._from_config(copy.copy(CONFIG)).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    random = torch.Generator().manual_seed(1)
    for _ in range(100):
        model(**batch(random, CONFIG), use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    # In the dimensions that hardly turn with the position, or scores would be low for some only.
    slow = torch.tensor([i + half for half in (0, 64) for i in (28, 29, 30, 31, 60, 61, 62, 63)])
    with torch.no_grad():
        for layer in model.transformer.layers:
            bias = layer.attention.query_key_value.bias.view(-1, 3, CONFIG.head_dim)
            bias[:, 0, slow] += LOW_BIAS
            bias[:, 1, slow] -= LOW_BIAS
    return model


@pytest.mark.parametrize("dtype", TYPES)
def test_batches_of_mixed_lengths_agree_with_the_plain_form(trained, dtype, monkeypatch):
    fused = copy.deepcopy(trained).to(dtype)
    plain = copy.deepcopy(fused)
    exact = copy.deepcopy(trained).to(dtype).double()
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "rounded", rounded)
    for model, attention in ((fused, "sdpa"), (plain, "rounded"), (exact, "eager")):
        model.config._attn_implementation = attention
    random = torch.Generator().manual_seed(2)
    distances = []
    for number in range(NUM_BATCHES):
        rows = batch(random, CONFIG)
        (loss, grad), (near, wanted), (true, expected) = (
            loss_and_gradient(model, rows) for model in (fused, plain, exact)
        )
        assert grad.isfinite().all(), (number, rows["input_ids"].shape)
        assert abs(loss - true) <= 2 * abs(near - true) + 0.02
        distances.append([(g - expected).norm() / expected.norm() for g in (grad, wanted)])
    of_kernels, of_plain = torch.tensor(distances).median(0).values.tolist()
    assert of_plain < LARGEST_DISTANCE  # or nothing would be shown
    assert of_kernels < 1.25 * of_plain
