"""A file or folder takes its name only once it is whole and on the disk.

It is written under a hidden name beside it, flushed, and renamed. Whatever ends the process, and at
whatever instant, the name leads to what was there before or to what was to be there; all that may
be left behind is the draft, which `clear_drafts` knows by its name.
"""

import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from glmtune.errors import UserError

_DRAFT = re.compile(r"\.([^/\\]+)\.\d+\.(?:tmp|old)")
_SEVERAL = "files"


@contextmanager
def replacing_file(path: str | Path) -> Iterator[Path]:
    """Give a path to write a file to, which replaces `path` once the block ends without error.

    A block that writes nothing leaves everything as it was. A symbolic link keeps pointing: what it
    points at is replaced. Raises OSError.
    """
    final = Path(os.path.realpath(path))
    draft = _beside(final, "tmp")
    try:
        yield draft
        if draft.exists():
            _fsync_unless_draft(draft, final.parent)
            os.replace(draft, final)
            _fsync_unless_draft(final.parent, final.parent)
    finally:
        draft.unlink(missing_ok=True)


@contextmanager
def replacing_files(folder: Path) -> Iterator[Path]:
    """Give an empty folder, whose files replace those of `folder` once the block ends well.

    One takes its place after the other. Raises OSError.
    """
    with _draft_folder(folder / _SEVERAL) as draft:
        yield draft
        files = list(draft.iterdir())
        for file in files:
            _fsync_unless_draft(file, folder)
        for file in files:
            os.replace(file, folder / file.name)
        _fsync_unless_draft(folder, folder)


@contextmanager
def replacing_folder(path: str | Path) -> Iterator[Path]:
    """Give an empty folder to fill, which replaces `path` once the block ends without error.

    Between an earlier folder's going and this one's coming there is an instant with neither. Raises
    OSError; the earlier folder then stays.
    """
    final = Path(os.path.realpath(path))
    with _draft_folder(final) as draft:
        yield draft
        for place, _, files in os.walk(draft):
            for file in files:
                _flush(Path(place, file))
            _flush(Path(place))
        earlier = _set_aside(final) if final.exists() else None
        try:
            draft.rename(final)
        except OSError:
            if earlier:
                earlier.rename(final)
            raise
        _flush(final.parent)
        if earlier:
            shutil.rmtree(earlier, ignore_errors=True)


def remove_folder(path: Path) -> None:
    """Delete a folder, of which no part is left under its name at any instant. Raises OSError."""
    shutil.rmtree(_set_aside(path))


def clear_drafts(folder: Path, is_ours: Callable[[str], object]) -> None:
    """Delete what a killed process left in a folder: drafts of the names that are ours.

    Raises OSError.
    """
    for entry in folder.iterdir():
        draft = _DRAFT.fullmatch(entry.name)
        if draft and (draft[1] == _SEVERAL or is_ours(draft[1])):
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


@contextmanager
def write_errors(path: str | Path) -> Iterator[None]:
    """Tell what keeps a path from being written as a UserError, which names no draft."""
    try:
        yield
    except OSError as error:
        name = _DRAFT.sub(r"\1", str(path))
        raise UserError(
            f"{name}: cannot be written ({error.strerror or error}); check the path, its "
            "permissions and the free space"
        ) from error


@contextmanager
def _draft_folder(final: Path) -> Iterator[Path]:
    draft = _beside(final, "tmp")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir()
    try:
        yield draft
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _beside(path: Path, kind: str) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.{kind}")


def _set_aside(path: Path) -> Path:
    aside = _beside(path, "old")
    shutil.rmtree(aside, ignore_errors=True)
    path.rename(aside)
    _flush(path.parent)
    return aside


def _fsync_unless_draft(place: Path, home: Path) -> None:
    """Flush a place, unless its home is in a draft, all of which is flushed in the end."""
    if not any(map(_DRAFT.fullmatch, home.parts)):
        _flush(place)


def _flush(path: Path) -> None:
    """Wait until a file's content, or the names in a folder, are on the disk."""
    if path.is_dir():
        if os.name == "nt":  # has no such call for folders
            return
        number = os.open(path, os.O_RDONLY)
    else:
        number = os.open(path, os.O_RDWR)
    try:
        os.fsync(number)
    finally:
        os.close(number)
