"""Held-out rows: a share of each set, and no near-equal rows on both sides."""

import random
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from toy_family import FIRST_BYTE, ByteTokenizer
from toys import ToyTokenizer, draw_rows, save_rows

from glmtune.data import split
from glmtune.data.conversations import IGNORED
from glmtune.data.near import group
from glmtune.data.split import group_rows, split_rows
from glmtune.data.token_rows import TokenRows
from glmtune.errors import UserError
from glmtune.evaluation.source_run import find_rows
from glmtune.training import loop

TOKENIZER = ByteTokenizer()
RULE = TOKENIZER.row_rule
WORDS = [a + b + c for a in ("sor", "mel", "kan", "du") for b in "aeiou" for c in ("ta", "vik")]


def token_rows(*rows: tuple[str, ...], labels: bool = False) -> TokenRows:
    """Rows of questions and answers; with labels, every answer is supervised."""
    ids, marks, prompts = [], [], []
    for row in rows:
        texts = [[FIRST_BYTE + byte for byte in text.encode()] for text in row]
        *before, answer = texts
        ids.append(RULE.prompt(list(chain(*before))) + RULE.answer(answer))
        prompts.append(len(ids[-1]) - len(RULE.answer(answer)))
        mark, place = [IGNORED] * len(ids[-1]), len(RULE.before_prompt)
        for number, text in enumerate(texts):
            place += len(RULE.after_prompt) if number == len(texts) - 1 else 0
            if number % 2:
                mark[place : place + len(text)] = text
            place += len(text)
        marks.append(mark)
    starts = np.concatenate(([0], np.cumsum([len(row) for row in ids])))
    labels_T = np.concatenate(marks) if labels else None
    return TokenRows(np.concatenate(ids), starts, np.array(prompts), RULE, labels_T)


def groups(*rows, **settings) -> list[int]:
    return group_rows(token_rows(*rows, **settings), TOKENIZER.decode_batch).tolist()


def test_near_equal_questions_are_grouped():
    assert groups(
        ("What is the capital of France, and why?", "Paris"),
        ("Name a tree.", "Oak"),
        ("what is the CAPITAL of France: and why", "Lyon"),
        ("So, what is the capital of France and why?", "Paris"),
        ("Name a tree!", "Elm"),
        ("Name a river.", "Elm"),
    ) == [0, 1, 0, 0, 1, 5]


def test_many_dialogues_that_begin_alike_are_joined_without_trying_all_pairs(monkeypatch):
    joined = []
    monkeypatch.setattr(
        split, "group", lambda labels, pairs: joined.append(len(pairs)) or group(labels, pairs)
    )
    short = [("Hello", str(n)) for n in range(300)]
    long = [("Hello", "Hi", f"question {n * n}", "yes") for n in range(300)]
    assert groups(*short, *long, labels=True) == [0] * 600
    assert sum(joined) < 3_000


def test_a_dialogue_of_which_another_row_is_the_beginning():
    rows = [
        ("Name a tree.", "Oak", "And a shrub?", "Broom"),
        ("Name a tree!", "Oak"),
        ("Name a river.", "Elbe", "And a shrub?", "Broom"),
        ("Name a tree.", "Elm", "And a shrub?", "Broom"),
        ("And a shrub?", "Broom"),
    ]
    assert groups(*rows, labels=True) == [0, 0, 2, 0, 4]  # by the second row, all of trees
    assert groups(*(rows[0], rows[3]), labels=True) == [0, 1]
    assert groups(*rows) == [0, 1, 2, 3, 4]  # nothing is taught of earlier answers


def test_text_without_a_question_is_compared_itself():
    rows = token_rows(("", "The oak is a tree."), ("", "the oak is a tree"), ("", "So is the elm."))
    assert group_rows(rows, TOKENIZER.decode_batch).tolist() == [0, 0, 2]
    whole = rows.ids_T.copy()
    whole[np.concatenate([rows.starts_R1[:-1]])] = IGNORED
    all_taught = TokenRows(rows.ids_T, rows.starts_R1, rows.prompt_lengths_R, RULE, whole)
    assert group_rows(all_taught, TOKENIZER.decode_batch).tolist() == [0, 0, 2]


@pytest.mark.parametrize("seed", range(5))
def test_without_groups_the_split_is_what_it_was(seed):
    """Runs of earlier versions can be resumed: the order of the seed, and its first rows."""
    order = np.random.default_rng([seed, 1]).permutation(101)
    train, held_out = split_rows(101, 0.2, seed)
    assert held_out.tolist() == sorted(order[:20])
    assert train.tolist() == sorted(order[20:])
    alone, one_set = np.arange(101), np.zeros(101, int)
    assert np.array_equal(split_rows(101, 0.2, seed, alone, one_set)[1], held_out)


@pytest.mark.parametrize("seed", range(20))
def test_a_group_is_on_one_side_and_each_set_has_its_share(seed):
    draw = np.random.default_rng(seed)
    sets_R = np.repeat([0, 1, 2], [60, 30, 10])
    groups_R = np.arange(100)
    for _ in range(15):  # also over sets
        a, b = draw.integers(0, 100, 2)
        groups_R[groups_R == max(groups_R[a], groups_R[b])] = min(groups_R[a], groups_R[b])
    train, held_out = split_rows(100, 0.2, seed, groups_R, sets_R)
    assert sorted([*train, *held_out]) == list(range(100))
    assert not np.intersect1d(groups_R[train], groups_R[held_out]).size
    assert np.bincount(sets_R[held_out]).tolist() == [12, 6, 2]
    again = split_rows(100, 0.2, seed, groups_R, sets_R)
    assert np.array_equal(again[1], held_out)


def test_a_group_that_is_too_large_is_trained_on():
    groups_R = np.array([0] * 50 + list(range(50, 60)))
    _, held_out = split_rows(60, 0.1, 3, groups_R)
    assert len(held_out) == 6
    assert held_out.min() >= 50
    with pytest.raises(UserError, match="stay together, and these are 60 of 60; set eval_ratio 0"):
        split_rows(60, 0.1, 3, np.zeros(60, int))


def test_where_no_group_is_small_enough_the_smallest_is_held_out():
    groups_R = np.array([0] * 5 + [5] * 4 + [9] * 4)
    train, held_out = split_rows(13, 0.05, 3, groups_R)
    assert held_out.tolist() in ([5, 6, 7, 8], [9, 10, 11, 12])
    assert len(train) == 9


def test_sets_of_one_row_each():
    train, held_out = split_rows(3, 0.1, 0, None, np.arange(3))
    assert (len(train), len(held_out)) == (2, 1)


class TestRun:
    """Training, resuming and the check-up have the same split, whichever version began it."""

    @pytest.fixture
    def doubled(self, tmp_path):
        """Every row twice, with another answer."""
        rows = draw_rows([(6, 3)] * 12, ToyTokenizer)
        again = [row | {"input_ids": [*row["input_ids"][:-2], 7, 1005]} for row in rows]
        return save_rows(rows + again, tmp_path / "rows")

    def held_out(self, run: Path) -> np.ndarray:
        rows = find_rows(run, ToyTokenizer())
        assert rows is not None
        return rows.held_out

    def test_both_of_a_pair_are_held_out(self, tiny_run, doubled, tmp_path, capsys):
        settings = {"dataset_path": doubled, "eval_ratio": 0.25, "save_steps": 1, "max_steps": 2}
        loop.train(tiny_run(**settings))
        held_out = self.held_out(tmp_path / "run")
        assert len(held_out) == 6
        assert sorted(held_out % 12) == sorted(2 * [*(held_out[held_out < 12])])
        assert "24 rows are nearly the same as others; each of their 12 groups" in (
            capsys.readouterr().out
        )
        checkpoint = str(tmp_path / "run" / "checkpoint-1")
        more = {"resume_from_checkpoint": checkpoint, "output_dir": str(tmp_path / "more")}
        loop.train(tiny_run(**settings | more))
        assert np.array_equal(self.held_out(tmp_path / "more"), held_out)

    def test_a_run_of_an_earlier_version_keeps_its_split(
        self, tiny_run, doubled, tmp_path, monkeypatch
    ):
        settings = {"dataset_path": doubled, "eval_ratio": 0.25, "save_steps": 1, "max_steps": 2}
        plain = split_rows(24, 0.25, 42)[1]
        assert len(np.unique(plain % 12)) < 12  # else the two rules agree
        with monkeypatch.context() as earlier:
            earlier.setattr(TokenRows, "grouped", lambda self, *_: self)
            loop.train(tiny_run(**settings))
        assert np.array_equal(self.held_out(tmp_path / "run"), plain)
        checkpoint = str(tmp_path / "run" / "checkpoint-1")
        more = {"resume_from_checkpoint": checkpoint, "output_dir": str(tmp_path / "more")}
        loop.train(tiny_run(**settings | more))
        assert np.array_equal(self.held_out(tmp_path / "more"), plain)


def test_rows_of_one_conversation_stay_together():
    """Of a base that takes a row for each answer, or where a long row was split."""
    draw = random.Random(0)
    rows = token_rows(*((" ".join(draw.choices(WORDS, k=8)), "a") for _ in range(40)))
    sources_R = np.repeat(np.arange(1, 11), 4)
    held_out = rows.grouped(TOKENIZER.decode_batch, sources_R).split(0.1, 42)[1]
    assert len(held_out) == 4
    assert len({*sources_R[held_out].tolist()}) == 1
    apart = rows.grouped(TOKENIZER.decode_batch).split(0.1, 42)[1]
    assert len({*sources_R[apart].tolist()}) > 1


def test_rows_of_a_run_are_split_by_their_sets_and_groups():
    draw = random.Random(0)
    questions = [" ".join(draw.choices(WORDS, k=8)) for _ in range(40)]
    rows = token_rows(*((q, "a") for q in questions), *((q.upper() + "!", "b") for q in questions))
    grouped = rows.grouped(TOKENIZER.decode_batch)
    sets_R = np.repeat([0, 1], 40)
    by_sets = TokenRows(
        rows.ids_T, rows.starts_R1, rows.prompt_lengths_R, RULE,
        sets_R=sets_R, groups_R=grouped.groups_R,
    )  # fmt: skip
    _, held_out = by_sets.split(0.1, 7)
    assert sorted(held_out % 40) == sorted(2 * [*held_out[:4]])  # each with its other
    assert rows.split(0.1, 7)[1].tolist() != held_out.tolist()
