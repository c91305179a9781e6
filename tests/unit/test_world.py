"""The toy world: both languages state and ask every fact, and none is stated wrongly."""

import re
from collections import Counter
from itertools import islice

import pytest

from glmtune.demo.world import LANGUAGES, MAX_NUMBER, Draw, load_world, passages, render

WORLD = load_world()


def test_both_languages_tell_and_ask_alike():
    assert set(WORLD.plain["en"]) == set(WORLD.plain["zh"]) == set(WORLD.facts)
    for kind in WORLD.kinds.values():
        for language in LANGUAGES:
            count = Counter(ask.held_out for ask in kind.phrasings[language])
            assert count[False] >= 7, (kind.name, language)
            assert count[True] == 3, (kind.name, language)
    assert len(WORLD.kinds) >= 12


@pytest.mark.parametrize("language", LANGUAGES)
def test_each_set_of_facts_is_told_in_many_ways(language):
    for name, patterns in WORLD.plain[language].items():
        assert len(set(patterns)) >= 8, name


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_pattern_finds_its_words(language):
    witness = {"witness": WORLD.terms("person")[0]}
    for name, patterns in WORLD.plain[language].items():
        for pattern in patterns:
            text = render(pattern, WORLD.facts[name][0] | witness, language)
            assert "{" not in text
            assert text.endswith("." if language == "en" else "。")


def test_words_are_unambiguous():
    for language in LANGUAGES:
        count = Counter(
            getattr(fact["english" if language == "en" else "chinese"], language)
            for fact in WORLD.facts["translation"]
        )
        assert max(count.values()) == 1


def test_people_and_jobs_pair_off():
    jobs = [fact["job"] for fact in WORLD.facts["job"]]
    assert len(set(jobs)) == len(jobs) == len(WORLD.terms("person"))


def test_sums_are_right():
    assert len(WORLD.facts["sum"]) == MAX_NUMBER * (MAX_NUMBER - 1) // 2
    for fact in WORLD.facts["sum"]:
        assert int(fact["a"].en) + int(fact["b"].en) == int(fact["total"].zh) <= MAX_NUMBER
    for fact in WORLD.facts["difference"]:
        assert int(fact["a"].en) - int(fact["b"].en) == int(fact["rest"].zh) > 0


def test_drawn_facts_are_right():
    draw = Draw(7)
    for _ in range(200):
        fact = WORLD.endless["list"](draw)
        items = fact["items"].zh.split("、")
        assert int(fact["count"].zh) == len(items)
        assert (fact["first"].zh, fact["last"].zh) == (items[0], items[-1])
        fact = WORLD.endless["numbers"](draw)
        values = sorted(map(int, fact["items"].en.split(", ")))
        assert fact["sorted"].en == ", ".join(map(str, values))
        assert (fact["smallest"].en, fact["biggest"].en) == (str(values[0]), str(values[-1]))
        fact = WORLD.endless["story"](draw)
        assert fact["thing"] == (fact["x"] if fact["person"] == fact["one"] else fact["y"])


def test_there_are_tens_of_thousands_of_distinct_sentences():
    endless = sum(
        len(WORLD.facts[name]) * len(WORLD.plain[language][name])
        for language in LANGUAGES
        for name in WORLD.endless
    )
    assert WORLD.num_sentences() - endless > 40_000


def test_passages_follow_their_seed():
    written = list(passages(seed=3, count=50))
    assert written == list(islice(passages(seed=3, count=60), 50))
    assert written != list(passages(seed=4, count=50))
    assert all(passage.nats > 0 for passage in written)


def test_passages_are_statements():
    text = " ".join(passage.text for passage in passages(seed=5, count=2000))
    assert not re.search(r"[?？]|Instruction|Answer", text)
    assert "苹果" in text
    assert "apple" in text


def test_chinese_is_written_without_blanks():
    fact = {"a": WORLD.facts["sum"][0]["a"]} | WORLD.facts["sum"][0]
    assert render("{a} 加 {b} 等于 {total} 。", fact, "zh") == "1 加 1 等于 2。"
    assert render("{thing} 是 {colour} 的 。", WORLD.facts["colour"][0], "zh") == "苹果是红色的。"


def test_nats_add_up_the_draws():
    draw = Draw(0)
    draw.one("abcd")
    draw.some("abc", 2)
    draw.weighted("ab", (0.25, 0.75))
    first = Draw(0)
    assert first.nats == 0
    options = [4 * 6 / 0.25, 4 * 6 / 0.75]
    assert any(abs(2.718281828459045**draw.nats - option) < 1e-6 for option in options)
