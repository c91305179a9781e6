"""Find rows that occur twice, nearly twice, or in both of two files, by hashes of their text.

Two rows are near duplicates when question and answer are the same once white space, punctuation and
the case of letters are gone (characters.bare). Only 24 bytes of a row are kept, or 32 where files
are compared, so that millions of rows can be compared.
"""

from array import array
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from glmtune.data.records import place_of

END_OF_PART, END_OF_ROW = "\x01", "\x00"
"""Separates instruction, input and answer, and rows, in joined texts."""


class Place(NamedTuple):
    """Where a row stands: its file, its number there, and its line, both from 1."""

    path: str
    row: int
    line: int

    def __str__(self) -> str:
        return place_of(self.path, self.line, self.row)


class Fingerprints:
    """What is kept of the rows of a file: 64 hash bits of the bare text, 32 of the text, the place.

    With `with_questions`, hashes of the bare questions are kept as well. Among ten million rows,
    the chance that any two share 64 bits is three in a million.
    """

    def __init__(self, path: str, with_questions: bool) -> None:
        self.path = path
        self.with_questions = with_questions
        self.bare, self.questions = array("q"), array("q")
        self.exact, self.rows, self.lines = array("I"), array("I"), array("Q")

    def add(self, texts: list[str], bare: bytes, rows: Sequence[int], lines: Sequence[int]) -> None:
        """Keep the hashes of rows, given their texts, and the same joined and made bare."""
        bare_texts = bare.split(END_OF_ROW.encode())
        self.bare.extend(map(hash, bare_texts))
        if self.with_questions:
            end = END_OF_PART.encode()
            self.questions.extend([hash(text.rpartition(end)[0]) for text in bare_texts])
        exact = np.fromiter(map(hash, texts), np.int64, len(texts))
        self.exact.frombytes(exact.astype(np.uint32).tobytes())
        self.rows.frombytes(_numbers(rows, np.uint32).tobytes())
        self.lines.frombytes(_numbers(lines, np.uint64).tobytes())

    def place(self, index: int) -> Place:
        """Where the row with the index-th hashes stands."""
        return Place(self.path, self.rows[index], self.lines[index])


def _numbers(numbers: Sequence[int], dtype: type) -> np.ndarray:
    if isinstance(numbers, range):
        return np.arange(numbers.start, numbers.stop, dtype=dtype)
    return np.array(numbers, dtype)


def find_repeats(files: list[Fingerprints]) -> Iterator[tuple[Place, Place, bool]]:
    """Yield each row that repeats an earlier one, that one, and whether nothing at all differs.

    Rows come in the order of files and rows. A row that equals an earlier one exactly is paired
    with that one, otherwise with the first that it nearly equals.
    """
    numbers = np.concatenate([np.asarray(file.bare) for file in files])
    later, first = _repeats(numbers)
    members = np.union1d(later, first)
    exact = np.concatenate([np.asarray(file.exact) for file in files])[members]
    exact_later, exact_first = _repeats(numbers[members] ^ (exact.astype(np.int64) << 31))
    is_exact = np.isin(later, members[exact_later])
    first[is_exact] = members[exact_first]
    starts = np.cumsum([0, *(len(file.rows) for file in files)])

    def place(index: int) -> Place:
        number = int(np.searchsorted(starts, index, side="right")) - 1
        return files[number].place(index - int(starts[number]))

    for pair in zip(later.tolist(), first.tolist(), is_exact.tolist(), strict=True):
        yield place(pair[0]), place(pair[1]), pair[2]


def find_shared_questions(
    files: list[Fingerprints], others: Fingerprints
) -> Iterator[tuple[Place, Place]]:
    """Yield each row of `files` whose bare question stands in `others`, and its place there."""
    theirs = np.asarray(others.questions)
    order = np.argsort(theirs, kind="stable")
    for file in files:
        ours = np.asarray(file.questions)
        at = np.searchsorted(theirs, ours, sorter=order)
        at = order[np.minimum(at, len(order) - 1)] if len(order) else at[:0]
        for index in np.flatnonzero(theirs[at] == ours[: len(at)]).tolist():
            yield file.place(index), others.place(int(at[index]))


def _repeats(numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the ascending indices of repeated numbers, and where each occurred first."""
    order = np.argsort(numbers, kind="stable")
    ranked = numbers[order]
    places = np.flatnonzero(ranked[1:] == ranked[:-1]) + 1
    starts_run = np.diff(places, prepend=-1) != 1
    firsts = np.maximum.accumulate(np.where(starts_run, places - 1, 0))
    later, first = order[places], order[firsts]
    back = np.argsort(later)
    return later[back], first[back]
