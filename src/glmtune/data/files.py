"""Read a user's text file; write results that appear under their final name only when whole."""

import codecs
import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from glmtune.drafts import continued_folder, replacing_file, replacing_folder, write_errors
from glmtune.errors import UserError

_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_BYTE_ORDER_MARKS = {
    b"\xff\xfe\x00\x00": "UTF-32",
    b"\x00\x00\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}


def read_text(path: str) -> str:
    """Read a whole UTF-8 file; a byte order mark at its start is dropped.

    Raises UserError when the file cannot be read, is a Git-LFS pointer, or holds anything other
    than UTF-8 text; the message names the byte and the encoding it more likely is in.
    """
    with open_bytes(path) as file:
        data = file.read()
    refuse_other_formats(path, data)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _not_text(path, data, error.start) from error


def read_json_object(path: str | Path) -> dict[str, Any]:
    """Read a JSON file whose whole content is one object.

    Raises UserError as `read_text` does, and where the content is not JSON, not an object, or
    nested too deeply to be read.
    """
    text = read_text(str(path))
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}:{error.lineno}: not JSON ({error.msg}); get the file again"
        ) from error
    except (RecursionError, ValueError) as error:  # ValueError: an integer of too many digits
        fault = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise UserError(f"{path}: cannot be read as JSON ({fault}); get the file again") from None
    if not isinstance(content, dict):
        kind = type(content).__name__
        raise UserError(f"{path}: holds a {kind}, not an object of settings; get the file again")
    return content


def write_json(content: Mapping[str, Any], path: str | Path) -> None:
    """Write a JSON file that appears whole. Raises UserError as `new_file` does."""
    with new_file(str(path)) as file:
        json.dump(content, file, indent=2, ensure_ascii=False)
        file.write("\n")


def sha256_of(path: str | Path) -> str:
    """The sha256 of a file's content, read in pieces. Raises OSError."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_inside(path: Path) -> None:
    """Raise UserError for a file that is a link out of its folder.

    Links of the hub cache, from a snapshot to the blobs of the same model, are allowed.
    """
    folder, target = path.parent.resolve(), path.resolve()
    blobs = folder.parent.parent / "blobs"
    in_hub_cache = folder.parent.name == "snapshots" and target.parent == blobs
    if not (target.is_relative_to(folder) or in_hub_cache):
        raise UserError(
            f"{path}: is a link to {target}, outside its folder; put the file itself in its place"
        )


@contextmanager
def open_bytes(path: str) -> Iterator[BinaryIO]:
    """Open a file to read its bytes. Raises UserError where it cannot be opened or read."""
    try:
        with open(path, "rb") as file:
            yield file
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}); check the path and its permissions"
        ) from error


class InUtf8:
    """A binary reader that recodes a file of another encoding to UTF-8.

    Raises UserError where the file is not in that encoding.
    """

    def __init__(self, path: str, file: BinaryIO, encoding: str) -> None:
        self._path, self._file, self._encoding = path, file, encoding
        self._decoder = codecs.getincrementaldecoder(encoding)()
        self._left, self._place = b"", 0

    def read(self, size: int) -> bytes:
        """Return the next `size` bytes, fewer only at the end."""
        pieces, at_end = [self._left], False
        while sum(map(len, pieces)) < size and not at_end:
            start = self._place
            data = self._file.read(size)
            self._place += len(data)
            at_end = not data
            try:
                pieces.append(self._decoder.decode(data, at_end).encode())
            except UnicodeError as error:
                place = start + max(0, getattr(error, "start", 0))
                raise UserError(
                    f"{self._path}: not {self._encoding} near byte {place}; name another encoding, "
                    "or leave it out for UTF-8"
                ) from error
        text = b"".join(pieces)
        self._left = text[size:]
        return text[:size]


def refuse_other_formats(path: str, start: bytes) -> None:
    """Raise UserError where the first bytes of a file cannot begin UTF-8 text.

    That is a Git-LFS pointer, UTF-16, UTF-32, or binary data such as an archive. Stray bytes in a
    text are accepted here: the reader of the lines reports which lines they damage.
    """
    if start.startswith(_LFS_POINTER):
        raise UserError(
            f"{path}:1: a Git-LFS pointer stands here instead of the data; "
            "fetch the data with `git lfs pull`, or download the file itself"
        )
    if _likely_encoding(start) in (*_BYTE_ORDER_MARKS.values(), "UTF-16BE", "UTF-16LE", None):
        undecoded = start.decode("utf-8", "surrogateescape")
        place = next(i for i, c in enumerate(undecoded) if c == "\0" or "\udc80" <= c <= "\udcff")
        raise _not_text(path, start, len(undecoded[:place].encode("utf-8")))


def _not_text(path: str, data: bytes, place: int) -> UserError:
    line = data.count(b"\n", 0, place) + 1
    cause, fix = explain_bytes(data)
    return UserError(f"{path}:{line}: not UTF-8 at byte {place}, {cause}; {fix}")


def explain_bytes(data: bytes) -> tuple[str, str]:
    """Say which encoding bytes that are not UTF-8 likely have, and how to convert them."""
    encoding = _likely_encoding(data)
    if encoding is None:
        return "it looks like binary data", "unpack the archive, or pass the JSON file itself"
    if encoding == "UTF-8":
        return "a few bytes are damaged or cut off", "download it again or fix that place"
    return f"likely {encoding}", f"save it as UTF-8, or, of rows, pass --encoding {encoding}"


def _likely_encoding(data: bytes) -> str | None:
    for mark, encoding in _BYTE_ORDER_MARKS.items():
        if data.startswith(mark):
            return encoding
    if data.count(0) > 1 + len(data) // 50:
        # In UTF-16 every ASCII character of JSON (quotes, brackets, keys) has its zero byte on the
        # same side.
        encoding = "UTF-16BE" if data[::2].count(0) > data[1::2].count(0) else "UTF-16LE"
        return encoding if '"' in data.decode(encoding, "ignore")[:1000] else None
    with contextlib.suppress(UnicodeDecodeError):
        # Halves of characters, written one by one, are no other encoding; the end may be cut off.
        codecs.getincrementaldecoder("utf-8")("surrogatepass").decode(data)
        return "UTF-8"
    mended = data.decode("utf-8", "replace")
    num_damaged = mended.count("\ufffd")
    if sum(character > "\x7f" for character in mended) > 3 * num_damaged:
        return "UTF-8"
    for encoding in ("GBK", "GB18030", "CP1252"):
        with contextlib.suppress(UnicodeDecodeError):
            data.decode(encoding)
            return encoding
    return None if num_damaged > len(data) // 20 else "UTF-8"


@contextmanager
def new_file(path: str) -> Iterator[TextIO]:
    """Open a UTF-8 text file for writing that replaces `path` once the block ends without error.

    Missing parent folders are made. On any error nothing is left behind, and a file that was
    there before stays as it was. Raises UserError where the path cannot be written.
    """
    final = Path(os.path.realpath(path))
    with write_errors(path):
        if final.exists() and not final.is_file():
            raise UserError(f"{path}: exists and is not a file; choose another path")
        final.parent.mkdir(parents=True, exist_ok=True)
        with (
            replacing_file(final) as draft,
            open(draft, "w", encoding="utf-8", newline="\n") as file,
        ):
            yield file


@contextmanager
def new_folder(path: str) -> Iterator[Path]:
    """Make an empty folder to fill that replaces `path` once the block ends without error.

    The caller must check beforehand that a folder at `path` may be replaced. On any error nothing
    is left behind, and the earlier folder stays. Raises UserError where the path cannot be written.
    """
    with write_errors(path):
        Path(os.path.realpath(path)).parent.mkdir(parents=True, exist_ok=True)
        with replacing_folder(path) as draft:
            yield draft


@contextmanager
def resumable_folder(path: str, stays: Callable[[Path, BaseException], bool]) -> Iterator[Path]:
    """Yield a folder as `new_folder` does, and after a killed process what it had written.

    After an error it is removed unless it `stays`. Raises UserError as that does, and while another
    process writes it.
    """
    with write_errors(path):
        Path(os.path.realpath(path)).parent.mkdir(parents=True, exist_ok=True)
        with continued_folder(path, stays) as draft:
            yield draft
