"""Token rows of any size: what is computed of all tokens goes block by block, and is the same."""

import hashlib
import tracemalloc
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from toy_family import ByteTokenizer

from glmtune.data import token_rows
from glmtune.data.conversations import IGNORED
from glmtune.data.joined import Joined, joined
from glmtune.data.row_stats import RowStats
from glmtune.data.split import group_rows
from glmtune.data.token_rows import TokenRows
from glmtune.errors import UserError

TOKENIZER = ByteTokenizer()
RULE = TOKENIZER.row_rule
VOCAB_SIZE = TOKENIZER.vocab_size


def make(seed: int, num_rows: int, has_labels: bool, most: int = 4) -> TokenRows:
    """Rows of less than `most` bytes; of few bytes, many are alike."""
    random = np.random.default_rng(seed)
    ids, marks, prompts = [], [], []
    for _ in range(num_rows):
        question, answer = (
            random.integers(97, 95 + most, random.integers(1, most)).tolist() for _ in range(2)
        )
        prompt = RULE.prompt(question)
        ids.append(prompt + RULE.answer(answer))
        prompts.append(len(prompt))
        is_marked = random.random(len(ids[-1])) < 0.6
        marks.append(np.where(is_marked, ids[-1], IGNORED))
    return TokenRows(
        np.concatenate(ids),
        np.cumsum([0, *map(len, ids)]),
        np.array(prompts),
        RULE,
        np.concatenate(marks) if has_labels else None,
    )


def as_table(rows: TokenRows, sizes: list[int]) -> pa.Table:
    """The rows as a data set on disk has them, in records of so many rows."""
    columns = {"input_ids": rows.ids_T, "labels": rows.labels_T}
    lists = {
        name: pa.array([of[a:b] for a, b in pairwise(rows.starts_R1)])
        for name, of in columns.items()
        if of is not None
    }
    whole = pa.table(lists | {"seq_len": pa.array(rows.prompt_lengths_R)})
    bounds = np.cumsum([0, *sizes])
    parts = [whole.slice(a, b - a) for a, b in pairwise(bounds)]
    return pa.concat_tables([*parts, whole.slice(bounds[-1])])


def supervised(rows: TokenRows, row: int) -> list[bool]:
    """The plain reference: which tokens of a row are labels."""
    start, end = rows.starts_R1[row : row + 2]
    if rows.labels_T is None:
        return [place >= rows.prompt_lengths_R[row] for place in range(end - start)]
    labels = rows.labels_T[start:end]
    return [place > 0 and label != IGNORED for place, label in enumerate(labels)]


def stretches(of_row: list[bool]) -> int:
    return sum(
        is_in and not before for before, is_in in zip([False, *of_row], of_row, strict=False)
    )


@given(st.integers(0, 2**32 - 1), st.integers(1, 9), st.booleans(), st.integers(1, 30), st.data())
def test_blocks_of_any_size_give_the_same(seed, num_rows, has_labels, block, data):
    plain = make(seed, num_rows, has_labels)
    sizes = data.draw(st.lists(st.integers(0, 3), max_size=4).filter(lambda s: sum(s) <= num_rows))
    row_ids = np.array(data.draw(st.lists(st.integers(0, num_rows - 1), max_size=4)), np.int64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(token_rows, "BLOCK_TOKENS", block)
        rows = TokenRows.from_table(as_table(plain, sizes), RULE)
        found = [first for first, _ in rows.blocks()]
        rows.check(VOCAB_SIZE, "rows")
        digest, labels, groups = rows.digest(), rows.num_labels_R, groups_of(rows)
        patch.setattr("glmtune.data.split.MOST_COMPARED", 0)
        joined_groups = groups_of(rows)
        shared = group_rows(
            rows, TOKENIZER.decode_batch, None, lambda task: [task(n, 4) for n in range(4)]
        )
        stats, taken = RowStats.of(rows, lambda ids: bytes(ids).decode()), rows.take(row_ids)
        ends = rows.teaches_end_R.tolist()
        marked = np.asarray(rows.as_labels_T).tolist()
    assert found[0] == 0
    assert found == sorted(set(found))
    assert [len(rows[row]) for row in range(num_rows)] == plain.lengths_R.tolist()
    of_rows = [supervised(plain, row) for row in range(num_rows)]
    assert labels.tolist() == [sum(of_row) for of_row in of_rows]
    assert stats.answers == {
        n: list(map(stretches, of_rows)).count(n) for n in sorted(set(map(stretches, of_rows)))
    }
    assert ends == [
        any(is_in and id_ in RULE.end_ids for is_in, id_ in zip(of_row, plain[row], strict=True))
        for row, of_row in enumerate(of_rows)
    ]
    flat = [is_in for of_row in of_rows for is_in in of_row]
    wanted = plain.labels_T if has_labels else np.where(flat, plain.ids_T, IGNORED)
    assert marked == wanted.tolist()
    assert digest == digest_of(plain)
    assert groups == groups_of(plain)
    assert shared.tolist() == joined_groups
    assert taken.ids_T.tolist() == [id_ for row in row_ids for id_ in plain[row]]
    assert taken.is_supervised_T.tolist() == [is_in for row in row_ids for is_in in of_rows[row]]


def groups_of(rows: TokenRows) -> list[int]:
    return group_rows(rows, TOKENIZER.decode_batch).tolist()


def digest_of(rows: TokenRows) -> str:
    """As runs before blocks have recorded it."""
    columns = rows.ids_T, rows.starts_R1, rows.prompt_lengths_R, rows.labels_T
    numbers = (of.astype(np.int64).tobytes() for of in columns if of is not None)
    return hashlib.sha256(b"".join(numbers)).hexdigest()


@pytest.mark.parametrize("block", [1, 40, 1 << 18])
def test_the_row_that_is_wrong_is_named_whichever_block_it_is_in(monkeypatch, block):
    monkeypatch.setattr(token_rows, "BLOCK_TOKENS", block)
    rows = make(0, 30, has_labels=True)
    row = 22
    start = rows.starts_R1[row]
    for changed, message in (
        (replace(rows, labels_T=put(rows.ids_T, start, 5)), "row 23 has the label 5 at the id"),
        (
            replace(rows, ids_T=put(rows.ids_T, start + 1, VOCAB_SIZE), labels_T=None),
            f"row 23 holds id {VOCAB_SIZE}, but the model's last",
        ),
        (
            replace(rows, prompt_lengths_R=put(rows.prompt_lengths_R, row, 2)),
            f"row 23 .seq_len 2 of {rows.lengths_R[row]} ids. has a prompt that does not end with",
        ),
    ):
        with pytest.raises(UserError, match=message):
            changed.check(VOCAB_SIZE, "rows")


def put(numbers: np.ndarray, place: int, number: int) -> np.ndarray:
    changed = numbers.copy()
    changed[place] = number
    return changed


@pytest.mark.parametrize("has_labels", [False, True])
def test_a_row_takes_few_bytes_however_many_there_are(monkeypatch, has_labels):
    monkeypatch.setattr(token_rows, "BLOCK_TOKENS", 1 << 12)
    table = as_table(make(0, 8_000, has_labels, most=25), [1_000] * 7)
    tracemalloc.start()
    rows = TokenRows.from_table(table, RULE)
    rows.check(VOCAB_SIZE, "rows")
    assert len(rows.num_labels_R) == len(rows) == 8_000
    rows.check_taught("rows")
    rows.digest()
    monkeypatch.setattr("glmtune.data.split.MOST_COMPARED", 0)
    rows = replace(rows, groups_R=np.array(groups_of(rows)))
    rows.split(0.1, seed=0)
    _, highest = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert highest / len(rows) < (500 if has_labels else 150), "3,400 and 800 in one block"


def test_parts_are_read_as_one_array():
    whole = np.arange(40, dtype=np.int32)
    parts = [whole[:7], whole[7:7], whole[7:8], whole[8:]]
    both = joined([Joined(parts[:2]), parts[2], Joined(parts[3:])])
    assert len(both) == len(whole)
    for start in range(len(whole) + 2):
        for stop in range(len(whole) + 2):
            assert both[start:stop].tolist() == whole[start:stop].tolist()
    assert np.array_equal(np.asarray(both), whole)
    assert np.shares_memory(both[9:30], whole), "nothing is copied within a part"
    assert both[-3:].tolist() == whole[-3:].tolist()
    assert len(Joined([])) == len(np.asarray(Joined([]))) == len(Joined([])[:3]) == 0
