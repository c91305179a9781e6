"""Read rows of a JSON list or of JSON lines, each with its file, row and line, and check them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby, islice
from typing import ClassVar, Literal, TypeVar

from glmtune.data.conversations import ASSISTANT, SYSTEM, USER, Example, Turn
from glmtune.data.fields import (
    ALPACA,
    CONVERSATIONS,
    HISTORY,
    ROW_FIELDS,
    Names,
    history_of,
    is_empty,
    is_record,
    is_row,
    names_of,
    text_of,
    unused_fields,
)
from glmtune.data.flaws import Flaw, kind_of, show
from glmtune.data.formats import FORMATS, read_example, recognise
from glmtune.data.jsonfile import read_batches
from glmtune.data.templates import question_of
from glmtune.errors import UserError

OnBadRow = Literal["fail", "skip"]
RECORDS, CONTEXT_TARGET = "alpaca", "context/target"


class _Placed:
    """Where a row stands in a file: its number, and the line on which it starts, both from 1."""

    __slots__ = ()
    path: str
    row: int
    line: int

    @property
    def where(self) -> str:
        """The place as a reader of messages needs it: "data.json:12 (row 3)"."""
        return f"{self.path}:{self.line} (row {self.row})"


@dataclass(frozen=True, slots=True)
class Record(_Placed):
    """One alpaca record.

    `history` holds the earlier rounds, question and answer each. `names` holds the names of its
    fields in the file, and `unused` the names of fields that nothing reads.
    """

    instruction: str
    input: str
    output: str
    path: str
    row: int
    line: int
    unused: tuple[str, ...] = ()
    history: tuple[tuple[str, str], ...] = ()
    names: Names = ALPACA
    system: str = ""

    @property
    def example(self) -> Example:
        """The record as a conversation; its input follows the instruction on a line of its own."""
        system = [Turn(SYSTEM, self.system)] if self.system.strip() else []
        rounds = [*self.history, (question_of(self.instruction, self.input), self.output)]
        turns = [t for q, a in rounds for t in (Turn(USER, q), Turn(ASSISTANT, a))]
        return Example((*system, *turns))


@dataclass(frozen=True, slots=True)
class Row(_Placed):
    """One question as the model will see it, and the answer to train on."""

    history: ClassVar[tuple[tuple[str, str], ...]] = ()
    names: ClassVar[Names] = ALPACA
    context: str
    target: str
    path: str
    row: int
    line: int
    unused: tuple[str, ...] = ()

    @property
    def num_characters(self) -> int:
        """Characters of its texts."""
        return len(self.context) + len(self.target)


@dataclass(frozen=True, slots=True)
class Conversation(_Placed):
    """A conversation as a row has it."""

    history: ClassVar[tuple[tuple[str, str], ...]] = ()
    names: ClassVar[Names] = ALPACA
    example: Example
    path: str
    row: int
    line: int
    unused: tuple[str, ...] = ()

    @property
    def num_characters(self) -> int:
        """Characters of its texts."""
        return sum(len(turn.text) for turn in self.example.turns)


@dataclass(frozen=True, slots=True)
class BadRow(_Placed):
    """A row that cannot be used, and why."""

    path: str
    row: int
    line: int
    reason: str


Placed = TypeVar("Placed", bound=_Placed)


def read_alpaca(
    path: str,
    on_bad_row: OnBadRow = "fail",
    encoding: str | None = None,
    needs_output: bool = True,
) -> tuple[list[Record], list[BadRow]]:
    """Read alpaca records: `instruction` and `output`, and `input` and `history` if present.

    Question and answer may have other names (see fields.names_of), and no unused field may hold
    what users expect to be trained on (see fields.unused_fields). The file is a JSON list or JSON
    lines; the content decides which. A bad row raises UserError, or with on_bad_row="skip" is
    returned in the second list. UserError is also raised when the file as a whole cannot be read
    (see jsonfile.read_batches), is a list but not valid JSON, or has no usable row.

    Questions that are only to be answered need no output: a missing one is read as empty.
    """
    return _read(path, on_bad_row, encoding, partial(alpaca_record, needs_output=needs_output))


def read_rows(
    path: str, on_bad_row: OnBadRow = "fail", encoding: str | None = None
) -> tuple[list[Row], list[BadRow]]:
    """Read rows of `context` and `target`, which `convert` writes; errors as in read_alpaca."""
    return _read(path, on_bad_row, encoding, context_and_target)


def format_of(fields: Mapping[str, object]) -> str:
    """The name of a row's format, by its fields; of records where nothing else fits."""
    if is_row(fields):
        return CONTEXT_TARGET
    found = None if is_record(fields) else recognise(fields)
    return found.name if found else RECORDS


def read_row(
    format: str, fields: dict, path: str, row: int, line: int
) -> Record | Row | Conversation:
    """Read a row in the format of a name; raises Flaw where its fields make none."""
    if format == CONTEXT_TARGET:
        return context_and_target(fields, path, row, line)
    if format == RECORDS:
        return alpaca_record(fields, path, row, line, reads_system=True)
    example, unused = read_example(FORMATS[format], fields)
    return Conversation(example, path, row, line, unused)


def name_rows(rows: Sequence[int], limit: int | None = 20) -> str:
    """Format ascending row numbers for a message: "rows 3, 7-9 and 40 more"."""
    # Consecutive numbers share the difference between a number and its index in the list.
    runs = groupby(enumerate(rows), lambda pair: pair[1] - pair[0])
    shown = [[row for _, row in run] for _, run in islice(runs, limit)]
    text = ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in shown)
    num_left = len(rows) - sum(map(len, shown))
    more = f" and {num_left:,} more" if num_left else ""
    return f"{'row' if len(rows) == 1 else 'rows'} {text}{more}"


def list_bad_rows(bad_rows: list[BadRow], limit: int = 20) -> list[str]:
    """Write a line for each bad row, and one that names the rows beyond the limit."""
    lines = [f"{bad.where}: {bad.reason}" for bad in bad_rows[:limit]]
    if others := [bad.row for bad in bad_rows[limit:]]:
        lines.append(f"and {len(others):,} more: {name_rows(others, limit=None)}")
    return lines


def _read(
    path: str,
    on_bad_row: OnBadRow,
    encoding: str | None,
    check: Callable[[dict, str, int, int], Placed],
) -> tuple[list[Placed], list[BadRow]]:
    good: list[Placed] = []
    bad: list[BadRow] = []
    for row in each_row(path, encoding, check):
        bad.append(row) if isinstance(row, BadRow) else good.append(row)
    check_usable(path, on_bad_row, bool(good), bad)
    return good, bad


def each_row(
    path: str, encoding: str | None, check: Callable[[dict, str, int, int], Placed]
) -> Iterator[Placed | BadRow]:
    """Yield each row of a file as `check` returns it, or what is wrong with it.

    Args:
        path: the file.
        encoding: its encoding, where that is not UTF-8.
        check: takes a row's fields, path, number and line; raises Flaw.

    Raises:
        UserError: the file as a whole cannot be read, or is a list but not valid JSON.
    """
    row = 0
    for batch in read_batches(path, encoding):
        for line, value in zip(batch.lines, batch.values, strict=True):
            row += 1
            try:
                good = check(fields_of(value), path, row, line)
            except Flaw as flaw:
                _refuse_broken_list(path, line, flaw)
                yield BadRow(path, row, line, str(flaw))
            else:
                yield good
        for line, fault in batch.between:
            _refuse_broken_list(path, line, fault)


def check_usable(path: str, on_bad_row: OnBadRow, has_good: bool, bad: Sequence[BadRow]) -> None:
    """Raise UserError where a file's rows are not to be used, as bad ones are among them."""
    if bad and (on_bad_row == "fail" or not has_good):
        first, others = bad[0], [flawed.row for flawed in bad[1:]]
        more = f" (bad as well: {name_rows(others, limit=5)})" if others else ""
        skip = f", or leave bad rows out with --on_bad_row skip{more}"
        fix = skip if has_good else " (no row is good)"
        raise UserError(f"{first.where}: {first.reason}{fix}")
    if not has_good:
        raise UserError(f"{path}: holds no row; check that this is the right file")


def _refuse_broken_list(path: str, line: int, flaw: Flaw) -> None:
    if flaw.breaks_list:
        raise UserError(f"{path}:{line}: {flaw}") from flaw


def fields_of(value: object) -> dict:
    """Return a row's fields; raise Flaw where the row is a Flaw or not an object."""
    if isinstance(value, Flaw):
        raise value
    if not isinstance(value, dict):
        what = f"{show(value)} ({kind_of(value)}) is not a record"
        raise Flaw("not a record", what, "remove it")
    return value


def alpaca_record(
    fields: dict,
    path: str,
    row: int,
    line: int,
    needs_output: bool = True,
    reads_system: bool = False,
) -> Record:
    """Return the record that a row's fields make; raise Flaw where they make none.

    Only with `reads_system` may they have a system text.
    """
    if is_row(fields):
        raise Flaw(
            "other format",
            "a context/target row as convert writes them, not an alpaca record",
            "pass the alpaca file here, or this file to `glmtune tokenize`",
        )
    names = names_of(fields)
    turns = next(filter(fields.get, CONVERSATIONS), None)
    if turns and not is_record(fields):
        raise Flaw(
            "conversation",
            f'a conversation in "{turns}", not a record',
            "pass the file to `glmtune tokenize`, or write each of its answers as a record "
            '{"instruction": question, "output": answer, '
            '"history": [["earlier question", "its answer"], ...]}',
            turns,
        )
    instruction, input, output = names
    system = ""
    if reads_system and not is_empty(fields.get(SYSTEM)):
        system = text_of(fields, SYSTEM)
    used = (instruction, input or "", HISTORY, *([SYSTEM] if system else []), output)
    has_output = needs_output or fields.get(output) is not None
    return Record(
        instruction=text_of(fields, instruction),
        input=text_of(fields, input) if input and fields.get(input) is not None else "",
        output=text_of(fields, output) if has_output else "",
        path=path,
        row=row,
        line=line,
        unused=unused_fields(fields, used),
        history=history_of(fields),
        names=names,
        system=system,
    )


def context_and_target(fields: dict, path: str, row: int, line: int) -> Row:
    """Return the row of context and target that the fields make; raise Flaw if they make none."""
    if is_record(fields) and not is_row(fields):
        raise Flaw(
            "other format",
            "an alpaca record, not a context/target row",
            "run `glmtune convert` first and pass the file that it writes",
        )
    return Row(
        context=text_of(fields, "context"),
        target=text_of(fields, "target"),
        path=path,
        row=row,
        line=line,
        unused=unused_fields(fields, ROW_FIELDS),
    )
