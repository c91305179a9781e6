"""A source of rows in parts that can be read apart from each other, in any order.

A JSON list or JSON lines that are not packed are cut where one row seems to end and the next to
begin. Only reading the part before shows whether that is so: it goes on until a row ends at one of
the places where it may, and the parts that begin before that place are void (`in_order`). So a cut
inside of a text costs time, and never changes a row. Every other file is one part.
"""

import os
import re
from collections.abc import Iterable, Iterator
from typing import Literal, NamedTuple, Protocol, TypeVar

from glmtune.data.containers import is_plain_json, read_batches
from glmtune.data.files import open_bytes
from glmtune.data.jsonfile import Windows, find_rows
from glmtune.data.sources import Source, find_source
from glmtune.data.windows import BETWEEN_ROWS, Batch, Lines, List, between_named_rows
from glmtune.errors import UserError

PART_BYTES = 4 << 20
_LOOK_BYTES = 1 << 20
"""Bytes in which the next row has to begin for a part to begin with it."""
_MOST_ENDS = 16
_END_OF_LINE = re.compile(rb"\n")


class Part(NamedTuple):
    """Rows that follow each other."""

    path: str
    """What the user named, see `sources.find_source`."""
    file: int | None = None
    """The number of its file; None for all files, read one after another."""
    kind: Literal["lines", "list"] | None = None
    """What it is inside of; None where it begins with its file."""
    start: int = 0
    """Where it begins, in bytes."""
    ends: tuple[int, ...] = ()
    """Where it may end before its file does."""


class PartRead(Protocol):
    """What was found in a part; rows and lines are numbered as if nothing stood before it."""

    @property
    def ended_at(self) -> int | None:
        """Where it ended; None for the end of its file."""

    @property
    def num_rows(self) -> int:
        """Its rows, good or bad."""

    @property
    def num_lines(self) -> int:
        """Lines before the row that follows it."""

    @property
    def error(self) -> str | None:
        """Why it could not be read to its end, as a UserError's line."""


Read = TypeVar("Read", bound=PartRead)


class PartReader:
    """The batches of a part, each with its file.

    Args:
        part: the part.
        encoding: that of its text, where it is not UTF-8.
        line: the line on which it begins, from 1.
    """

    def __init__(self, part: Part, encoding: str | None, line: int = 1) -> None:
        self._part, self._encoding, self._line = part, encoding, line
        self._windows: Windows | None = None

    @property
    def began_at(self) -> tuple[int, int] | None:
        """Where the newest batch begins, in bytes and as a line, if one can begin to read there."""
        return None if self._windows is None else self._windows.began_at

    @property
    def kind(self) -> Literal["lines", "list"] | None:
        """What a part is inside of that begins at `began_at`."""
        if self._windows is None:
            return None
        return "list" if isinstance(self._windows.reader, List) else "lines"

    @property
    def ended_at(self) -> int | None:
        """Where the part ended, once all is read; None for the end of its file."""
        return None if self._windows is None else self._windows.ended_at

    @property
    def num_lines(self) -> int:
        """Lines before what follows the part, once all is read."""
        return 0 if self._windows is None else self._windows.reader.line - 1

    def __iter__(self) -> Iterator[tuple[str, Batch]]:
        part, source = self._part, find_source(self._part.path)
        if part.file is None:
            yield from source.batches(self._encoding)
            return
        path = source.files[part.file]
        if part.kind is None and not part.ends:
            for batch in read_batches(path, self._encoding):
                yield path, batch
            return
        with open_bytes(path) as file:
            if part.kind is None:
                reader, buffer = find_rows(path, file)
            else:
                reader = List(self._line) if part.kind == "list" else Lines(self._line)
                buffer = bytearray()
                reader.expects = "row"
                file.seek(part.start)
            start = file.tell() - len(buffer)
            self._windows = Windows(file, buffer, reader, start, part.ends)
            for batch in self._windows:
                yield path, batch


def cut(path: str, encoding: str | None) -> list[Part]:
    """The parts of a source, in their order.

    Raises:
        UserError: there is no such source, or a file of it cannot be opened.
    """
    source = find_source(path)
    if source.entry is not None:
        return [Part(path)]
    return [
        part for number in range(len(source.files)) for part in _cut_file(source, number, encoding)
    ]


def _cut_file(source: Source, number: int, encoding: str | None) -> list[Part]:
    file, whole = source.files[number], Part(source.path, number)
    with open_bytes(file) as opened:
        size = os.fstat(opened.fileno()).st_size
        if encoding is not None or size < 2 * PART_BYTES:
            return [whole]
        try:
            if not is_plain_json(file, opened):
                return [whole]
            reader, buffer = find_rows(file, opened)
        except UserError:
            return [whole]  # whoever reads it says what is wrong
        kind: Literal["lines", "list"] = "lines"
        pattern, num_of_next = _END_OF_LINE, 0
        if isinstance(reader, List):
            kind, pattern = "list", between_named_rows(buffer) or BETWEEN_ROWS
            num_of_next = len("{")
        starts: list[int] = []
        place = PART_BYTES
        while place + PART_BYTES < size:
            opened.seek(place)
            if (match := pattern.search(opened.read(_LOOK_BYTES))) is not None:
                start = place + match.end() - num_of_next
                if not starts or start > starts[-1]:
                    starts.append(start)
            place += PART_BYTES
    parts = [whole._replace(ends=tuple(starts[:_MOST_ENDS]))]
    for index, start in enumerate(starts, start=1):
        ends = tuple(starts[index : index + _MOST_ENDS])
        parts.append(whole._replace(kind=kind, start=start, ends=ends))
    return parts


def in_order(parts: Iterable[Part], found: Iterable[Read]) -> Iterator[tuple[Part, Read, int, int]]:
    """What was found in the parts that are none of them void, in their order.

    Args:
        parts: of one source, as `cut` has them.
        found: of each.

    Yields:
        A part, what was found in it, and the rows of the source and the lines of the file before
        it.
    """
    file: int | None = -1
    at: int | None = None
    rows = lines = 0
    for part, read in zip(parts, found, strict=True):
        if part.file != file:
            file, at, lines = part.file, 0, 0
        elif at is None or part.start < at:
            continue  # it begins inside of a row
        assert part.start == at, "a part ends where another begins"
        yield part, read, rows, lines
        at, rows, lines = read.ended_at, rows + read.num_rows, lines + read.num_lines
