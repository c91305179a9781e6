"""Which rows of several files are taken: numbers, weights, languages and general rows."""

import numpy as np
import pytest

from glmtune.data.mixing import (
    CHINESE,
    ENGLISH,
    OTHER,
    language_of,
    num_replayed,
    share_languages,
    uses_of,
)
from glmtune.errors import UserError


@pytest.mark.parametrize(
    "num, weight, counts",
    [
        (None, 1, {1: 100}),
        (30, 1, {0: 70, 1: 30}),
        (None, 2, {2: 100}),
        (None, 0.25, {0: 75, 1: 25}),
        (10, 2.5, {0: 90, 2: 5, 3: 5}),
        (100, 0.005, {}),
    ],
)
def test_a_number_of_rows_and_how_often_each_is_used(num, weight, counts):
    if not counts:
        with pytest.raises(UserError, match="no row is taken, since weight"):
            uses_of("a", 100, num, weight, 1, 0)
        return
    uses = uses_of("a", 100, num, weight, 1, 0)
    assert dict(zip(*np.unique(uses, return_counts=True), strict=True)) == counts
    assert np.array_equal(uses, uses_of("a", 100, num, weight, 1, 0))


def test_the_draw_depends_on_the_seed_and_on_the_place_of_the_file():
    draws = [uses_of("a", 100, 50, 1, seed, number) for seed in (1, 2) for number in (0, 1)]
    assert len({draw.tobytes() for draw in draws}) == 4


def test_more_rows_than_there_are_is_refused():
    assert uses_of("a", 300, 300, 1, 1, 0).all()
    with pytest.raises(UserError, match=r"a: has 300 rows, and 301 are to be taken"):
        uses_of("a", 300, 301, 1, 1, 0)


@pytest.mark.parametrize(
    "texts, language",
    [
        (["什么是 AI？", "人工智能"], CHINESE),
        (["翻译成英文：你好", "Hello, nice to meet you, how are you doing today?"], ENGLISH),
        (["What is a tree?", "A plant."], ENGLISH),
        (["1 + 1 =", "2"], OTHER),
        (["Что это?", "это"], OTHER),
        ([], OTHER),
    ],
)
def test_the_language_of_a_row(texts, language):
    assert language_of(texts) == language


@pytest.mark.parametrize("zh_share", [0.1, 0.5, 0.7, 0.99])
def test_languages_get_their_share_and_no_more_is_left_out_than_needed(zh_share):
    uses = [np.array([2] * 60 + [1] * 40), np.ones(50, int)]
    languages = [np.array([CHINESE] * 60 + [OTHER] * 40), np.array([ENGLISH] * 50)]
    shared = share_languages(uses, languages, zh_share, 3)
    all_uses, spoken = np.concatenate(shared), np.concatenate(languages)
    zh, en, other = (all_uses[spoken == lang].sum() for lang in (CHINESE, ENGLISH, OTHER))
    assert other == 40
    assert zh / (zh + en) == pytest.approx(zh_share, abs=0.01)
    assert zh == 120 or en == 50  # one of them is whole
    assert (all_uses >= 0).all()
    assert (uses[0][0], uses[1].sum()) == (2, 50)  # what it was given is as it was
    others = share_languages(uses, languages, zh_share, 4)
    assert zh + en == 170 or not all(map(np.array_equal, shared, others))


def test_a_share_needs_rows_of_both_languages():
    one = [np.ones(3, int)], [np.array([CHINESE, CHINESE, OTHER])]
    with pytest.raises(UserError, match="no row is English"):
        share_languages(*one, 0.5, 1)


@pytest.mark.parametrize("share", [0.01, 0.05, 0.5])
def test_general_rows_make_up_their_share(share):
    num = num_replayed("g", 10_000, 1000, share)
    assert num / (num + 1000) == pytest.approx(share, abs=0.001)


def test_the_share_that_is_advised_is_possible():
    with pytest.raises(UserError, match=r"set replay_share 0\.189 at most") as error:
        num_replayed("g", 100, 429, 0.5)
    assert "asks for 429" in str(error.value)
    assert num_replayed("g", 100, 429, 0.189) <= 100
    with pytest.raises(UserError, match="is no row"):
        num_replayed("g", 100, 4, 0.05)
