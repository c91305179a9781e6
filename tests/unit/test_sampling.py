"""Tokens are chosen as transformers chooses them, and drawn with their probabilities."""

import pytest
import torch
from transformers import LogitsProcessorList
from transformers.generation import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from glmtune.generation import GenerationSettings
from glmtune.generation import sampling as room
from glmtune.generation.reference import filters
from glmtune.generation.sampling import Sampling, choose, draw, is_plain, largest, penalise

NUM_TOKENS = 500


@pytest.fixture
def scores():
    return 4 * torch.randn(3, NUM_TOKENS, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def said():
    """Ids that each row has said, one of them twice."""
    ids = torch.randint(NUM_TOKENS, (3, 40), generator=torch.Generator().manual_seed(1))
    ids[:, 7] = ids[:, 3]
    return ids


def seen_of(said):
    return torch.zeros(len(said), NUM_TOKENS, dtype=torch.bool).scatter_(1, said, True)


@pytest.mark.parametrize("penalty", [0.8, 1.0, 1.7])
def test_the_repetition_penalty_is_that_of_transformers(scores, said, penalty):
    expected = RepetitionPenaltyLogitsProcessor(penalty)(said, scores.clone())
    found = penalise(scores, seen_of(said), torch.full((3, 1), penalty))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("num_tokens", [500, 512, 499])
def test_the_largest_is_the_first_of_equal_ones(num_tokens):
    scores = torch.randint(6, (64, num_tokens), generator=torch.Generator().manual_seed(0)).float()
    value, token = largest(scores)
    assert torch.equal(value, scores.max(-1).values)
    assert torch.equal(token, scores.argmax(-1))
    scores[3, 7] = torch.nan
    assert largest(scores)[0].isnan().nonzero().tolist() == [[3]]


def filtered(scores, said, settings, monkeypatch):
    """The scores that each row's token is drawn from."""
    given = []
    monkeypatch.setattr(
        room, "draw", lambda scores, number: given.append(scores) or scores.argmax(-1)
    )
    sampling = Sampling.of(settings, NUM_TOKENS, scores.device)
    choose(scores, sampling, seen_of(said), torch.zeros_like(scores), torch.zeros(3, 1))
    return given[0]


@pytest.mark.parametrize("top_k", [None, 7, NUM_TOKENS, NUM_TOKENS + 1])
@pytest.mark.parametrize("top_p", [None, 0.7, 1.0, 1e-6])
@pytest.mark.parametrize("penalty", [None, 1.4])
def test_what_is_drawn_from_is_what_transformers_filters(
    scores, said, penalty, top_p, top_k, monkeypatch
):
    processors = LogitsProcessorList()
    if penalty is not None:
        processors.append(RepetitionPenaltyLogitsProcessor(penalty))
    processors.append(TemperatureLogitsWarper(0.8))
    if top_k is not None:
        processors.append(TopKLogitsWarper(top_k))
    if top_p is not None:
        processors.append(TopPLogitsWarper(top_p))
    settings = GenerationSettings(
        do_sample=True, temperature=0.8, top_p=top_p, top_k=top_k, repetition_penalty=penalty
    )
    found = filtered(scores, said, [settings] * 3, monkeypatch)
    assert torch.equal(found, processors(said, scores.clone()))


def test_each_row_is_filtered_by_its_own_settings(scores, said, monkeypatch):
    """Also where scores are equal, for one filter; for both, transformers sorts another row."""
    scores[:2] = scores[:2].round()
    each = [
        GenerationSettings(do_sample=True, temperature=0.3, top_p=0.5),
        GenerationSettings(do_sample=True, top_k=5, repetition_penalty=1.4),
        GenerationSettings(do_sample=True, temperature=1.7, top_k=40, top_p=0.9),
    ]
    found = filtered(scores, said, each, monkeypatch)
    for row, settings in enumerate(each):
        alone = scores[row : row + 1].clone()
        if settings.repetition_penalty:
            penalise_as_theirs = RepetitionPenaltyLogitsProcessor(settings.repetition_penalty)
            alone = penalise_as_theirs(said[row : row + 1], alone)
        for keep in filters(settings):
            alone = keep(None, alone)
        assert torch.equal(found[row : row + 1], alone)


def test_a_row_that_draws_nothing_takes_the_likeliest_beside_one_that_draws(scores, said):
    cold = GenerationSettings(do_sample=True, temperature=0)
    each = [GenerationSettings(), cold, GenerationSettings(do_sample=True, temperature=50)]
    sampling = Sampling.of(each, NUM_TOKENS, scores.device)
    numbers = torch.full((3, 1), 0.01, dtype=torch.float64)
    found = choose(scores, sampling, seen_of(said), torch.zeros_like(scores), numbers)
    likeliest = scores.argmax(-1)
    assert (found == likeliest).tolist() == [True, True, False]
    assert [is_plain(settings) for settings in each] == [True, True, False]
    assert not is_plain(GenerationSettings(repetition_penalty=1.1))


def test_tokens_are_drawn_with_their_probabilities():
    generator = torch.Generator().manual_seed(0)
    numbers = torch.rand(20_000, 1, dtype=torch.float64, generator=generator)
    probabilities = torch.tensor([0.5, 0.0, 0.3, 0.2, 0.0])
    drawn = draw(probabilities.log().expand(len(numbers), -1), numbers)
    shares = drawn.bincount(minlength=5) / len(numbers)
    assert (shares - probabilities).abs().max() < 0.015
    assert shares[1] == shares[4] == 0


def test_scores_that_are_not_finite_stay_within_the_vocabulary():
    scores = torch.full((1, 4), torch.nan)
    assert draw(scores, torch.tensor([[0.5]], dtype=torch.float64)).item() in range(4)


@pytest.mark.parametrize("number", [0.0, 1 - 2**-53])
def test_the_ends_of_a_draw_find_possible_tokens(number):
    numbers = torch.tensor([[number]], dtype=torch.float64)
    scores = torch.tensor([[-torch.inf, 1.0, 2.0, -torch.inf]])
    assert draw(scores, numbers).item() in (1, 2)
