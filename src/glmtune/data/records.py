"""Read rows of a JSON list or of JSON lines, each with its file, row and line, and check them."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby, islice
from typing import ClassVar, Literal, TypeVar

from glmtune.data.conversations import ASSISTANT, SYSTEM, USER, Example, PlainText, Turn
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
    is_text,
    names_of,
    text_of,
    unused_fields,
)
from glmtune.data.flaws import Flaw, kind_of, show
from glmtune.data.formats import FORMATS, read_example, recognise
from glmtune.data.sources import find_source
from glmtune.data.templates import context_of, question_of
from glmtune.data.thoughts import check_answer
from glmtune.data.windows import Batch
from glmtune.errors import UserError

OnBadRow = Literal["fail", "skip"]
RECORDS, CONTEXT_TARGET, TEXT = "alpaca", "context/target", "text"


def place_of(path: str, line: int, row: int) -> str:
    """Where a row stands, for messages; line 0 is that of files without lines."""
    return f"{path}:{line} (row {row})" if line else f"{path} (row {row})"


class _Placed:
    """Where a row stands in a file: its number, and the line on which it starts, both from 1.

    The line is 0 in files without lines."""

    __slots__ = ()
    path: str
    row: int
    line: int

    @property
    def where(self) -> str:
        """The place as a reader of messages needs it: "data.json:12 (row 3)"."""
        return place_of(self.path, self.line, self.row)


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
    def num_characters(self) -> int:
        """Characters of its texts."""
        earlier = sum(len(text) for pair in self.history for text in pair)
        return earlier + sum(map(len, (self.system, self.instruction, self.input, self.output)))

    @property
    def example(self) -> Example:
        """The record as a conversation; its input follows the instruction on a line of its own."""
        system = [Turn(SYSTEM, self.system)] if self.system.strip() else []
        rounds = [*self.history, (question_of(self.instruction, self.input), self.output)]
        turns = [t for q, a in rounds for t in (Turn(USER, q), Turn(ASSISTANT, a))]
        return Example((*system, *turns))


class _NoRecord(_Placed):
    """A row that has no earlier rounds beside its text, and no fields of other names."""

    __slots__ = ()
    history: ClassVar[tuple[tuple[str, str], ...]] = ()
    names: ClassVar[Names] = ALPACA


@dataclass(frozen=True, slots=True)
class Row(_NoRecord):
    """One question as the model will see it, and the answer to train on."""

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
class Conversation(_NoRecord):
    """A conversation as a row has it."""

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
class TextRow(_NoRecord):
    """A text alone."""

    text: PlainText
    path: str
    row: int
    line: int
    unused: tuple[str, ...] = ()

    @property
    def num_characters(self) -> int:
        """Characters of its text."""
        return len(self.text.text)


AnyRow = Record | Row | Conversation | TextRow


@dataclass(frozen=True, slots=True)
class BadRow(_Placed):
    """A row that cannot be used, and why."""

    path: str
    row: int
    line: int
    reason: str


Placed = TypeVar("Placed", bound=_Placed)


def read_typed(
    path: str,
    format: str | None = None,
    on_bad_row: OnBadRow = "fail",
    encoding: str | None = None,
    needs_answer: bool = True,
) -> tuple[list[AnyRow], list[BadRow]]:
    """Read rows of any format, each in its own form; errors as in read_alpaca.

    Args:
        path: the file, or what else sources.find_source knows.
        format: its name, of `FORMATS` or beside them; None for that of the first row.
        on_bad_row: as in read_alpaca.
        encoding: as in read_alpaca.
        needs_answer: whether a row has to have one.
    """
    reader = _AnyReader(format_in_effect(path, format), needs_answer)
    return _read(path, on_bad_row, encoding, reader.read)


def format_in_effect(path: str, format: str | None) -> str | None:
    """The format of a file's rows, where a setting or a list of data sets says it.

    Raises:
        UserError: both do, and differ.
    """
    listed = find_source(path).format
    if format and listed and format != listed:
        raise UserError(f"{path}: is listed as {listed}, and format is {format}; leave format out")
    return format or listed


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
    (see sources.find_source), is a list but not valid JSON, or has no usable row.

    Questions that are only to be answered need no output: a missing one is read as empty.
    """
    return _read(path, on_bad_row, encoding, partial(alpaca_record, needs_output=needs_output))


def read_rows(
    path: str, on_bad_row: OnBadRow = "fail", encoding: str | None = None
) -> tuple[list[Row], list[BadRow]]:
    """Read rows of `context` and `target`, which `convert` writes; errors as in read_alpaca."""
    return _read(path, on_bad_row, encoding, context_and_target)


def has_turns(rows: Iterable[AnyRow]) -> bool:
    """Whether rows of one file are conversations, each of them.

    Records are, if one has a system text or earlier rounds.
    """
    return any(
        isinstance(row, Conversation) or (isinstance(row, Record) and (row.history or row.system))
        for row in rows
    )


def as_context(row: AnyRow) -> Row:
    """A record as the context and target that `convert` writes; such a row as it is."""
    if isinstance(row, Row):
        return row
    assert isinstance(row, Record), "rows of one file are of one format"
    context = context_of(row.instruction, row.input)
    return Row(context, row.output, row.path, row.row, row.line, row.unused)


def as_conversation(row: AnyRow) -> Conversation:
    """A record as a conversation; a conversation as it is."""
    if isinstance(row, Conversation):
        return row
    assert isinstance(row, Record), "rows of one file are of one format"
    return Conversation(row.example, row.path, row.row, row.line, row.unused)


class _AnyReader:
    """Reads rows in one format, which the first row decides unless it is named."""

    def __init__(self, format: str | None, needs_answer: bool = True) -> None:
        self.format = format
        self.needs_answer = needs_answer

    def read(self, fields: dict, path: str, row: int, line: int) -> AnyRow:
        """Return the row that fields make; raise Flaw where they make none."""
        self.format = self.format or format_of(fields)
        return read_row(self.format, fields, path, row, line, self.needs_answer)


def format_of(fields: Mapping[str, object]) -> str:
    """The name of a row's format, by its fields; of records where nothing else fits."""
    if is_row(fields):
        return CONTEXT_TARGET
    found = None if is_record(fields) else recognise(fields)
    return found.name if found else TEXT if is_text(fields) else RECORDS


def read_row(
    format: str, fields: dict, path: str, row: int, line: int, needs_answer: bool = True
) -> AnyRow:
    """Read a row in the format of a name; raises Flaw where its fields make none."""
    if format == CONTEXT_TARGET:
        return context_and_target(fields, path, row, line, needs_answer)
    if format == RECORDS:
        return alpaca_record(fields, path, row, line, needs_answer, reads_system=True)
    if format == TEXT:
        text = PlainText(text_of(fields, TEXT))
        return TextRow(text, path, row, line, unused_fields(fields, (TEXT,)))
    example, unused = read_example(FORMATS[format], fields, needs_answer)
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
        path: the file, or what else sources.find_source knows.
        encoding: its encoding, where that is not UTF-8.
        check: takes a row's fields, file, number and line; raises Flaw.

    Raises:
        UserError: the file as a whole cannot be read, or is a list but not valid JSON.
    """
    yield from rows_in(find_source(path).batches(encoding), check)


def rows_in(
    batches: Iterable[tuple[str, Batch]],
    check: Callable[[dict, str, int, int], Placed],
    row: int = 0,
) -> Iterator[Placed | BadRow]:
    """Yield each row of batches; see `each_row`.

    Args:
        batches: each with its file.
        check: see `each_row`.
        row: the number of the row before the first.
    """
    for file, batch in batches:
        for line, value in zip(batch.lines, batch.values, strict=True):
            row += 1
            try:
                good = check(fields_of(value), file, row, line)
            except Flaw as flaw:
                _refuse_broken_list(file, line, flaw)
                _refuse_missing_column(file, batch.columns, flaw)
                yield BadRow(file, row, line, str(flaw))
            else:
                yield good
        for _, line, fault in batch.between:
            _refuse_broken_list(file, line, fault)


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


def _refuse_missing_column(path: str, columns: Sequence[str] | None, flaw: Flaw) -> None:
    """Raise UserError where no row of a table can have a field, since that has no such column."""
    if columns is not None and flaw.is_missing and flaw.field not in columns:
        raise UserError(
            f'{path}: no column is named "{flaw.field}", the table has {show(list(columns))}; '
            f"{flaw.fix}"
        ) from flaw


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
            "keep rows of one kind in a file",
        )
    names = names_of(fields)
    turns = next(filter(fields.get, CONVERSATIONS), None)
    if turns and not is_record(fields):
        raise Flaw(
            "conversation",
            f'a conversation in "{turns}", not a record',
            "keep rows of one kind in a file, or write it as a record "
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
    question = text_of(fields, instruction)
    more = text_of(fields, input) if input and fields.get(input) is not None else ""
    answer, history = text_of(fields, output) if has_output else "", history_of(fields)
    for where, text in [(HISTORY, earlier) for _, earlier in history] + [(output, answer)]:
        check_answer(f'an answer in field "{where}"', text)
    return Record(
        instruction=question,
        input=more,
        output=answer,
        path=path,
        row=row,
        line=line,
        unused=unused_fields(fields, used),
        history=history,
        names=names,
        system=system,
    )


def context_and_target(
    fields: dict, path: str, row: int, line: int, needs_target: bool = True
) -> Row:
    """Return the row of context and target that the fields make; raise Flaw if they make none."""
    if is_record(fields) and not is_row(fields):
        raise Flaw(
            "other format",
            "an alpaca record, not a context/target row",
            "keep rows of one kind in a file; `glmtune convert` writes records as such rows",
        )
    context = text_of(fields, "context")
    target = text_of(fields, "target") if needs_target or "target" in fields else ""
    check_answer('field "target"', target)
    return Row(
        context=context,
        target=target,
        path=path,
        row=row,
        line=line,
        unused=unused_fields(fields, ROW_FIELDS),
    )
