"""Which rows are trained on and which are held out, so that near-equal rows stay together.

Shapes: R rows of the data set.
"""

from array import array
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from glmtune.data.characters import survey
from glmtune.data.near import Pieces, first_of_each, group, hashes_of, near_pairs
from glmtune.errors import UserError

if TYPE_CHECKING:
    from glmtune.data.token_rows import TokenRows

GROUPS = "near-equal rows"
"""The name, in a run's identity, of the groups that its split keeps together."""
_STREAM_SPLIT = 1
"""A random stream that must differ from that of the rows' order."""
MOST_COMPARED = 200_000
"""Rows whose questions are compared by their pieces; of more than these, equal ones are joined."""


def split_rows(
    num_rows: int,
    eval_ratio: float,
    seed: int,
    groups_R: np.ndarray | None = None,
    sets_R: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Hold out a share of the rows for evaluation: at least one of each set, and never all.

    Rows are taken in an order drawn from the seed, each with its whole group, until the share of
    its set is full; a group that is larger than what is left stays in the training. Where all are,
    the smallest is held out.

    Args:
        num_rows: number of rows.
        eval_ratio: the share, of each set.
        seed: of the order.
        groups_R: the group of each row; without them each row is one.
        sets_R: the set of each row; without them all are one.

    Returns:
        Row numbers to train on and row numbers to evaluate on, each in ascending order.

    Raises:
        UserError: no row can be held out.
    """
    if not eval_ratio:
        return np.arange(num_rows), np.arange(0)
    if num_rows < 2:
        raise UserError(
            f"eval_ratio {eval_ratio}: one row cannot be split; leave eval_ratio out or add rows"
        )
    sets_R = np.zeros(num_rows, np.int64) if sets_R is None else sets_R
    groups_R = np.arange(num_rows) if groups_R is None else groups_R
    sizes = np.bincount(sets_R)
    if sizes.max() == 1:
        sets_R, sizes = np.zeros(num_rows, np.int64), np.array([num_rows])
    room = np.minimum(np.maximum(1, np.round(sizes * eval_ratio)), sizes - 1).astype(np.int64)
    members = np.argsort(groups_R, kind="stable")
    ranked = groups_R[members]
    is_out = np.zeros(num_rows, bool)
    is_seen = np.zeros(num_rows, bool)
    order = np.random.default_rng([seed, _STREAM_SPLIT]).permutation(num_rows)
    for row in map(int, order):  # a list of them would be several times as large
        if not room.any():
            break
        if is_seen[row] or not room[sets_R[row]]:
            continue
        rows = members[slice(*np.searchsorted(ranked, [groups_R[row], groups_R[row] + 1]))]
        is_seen[rows] = True
        needed = np.bincount(sets_R[rows], minlength=len(sizes))
        if (needed <= room).all():
            is_out[rows] = True
            room -= needed
    if not is_out.any():
        is_out = groups_R == _smallest(groups_R, order, eval_ratio)
    return np.flatnonzero(~is_out), np.flatnonzero(is_out)


def _smallest(groups_R: np.ndarray, order: np.ndarray, eval_ratio: float) -> int:
    """The smallest group, the first in an order where there are several.

    Raises:
        UserError: it is more than half of all rows.
    """
    sizes = np.bincount(groups_R)[groups_R[order]]
    smallest = int(sizes.min())
    if smallest > len(order) // 2:
        raise UserError(
            f"eval_ratio {eval_ratio}: no row can be held out: rows that ask nearly the same stay "
            f"together, and these are {smallest:,} of {len(order):,}; set eval_ratio 0, or add "
            "other rows"
        )
    return int(groups_R[order[sizes.argmin()]])


class Asked(NamedTuple):
    """What rows ask, as hashes."""

    keys_R: np.ndarray
    """One for each row, of all that stands before its last answer."""
    early_keys: np.ndarray
    """One for each earlier answer, of what stands before it."""
    early_rows: np.ndarray
    """The row that each of these is in."""


ShareOut = Callable[[Callable[[int, int], Asked]], list[Asked]]
"""Has each of n processes do a task for its number and n, and gives all of them all results."""


def alone(task: Callable[[int, int], Asked]) -> list[Asked]:
    """Do all of a task that could be shared out."""
    return [task(0, 1)]


def group_rows(
    rows: "TokenRows",
    decode_batch: Callable[[Sequence[Sequence[int]]], list[str]],
    sources_R: np.ndarray | None = None,
    share_out: ShareOut = alone,
) -> np.ndarray:
    """The group of each row, ``(R,)``: the number of the first row that is nearly the same.

    Rows are nearly the same if they come from one row of the source, if their last questions are
    near-equal (`near`) after equal turns, or if one is the beginning of the other: what stands
    before an answer that is supervised in one is all that stands before the last answer of the
    other.

    Args:
        rows: token rows.
        decode_batch: ids to texts, as of `RowTokenizer`.
        sources_R: the source's row that each row comes from, where it is known; ascending.
        share_out: where there are many rows, each process looks at a part of them.
    """
    if len(rows) > MOST_COMPARED:
        parts = share_out(partial(_asked_by, rows, decode_batch))
        keys_R, early_keys, early_rows = map(np.concatenate, zip(*parts, strict=True))
        groups = first_of_each(keys_R)
    else:
        pieces = Pieces()
        keys_R, early_keys, early_rows = _asked_by(rows, decode_batch, 0, 1, pieces)
        groups = first_of_each(keys_R)
        groups = group(groups, near_pairs(pieces, np.flatnonzero(groups == np.arange(len(rows)))))
    pairs = [_begins(keys_R, early_keys, early_rows)]
    if sources_R is not None:
        same = np.flatnonzero(np.diff(sources_R) == 0)
        pairs.append(np.column_stack((same, same + 1)))
    return group(groups, np.concatenate(pairs))


def _asked_by(
    rows: "TokenRows",
    decode_batch: Callable[[Sequence[Sequence[int]]], list[str]],
    number: int,
    count: int,
    pieces: Pieces | None = None,
) -> Asked:
    """What process `number` of `count` finds in its part of the rows; pieces are added to."""
    start, end = (len(rows) * bound // count for bound in (number, number + 1))
    keys_R, early_keys, early_rows = array("q"), array("q"), array("q")
    for first, block in rows.blocks(start, end):
        before, questions, earlier = [], [], []
        for row, (turns, question) in enumerate(_asked(block, decode_batch), start=first):
            so_far = b""
            for place, turn in enumerate(turns):
                so_far += turn
                if place % 2 == 0:
                    earlier.append(so_far)
                    early_rows.append(row)
            before.append(so_far)
            questions.append(question)
        early_keys += hashes_of(earlier)
        keys_R += hashes_of(list(map(bytes.__add__, before, questions)))
        if pieces is not None:
            pieces.add(questions, before)
    return Asked(*(np.array(numbers, np.int64) for numbers in (keys_R, early_keys, early_rows)))


def _begins(keys_R: np.ndarray, early_keys: np.ndarray, early_rows: np.ndarray) -> np.ndarray:
    """A row that asks the same for each earlier question that some row asks, ``(pairs, 2)``.

    One is enough: those that ask the same are of one group.

    Args:
        keys_R: hashes of what each row asks, with what stands before it.
        early_keys: the same of earlier questions of rows.
        early_rows: the row of each of these.
    """
    keys, first = np.unique(keys_R, return_index=True)
    places = np.searchsorted(keys, early_keys).clip(max=len(keys) - 1)
    is_asked = keys[places] == early_keys
    return np.column_stack((first[places], early_rows))[is_asked]


def _asked(
    rows: "TokenRows", decode_batch: Callable[[Sequence[Sequence[int]]], list[str]]
) -> Iterator[tuple[list[bytes], bytes]]:
    """The bare texts of each row: turns before its last question, and that question.

    A text alone has no question: it stands for one itself.
    """
    spans = list(_spans_before_last_answers(rows))
    texts = iter(_bare(rows, decode_batch, [span for of_row in spans for span in of_row]))
    asked = [[next(texts) for _ in of_row] for of_row in spans]
    without = [row for row, of_row in enumerate(asked) if not any(of_row)]
    ends = [(int(rows.starts_R1[row]), int(rows.starts_R1[row + 1])) for row in without]
    for row, text in zip(without, _bare(rows, decode_batch, ends), strict=True):
        asked[row][-1] = text
    for *turns, question in asked:
        yield turns, question


def _bare(
    rows: "TokenRows",
    decode_batch: Callable[[Sequence[Sequence[int]]], list[str]],
    spans: Sequence[tuple[int, int]],
) -> list[bytes]:
    """The bare texts of spans of ids."""
    if not spans:
        return []
    texts = decode_batch([rows.ids_T[start:end].tolist() for start, end in spans])
    joined = "\x00".join(text.replace("\x00", "") for text in texts)
    return survey(joined.encode("utf-8", "replace")).bare.split(b"\x00")


def _spans_before_last_answers(rows: "TokenRows") -> Iterator[list[tuple[int, int]]]:
    """For each row, the spans of its first question, the answer to it, and so on to the last
    question.
    """
    starts = rows.starts_R1.tolist()
    if rows.labels_T is None:
        for start, length in zip(starts, rows.prompt_lengths_R.tolist(), strict=False):
            yield [(start, start + length)]
        return
    is_supervised = np.concatenate(([False], rows.is_supervised_T, [False]))
    changes = np.diff(is_supervised.astype(np.int8))
    begins, ends = np.flatnonzero(changes == 1).tolist(), np.flatnonzero(changes == -1).tolist()
    place = 0
    for start, end in pairwise(starts):
        bounds = [start]
        while place < len(begins) and begins[place] < end:
            bounds += [begins[place], ends[place]]
            place += 1
        yield list(pairwise(bounds[:-1])) if len(bounds) > 1 else [(start, end)]
