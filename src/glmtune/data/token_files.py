"""Write token rows file by file while they are encoded, so that a killed run can be continued.

A journal beside the files says what they were made from and, once a file is whole and on the disk,
what became of its rows. What the journal does not name does not count.
"""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from glmtune.data.encoded_rows import EncodedRows, RowCounts
from glmtune.errors import UserError, reason_of

TOKENS_PER_FILE = 1 << 24
"""Token ids from which on a file is closed: 64 MiB of them, as many of labels."""
JOURNAL_FILE = "journal.jsonl"


class CannotResume(UserError):
    """What is there cannot be resumed."""


def stays(folder: Path, error: BaseException) -> bool:
    """Whether an error leaves in a folder what can be resumed."""
    return isinstance(error, KeyboardInterrupt | CannotResume) and has_whole_file(folder)


def has_whole_file(folder: Path) -> bool:
    """Whether a folder holds a file to resume."""
    try:
        return (folder / JOURNAL_FILE).read_bytes().count(b"\n") > 1
    except OSError:
        return False


class TokenFiles:
    """The files of a data set that is being written; `of_sets` is what became of all rows so far.

    Its rows are those of one source, or of several, one after the other.
    """

    def __init__(
        self,
        folder: Path,
        path: str,
        made_from: Mapping[str, Any],
        resume: bool = False,
        num_sets: int = 1,
    ) -> None:
        """Begin in a folder, or go on where its journal ends.

        Args:
            folder: is there; what it holds is removed unless it is resumed.
            path: what messages call it.
            made_from: what has to be the same when it is resumed, as plain data.
            resume: whether to go on.
            num_sets: how many sources it has.

        Raises:
            CannotResume: it was made from something else, or is damaged.
            OSError: it cannot be written.
        """
        self.folder = folder
        self.of_sets = [RowCounts() for _ in range(num_sets)]
        """What became of the rows of each source; all of them after `flush`."""
        self._set = 0
        self._pending = EncodedRows()
        self._digests: list[str] = []
        self._schema: Any = None
        if not (resume and self._read_journal(path, made_from)):
            for entry in folder.iterdir():
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
            self._note(dict(made_from))

    @property
    def num_written(self) -> int:
        """Rows of all sources whose fate is known."""
        return sum(counts.num_rows for counts in self.of_sets)

    def begin(self, number: int) -> int:
        """Begin with a source, and return how many of its rows have been written before."""
        self.flush()
        self._set = number
        return self.of_sets[number].num_rows

    def add(self, rows: EncodedRows) -> None:
        """Write the rows that follow, sooner or later."""
        self._pending.extend(rows)
        if len(self._pending.input_ids) >= TOKENS_PER_FILE:
            self._write()

    def flush(self) -> None:
        """Write what is waiting; afterwards `of_sets` covers all rows."""
        if self._pending.seq_len:
            self._write()
        self.of_sets[self._set].add(self._pending)
        self._pending = EncodedRows()

    def close(self) -> None:
        """Make the files a data set; at least one row has been kept."""
        from glmtune.data.arrow_files import file_name, write_lists

        count = len(self._digests)
        names = [file_name(number, count) for number in range(count)]
        for number, name in enumerate(names):
            os.replace(self._file(number), self.folder / name)
        write_lists(self._schema, self.folder, names, self._digests)
        (self.folder / JOURNAL_FILE).unlink()

    def _file(self, number: int) -> Path:
        return self.folder / f"data-{number:05}.arrow"

    def _write(self) -> None:
        """Write a file; only when it is on the disk, the journal names it."""
        from glmtune.data.arrow_files import write_file

        table = _table_of(self._pending)
        file, self._schema = self._file(len(self._digests)), table.schema
        self._digests.append(write_file(table, file))
        with file.open("rb") as written:
            os.fsync(written.fileno())
        counts = self._pending.as_json()
        self._note({"sha256": self._digests[-1], "set": self._set, "counts": counts})
        self.of_sets[self._set].add(self._pending)
        self._pending = EncodedRows()

    def _note(self, entry: dict[str, Any]) -> None:
        with (self.folder / JOURNAL_FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _read_journal(self, path: str, made_from: Mapping[str, Any]) -> bool:
        """Take up what is whole; return whether that is a file at least."""
        if not has_whole_file(self.folder):
            return False
        journal = self.folder / JOURNAL_FILE
        text = journal.read_bytes()
        whole = text[: text.rfind(b"\n") + 1]
        first, *entries = map(json.loads, whole.splitlines())
        _check_same(path, first, made_from)
        try:
            for number, entry in enumerate(entries):
                # A run that was killed while it closed may have renamed it.
                (file,) = self.folder.glob(f"data-{number:05}*.arrow")
                os.replace(file, self._file(number))
                self._digests.append(entry["sha256"])
                self.of_sets[entry["set"]].add(RowCounts.of_json(entry["counts"]))
            self._schema = _schema_of(self._file(0))
        except (LookupError, TypeError, ValueError) as error:
            raise CannotResume(
                f"{path}: cannot be resumed, what was written of it is damaged "
                f"({reason_of(error)}); leave resume out to start over"
            ) from error
        known = {journal, *map(self._file, range(len(entries)))}
        for unfinished in set(self.folder.iterdir()) - known:
            unfinished.unlink()
        if len(whole) < len(text):  # it was killed while it wrote the last line
            os.truncate(journal, len(whole))
        return True


def _check_same(path: str, former: Mapping[str, Any], made_from: Mapping[str, Any]) -> None:
    for name in {**former, **made_from}:
        earlier, now = former.get(name), made_from.get(name)
        if earlier != now:
            raise CannotResume(
                f"{path}: cannot be resumed, since {name} was {json.dumps(earlier)} and is "
                f"{json.dumps(now)} now; make it the same again, or leave resume out to start over"
            )


def _table_of(rows: EncodedRows) -> Any:
    import pyarrow as pa

    from glmtune.data.arrow_files import as_column

    offsets = as_column(rows.starts.astype(np.int32))
    columns = {
        "input_ids": pa.ListArray.from_arrays(offsets, as_column(rows.input_ids)),
        "seq_len": as_column(rows.seq_len),
    }
    if rows.labels is not None:
        columns["labels"] = pa.ListArray.from_arrays(offsets, as_column(rows.labels))
    return pa.table(columns)


def _schema_of(file: Path) -> Any:
    import pyarrow as pa

    with pa.ipc.open_stream(file) as stream:
        return stream.schema
