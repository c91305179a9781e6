"""`tokenize` with `engine ray`: a file looked through and encoded part by part, by many workers.

The parts are read and encoded by what the local engine calls. What that decides one row after
another, where a batch ends and which rows are taken, is decided here for all rows, so that files,
card and summary are the same.
"""

from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, islice, repeat
from typing import Any, Literal, NamedTuple

import numpy as np
from tqdm import tqdm

from glmtune.config.settings import RowSettings
from glmtune.data.dataset import RowTokenizer
from glmtune.data.encoded_rows import EncodedRows
from glmtune.data.parts import Part, PartReader, cut, in_order
from glmtune.data.records import (
    BadRow,
    OnBadRow,
    Record,
    Row,
    check_usable,
    each_row,
    format_in_effect,
    rows_in,
)
from glmtune.data.row_files import RowFile
from glmtune.data.row_sets import RowSet
from glmtune.data.sources import find_source
from glmtune.data.tokenizing import (
    CHARACTERS_PER_BATCH,
    encode_batches,
    no_collection,
    rows_per_batch,
)
from glmtune.errors import UserError
from glmtune.spread import over

BYTES_BETWEEN_PLACES = 1 << 18
CHARACTERS_PER_STRETCH = 1 << 21
"""Characters from which on a worker's rows are enough for one item of work."""


class Place(NamedTuple):
    """Where reading can begin."""

    good: int
    """Good rows of the source before it."""
    row: int
    """All rows before it, good or bad."""
    file: int | None
    """See `parts.Part`."""
    kind: Literal["lines", "list"] | None = None
    start: int = 0
    line: int = 1


@dataclass(slots=True)
class SpreadFile(RowFile):
    """What a file of rows holds, with what is needed to encode parts of it."""

    places: list[Place] = field(default_factory=list)
    sizes: tuple[array, array] = field(default_factory=lambda: (array("i"), array("i")))
    """Characters of each good row: as it is, a record as a context; and as a conversation."""


@dataclass(slots=True)
class Looked:
    """What looking through a part has found; see `parts.PartRead`."""

    file: SpreadFile
    ended_at: int | None
    num_lines: int
    error: str | None

    @property
    def num_rows(self) -> int:
        """Its rows, good or bad."""
        return self.file.num_rows


def look_through(
    path: str,
    format: str | None = None,
    on_bad_row: OnBadRow = "fail",
    encoding: str | None = None,
    with_languages: bool = False,
) -> RowFile:
    """The same as `row_files.look_through`, by the workers of a Ray that runs."""
    file = _new_file(path, encoding, format_in_effect(path, format), with_languages)
    if file.format is None:  # the first row decides
        next((row for row in each_row(path, encoding, file.read) if file.format), None)
    parts = cut(path, encoding)
    look = partial(_look_at, encoding=encoding, format=file.format, with_languages=with_languages)
    num_rows: dict[int | None, int] = {}
    with tqdm(desc="read", unit="row", delay=1) as progress:
        for part, found, row, line in in_order(parts, over(look, parts)):
            if found.error:
                _refuse(part, found.error, look)
            num_rows[part.file] = num_rows.get(part.file, 0) + found.num_rows
            _join(file, part, found.file, row, line)
            progress.update(found.num_rows)
    for number, num in num_rows.items():
        if num <= 1 and sum(part.file == number for part in parts) > 1:
            for found in over(look, [Part(path, number)]):  # one object is no file of rows
                if found.error:
                    raise UserError(found.error)
    file.end()
    check_usable(path, on_bad_row, file.num_good > 0, file.bad_rows)
    return file


def _refuse(part: Part, error: str, look: Any) -> None:
    """Raise UserError for a part; with the line of its file, where it begins inside of that."""
    whole = Part(part.path, part.file)
    if part.start:
        error = next((found.error for found in over(look, [whole]) if found.error), error)
    raise UserError(error)


def _new_file(
    path: str, encoding: str | None, format: str | None, with_languages: bool
) -> SpreadFile:
    languages = bytearray() if with_languages else None
    return SpreadFile(path, encoding, format, languages=languages, _kept=None)


def _look_at(
    part: Part, *, encoding: str | None, format: str | None, with_languages: bool
) -> Iterator[Looked]:
    """Look through a part, as if nothing stood before it."""
    file = _new_file(part.path, encoding, format, with_languages)
    reader, error = PartReader(part, encoding), None
    file.places.append(Place(0, 0, part.file, part.kind, part.start))
    try:
        for of_file, batch in reader:
            began = reader.began_at
            if began and began[0] - file.places[-1].start > BYTES_BETWEEN_PLACES:
                place = Place(file.num_good, file.num_rows, part.file, reader.kind, *began)
                file.places.append(place)
            rows = [*rows_in([(of_file, batch)], file.read, file.num_rows)]
            file.count(rows)
            _measure(file.sizes, rows)
    except UserError as mistake:
        error = str(mistake)
    yield Looked(file, reader.ended_at, reader.num_lines, error)


def _measure(sizes: tuple[array, array], rows: Sequence[Any]) -> None:
    """Keep how long rows are in the forms in which they may be encoded."""
    good = [row for row in rows if not isinstance(row, BadRow)]
    for size, has_turns in zip(sizes, (False, True), strict=True):
        if has_turns and not any(isinstance(row, Record | Row) for row in good):
            size.extend(sizes[0][len(size) :])  # the form is the same
            continue
        form = RowFile("", has_turns=has_turns)
        size.extend(row.num_characters for row in form.used(good))


def _join(file: SpreadFile, part: Part, found: SpreadFile, row: int, line: int) -> None:
    """Take over what was found in the part that follows.

    Args:
        file: what was found before.
        part: the part.
        found: in it.
        row: rows of the source before it.
        line: lines of its file before it.
    """
    if found.num_rows:
        file.row_is_line = file.row_is_line and found.row_is_line and row == line
    file.bad_rows += [
        replace(bad, row=bad.row + row, line=bad.line + line if bad.line else 0)
        for bad in found.bad_rows
    ]
    file.places += [
        place._replace(good=place.good + file.num_good, row=place.row + row, line=place.line + line)
        for place in found.places
    ]
    file.num_good += found.num_good
    file.fields.add(found.fields)
    file.has_turns |= found.has_turns
    file.has_earlier_rounds |= found.has_earlier_rounds
    file.has_thoughts |= found.has_thoughts
    if file.template != "custom":
        file.template = found.template or file.template
    if file.languages is not None:
        file.languages += found.languages or b""
    for mine, more in zip(file.sizes, found.sizes, strict=True):
        mine.extend(more)


class Stretch(NamedTuple):
    """Rows that follow each other, in the batches in which they are encoded."""

    place: Place
    """Where reading begins, at the first row or before it."""
    uses: array
    """How often each good row from there on is taken."""
    batches: list[int]
    """Rows of each batch."""


def encode(
    one: RowSet, tokenizer: RowTokenizer, settings: RowSettings, num_done: int = 0
) -> Iterator[EncodedRows]:
    """The batches of encoded rows of a file, by the workers of a Ray that runs.

    Args:
        one: the file, as `look_through` has found it.
        tokenizer: of the base model.
        settings: how rows are encoded.
        num_done: rows, each as often as it is taken, that are encoded already.
    """
    assert isinstance(one.file, SpreadFile)
    file = one.file
    form = RowFile(file.path, file.encoding, file.format, has_turns=file.has_turns, _kept=None)
    one_thread = settings.model_copy(update={"num_threads": 1})
    work = partial(_encode_stretch, form=form, tokenizer=tokenizer, settings=one_thread)
    with tqdm(
        total=one.num_taken, initial=num_done, desc="tokenize", unit="row", delay=1
    ) as progress:
        for batch in over(work, [*_stretches(one, file, num_done)]):
            yield batch
            progress.update(batch.num_rows)


def _stretches(one: RowSet, file: SpreadFile, num_done: int) -> Iterator[Stretch]:
    """All rows that are taken and not done."""
    sizes_R = np.asarray(file.sizes[file.has_turns], np.int64)
    row_T = np.repeat(np.arange(len(sizes_R)), one.uses)
    ends_T = np.cumsum(sizes_R[row_T])
    first = num_done
    pending: list[int] = []
    firsts = [place.good for place in file.places]
    for size in _batch_sizes(ends_T, num_done, rows_per_batch(file)):
        start = first + sum(pending)
        before, at = ends_T[first] if pending else 0, 0
        if pending:
            at = bisect_right(firsts, int(row_T[start])) - 1
            is_full = ends_T[start - 1] - before >= CHARACTERS_PER_STRETCH
            if is_full and at > bisect_right(firsts, int(row_T[first])) - 1:
                yield _stretch(file, row_T, firsts, first, pending)
                first, pending = start, []
        pending.append(size)
    if pending:
        yield _stretch(file, row_T, firsts, first, pending)


def _batch_sizes(ends_T: np.ndarray, first: int, most: int) -> Iterator[int]:
    """Rows of each batch, as `tokenizing.encode_batches` makes them.

    Args:
        ends_T: characters of all rows up to each one.
        first: the row with which the first batch begins.
        most: rows of a batch.
    """
    while first < len(ends_T):
        full = CHARACTERS_PER_BATCH + (ends_T[first - 1] if first else 0)
        end = min(first + most, int(np.searchsorted(ends_T, full)) + 1, len(ends_T))
        yield end - first
        first = end


def _stretch(
    file: SpreadFile, row_T: np.ndarray, firsts: list[int], first: int, sizes: list[int]
) -> Stretch:
    rows = row_T[first : first + sum(sizes)]
    place = file.places[bisect_right(firsts, int(rows[0])) - 1]
    uses = np.bincount(rows - place.good)
    return Stretch(place, array("i", uses.astype(np.int32).tobytes()), sizes)


def _encode_stretch(
    stretch: Stretch, *, form: RowFile, tokenizer: RowTokenizer, settings: RowSettings
) -> Iterator[EncodedRows]:
    with no_collection():
        good = form.used(_rows_from(stretch.place, form))
        rows = chain.from_iterable(
            repeat(row, num)
            for row, num in zip(good, stretch.uses)  # noqa: B905
        )
        for size in stretch.batches:
            batch = [*islice(rows, size)]
            if len(batch) < size:
                raise UserError(
                    f"{form.path}: has fewer rows than when it was looked through; make sure that "
                    "nothing else writes it, and do it again"
                )
            (encoded,) = encode_batches(batch, tokenizer, settings, form)
            yield encoded


def _rows_from(place: Place, form: RowFile) -> Iterator[Any]:
    """The rows of a source from a place on."""
    part = Part(form.path, place.file, place.kind, place.start)
    rest = range(0)
    if place.file is not None:
        rest = range(place.file + 1, len(find_source(form.path).files))
    readers = [
        PartReader(part, form.encoding, place.line),
        *(PartReader(Part(form.path, number), form.encoding) for number in rest),
    ]
    yield from rows_in(chain.from_iterable(readers), form.read, place.row)
