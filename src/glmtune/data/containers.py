"""Rows of any file: JSON, CSV, TSV, Parquet or Arrow, packed with gzip or zstd or not.

The content decides which it is; only whether a text without known names of columns is a table is
read off the file's name.
"""

import gzip
import io
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import BinaryIO, cast

from glmtune.data.files import InUtf8, open_bytes, refuse_other_formats
from glmtune.data.jsonfile import read_json
from glmtune.data.tables import (
    delimiter_of,
    read_arrow_file,
    read_arrow_stream,
    read_csv,
    read_parquet,
)
from glmtune.data.windows import Batch
from glmtune.errors import UserError, reason_of

_START_BYTES = 1 << 12
_BUFFER_BYTES = 1 << 16
_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
_EXCEL = "an Excel workbook", "save its sheet as CSV (UTF-8) and pass that"
_ARCHIVE = "unpack it and pass the file of rows inside"
_REFUSED = (
    (b"\xd0\xcf\x11\xe0", *_EXCEL),
    (b"BZh", "a bzip2 file", "unpack it, or pack it with gzip or zstd"),
    (b"\xfd7zXZ\x00", "an xz file", "unpack it, or pack it with gzip or zstd"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", _ARCHIVE),
    (b"Rar!", "a RAR archive", _ARCHIVE),
    (b"SQLite format 3\x00", "an SQLite database", "export the table as CSV or JSON lines"),
    (b"\x80\x04", "a pickle of Python", "write the rows as JSON lines"),
)
_BINARY: dict[bytes, tuple[str, Callable[[str, BinaryIO], Iterator[Batch]], bool]] = {
    b"PAR1": ("Parquet", read_parquet, True),
    b"ARROW1\x00\x00": ("Arrow", read_arrow_file, True),
    b"\xff\xff\xff\xff": ("Arrow", read_arrow_stream, False),
}
"""First bytes of a binary table: its name, its reader, and whether that needs to seek."""


def read_batches(path: str, encoding: str | None = None) -> Iterator[Batch]:
    """Yield all rows of a file, in their order.

    Args:
        path: the file.
        encoding: that of its text, where it is not UTF-8.

    Raises:
        UserError: the file cannot be read, is empty, damaged, cut off, or holds no rows: an
            archive, a workbook, a web page, a single object.
    """
    with open_bytes(path) as plain, ExitStack() as stack:
        start = _peek(plain)
        is_packed = start.startswith((_GZIP, _ZSTD))
        file = _unpacked(path, plain, start) if is_packed else plain
        start = _peek(file)
        for magic, (name, read, seeks) in _BINARY.items():
            if start.startswith(magic):
                if encoding:
                    raise UserError(
                        f"{path}: is {name}, whose text is UTF-8 always; leave encoding out"
                    )
                if seeks:
                    place = stack.enter_context(_on_disk(file)) if is_packed else path
                    file = stack.enter_context(_native(place))
                yield from read(path, file)
                return
        _refuse_others(path, start)
        if encoding:
            file = _reader(InUtf8(path, file, encoding).read)
            start = _peek(file)
        if delimiter := delimiter_of(path, start):
            refuse_other_formats(path, start)
            yield from read_csv(path, file, delimiter)
        else:
            yield from read_json(path, file)


def is_plain_json(path: str, file: BinaryIO) -> bool:
    """Whether a file is read as JSON, and is not packed.

    Args:
        path: the file.
        file: stands at its start, and stays there.

    Raises:
        UserError: it is known to be something else than rows.
    """
    start = _peek(file)
    if start.startswith((_GZIP, _ZSTD, *_BINARY)):
        return False
    _refuse_others(path, start)
    return delimiter_of(path, start) is None


def _unpacked(path: str, file: BinaryIO, start: bytes) -> BinaryIO:
    """A reader of what a packed file holds, which names the file where that is damaged."""
    if start.startswith(_GZIP):
        kind, packed = "gzip", gzip.GzipFile(fileobj=file)
        read: Callable[[int], bytes] = packed.read
    else:
        import pyarrow as pa

        kind, read = "zstd", pa.CompressedInputStream(file, "zstd").read

    def checked(size: int) -> bytes:
        try:
            return read(size)
        except (OSError, EOFError, ValueError, zlib.error) as error:
            raise UserError(
                f"{path}: the {kind} file is damaged or cut off ({reason_of(error)}); download or "
                "copy it again"
            ) from error

    return _reader(checked)


def _refuse_others(path: str, start: bytes) -> None:
    """Raise UserError where a file is known to be something else than rows."""
    found = next((rest for magic, *rest in _REFUSED if start.startswith(magic)), None)
    if start.startswith(b"PK\x03\x04"):
        is_book = b"[Content_Types].xml" in start or b"xl/" in start
        found = [*_EXCEL] if is_book else ["a zip archive", _ARCHIVE]
    elif start[257:262] == b"ustar":
        found = ["a tar archive", _ARCHIVE]
    if found:
        raise UserError(f"{path}: is {found[0]}, not a file of rows; {found[1]}")


@contextmanager
def _on_disk(file: BinaryIO) -> Iterator[str]:
    """The path of the rest of a file, unpacked, for readers that have to seek."""
    with tempfile.NamedTemporaryFile() as whole:
        shutil.copyfileobj(file, whole)
        whole.flush()
        yield whole.name


def _native(path: str) -> AbstractContextManager[BinaryIO]:
    """A file as pyarrow opens it.

    Its readers use threads. One that still needed Python, for a file that Python has opened, would
    abort the process where a bad row ends it early.
    """
    import pyarrow as pa

    return cast(AbstractContextManager[BinaryIO], pa.OSFile(path))


def _peek(file: BinaryIO) -> bytes:
    return cast(io.BufferedReader, file).peek(_START_BYTES)


def _reader(read: Callable[[int], bytes]) -> BinaryIO:
    return io.BufferedReader(_Raw(read), _BUFFER_BYTES)


class _Raw(io.RawIOBase):
    """A stream of bytes over a function that reads some."""

    def __init__(self, read: Callable[[int], bytes]) -> None:
        self._read = read

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        data = self._read(len(buffer))
        buffer[: len(data)] = data
        return len(data)
