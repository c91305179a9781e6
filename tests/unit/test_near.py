"""Near-equal texts: found fast, and the same that comparing each with each finds."""

import os
import random
import subprocess
import sys
from itertools import combinations

import numpy as np
import pytest

from glmtune.data import near
from glmtune.data.characters import survey
from glmtune.data.near import Pieces, first_of_each, group, near_pairs

TEMPLATE = "Read the following review of a customer and say in one word whether it is kind: "
WORDS = [f"{a}{b}{c}" for a in ("sor", "mel", "kan") for b in "aeiou" for c in ("ta", "vik", "nop")]


def pairs_of(*texts: str, before: list[bytes] | None = None) -> set[tuple[int, int]]:
    pieces = Pieces()
    pieces.add([survey(text.encode()).bare for text in texts], before)
    return set(map(tuple, near_pairs(pieces).tolist()))


@pytest.mark.parametrize(
    "one, other",
    [
        ("什么是机器学习？它有哪些用途？", "请问什么是机器学习？它有哪些用途？"),
        (
            "What is the capital of France, and why?",
            "So, what is the capital of France and why?",
        ),
        ("Ｔｈｅ　ｃａｐｉｔａｌ of Peru, and why?", "the  CAPITAL of Peru; and why, too"),
    ],
)
def test_a_few_letters_more_are_nearly_the_same(one, other):
    assert pairs_of(one, other, "Name a tree that grows in the north.") == {(0, 1)}


@pytest.mark.parametrize(
    "one, other",
    [
        ("Tom has 5 apples and eats one of them.", "Tom has 6 apples and eats one of them."),
        ("Is the sum of 3 + 4 really so large?", "Is the sum of 3 - 4 really so large?"),
        ("什么是机器学习？", "什么是深度学习？"),
        ("short", "shore"),
        ("", "?"),
    ],
)
def test_other_questions_are_not(one, other):
    assert pairs_of(one, other) == set()


def test_what_stands_before_a_question_has_to_be_equal():
    texts = "And what is the capital of it?", "Well, and what is the capital of it?"
    assert pairs_of(*texts, before=[b"france", b"france"]) == {(0, 1)}
    assert pairs_of(*texts, before=[b"france", b"spain"]) == set()


def test_a_template_of_many_rows_does_not_make_them_alike():
    """Most rows have it, so it is not rare; the reviews in it decide, of which two are alike."""
    reviews = random.Random(0).sample(WORDS, 11)
    texts = [TEMPLATE + review for review in reviews]
    assert len(TEMPLATE) / (len(TEMPLATE) + 20) > near.SHARE  # by all pieces they are alike
    assert pairs_of(*texts) == set()
    assert pairs_of(*texts[:2]) == {(0, 1)}
    slow = "the parcel came a week late and nobody answered the telephone"
    assert pairs_of(*texts, TEMPLATE + slow, TEMPLATE + slow + " either") == {(11, 12)}


def test_it_finds_what_comparing_each_with_each_finds(monkeypatch):
    """The reference is of sets of Python, and takes every pair."""
    monkeypatch.setattr(near, "_CHUNK", 7)
    monkeypatch.setattr(near, "_CHUNK_BYTES", 1000)
    draw = random.Random(1)
    texts = []
    for _ in range(150):
        words = draw.choices(WORDS, k=draw.randrange(1, 12))
        texts.append("".join(words))
        changed = list(words)
        changed[draw.randrange(len(words))] = draw.choice(WORDS)
        texts.append("".join(changed) + draw.choice(["", "7", "x"]))
    texts = sorted(set(texts))
    sets = [{text[i : i + 8] for i in range(len(text) - 7)} for text in texts]
    rare = {p for p in set().union(*sets) if sum(p in one for one in sets) <= 10}
    rare_sets = [one & rare for one in sets]
    likeness = [
        [len(s[a] & s[b]) / max(len(s[a] | s[b]), 1) for s in (sets, rare_sets)]
        for a, b in combinations(range(len(texts)), 2)
    ]
    expected = {
        (a, b)
        for (a, b), (all_, few) in zip(combinations(range(len(texts)), 2), likeness, strict=True)
        if all_ >= near.SHARE and few >= near.RARE_SHARE and ("7" in texts[a]) == ("7" in texts[b])
    }
    assert len(expected) > 20
    assert pairs_of(*texts) == expected
    some = np.arange(0, len(texts), 3)
    pieces = Pieces()
    for start in range(0, len(texts), 50):
        part = Pieces()
        part.add([text.encode() for text in texts[start : start + 50]])
        pieces.extend(part)
    of_some = set(map(tuple, near_pairs(pieces, some).tolist()))
    assert of_some <= {(a, b) for a, b in combinations(some.tolist(), 2)}
    if not any(sum(p in one for one in sets) > 10 for p in set().union(*sets)):
        assert of_some == {pair for pair in expected if {*pair} <= {*some.tolist()}}


def test_of_long_texts_some_pieces_stand_for_all():
    draw = random.Random(2)
    long, other = ("".join(draw.choices("abcdefgh", k=2000)) for _ in range(2))
    pieces = Pieces()
    pieces.add([long.encode()])
    assert list(pieces.counts) == [near.MOST_PIECES]
    assert pairs_of(long, long + " and more", other) == {(0, 1)}


def test_nothing_is_near_nothing():
    pieces = Pieces()
    assert near_pairs(pieces).shape == (0, 2)
    pieces.add([b"", b"a"])
    assert near_pairs(pieces).shape == (0, 2)


def test_groups_are_joined_over_any_number_of_pairs():
    labels = first_of_each(np.array([5, 6, 7, 6, 8, 9, 10]))
    assert labels.tolist() == [0, 1, 2, 1, 4, 5, 6]
    pairs = np.array([[3, 4], [5, 6], [4, 5]])
    assert group(labels, pairs).tolist() == [0, 1, 2, 1, 1, 1, 1]
    assert group(labels, np.zeros((0, 2), int)).tolist() == labels.tolist()


def test_what_is_kept_of_rows_is_the_same_in_every_process():
    """Parts of a file that several processes have read are compared with each other."""
    code = (
        "from glmtune.data.validation.duplicates import Fingerprints\n"
        "kept = Fingerprints('a')\n"
        "kept.add(['Q 1\\x01A'], b'q1\\x01a', [1], [1])\n"
        "print(kept.exact, kept.last.asked, kept.last.answered, kept.last.pieces.same)"
    )
    told = {
        subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(told) == 1
