"""Read a user's text file; write results that appear under their final name only when whole."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

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
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}); check the path and its permissions"
        ) from error
    if data.startswith(_LFS_POINTER):
        raise UserError(
            f"{path}:1: a Git-LFS pointer stands here instead of the data; "
            "fetch the data with `git lfs pull`, or download the file itself"
        )
    # JSON text holds no NUL, but UTF-16 without a mark does, and then can still be valid UTF-8.
    offsets = [data.find(0)] if 0 in data else []
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        offsets.append(error.start)
    if offsets:
        line = data.count(b"\n", 0, min(offsets)) + 1
        raise UserError(f"{path}:{line}: not UTF-8 at byte {min(offsets)}; {_explain(data, path)}")
    return text.removeprefix("\ufeff")


def _explain(data: bytes, path: str) -> str:
    """Say what a file that is not UTF-8 more likely is, and how to mend it."""
    encoding = _likely_encoding(data)
    if encoding is None:
        return "it looks like binary data (an archive?); unpack it or pass the JSON file itself"
    if encoding == "UTF-8":
        return "a few bytes of it are damaged or cut off; download it again or mend that place"
    return (
        f"its encoding is likely {encoding}; save it as UTF-8, for example with "
        f"`iconv -f {encoding} -t UTF-8 {path} > {Path(path).stem}.utf8{Path(path).suffix}`"
    )


def _likely_encoding(data: bytes) -> str | None:
    for mark, encoding in _BYTE_ORDER_MARKS.items():
        if data.startswith(mark):
            return encoding
    if 0 in data:
        # In UTF-16 the quotes, brackets and keys of JSON all have their zero byte on one side.
        encoding = "UTF-16BE" if data[::2].count(0) > data[1::2].count(0) else "UTF-16LE"
        return encoding if '"' in data.decode(encoding, "ignore")[:1000] else None
    mended = data.decode("utf-8", "replace")
    num_damaged = mended.count("\ufffd")
    if sum(character > "\x7f" for character in mended) > 3 * num_damaged:
        return "UTF-8"
    for encoding in ("GBK", "GB18030", "CP1252"):
        with contextlib.suppress(UnicodeDecodeError):
            data.decode(encoding)
            return encoding
    return None


@contextmanager
def new_file(path: str) -> Iterator[TextIO]:
    """Open a UTF-8 text file for writing; it replaces `path` once the block ends without error.

    Missing parent folders are made. On any error nothing is left behind, and a file that was
    there before stays as it was. Raises UserError where the path cannot be written.
    """
    final, draft = _final_and_draft(path)
    with _write_errors(path):
        if final.exists() and not final.is_file():
            raise UserError(f"{path}: exists and is not a file; choose another path")
        final.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(draft, "w", encoding="utf-8", newline="\n") as file:
                yield file
            os.replace(draft, final)
        finally:
            draft.unlink(missing_ok=True)


@contextmanager
def new_folder(path: str) -> Iterator[Path]:
    """Make an empty folder to fill; it replaces `path` once the block ends without error.

    Whether a folder that stands at `path` may go is for the caller to judge beforehand. On any
    error nothing is left behind, and the earlier folder stays. Raises UserError where the path
    cannot be written.
    """
    final, draft = _final_and_draft(path)
    earlier = draft.with_suffix(".old")
    with _write_errors(path):
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        try:
            yield draft
            if final.exists():
                final.rename(earlier)
            try:
                draft.rename(final)
            except OSError:
                if earlier.exists():
                    earlier.rename(final)
                raise
            shutil.rmtree(earlier, ignore_errors=True)
        finally:
            shutil.rmtree(draft, ignore_errors=True)


def _final_and_draft(path: str) -> tuple[Path, Path]:
    # A symbolic link keeps pointing: what it points at is replaced, not the link.
    final = Path(os.path.realpath(path))
    return final, final.with_name(f".{final.name}.{os.getpid()}.tmp")


@contextmanager
def _write_errors(path: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror or error}); "
            "check the path, its permissions and the free space"
        ) from error
