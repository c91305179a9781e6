"""What a path of rows means: a file, a folder of files, or a data set that dataset_info.json lists.

That list is LLaMA-Factory's: it says where the rows are and how their columns and turns are named.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from glmtune.data.containers import read_batches
from glmtune.data.files import open_bytes, read_json_object, sha256_of
from glmtune.data.listed import DEFAULT_SPLIT, LIST_NAME, Entry, note_once, read_entry
from glmtune.data.windows import Batch
from glmtune.errors import UserError

_NAMED = re.compile(rf"(.*{re.escape(LIST_NAME)})#(.+)", re.DOTALL)
_STATE, _SPLITS = "state.json", "dataset_dict.json"


@dataclass(frozen=True, slots=True)
class Source:
    """Files of rows, and how their rows are to be read."""

    path: str
    files: tuple[str, ...]
    entry: "Entry | None" = None

    @property
    def format(self) -> str | None:
        """The format that its list says, if there is one."""
        return self.entry.format if self.entry else None

    @property
    def digest(self) -> str:
        """A sha256 of all that its rows depend on; of a single file, that of its content."""
        self.check_readable()
        digests = [sha256_of(file) for file in self.files]
        if len(digests) == 1 and self.entry is None:
            return digests[0]
        told = json.dumps([digests, self.entry.as_json() if self.entry else None], sort_keys=True)
        return hashlib.sha256(told.encode()).hexdigest()

    def check_readable(self) -> None:
        """Raise UserError where a file cannot be opened."""
        for file in self.files:
            with open_bytes(file):
                pass

    def batches(self, encoding: str | None = None) -> Iterator[tuple[str, Batch]]:
        """Yield the batches of all files, each with its file.

        Raises:
            UserError: see `containers.read_batches`; or the list names a column that is not there.
        """
        if self.entry is None:
            for file in self.files:
                for batch in read_batches(file, encoding):
                    yield file, batch
            return
        names = self.entry.start(self.path)
        for file in self.files:
            for batch in read_batches(file, encoding):
                names.rename(file, batch)
                yield file, batch
                if names.is_full:
                    return
        names.check_used()


def find_source(path: str) -> Source:
    """What a path means.

    Raises:
        UserError: it is a list of data sets and names none of them, or one that is not there or
            whose rows are not in files beside it; it is a folder without files; or what stands
            behind a file's name is no number of rows.
    """
    if named := None if os.path.exists(path) else _NAMED.fullmatch(path):
        return _listed(path, named[1], named[2])
    if Path(path).name == LIST_NAME and (names := _lists(path)):
        raise UserError(
            f"{path}: lists the data sets {', '.join(names)}; name one of them as {path}#{names[0]}"
        )
    file, mark, num = path.rpartition("#")
    if mark and not num.isdecimal() and os.path.isfile(file) and not os.path.exists(path):
        raise UserError(
            f"{path}: {num or 'nothing'} behind # is no number of rows; tokenize takes 500 of them "
            f"as {file}#500"
        )
    return Source(path, _files_of(path))


def _listed(path: str, list_path: str, name: str) -> Source:
    entries = read_json_object(list_path)
    if name not in entries:
        raise UserError(
            f"{list_path}: lists no data set {name}, only {', '.join(entries)}; name one of these "
            f"as {list_path}#NAME"
        )
    where = f"{list_path}: {name}"
    entry = read_entry(where, entries[name])
    place = str(Path(list_path).parent / entry.file_name)
    files = _files_of(place, entry.split)
    if entry.split != DEFAULT_SPLIT and files == (place,):
        raise UserError(
            f"{where}: split is {entry.split}, and {place} is a single file; leave split out"
        )
    return Source(path, files, entry)


def _lists(path: str) -> list[str]:
    """The names of the data sets that a file lists; none where it is no such list."""
    try:
        content = json.loads(Path(path).read_bytes())
    except (OSError, ValueError, RecursionError):
        return []
    is_list = isinstance(content, dict) and all(isinstance(v, dict) for v in content.values())
    return list(content) if is_list else []


def _files_of(path: str, split: str | None = None) -> tuple[str, ...]:
    """A file, or the files in a folder in the order of their names.

    Of a folder that datasets wrote, those that it lists.
    """
    folder = Path(path)
    if not folder.is_dir():
        return (path,)
    if (folder / _SPLITS).is_file():
        splits = read_json_object(folder / _SPLITS).get("splits")
        names = [str(name) for name in splits] if isinstance(splits, list) else []
        if split in names:
            return _files_of(str(folder / str(split)))
        raise UserError(
            f"{path}: holds the splits {', '.join(names)}; name one of them as "
            f"{folder / (names or ['train'])[0]}"
        )
    if (folder / _STATE).is_file():
        content = read_json_object(folder / _STATE).get("_data_files")
        entries = content if isinstance(content, list) else []
        listed = [entry.get("filename") for entry in entries if isinstance(entry, dict)]
        files = [folder / name for name in listed if isinstance(name, str) and name]
    else:
        entries = sorted(entry for entry in folder.iterdir() if entry.name[0] != ".")
        files = [entry for entry in entries if entry.is_file()]
        if inner := [entry.name for entry in entries if entry.is_dir()]:
            note_once(f"{path}: folders inside it are not read: {', '.join(inner)}")
    if not files:
        raise UserError(f"{path}: a folder without a file of rows; pass the file itself")
    return tuple(map(str, files))
