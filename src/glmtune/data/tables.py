"""Rows of tables: CSV and TSV, in which every cell is text, and Parquet and Arrow.

A cell that holds a list as text, as tables without nested columns do, is that list where a
conversation stands in the column. Rows of Parquet and Arrow are what the same rows in JSON would
be; what JSON has no value for becomes text.
"""

import ast
import contextlib
import csv
import io
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from glmtune.data.fields import CONVERSATIONS, is_content
from glmtune.data.flaws import Flaw, not_utf8, show
from glmtune.data.windows import MAX_ROW_BYTES, Batch
from glmtune.errors import UserError, reason_of

if TYPE_CHECKING:
    import pyarrow as pa

ROWS_PER_BATCH = 1024
_PLAIN_VALUES = (str, int, float, bool, type(None))
_DELIMITERS = {".csv": ",", ".tsv": "\t", ".tab": "\t"}
_OTHER_DELIMITERS = ";|"
_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"


def delimiter_of(path: str, start: bytes) -> str | None:
    """What stands between the cells of a text; None where it is no table.

    Args:
        path: the file.
        start: its first bytes.

    Raises:
        UserError: it is a table whose cells are separated by something that is not read.
    """
    text = start.decode("utf-8-sig", "replace").lstrip()
    if not text or text[0] in "[{<":
        return None
    named = next((_DELIMITERS[s] for s in Path(path).suffixes if s in _DELIMITERS), None)
    first_line = text.splitlines()[0]
    heads = {mark: _split(first_line, mark) for mark in ",\t" + _OTHER_DELIMITERS}
    known = [
        mark for mark, names in heads.items() if len(names) > 1 and any(map(is_content, names))
    ]
    wrong = [mark for mark in _OTHER_DELIMITERS if mark in known]
    if wrong and not {",", "\t"} & {*known}:
        raise UserError(
            f'{path}:1: its cells are separated by "{wrong[0]}"; save it with commas or tabs '
            "between them"
        )
    fitting = [mark for mark in (named, ",", "\t") if mark in known]
    return fitting[0] if fitting else named


def _split(line: str, delimiter: str) -> list[str]:
    try:
        return [name.strip() for name in next(csv.reader([line], delimiter=delimiter))]
    except (csv.Error, StopIteration):
        return []


def read_csv(path: str, file: BinaryIO, delimiter: str) -> Iterator[Batch]:
    """Yield the rows below the line with the names of the columns; every value is text.

    A text may stand in quotes, with line breaks and delimiters inside, and quotes written twice.

    Raises:
        UserError: the first line names no columns, or one twice.
    """
    text = io.TextIOWrapper(file, "utf-8-sig", "surrogateescape", newline="")
    csv.field_size_limit(max(csv.field_size_limit(), MAX_ROW_BYTES))
    reader = csv.reader(text, delimiter=delimiter, strict=True)
    try:
        names = [name.strip() for name in next(filter(None, reader), [])]
    except csv.Error as error:
        raise UserError(
            f"{path}:1: the names of the columns cannot be read ({error}); write them in the first "
            "line, a quote inside of quotes twice"
        ) from error
    if flaw := not_utf8("".join(names)):
        raise UserError(f"{path}:1: {flaw}")
    _check_names(path, names)
    rows = _csv_rows(reader, names, delimiter)
    while batch := list(islice(rows, ROWS_PER_BATCH)):
        lines, values, sizes = zip(*batch, strict=True)
        yield Batch(lines, list(values), sum(sizes), columns=names)
    text.detach()  # the file is closed by whoever opened it


def _csv_rows(
    reader: Any, names: Sequence[str], delimiter: str
) -> Iterator[tuple[int, object, int]]:
    """Yield the line of each row, the row or its Flaw, and its size."""
    listed = [place for place, name in enumerate(names) if name in CONVERSATIONS]
    line = reader.line_num + 1
    while True:
        value: object
        cells: list[str] = []
        try:
            cells = next(reader)
            value = _csv_row(cells, names, delimiter)
            if isinstance(value, dict):
                for place in listed:
                    value[names[place]] = list_in(cells[place])
        except StopIteration:
            return
        except csv.Error as error:
            value = Flaw(
                "quotes",
                f"quotes that do not match ({error})",
                "write a quote inside of a quoted text twice",
                breaks_list=True,
            )
        if value is not None:
            yield line, value, sum(map(len, cells)) + len(cells)
        line = reader.line_num + 1


def _csv_row(
    cells: list[str], names: Sequence[str], delimiter: str
) -> dict[str, Any] | Flaw | None:
    """The fields of a row, or what is wrong with it; None for a blank line.

    A column without a name, as spreadsheets leave them, counts where something stands in it.
    """
    if not cells:
        return None
    rest = cells[len(names) :]
    if len(cells) < len(names) or any(rest):
        what = f"{len(cells)} cells, and the first line names {len(names)} columns"
        mark = "a tab" if delimiter == "\t" else f'"{delimiter}"'
        return Flaw("cells", what, f"write a text that holds {mark} or a line break in quotes")
    if flaw := not_utf8(delimiter.join(cells)):
        return flaw
    return {name: cell for name, cell in zip(names, cells, strict=False) if name or cell}


def list_in(cell: str) -> object:
    """The list that a cell holds as JSON, or as Python shows it; any other text as it is."""
    if not cell.lstrip().startswith("["):
        return cell
    for read in (json.loads, ast.literal_eval):
        with contextlib.suppress(ValueError, SyntaxError, RecursionError, MemoryError):
            return read(cell.strip())
    return cell


def _check_names(path: str, names: Sequence[str]) -> None:
    if not any(names):
        raise UserError(f"{path}: holds no row; check that this is the right file")
    name, count = Counter(filter(None, names)).most_common(1)[0]
    if count > 1:
        raise UserError(
            f"{path}: {count} of its columns are named {show(name)}; give each its own name"
        )


def read_parquet(path: str, file: BinaryIO) -> Iterator[Batch]:
    """Yield the rows of a Parquet file. Raises UserError where it is damaged or cut off."""
    from pyarrow import parquet

    with _damage(path, "Parquet"):
        table = parquet.ParquetFile(file)
    batches = table.iter_batches(ROWS_PER_BATCH, use_threads=False)
    yield from _arrow_rows(path, "Parquet", table.schema_arrow, batches)


def read_arrow_file(path: str, file: BinaryIO) -> Iterator[Batch]:
    """Yield the rows of an Arrow file. Raises UserError where it is damaged or cut off."""
    import pyarrow as pa

    with _damage(path, "Arrow"):
        table = pa.ipc.open_file(file)
    batches = (table.get_batch(number) for number in range(table.num_record_batches))
    yield from _arrow_rows(path, "Arrow", table.schema, batches)


def read_arrow_stream(path: str, file: BinaryIO) -> Iterator[Batch]:
    """Yield the rows of an Arrow stream. Raises UserError where it is damaged or cut off."""
    import pyarrow as pa

    watched = _End(file)
    with _damage(path, "Arrow"):
        table = pa.ipc.open_stream(pa.PythonFile(watched, mode="r"))
    yield from _arrow_rows(path, "Arrow", table.schema, table)
    if watched.last != _END_OF_STREAM:  # a reader takes a file that was cut for one that ended
        raise UserError(f"{path}: the Arrow file is cut off; download or copy it again")


class _End(io.RawIOBase):
    """A stream that knows the last bytes it has read."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.last = b""

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        self.last = (self.last + data[-8:])[-8:]
        return data


def _arrow_rows(
    path: str, kind: str, schema: "pa.Schema", batches: Iterable["pa.RecordBatch"]
) -> Iterator[Batch]:
    import pyarrow as pa

    _check_names(path, schema.names)
    simple = (pa.types.is_string, pa.types.is_large_string, pa.types.is_integer)
    mixed = [f.name for f in schema if not any(is_one(f.type) for is_one in simple)]
    batches = iter(batches)
    while True:
        with _damage(path, kind):
            batch = next(batches, None)
            if batch is None:
                return
            rows = batch.to_pylist()
        for name in mixed:
            for row in rows:
                row[name] = _json_value(row[name])
        for name in set(CONVERSATIONS) & {*schema.names}:
            for row in rows:
                if isinstance(row[name], str):
                    row[name] = list_in(row[name])
        for start in range(0, len(rows), ROWS_PER_BATCH):
            part = rows[start : start + ROWS_PER_BATCH]
            yield Batch([0] * len(part), part, batch.nbytes // len(rows), columns=schema.names)


def _json_value(value: object) -> object:
    """A value of a table as JSON has it.

    A property of an inner object that is null is left out: a table has all properties in all rows.
    """
    if isinstance(value, dict):
        return {k: _json_value(v) for k, v in value.items() if v is not None}
    if isinstance(value, list):
        if value and all(isinstance(pair, tuple) for pair in value):  # a map
            return {str(k): _json_value(v) for k, v in value}
        return [_json_value(inner) for inner in value]
    if isinstance(value, bytes):
        return value.decode("utf-8", "surrogateescape")
    return value if isinstance(value, _PLAIN_VALUES) else str(value)


@contextlib.contextmanager
def _damage(path: str, kind: str) -> Iterator[None]:
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{path}: the {kind} file is damaged or cut off ({reason_of(error)}); download or copy "
            "it again"
        ) from error
