"""Stream the rows of a JSON list or of JSON lines, with their line numbers.

Only a window of the file is in memory, however long the file is.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import orjson

from glmtune.data import windows
from glmtune.data.files import refuse_other_formats
from glmtune.data.flaws import Flaw, kind_of, show
from glmtune.data.windows import BLANK, Batch, Lines, List
from glmtune.errors import UserError

HEAD_BYTES = 1 << 16
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def read_json(path: str, file: BinaryIO) -> Iterator[Batch]:
    """Yield all rows of a JSON list or of JSON lines; the content decides which it is.

    `file` is that of `path`, read as UTF-8. Raises UserError when it is empty, or something else:
    see files.refuse_other_formats; a web page; a single object.
    """
    num_rows, first = 0, None
    reader, buffer = find_rows(path, file)
    for batch in Windows(file, buffer, reader):
        if batch.values and not num_rows:
            first = batch.values[0]
        num_rows += len(batch.values)
        yield batch
    holds_rows = isinstance(reader, List) or ".jsonl" in Path(path).suffixes
    if num_rows == 1 and not (holds_rows or isinstance(first, Flaw)):
        what = f"an object with the keys {show(list(first))}" if isinstance(first, dict) else None
        raise UserError(
            f"{path}: JSON, but {what or kind_of(first)}, not a list; "
            "write the records as [{...}, {...}], or one a line in a .jsonl file"
        )


def find_rows(path: str, file: BinaryIO) -> tuple[Lines | List, bytearray]:
    """Return a reader positioned where the rows start, and the bytes of them read so far.

    Raises:
        UserError: as `read_json`, for what the first bytes show.
    """
    head = file.read(HEAD_BYTES)
    refuse_other_formats(path, head)
    content = head.removeprefix(_BYTE_ORDER_MARK)
    line = 1
    while content and not content.strip(BLANK):
        line += content.count(b"\n")
        content = file.read(HEAD_BYTES)
    rows = content.lstrip(BLANK)
    _refuse_other_values(path, rows)
    line += content.count(b"\n", 0, len(content) - len(rows))
    is_list = rows.startswith(b"[")
    return List(line) if is_list else Lines(line), bytearray(rows[is_list:])


class Windows:
    """The batches of a file from a place on, window by window.

    Where a row does not fit into the window, the window is doubled. The reader stops before the end
    of the file at the first of `ends` where a row has ended and the next may begin.

    Args:
        file: stands behind what `buffer` holds.
        buffer: the bytes from the place on that have been read.
        reader: expects what stands there.
        place: the place, in bytes from the start of the file.
        ends: places behind it, ascending and before the end of the file.
    """

    def __init__(
        self,
        file: BinaryIO,
        buffer: bytearray,
        reader: Lines | List,
        place: int = 0,
        ends: Sequence[int] = (),
    ) -> None:
        self.reader = reader
        self.place = place
        """How far it has read, in bytes from the start of the file."""
        self.began_at: tuple[int, int] | None = None
        """Where the newest batch begins, in bytes and as a line; None inside of something."""
        self.ended_at: int | None = None
        """Where it stopped; None at the end of the file, and before."""
        self._file, self._buffer, self._ends = file, buffer, list(ends)

    def __iter__(self) -> Iterator[Batch]:
        size, buffer, ends = windows.WINDOW_BYTES, self._buffer, self._ends
        while True:
            room = ends[0] - self.place if ends else None
            if room == 0 and self.reader.expects == "row":
                self.ended_at = self.place
                return
            if room == 0:  # what stands there is no row's beginning, so read on
                del ends[0]
                continue
            is_cut = room is not None and size >= room
            wanted = room if is_cut and room is not None else size
            buffer += self._file.read(max(0, wanted - len(buffer)))
            is_last = len(buffer) < wanted
            is_between = self.reader.expects == "row"
            self.began_at = (self.place, self.reader.line) if is_between else None
            batch = self.reader.read(bytes(buffer[:wanted]), at_end=is_last)
            del buffer[: batch.num_bytes]
            self.place += batch.num_bytes
            yield batch
            if is_last and not buffer:
                return
            if is_cut and not batch.num_bytes:
                del ends[0]  # a row begins before it and goes on behind it
            elif not is_cut:
                size = windows.WINDOW_BYTES if batch.num_bytes else 2 * size


def _is_json(text: bytes) -> bool:
    try:
        orjson.loads(text)
    except ValueError:
        return False
    return True


def _refuse_other_values(path: str, start: bytes) -> None:
    """Raise UserError where a file begins like neither a JSON list nor JSON lines."""
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
