"""The decoding functions against the module: the same numbers, one token at a time."""

import pytest
import torch
from torch.nn import functional as F

from glmtune.generation.weights import read_weights
from glmtune.models.chatglm.decoding import DECODING
from glmtune.models.decoding import (
    Angles,
    KeyValueCache,
    Place,
    attend,
    decode,
    prefill,
    run_head,
)
from glmtune.models.families import family_of
from glmtune.models.loading import load_base_model
from glmtune.ops.attention import prefix_lm_mask

NUM_COLUMNS = 32
NUM_ANSWER = 4


@pytest.fixture(scope="module", params=["chatglm-6b-tiny", "chatglm-6b-v1.0-tiny"])
def model(request, tiny_folder):
    if request.param == tiny_folder.name:
        return load_base_model(str(tiny_folder), dtype=torch.float32)
    folder = request.getfixturevalue("shared") / "golden" / request.param
    return load_base_model(str(folder), dtype=torch.float32)


@pytest.fixture
def rows(model):
    """Two rows of unequal prompts, with four answer tokens each."""
    config = model.config
    first, specials = config.pad_token_id + 7, [config.gmask_token_id, config.bos_token_id]
    prompts = [[first, first + 20, first + 3], [first + n for n in range(9)]]
    answers = [[first + 40, first + 41, first + 2, first + 9], [first + 1, first, first, first + 5]]
    return [[*p, *specials, *a] for p, a in zip(prompts, answers, strict=True)]


class Reading:
    """Prompts padded at their ends, and what `prefill` needs beside them."""

    def __init__(self, model, rows):
        self.weights = read_weights(model, DECODING)
        self.lengths = torch.tensor([len(row) - NUM_ANSWER for row in rows])
        self.longest = int(self.lengths.max())
        prompts = [row[:-NUM_ANSWER] for row in rows]
        self.ids = torch.tensor([ids + [0] * (NUM_COLUMNS - len(ids)) for ids in prompts])
        layout = DECODING.layout(self.ids, model.config)
        self.angles = DECODING.angles(layout.positions, model.config)
        valid = torch.arange(self.longest) < self.lengths[:, None]
        self.mask = prefix_lm_mask(layout.prefix_end_B, valid)
        shape, like = family_of(model.config).shape(model.config), self.weights.final_norm.weight
        self.cache = KeyValueCache.zeros(shape, len(rows), NUM_COLUMNS, like)

    def prefill(self):
        return prefill(
            self.weights, DECODING, self.ids[:, : self.longest], self.lengths, self.mask,
            Angles(*(angle[:, : self.longest] for angle in self.angles)),
            self.cache.part(slice(None), self.longest),
        )  # fmt: skip


@pytest.mark.parametrize("extra", [0, 5])
@torch.inference_mode()
def test_prefill_and_decode_give_the_modules_logits(model, rows, extra):
    """Also where the cache has more columns than there are tokens, as in a captured step."""
    reading = Reading(model, rows)
    found, row_B = [reading.prefill()], torch.arange(len(rows))
    for step in range(NUM_ANSWER):
        column = reading.lengths + step
        token = torch.tensor([[row[i]] for row, i in zip(rows, column, strict=True)])
        num_columns = int(column.max()) + 1 + extra
        mask = torch.arange(num_columns) <= column[:, None]
        angles = Angles(*(angle[row_B, column, None] for angle in reading.angles))
        found.append(
            decode(
                reading.weights, token, Place(row_B, column), mask[:, None, None], angles,
                reading.cache.part(slice(None), num_columns), DECODING.run_block, run_head,
            )
        )  # fmt: skip
    for number, row in enumerate(rows):
        expected = model(torch.tensor([row])).logits[0, -NUM_ANSWER - 1 :]
        assert (torch.stack(found)[:, number] - expected).abs().max() < 1e-5


@torch.inference_mode()
def test_a_prompt_is_read_without_the_attention_that_plans_for_each_length(
    model, rows, monkeypatch
):
    """cuDNN's kernel, a GPU's default, takes 60 ms for each new length."""
    allowed = []
    attention = F.scaled_dot_product_attention

    def seen(*given):
        allowed.append(torch.backends.cuda.cudnn_sdp_enabled())
        return attention(*given)

    monkeypatch.setattr(F, "scaled_dot_product_attention", seen)
    Reading(model, rows).prefill()
    assert allowed == [False] * model.config.num_layers
    assert torch.backends.cuda.cudnn_sdp_enabled()


@pytest.mark.parametrize("num_queries, num_keys", [(3, 3), (6, 2), (4, 1)])
def test_attention_of_one_query_is_that_of_the_fused_kernel(num_queries, num_keys):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, num_queries, 1, 8, generator=generator)
    keys, values = torch.randn(2, 2, num_keys, NUM_COLUMNS, 8, generator=generator)
    mask = torch.rand(2, 1, 1, NUM_COLUMNS, generator=generator) < 0.5
    fused = F.scaled_dot_product_attention(query, keys, values, mask, enable_gqa=True)
    found = attend(query, keys, values, mask)
    assert torch.allclose(found, fused.transpose(1, 2).flatten(2), atol=1e-6)
