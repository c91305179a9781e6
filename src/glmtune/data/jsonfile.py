"""Stream the rows of a JSON list or of JSON lines, whole files or spans of them, with their lines.

Memory holds a window of the file and no more, however long the file is.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import BinaryIO

import orjson

from glmtune.data import windows
from glmtune.data.files import open_bytes, refuse_other_formats
from glmtune.data.flaws import Flaw, kind_of, show
from glmtune.data.windows import BETWEEN_ROWS, BLANK, Batch, Lines, List
from glmtune.errors import UserError

HEAD_BYTES = 1 << 16
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class Span:
    """Rows that lie together in a file: from byte `start`, in line `line`, to before byte `end`.

    At `end`, if the file does not end there, another row of the file starts. `is_first`: no row of
    the file lies before the span.
    """

    path: str
    is_list: bool
    start: int
    line: int
    end: int | None = None
    is_first: bool = False


def read_batches(path: str, encoding: str | None = None) -> Iterator[Batch]:
    """Yield all rows of a JSON list or of JSON lines, told apart by what the file holds.

    `encoding` is that of the file where it is not UTF-8. Raises UserError when the file cannot be
    read, is empty, or is no such file at all: see
    files.refuse_other_formats; a web page; a single object.
    """
    num_rows, first = 0, None
    with open_bytes(path, encoding) as file:
        span, buffer = _find_rows(path, file)
        reader = _reader(span)
        for batch in _batches(file, buffer, reader):
            if batch.values and not num_rows:
                first = batch.values[0]
            num_rows += len(batch.values)
            yield batch
    if num_rows == 1 and not (span.is_list or path.endswith(".jsonl") or isinstance(first, Flaw)):
        what = f"an object with the keys {show(list(first))}" if isinstance(first, dict) else None
        raise UserError(
            f"{path}: JSON, but {what or kind_of(first)}, not a list; "
            "write the records as [{...}, {...}], or one a line in a .jsonl file"
        )


class CutInsideRow(Exception):
    """Where a span of a file was thought to end, no row ends."""


def read_span(span: Span) -> Iterator[Batch]:
    """Yield the rows of a span; CutInsideRow, at its end, where the last of them does not end."""
    reader = _reader(span)
    # In a list, the bracket of the row behind the end shows that the last one is whole.
    behind = b"{" if span.is_list else b""
    left = None if span.end is None else span.end - span.start + len(behind)
    with open_bytes(span.path) as file:
        file.seek(span.start)
        buffer = bytearray()
        yield from _batches(file, buffer, reader, left)
    if span.end is not None and (buffer != behind or reader.expects != "row"):
        raise CutInsideRow


def cut_into_spans(path: str, size: int) -> Iterator[Span]:
    """Cut the rows of a file into spans of about `size` bytes; UserError as from read_batches.

    A list is cut where an object seems to end and another to begin. That may be inside of a string;
    then read_span raises CutInsideRow for the span before it, from whose start the file is to be
    read on.
    """
    with open_bytes(path) as file:
        rest, _ = _find_rows(path, file)
        file.seek(rest.start)
        piece = b""
        while len(piece) <= windows.MAX_ROW_BYTES and (data := file.read(size)):
            piece += data
            if length := _last_end(piece, rest.is_list):
                end = rest.start + length
                yield replace(rest, end=end)
                line = rest.line + piece.count(b"\n", 0, length)
                rest, piece = Span(path, rest.is_list, end, line), piece[length:]
    yield rest


def _last_end(piece: bytes, is_list: bool) -> int:
    """Return where the last row that starts in a piece of a file starts; 0 where none is seen."""
    if not is_list:
        return piece.rfind(b"\n") + 1
    ends = [match.end() - 1 for match in BETWEEN_ROWS.finditer(piece, len(piece) - HEAD_BYTES)]
    return ends[-1] if ends else 0


def _find_rows(path: str, file: BinaryIO) -> tuple[Span, bytearray]:
    """Find where the rows start; also return what was read of them."""
    head = file.read(HEAD_BYTES)
    refuse_other_formats(path, head)
    content = head.removeprefix(_BYTE_ORDER_MARK)
    start, line = len(head) - len(content), 1
    while content and not content.strip(BLANK):
        start, line = start + len(content), line + content.count(b"\n")
        content = file.read(HEAD_BYTES)
    rows = content.lstrip(BLANK)
    num_blanks = len(content) - len(rows)
    _refuse_other_values(path, rows)
    is_list = rows.startswith(b"[")
    line += content.count(b"\n", 0, num_blanks)
    span = Span(path, is_list, start + num_blanks + is_list, line, is_first=True)
    return span, bytearray(rows[is_list:])


def _reader(span: Span) -> Lines | List:
    if not span.is_list:
        return Lines(span.line)
    return List(span.line, expects="first" if span.is_first else "row")


def _batches(
    file: BinaryIO, buffer: bytearray, reader: Lines | List, left: int | None = None
) -> Iterator[Batch]:
    """Read `left` more bytes of a file, or all, window by window; what is no row yet is in buffer.

    For a row that the window cuts, the window is made twice as long.
    """
    size = windows.WINDOW_BYTES
    while True:
        wanted = max(0, size - len(buffer))
        data = file.read(wanted if left is None else min(wanted, left))
        buffer += data
        if left is not None:
            left -= len(data)
        is_last = len(buffer) < size
        batch = reader.read(bytes(buffer[:size]), at_end=is_last and left is None)
        yield batch
        del buffer[: batch.num_bytes]
        if is_last and (not buffer or (left is not None and not batch.num_bytes)):
            return
        size = windows.WINDOW_BYTES if batch.num_bytes else 2 * size


def _is_json(text: bytes) -> bool:
    try:
        orjson.loads(text)
    except ValueError:
        return False
    return True


def _refuse_other_values(path: str, start: bytes) -> None:
    """Raise UserError where what a file starts with is the start of neither list nor lines."""
    if not start:
        raise UserError(f"{path}: the file is empty; check that this is the right file")
    if start.startswith(b"<"):
        raise UserError(f"{path}: a web page, not JSON; download the file itself (its raw form)")
    first_line, newline, _ = start.partition(b"\n")
    first_line = first_line.rstrip()
    goes_on = newline and start.startswith(b"{") and first_line[-1:] in (b"{", b"[", b",", b":")
    if goes_on and not _is_json(first_line.removesuffix(b",")):
        raise UserError(
            f"{path}: a JSON object over several lines, not a list; "
            "write the records as [{...}, {...}], or one a line in a .jsonl file"
        )
