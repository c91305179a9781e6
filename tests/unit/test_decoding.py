"""The plain functions against the module: the same numbers, one token at a time."""

import pytest
import torch
from torch.nn import functional as F

from glmtune.generation.weights import read_weights
from glmtune.models.chatglm.decoding import Angles, KeyValueCache, attend, decode, prefill
from glmtune.models.chatglm.layout import read_layout
from glmtune.models.loading import load_base_model
from glmtune.ops.attention import prefix_lm_mask
from glmtune.ops.rotary import rotary_angles

NUM_COLUMNS = 32


@pytest.fixture(scope="module", params=["chatglm-6b-tiny", "chatglm-6b-v1.0-tiny"])
def model(request, tiny_folder):
    if request.param == tiny_folder.name:
        return load_base_model(str(tiny_folder), dtype=torch.float32)
    folder = request.getfixturevalue("shared") / "golden" / request.param
    return load_base_model(str(folder), dtype=torch.float32)


@pytest.fixture
def rows(model):
    """Two rows of unequal prompts, left-padded, with four answer tokens each."""
    config = model.config
    first, specials = config.pad_token_id + 7, [config.gmask_token_id, config.bos_token_id]
    prompts = [[first, first + 20, first + 3], [first + n for n in range(9)]]
    answers = [[first + 40, first + 41, first + 2, first + 9], [first + 1, first, first, first + 5]]
    longest = max(map(len, prompts))
    return torch.tensor(
        [
            [config.pad_token_id] * (longest - len(prompt)) + prompt + specials + answer
            for prompt, answer in zip(prompts, answers, strict=True)
        ]
    )


@pytest.mark.parametrize("extra", [0, 5])
@torch.inference_mode()
def test_prefill_and_decode_give_the_modules_logits(model, rows, extra):
    """Also where the cache has more columns than there are tokens, as in a captured step."""
    num_answer = 4
    num_prompt = rows.shape[1] - num_answer
    weights = read_weights(model)
    cache = KeyValueCache.zeros(model.config, len(rows), NUM_COLUMNS, weights.final_norm.weight)
    layout = read_layout(rows, model.config)
    cos, sin = rotary_angles(layout.position_ids_B2S, model.config.head_dim)

    def angles(start, end):
        return Angles(cos[:, start:end], sin[:, start:end])

    mask = prefix_lm_mask(layout.prefix_end_B, layout.valid_BS[:, :num_prompt])
    found = [prefill(weights, rows[:, :num_prompt], mask, angles(0, num_prompt), cache)]
    for column in range(num_prompt, rows.shape[1]):
        seen = F.pad(layout.valid_BS[:, : column + 1], (0, extra))
        token, place = rows[:, column, None], torch.tensor([column])
        ready = angles(column, column + 1)
        found.append(decode(weights, token, place, seen[:, None, None], ready, cache))
    expected = model(rows).logits[:, num_prompt - 1 :]
    assert (torch.stack(found, dim=1) - expected).abs().max() < 1e-5


@torch.inference_mode()
def test_a_prompt_is_read_without_the_attention_that_plans_for_each_length(
    model, rows, monkeypatch
):
    """cuDNN's, which a GPU would take, costs 60 ms for a length that is new."""
    allowed = []
    attention = F.scaled_dot_product_attention

    def seen(*given):
        allowed.append(torch.backends.cuda.cudnn_sdp_enabled())
        return attention(*given)

    monkeypatch.setattr(F, "scaled_dot_product_attention", seen)
    weights = read_weights(model)
    cache = KeyValueCache.zeros(model.config, len(rows), NUM_COLUMNS, weights.final_norm.weight)
    layout = read_layout(rows, model.config)
    angles = Angles(*rotary_angles(layout.position_ids_B2S, model.config.head_dim))
    mask = prefix_lm_mask(layout.prefix_end_B, layout.valid_BS)
    prefill(weights, rows, mask, angles, cache)
    assert allowed == [False] * model.config.num_layers
    assert torch.backends.cuda.cudnn_sdp_enabled()


def test_attention_of_one_query_is_that_of_the_fused_kernel():
    generator = torch.Generator().manual_seed(0)
    query, keys, values = (
        torch.randn(2, 3, n, 8, generator=generator) for n in (1, NUM_COLUMNS, NUM_COLUMNS)
    )
    mask = torch.rand(2, 1, 1, NUM_COLUMNS, generator=generator) < 0.5
    fused = F.scaled_dot_product_attention(query, keys, values, mask)
    found = attend(query, keys, values, mask)
    assert torch.allclose(found, fused.transpose(1, 2).flatten(2), atol=1e-6)
