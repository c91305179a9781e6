"""The mask rule, against its own definition spelled out element by element, and the kernels."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from glmtune.models import ChatGLMForConditionalGeneration
from glmtune.ops.attention import PaddedRows, additive_mask, prefix_lm_mask
from glmtune.ops.rotary import rotary_angles
from glmtune.training.passes import enable_recompute


@given(
    left=st.integers(0, 3),
    prefix=st.integers(1, 4),
    answer=st.integers(1, 4),
    right=st.integers(0, 3),
    data=st.data(),
)
def test_each_query_sees_prefix_and_what_precedes_it(left, prefix, answer, right, data):
    length = left + prefix + answer + right
    num_queries = data.draw(st.integers(1, length))
    valid = torch.zeros(1, length, dtype=torch.bool)
    valid[:, left : left + prefix + answer] = True
    mask = prefix_lm_mask(torch.tensor([left + prefix]), valid, num_queries)
    assert mask.shape == (1, 1, num_queries, length)
    for row, query in enumerate(range(length - num_queries, length)):
        for key in range(length):
            sees = bool(valid[0, key]) and (key <= query or key < left + prefix)
            assert mask[0, 0, row, key] == (sees or key == query)


@pytest.mark.parametrize("num_keys", [16, 21])
def test_an_added_mask_is_the_mask_in_rows_that_no_kernel_copies(num_keys):
    mask = torch.rand(2, 1, 5, num_keys, generator=torch.Generator().manual_seed(0)) < 0.5
    mask[..., 0] = True
    added = additive_mask(mask, torch.float32)
    assert torch.equal(added == 0, mask)
    assert torch.equal(added.isneginf(), ~mask)
    assert all(stride % 16 == 0 for stride in added.stride()[:-1])


def padded_forward(model, rows):
    model(rows).logits.sum().backward()


def recomputed_forward(model, rows):
    model.train()
    enable_recompute(model, model.config.num_layers)
    padded_forward(model, rows)
    enable_recompute(model, 0)
    model.eval()


def generated(model, rows):
    model.generate(rows[:, :4], max_new_tokens=2, do_sample=False)


def packed_attention(model, rows):
    place = torch.arange(6)
    rows = PaddedRows.of(torch.zeros_like(place), torch.full((6,), 2), torch.full((6,), 6))
    angles = rotary_angles(place.expand(1, 2, 6), 8)
    rows.attend_fused(torch.randn(6, 2, 24), None, *(angle[0] for angle in angles))


@pytest.mark.parametrize("use", [padded_forward, recomputed_forward, generated, packed_attention])
def test_torchs_attention_is_always_called_without_cudnn(use, tiny_folder, monkeypatch):
    """cuDNN's kernels, which Hopper prefers, give NaN for some rows."""
    model = ChatGLMForConditionalGeneration.from_pretrained(tiny_folder).eval()
    config = model.config
    prompt = [10, 11, config.gmask_token_id, config.bos_token_id]
    rows = torch.tensor([[*prompt, 20, 21], [*prompt, 30, 31]])
    allowed = []
    attention = F.scaled_dot_product_attention

    def seen(*arguments, **more):
        allowed.append(torch.backends.cuda.cudnn_sdp_enabled())
        return attention(*arguments, **more)

    monkeypatch.setattr(F, "scaled_dot_product_attention", seen)
    use(model, rows)
    assert allowed
    assert not any(allowed)
    assert torch.backends.cuda.cudnn_sdp_enabled()


def test_the_choice_of_kernels_compiles(tiny_folder):
    model = ChatGLMForConditionalGeneration.from_pretrained(tiny_folder).eval()
    attention = model.transformer.layers[0].attention
    hidden = torch.randn(1, 6, model.config.hidden_size)
    mask = prefix_lm_mask(torch.tensor([4]), torch.ones(1, 6, dtype=torch.bool))
    angles = rotary_angles(torch.arange(6).expand(1, 2, 6), model.config.head_dim)
    compiled = torch.compile(attention, fullgraph=True, backend="eager")
    wanted, _ = attention(hidden, mask, *angles)
    found, _ = compiled(hidden, mask, *angles)
    assert torch.equal(found, wanted)
