"""Read rows of a JSON list or of JSON lines, each with its file, row and line, and check them."""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Literal, TypeVar

from glmtune.data.files import read_text
from glmtune.errors import UserError

OnBadRow = Literal["fail", "skip"]
_ALPACA_FIELDS = ("instruction", "input", "output")


class _Placed:
    """A piece of a file: `row` counts rows from 1, `line` is where the row starts, from 1."""

    __slots__ = ()
    path: str
    row: int
    line: int

    @property
    def where(self) -> str:
        """The place for a person to look at: "data.json:12 (row 3)"."""
        return f"{self.path}:{self.line} (row {self.row})"


@dataclass(frozen=True, slots=True)
class Record(_Placed):
    """One alpaca record; `unused` names the fields beside the three that nothing reads."""

    instruction: str
    input: str
    output: str
    path: str
    row: int
    line: int
    unused: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Row(_Placed):
    """One question as the model will see it, and the answer it shall learn."""

    context: str
    target: str
    path: str
    row: int
    line: int


@dataclass(frozen=True, slots=True)
class BadRow(_Placed):
    """A row that cannot be used, and why."""

    path: str
    row: int
    line: int
    reason: str


Placed = TypeVar("Placed", Record, Row)


def read_alpaca(path: str, on_bad_row: OnBadRow = "fail") -> tuple[list[Record], list[BadRow]]:
    """Read alpaca records: `instruction` and `output`, and `input` where there is one.

    The file is a JSON list or JSON lines, told apart by what it holds. A bad row raises UserError,
    or with on_bad_row="skip" comes back in the second list. UserError also when the file as a whole
    cannot be read (see files.read_text), is no JSON or no list, or has no usable row.
    """

    def record(fields: dict, row: int, line: int) -> Record:
        if "context" in fields and "target" in fields and "instruction" not in fields:
            raise _Flaw(
                "a context/target row as convert writes them, not an alpaca record; "
                "pass the alpaca file here, or this file to `glmtune tokenize`"
            )
        return Record(
            instruction=_string(fields, "instruction"),
            input=_string(fields, "input") if "input" in fields else "",
            output=_string(fields, "output"),
            path=path,
            row=row,
            line=line,
            unused=tuple(name for name in fields if name not in _ALPACA_FIELDS),
        )

    return _read(path, on_bad_row, record)


def read_rows(path: str, on_bad_row: OnBadRow = "fail") -> tuple[list[Row], list[BadRow]]:
    """Read rows of `context` and `target` as `convert` writes them; errors as in read_alpaca."""

    def context_and_target(fields: dict, row: int, line: int) -> Row:
        if "instruction" in fields and "context" not in fields:
            raise _Flaw(
                "an alpaca record, not a context/target row; "
                "run `glmtune convert` first and pass the file that it writes"
            )
        return Row(
            context=_string(fields, "context"),
            target=_string(fields, "target"),
            path=path,
            row=row,
            line=line,
        )

    return _read(path, on_bad_row, context_and_target)


def name_rows(rows: list[int], limit: int | None = 20) -> str:
    """Write ascending row numbers for a person: "rows 3, 7-9 and 40 more"."""
    # Neighbours share the difference between the number and its place in the list.
    runs = [
        [row for _, row in run]
        for _, run in groupby(enumerate(rows), lambda pair: pair[1] - pair[0])
    ]
    shown = runs[:limit]
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


class _Flaw(Exception):
    """What is wrong with a row, and the fix; never leaves this module."""


def _read(
    path: str, on_bad_row: OnBadRow, check: Callable[[dict, int, int], Placed]
) -> tuple[list[Placed], list[BadRow]]:
    good: list[Placed] = []
    bad: list[BadRow] = []
    for row, (line, value) in enumerate(_values(path, read_text(path)), start=1):
        try:
            if isinstance(value, _Flaw):
                raise value
            if not isinstance(value, dict):
                raise _Flaw(f"{_show(value)} ({_kind(value)}) is not a record; remove it")
            good.append(check(value, row, line))
        except _Flaw as flaw:
            bad.append(BadRow(path, row, line, str(flaw)))
    if bad and (on_bad_row == "fail" or not good):
        first, others = bad[0], [flawed.row for flawed in bad[1:]]
        more = f" (bad as well: {name_rows(others, limit=5)})" if others else ""
        fix = (
            f", or leave bad rows out with --on_bad_row skip{more}" if good else " (no row is good)"
        )
        raise UserError(f"{first.where}: {first.reason}{fix}")
    if not good:
        raise UserError(f"{path}: holds no row; check that this is the right file")
    return good, bad


def _string(fields: dict, name: str) -> str:
    if name not in fields:
        raise _Flaw(f'field "{name}" is missing, the row has {_show(list(fields))}; add it')
    value = fields[name]
    if not isinstance(value, str):
        raise _Flaw(f'field "{name}" is {_show(value)} ({_kind(value)}), not a string; quote it')
    try:
        value.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(value[error.start]):04x}"
        raise _Flaw(f'field "{name}" holds {half}, half of a character; remove it') from error
    return value


_BLANK = re.compile(r"[ \t\r\n]*")
_decode = json.JSONDecoder().raw_decode


def _values(path: str, text: str) -> Iterator[tuple[int, object]]:
    """Yield the line and the value of each row; a line that is no JSON yields its _Flaw."""
    start = _skip_blank(text, 0)
    if start == len(text):
        raise UserError(f"{path}: the file is empty; check that this is the right file")
    if text[start] == "<":
        raise UserError(f"{path}: a web page, not JSON; download the file itself (its raw form)")
    if text[start] == "[":
        yield from _values_of_list(path, text, start + 1)
        return
    if not path.endswith(".jsonl"):
        _refuse_single_value(path, text, start)
    for line, content in enumerate(text.split("\n"), start=1):
        begin = _skip_blank(content, 0)
        if begin == len(content):
            continue
        try:
            yield line, json.loads(content)
        except (ValueError, RecursionError) as error:
            yield line, _Flaw(f"not JSON ({_syntax(error)}); mend the line")


def _values_of_list(path: str, text: str, at: int) -> Iterator[tuple[int, object]]:
    """Walk a JSON list value by value, from behind its opening bracket, counting lines."""

    def broken(what: str, at: int) -> UserError:
        if at >= len(text.rstrip()):
            what = "the list ends early, the file is cut off; download or copy it again"
        else:
            what = f"not JSON ({what}); mend that place"
        line = text.count("\n", 0, at) + 1
        return UserError(f"{path}:{line}: {what}")

    line, counted = 1, 0
    at = _skip_blank(text, at)
    while not text.startswith("]", at):
        line += text.count("\n", counted, at)
        counted = at
        try:
            value, at = _decode(text, at)
        except (ValueError, RecursionError) as error:
            at = error.pos if isinstance(error, json.JSONDecodeError) else at
            raise broken(_syntax(error), at) from error
        yield line, value
        at = _skip_blank(text, at)
        if text.startswith(",", at):
            at = _skip_blank(text, at + 1)
            if text.startswith("]", at):
                raise broken("a comma stands before the closing ]", at)
        elif not text.startswith("]", at):
            raise broken("a comma or ] is missing between two rows", at)
    after = _skip_blank(text, at + 1)
    if after < len(text):
        raise broken("text follows the closing ]", after)


def _refuse_single_value(path: str, text: str, start: int) -> None:
    """Raise UserError where the whole file is one JSON value other than a list."""
    try:
        value, end = _decode(text, start)
    except (ValueError, RecursionError):
        return
    if _skip_blank(text, end) < len(text):
        return
    what = (
        f"an object with the keys {_show(list(value))}" if isinstance(value, dict) else _kind(value)
    )
    raise UserError(
        f"{path}: JSON, but {what}, not a list; "
        "write the records as [{...}, {...}], or one a line in a .jsonl file"
    )


def _skip_blank(text: str, at: int) -> int:
    match = _BLANK.match(text, at)
    assert match is not None
    return match.end()


def _syntax(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at column {error.colno}"
    return "nested too deeply" if isinstance(error, RecursionError) else "a number too long"


def _show(value: object) -> str:
    """Write a value on one line, short, and printable whatever it holds."""
    text = json.dumps(value, ensure_ascii=False).encode("utf-8", "replace").decode()
    return text if len(text) <= 60 else text[:57] + "..."


def _kind(value: object) -> str:
    kinds = {bool: "a truth value", list: "a list", dict: "an object", str: "a string"}
    return "null" if value is None else kinds.get(type(value), "a number")
