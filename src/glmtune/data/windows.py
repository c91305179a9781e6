"""Read a window of a JSON list or of JSON lines: its whole rows, skipping what is broken.

orjson parses all rows of the window. Where it refuses any, or where a field may occur twice (it
silently keeps the last), the standard json module, which is the reference, reads the window again
row by row and reports what is wrong, and where. So clean files are read fast, and every row has the
value that json gives it.
"""

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, chain, repeat
from typing import Literal

import numpy as np
import orjson

from glmtune.data.flaws import (
    Flaw,
    broken_list,
    cut_off,
    long_number,
    no_json,
    not_utf8,
    show,
    too_long,
)

WINDOW_BYTES = 1 << 16  # fits into a core's cache
MAX_ROW_BYTES = 1 << 25
# The limit of json depends on how much of the stack is left; this one is always lower.
MAX_DEPTH = 256
BLANK = b" \t\r\n"
_FIRST_NAME = re.compile(rb'[ \t\r\n]*\{[ \t\r\n]*("[^"\\]*")')
BETWEEN_ROWS = re.compile(rb"\}([ \t\r\n]*,[ \t\r\n]*)\{")
"""From the end of one object of a list to the start of the next, both included."""

_STRING_OR_BRACKET = re.compile(r'"(?:[^"\\]|\\.)*"|[\[\]{}]', re.DOTALL)
_BLANKS = re.compile(r"[ \t\r\n]*")
# Where another object begins, whether or not the one before it has an end.
_NEXT_ROW = re.compile(r",[ \t\r\n]*(?=\{[ \t\r\n]*[\"}])")
_PERHAPS_NEXT_ROW = re.compile(r",[ \t\r\n]*(?:\{[ \t\r\n]*)?\Z")
_LONGEST_GAP = 4096
_LONGEST_WORD = len("-Infinity")


@dataclass(slots=True)
class Batch:
    """Consecutive rows: `lines[i]` is the line, from 1, on which `values[i]` starts.

    A value is what json makes of the row, or a Flaw instead. `between` has what is wrong outside of
    rows: how many of them stand before it, its line and its Flaw. The batch took `num_bytes` of the
    file. Rows of a table have the names of its `columns`, and lines 0 where it has no lines.
    """

    lines: Sequence[int]
    values: list[object]
    num_bytes: int
    between: list[tuple[int, int, Flaw]] = field(default_factory=list)
    columns: Sequence[str] | None = None


class Lines:
    """A reader of JSON lines; `line` is the number of the next line.

    `expects` is "next" inside of a line that is skipped, otherwise "row".
    """

    def __init__(self, line: int) -> None:
        self.line = line
        self.expects: Literal["row", "next"] = "row"
        self.reference = _Reference()

    def read(self, window: bytes, at_end: bool) -> Batch:
        """Read the whole lines at the start of the window; at the end of the file, all of them."""
        if self.expects == "next":
            size = window.find(b"\n") + 1
            self.expects = "row" if size else "next"
            self.line += bool(size)
            return Batch([], [], size or len(window))
        size = len(window) if at_end else window.rfind(b"\n") + 1
        if not size and len(window) > MAX_ROW_BYTES:
            self.expects = "next"
            return Batch([self.line], [too_long(MAX_ROW_BYTES)], len(window))
        block = window[:size]
        rows = block.removesuffix(b"\n").split(b"\n") if block else []
        lines: Sequence[int] = range(self.line, self.line + len(rows))
        self.line += len(rows)
        values = _parse_at_once(rows, block)
        if values is None:  # lines copied out of a list may end in its commas
            values = _parse_at_once([row.rstrip(BLANK).removesuffix(b",") for row in rows], block)
        if values is None:
            lines = [line for line, row in zip(lines, rows, strict=True) if row.strip(BLANK)]
            values = [self._parse(row) for row in rows if row.strip(BLANK)]
        return Batch(lines, values, size)

    def _parse(self, row: bytes) -> object:
        if len(row) > MAX_ROW_BYTES:
            return too_long(MAX_ROW_BYTES)
        text = row.decode("utf-8", "surrogateescape")
        try:
            value, end = self.reference.parse(text, _skip_blank(text, 0))
            end = _skip_blank(text, end)
            if end < len(text) and text[end:].rstrip() != ",":
                raise json.JSONDecodeError("Extra data", text, end)
        except (json.JSONDecodeError, RecursionError) as error:
            place = f"column {getattr(error, 'pos', 0) + 1}"
            return not_utf8(text) or no_json(error, place)
        return value


def between_named_rows(rows: bytes | bytearray) -> re.Pattern[bytes] | None:
    """What `BETWEEN_ROWS` matches, but only before rows whose first field is that of the first.

    Args:
        rows: begin with a row of a list.

    Returns:
        None where that is no object with a first field.
    """
    name = _FIRST_NAME.match(rows)
    if name is None:
        return None
    return re.compile(rb"%b(?=[ \t\r\n]*%b)" % (BETWEEN_ROWS.pattern, re.escape(name[1])))


class List:
    """A reader of a JSON list, from after its opening bracket.

    `line` is the line that the next window starts on, `expects` what should stand there: a "first"
    or another "row", a "comma" (or the closing bracket), the "end" of the file; or the "next" row,
    when the window starts inside a row that is skipped.
    """

    def __init__(self, line: int) -> None:
        self.line = line
        self.expects: Literal["first", "row", "comma", "end", "next"] = "first"
        self.reference = _Reference()

    def read(self, window: bytes, at_end: bool) -> Batch:
        """Read the whole rows at the start of the window; at the end of the file, what is left."""
        return self._read_at_once(window) or self._read_by_row(window, at_end)

    def _read_at_once(self, window: bytes) -> Batch | None:
        """Read all rows but the last, which may be cut; None where anything is unusual.

        The window is split wherever one object may end and another begin. A split inside of an
        object leaves pieces that are not JSON, and a piece that is a JSON object is a whole row.
        """
        if self.expects not in ("first", "row"):
            return None
        return self._split_at_once(window, BETWEEN_ROWS) or self._split_at_name(window)

    def _split_at_name(self, window: bytes) -> Batch | None:
        """Read rows that hold objects themselves, told apart by the name of their first field."""
        pattern = between_named_rows(window)
        return self._split_at_once(window, pattern) if pattern else None

    def _split_at_once(self, window: bytes, between_rows: re.Pattern[bytes]) -> Batch | None:
        first, *pieces = between_rows.split(window)
        if not pieces:
            return None
        last = pieces.pop()
        gaps = pieces[::2]
        rows = [first + b"}", *(b"{%b}" % piece for piece in pieces[1::2])]
        block = window[: len(window) - len(last) - len(b"{")]
        values = _parse_at_once(rows, block)
        if values is None:
            return None
        blank_lines = first[: len(first) - len(first.lstrip(BLANK))].count(b"\n")
        heights = [row.count(b"\n") + gap.count(b"\n") for row, gap in zip(rows, gaps, strict=True)]
        heights[0] -= blank_lines
        *lines, self.line = accumulate(heights, initial=self.line + blank_lines)
        self.expects = "row"
        return Batch(lines, values, len(block))

    def _read_by_row(self, window: bytes, at_end: bool) -> Batch:
        text = window.decode("utf-8", "surrogateescape")
        batch = Batch(lines := [], [], 0)
        at = counted = 0
        while True:
            if self.expects == "next":
                at = self._find_next_row(text, at, at_end)
            at = _skip_blank(text, at)
            self.line += text.count("\n", counted, at)
            counted = at
            # json's error messages take time in proportion to the text. So after an oversized row,
            # go back to small windows.
            was_for_one = batch.values and len(window) > WINDOW_BYTES
            if at == len(text) or self.expects == "next" or was_for_one:
                break
            mark = text[at]
            if what := self._complain(text, at):
                batch.between.append((len(batch.values), self.line, broken_list(what)))
            if mark in ",]" or (what and mark == "["):
                self.expects = "end" if mark == "]" else "row"
                at += 1
                continue
            if what and mark != "{":
                self.expects = "next"
                continue
            self.expects = "row"
            value, end = self._parse(text, at, at_end, has_room=len(window) <= MAX_ROW_BYTES)
            if end is None:
                break
            lines.append(self.line)
            batch.values.append(value)
            at = end
        if at_end and at == len(text) and self.expects != "end":
            batch.between.append((len(batch.values), self.line, cut_off()))
        batch.num_bytes = len(text[:at].encode("utf-8", "surrogateescape"))
        return batch

    def _complain(self, text: str, at: int) -> str | None:
        """Describe what is wrong between rows, or where a row should begin."""
        mark = text[at]
        if self.expects == "end":
            return "text follows the closing ]"
        if self.expects == "comma":
            return None if mark in ",]" else "a comma or ] is missing between two rows"
        if mark == ",":
            return "a comma stands where a row should"
        if mark == "[" and text.startswith("{", _skip_blank(text, at + 1)):
            return "a [ stands before a row"  # all rows after it would be one
        if mark == "]" and self.expects == "row":
            return "a comma stands before the closing ]"
        return None

    def _parse(self, text: str, at: int, at_end: bool, has_room: bool) -> tuple[object, int | None]:
        """Return the row at `at`, or its Flaw, and where to continue.

        That is None where the row may continue after the window. A broken row is taken to end where
        one object ends and another begins.
        """
        flaw, is_cut = too_long(MAX_ROW_BYTES, breaks_list=True), True
        try:
            value, end = self.reference.parse(text, at)
            is_closed = text[end - 1] in '}]"'  # a number may continue: 1 may begin 1e9
            if is_closed or end <= len(text) - _LONGEST_WORD or at_end:
                self.expects = "comma"
                return value, end
        except (json.JSONDecodeError, RecursionError) as error:
            pos = getattr(error, "pos", at)
            is_cut = pos > len(text) - _LONGEST_WORD or str(error).startswith("Unterminated")
            if has_room or at_end or not is_cut:
                flaw = no_json(error, self._place(text, at, pos), breaks_list=True)
        next_row = _NEXT_ROW.search(text, at)
        if has_room and not at_end and (is_cut or not next_row):
            return None, None
        if next_row:
            end = next_row.end()
        elif at_end:
            end = len(text)
            if text.rstrip().endswith("]"):
                self.expects = "end"
            elif is_cut:
                self.expects = "end"
                return cut_off(), end
        else:
            end, self.expects = at, "next"
        return not_utf8(text[at:end], breaks_list=True) or flaw, end

    def _place(self, text: str, start: int, pos: int) -> str:
        """Describe a place in a row: by line, or in a row of one line by its column."""
        num_lines = text.count("\n", start, pos)
        if num_lines:
            return f"line {self.line + num_lines} column {pos - text.rfind(chr(10), start, pos)}"
        return f"character {pos - start + 1} of the row"

    def _find_next_row(self, text: str, at: int, at_end: bool) -> int:
        if next_row := _NEXT_ROW.search(text, at):
            self.expects = "row"
            return next_row.end()
        if at_end:
            self.expects = "end"
            return len(text)
        perhaps = _PERHAPS_NEXT_ROW.search(text, max(at, len(text) - _LONGEST_GAP))
        return perhaps.start() if perhaps else len(text)


class _Reference:
    """A json reader of one value that reports what json ignores: repeated fields, stray bytes."""

    def __init__(self) -> None:
        decoder = json.JSONDecoder(object_pairs_hook=self._object, parse_int=self._int)
        self._decode = decoder.raw_decode
        self._repeated: list[str] = []
        self._has_long_number = False

    def parse(self, text: str, at: int) -> tuple[object, int]:
        """Return the value at `at`, or its Flaw, and where it ends.

        Raises JSONDecodeError, and RecursionError beyond `MAX_DEPTH`.
        """
        self._repeated.clear()
        self._has_long_number = False
        try:
            value, end = self._decode(text, at)
        except json.JSONDecodeError as error:
            _check_depth(text, at, error.pos)
            raise
        _check_depth(text, at, end)
        if self._has_long_number:
            return long_number(), end
        if flaw := not_utf8(text[at:end]):
            return flaw, end
        if self._repeated:
            name = self._repeated[-1]
            what = f"field {show(name)} stands more than once"
            return Flaw("repeated field", what, "keep one", field=name), end
        return value, end

    def _object(self, pairs: list[tuple[str, object]]) -> dict:
        fields = dict(pairs)
        if len(fields) < len(pairs):
            counts = Counter(name for name, _ in pairs)
            self._repeated.append(counts.most_common(1)[0][0])
        return fields

    def _int(self, digits: str) -> int:
        try:
            return int(digits)
        except ValueError:  # an integer of thousands of digits
            self._has_long_number = True
            return 0


def _check_depth(text: str, start: int, end: int) -> None:
    """Raise RecursionError where JSON, or the start of some, is nested too deeply."""
    if text.count("[", start, end) + text.count("{", start, end) <= MAX_DEPTH:
        return
    depth = 0
    for match in _STRING_OR_BRACKET.finditer(text, start, end):
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(match[0], 0)
        if depth > MAX_DEPTH:
            raise RecursionError


def _parse_at_once(rows: list[bytes], block: bytes) -> list | None:
    """Parse the rows that make up a block; None where the reference has to read them.

    That is the case where one is not JSON, or where the block has more strings than its values,
    since a field then occurs twice.
    """
    if len(block) > MAX_ROW_BYTES:
        return None
    try:
        values = list(map(orjson.loads, rows))
        num_strings = _count_strings(values)
    except (ValueError, RecursionError):
        return None
    return values if 2 * num_strings == _count_quotes(block) else None


def _count_strings(values: list) -> int:
    """Count the strings in values, names of fields included."""
    try:
        kinds = set(map(type, chain.from_iterable(map(dict.values, values))))
    except TypeError:  # not every value is an object
        return sum(map(_count_strings_in, values))
    if kinds <= {str}:
        return 2 * sum(map(len, values))
    return sum(map(_count_strings_in, values))


def _count_strings_in(value: object, depth: int = 1) -> int:
    if type(value) is not dict and type(value) is not list:
        return int(type(value) is str)
    if depth > MAX_DEPTH:
        raise RecursionError
    names, inner = (len(value), value.values()) if type(value) is dict else (0, value)
    return names + sum(map(_count_strings_in, inner, repeat(depth + 1)))


def _count_quotes(block: bytes) -> int:
    """Count the quotes around strings, not the escaped ones inside."""
    codes = np.frombuffer(block, np.uint8)
    is_slash = codes == ord("\\")
    if (is_slash[1:] & is_slash[:-1]).any():  # a backslash may itself be escaped
        codes = np.frombuffer(block.replace(rb"\\", b""), np.uint8)
        is_slash = codes == ord("\\")
    is_quote = codes == ord('"')
    return int(np.count_nonzero(is_quote) - np.count_nonzero(is_quote[1:] & is_slash[:-1]))


def _skip_blank(text: str, at: int) -> int:
    match = _BLANKS.match(text, at)
    assert match is not None
    return match.end()
