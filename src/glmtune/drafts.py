"""Write files and folders that get their name only once they are whole and on the disk.

Each is written under a hidden name beside the final one, flushed, and renamed. Whenever the process
is killed, the name leads either to the old content or to the new; at most a draft is left behind,
which `clear_drafts` recognises by its name.
"""

import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from glmtune.errors import UserError
from glmtune.locks import held_alone

_DRAFT = re.compile(r"\.([^/\\]+)\.\d+\.(?:tmp|old)")
_SEVERAL = "files"


@contextmanager
def replacing_file(path: str | Path) -> Iterator[Path]:
    """Yield a path to write a file to, which replaces `path` once the block ends without error.

    A block that writes nothing changes nothing. A symbolic link is kept: its target is replaced.
    Raises OSError.
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
    """Yield an empty folder, whose files replace those of `folder` after a block without error.

    They are replaced one after the other. Raises OSError.
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
    """Yield an empty folder to fill, which replaces `path` once the block ends without error.

    For an instant between the removal of an earlier folder and the renaming there is neither.
    Raises OSError; the earlier folder then stays.
    """
    final = Path(os.path.realpath(path))
    with _draft_folder(final) as draft:
        yield draft
        _put_in_place(draft, final)


@contextmanager
def continued_folder(
    path: str | Path, stays: Callable[[Path, BaseException], bool]
) -> Iterator[Path]:
    """Yield a folder as `replacing_folder` does, and after a killed process what it had written.

    After an error it is removed unless it `stays`. Raises OSError, and UserError while another
    process fills it.
    """
    final = Path(os.path.realpath(path))
    draft = _beside(final, "tmp", process=0)  # no process has this number
    draft.mkdir(exist_ok=True)
    with _locked(draft, path):
        try:
            yield draft
            _put_in_place(draft, final)
        except BaseException as error:
            if not stays(draft, error):
                shutil.rmtree(draft, ignore_errors=True)
            raise


def remove_folder(path: Path) -> None:
    """Delete a folder; no partial folder is ever visible under its name. Raises OSError."""
    shutil.rmtree(_set_aside(path))


def clear_drafts(folder: Path, is_ours: Callable[[str], object]) -> None:
    """Delete the drafts of our names that a killed process left in a folder.

    Raises OSError.
    """
    for entry in folder.iterdir():
        draft = _DRAFT.fullmatch(entry.name)
        if draft and (draft[1] == _SEVERAL or is_ours(draft[1])):
            is_folder = entry.is_dir() and not entry.is_symlink()
            shutil.rmtree(entry) if is_folder else entry.unlink()


@contextmanager
def write_errors(path: str | Path) -> Iterator[None]:
    """Turn an error of writing a path into a UserError, which does not name the draft."""
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


@contextmanager
def _locked(folder: Path, path: str | Path) -> Iterator[None]:
    """Keep other processes out of a folder, where the system can; a killed one keeps none out."""
    with held_alone(folder) as is_ours:
        if not is_ours:
            raise UserError(
                f"{path}: another process is writing it; wait until it ends, or name another path"
            )
        yield


def _put_in_place(draft: Path, final: Path) -> None:
    """Flush a folder and give it its name, in place of an earlier one."""
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


def _beside(path: Path, kind: str, process: int | None = None) -> Path:
    number = os.getpid() if process is None else process
    return path.with_name(f".{path.name}.{number}.{kind}")


def _set_aside(path: Path) -> Path:
    aside = _beside(path, "old")
    shutil.rmtree(aside, ignore_errors=True)
    path.rename(aside)
    _flush(path.parent)
    return aside


def _fsync_unless_draft(place: Path, home: Path) -> None:
    """Flush a path, unless it is inside a draft, which is flushed as a whole in the end."""
    if not any(map(_DRAFT.fullmatch, home.parts)):
        _flush(place)


def _flush(path: Path) -> None:
    """Wait until a file's content, or the names in a folder, are on the disk."""
    if path.is_dir():
        if os.name == "nt":  # Windows cannot flush folders
            return
        number = os.open(path, os.O_RDONLY)
    else:
        number = os.open(path, os.O_RDWR)
    try:
        os.fsync(number)
    finally:
        os.close(number)
