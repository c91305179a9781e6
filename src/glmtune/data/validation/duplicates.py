"""Find rows that occur twice, nearly twice, or in both of two files, by hashes of their text.

Two rows are near duplicates when question and answer are the same once white space, punctuation,
the case of letters and their width are gone (`characters.survey`). Only 32 bytes of a row are kept,
and its pieces (`near`) of the first rows, so that millions of rows can be compared.
"""

from array import array
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from glmtune.data.near import Pieces, hashes_of
from glmtune.data.records import place_of

END_OF_PART, END_OF_ROW = "\x01", "\x00"
"""Separates texts of a row, such as instruction, input and answer, and rows, in joined texts."""
MOST_COMPARED = 200_000
"""Questions that are compared by their pieces; of more than these, only equal ones are found."""
_ODD = -0x61C8864680B583EB  # an odd number of many bits, so that hashes combine in this order only


class Place(NamedTuple):
    """Where a row stands: its file, its number there, and its line, both from 1."""

    path: str
    row: int
    line: int

    def __str__(self) -> str:
        return place_of(self.path, self.line, self.row)


class Answered:
    """Hashes of bare questions and of the bare answers to them, and the pieces of the questions.

    A question is everything before its answer. Among ten million, the chance that any two share 64
    bits is three in a million.
    """

    def __init__(self) -> None:
        self.asked, self.answered = array("q"), array("q")
        self.pieces = Pieces()

    def add(
        self, questions: list[bytes], answers: list[bytes], before: list[bytes] | None = None
    ) -> None:
        """Keep questions, the answers to them, and what stands before them."""
        whole = [*map(bytes.__add__, before, questions)] if before else questions
        self.asked += hashes_of(whole)
        self.answered += hashes_of(answers)
        if len(self.asked) <= MOST_COMPARED:
            self.pieces.add(questions, before)

    def extend(self, others: "Answered") -> None:
        """Keep what others have kept."""
        self.asked += others.asked
        self.answered += others.answered
        if len(self.asked) <= MOST_COMPARED:
            self.pieces.extend(others.pieces)
        else:  # equal questions alone are looked for
            self.pieces = Pieces()


class Fingerprints:
    """What is kept of the rows of a file: their last answers, earlier ones, 32 hash bits of all of
    the text, and the place.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.last, self.earlier = Answered(), Answered()
        self.exact, self.rows, self.lines = array("I"), array("I"), array("Q")
        self.earlier_row, self.earlier_number = array("I"), array("I")
        """The index of each earlier answer's row, and which answer of that row it is, from 0."""

    def add(
        self,
        texts: list[str],
        bare: bytes,
        rows: Sequence[int],
        lines: Sequence[int],
        answers: list[list[int]] | None = None,
    ) -> None:
        """Keep the hashes of rows.

        Args:
            texts: the texts of each row, joined.
            bare: those of all rows joined, and made bare.
            rows: the number of each row.
            lines: its line.
            answers: which of its texts are answers; None where only the last of each is.
        """
        bare_rows = bare.split(END_OF_ROW.encode())
        end = END_OF_PART.encode()
        if answers is None:
            parts = [text.rpartition(end) for text in bare_rows]
            asked = [part[0].replace(end, b"") for part in parts]
            self.last.add(asked, [part[2] for part in parts])
        else:
            rounds = [_rounds(t.split(end), a) for t, a in zip(bare_rows, answers, strict=True)]
            for kept, ones in (
                (self.last, [of_row[-1] for of_row in rounds]),
                (self.earlier, [one for of_row in rounds for one in of_row[:-1]]),
            ):
                kept.add(*([one[i] for one in ones] for i in range(3)))
            for index, of_row in enumerate(rounds, start=len(self.rows)):
                self.earlier_row.extend([index] * (len(of_row) - 1))
                self.earlier_number.extend(range(len(of_row) - 1))
        exact = np.asarray(hashes_of([text.encode() for text in texts]))
        self.exact.frombytes(exact.astype(np.uint32).tobytes())
        self.rows.frombytes(_numbers(rows, np.uint32).tobytes())
        self.lines.frombytes(_numbers(lines, np.uint64).tobytes())

    def extend(self, others: "Fingerprints", row: int, line: int) -> None:
        """Keep what was kept of the rows that follow.

        Args:
            others: number rows and lines from 1.
            row: the number of the row before them.
            line: the line before them.
        """
        earlier = np.array(others.earlier_row) + np.uint32(len(self.rows))
        self.earlier_row.frombytes(earlier.tobytes())
        self.earlier_number += others.earlier_number
        self.last.extend(others.last)
        self.earlier.extend(others.earlier)
        self.exact += others.exact
        self.rows.frombytes((np.array(others.rows) + np.uint32(row)).tobytes())
        self.lines.frombytes((np.array(others.lines) + np.uint64(line)).tobytes())

    def place(self, index: int) -> Place:
        """Where the row with the index-th hashes stands."""
        return Place(self.path, self.rows[index], self.lines[index])


def _rounds(texts: list[bytes], answers: list[int]) -> list[tuple[bytes, bytes, bytes]]:
    """Each question, its answer, and what stands before both."""
    found, before, start = [], b"", 0
    for place in answers:
        question = b"".join(texts[start:place])
        found.append((question, texts[place], before))
        before += question + texts[place]
        start = place + 1
    return found


def _numbers(numbers: Sequence[int], dtype: type) -> np.ndarray:
    if isinstance(numbers, range):
        return np.arange(numbers.start, numbers.stop, dtype=dtype)
    return np.array(numbers, dtype)


def find_repeats(files: list[Fingerprints]) -> Iterator[tuple[Place, Place, bool]]:
    """Yield each row that repeats an earlier one, that one, and whether nothing at all differs.

    Rows come in the order of files and rows. A row that equals an earlier one exactly is paired
    with that one, otherwise with the first that it nearly equals.
    """
    asked = np.concatenate([np.asarray(file.last.asked) for file in files])
    answered = np.concatenate([np.asarray(file.last.answered) for file in files])
    numbers = asked ^ (answered * _ODD)
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
    theirs = np.asarray(others.last.asked)
    order = np.argsort(theirs, kind="stable")
    for file in files:
        ours = np.asarray(file.last.asked)
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
