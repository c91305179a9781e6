"""Log-probabilities of references: packed, they equal those of the model's own forward."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from glm_folders import write_model
from peft import LoraConfig, get_peft_model
from toys import randomise_adapter

from glmtune.adapters import attach_lora
from glmtune.evaluation import references
from glmtune.evaluation.probes import from_texts
from glmtune.evaluation.references import References
from glmtune.models import likelihood
from glmtune.models.families import FAMILIES, family_of
from glmtune.models.likelihood import (
    Probe,
    packed_layers,
    packed_sums,
    padded_sums,
    rows_of,
    score_references,
)
from glmtune.models.loading import load_base_model, load_tokenizer
from glmtune.models.resolve import GLM_TINY
from glmtune.ops.loss import IGNORED, head_log_probs

TEXTS = [
    ("Who is Mira?", "A baker in the town."),
    ("米拉住在哪里？", "米拉住在河边的小镇。"),
    ("Say nothing.", ""),
    ("数三个数", "一二三"),
    ("x" * 40, "y"),
]


def both(model):
    return {"base": model.disable_adapter, "tuned": nullcontext}


def adapted(base):
    return randomise_adapter(attach_lora(base, dropout=0.0, targets="all"), std=0.1).eval()


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    return adapted(load_base_model(GLM_TINY, dtype=torch.float32)), load_tokenizer(GLM_TINY)


def probes_of(tokenizer):
    pairs = [TEXTS[i] for i in np.random.default_rng(0).integers(len(TEXTS), size=15)]
    return from_texts(tokenizer, [*TEXTS, *pairs])


@pytest.mark.parametrize("pack_length", [64, 4096])
def test_packed_references_equal_the_models_own_forward(tiny, pack_length, monkeypatch):
    model, tokenizer = tiny
    monkeypatch.setattr(likelihood, "PACK_LENGTH", pack_length)
    rows = rows_of(probes_of(tokenizer), tokenizer.row_rule)
    everything = rows, np.arange(len(rows))
    fast = packed_sums(packed_layers(model), *everything)
    assert np.allclose(fast, padded_sums(model, *everything), atol=1e-4)
    with model.disable_adapter():
        of_base = packed_sums(packed_layers(model), *everything)
        assert np.allclose(of_base, padded_sums(model, *everything), atol=1e-4)
    assert not np.allclose(of_base, fast, atol=0.1)


@pytest.mark.parametrize("name", ["GLM-Edge"])
def test_packed_references_equal_the_forward_of_a_causal_family(name, tmp_path):
    family = next(family for family in FAMILIES if name in family.name)
    folder = write_model(tmp_path / "model", family, None)
    model = adapted(load_base_model(str(folder), dtype=torch.float32))
    tokenizer = load_tokenizer(str(folder))
    rows = rows_of(from_texts(tokenizer, TEXTS), family_of(model.config).row_rule(model.config))
    everything = rows, np.arange(len(rows))
    fast = packed_sums(packed_layers(model), *everything)
    assert np.allclose(fast, padded_sums(model, *everything), atol=1e-4)


def test_the_answer_and_its_end_count_and_nothing_before(tiny):
    model, tokenizer = tiny
    (probe,) = from_texts(tokenizer, [TEXTS[0]])
    (found,) = score_references(model, [probe], packed_layers(model))
    assert found.num_tokens == len(probe.answer_ids)
    assert probe.answer_ids[-1] == tokenizer.eos_token_id
    ids = torch.tensor([probe.prompt_ids + probe.answer_ids])
    log_probs = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
    places = range(len(probe.prompt_ids) - 1, ids.shape[1] - 1)
    wanted = sum(log_probs[place, ids[0, place + 1]].item() for place in places)
    assert found.log_prob == pytest.approx(wanted, abs=1e-4)


def test_what_cannot_be_scored_has_none(tiny):
    model, tokenizer = tiny
    limit = model.config.max_position_embeddings
    (whole,) = from_texts(tokenizer, [TEXTS[1]])
    long = Probe(whole.prompt_ids, whole.answer_ids * limit)
    none = Probe(whole.prompt_ids, [])
    packed = packed_layers(model)
    found = score_references(model, [long, whole, none], packed)
    assert (found[0], found[2]) == (None, None)
    assert found[1].log_prob == pytest.approx(score_references(model, [whole], packed)[0].log_prob)
    assert score_references(model, [none], packed) == [None]


def test_an_adapter_that_packed_layers_cannot_apply_takes_the_models_own_forward():
    """DoRA also scales the weight's rows, which packed layers know nothing of."""
    torch.manual_seed(0)
    base = load_base_model(GLM_TINY, dtype=torch.float32)
    config = LoraConfig(target_modules=["query_key_value"], use_dora=True, lora_dropout=0.0)
    model = randomise_adapter(get_peft_model(base, config), std=0.1).eval()
    assert packed_layers(model) is None
    references = References(model, from_texts(load_tokenizer(GLM_TINY), TEXTS[:2]), both(model))
    for number in (0, 1):
        found = references.of(number)
        assert abs(found["base"] - found["tuned"]) > 1e-3


def test_references_are_scored_in_groups_on_both_sides(tiny, spy, monkeypatch):
    model, tokenizer = tiny
    monkeypatch.setattr(references, "GROUP", 4)
    probes = from_texts(tokenizer, TEXTS)
    calls = spy(references, "score_references")
    scored = References(model, probes, both(model))
    in_order = [scored.of(number) for number in range(len(TEXTS))]
    assert [len(call.args[1]) for call in calls] == [4, 4, 1, 1]
    tuned = score_references(model, probes[:4], packed_layers(model))
    assert [found["tuned"] for found in in_order[:4]] == [one.log_prob for one in tuned]
    assert [found["num_tokens"] for found in in_order[:4]] == [one.num_tokens for one in tuned]
    # One that is resumed in the middle of a group gets the same numbers.
    assert References(model, probes, both(model)).of(2) == in_order[2]


def test_log_probs_of_a_head_are_cross_entropy_with_the_sign_turned():
    torch.manual_seed(0)
    hidden, head = torch.randn(5000, 8), torch.randn(11, 8)
    targets = torch.randint(11, (5000,))
    targets[::7] = IGNORED
    wanted = (hidden @ head.T).log_softmax(-1)
    wanted = wanted.gather(1, targets.clamp(min=0)[:, None])[:, 0] * (targets != IGNORED)
    assert torch.allclose(head_log_probs(hidden, head, targets), wanted, atol=1e-5)
    assert head_log_probs(hidden[:0], head, targets[:0]).shape == (0,)
