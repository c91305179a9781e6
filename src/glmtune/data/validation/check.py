"""One file, batch by batch: what is wrong with its rows, and what they are made of.

A batch is first checked as a whole, with a few operations on all of its text. Only where that shows
anything unusual are its rows checked one by one, to say which and why.
"""

import string
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from operator import itemgetter

import numpy as np

from glmtune.data.characters import CONTROL, LANGUAGES, survey
from glmtune.data.fields import (
    ALPACA,
    ROW_FIELDS,
    FieldUse,
    is_content,
    is_record,
    names_of,
)
from glmtune.data.flaws import Flaw
from glmtune.data.records import (
    CONTEXT_TARGET,
    RECORDS,
    TEXT,
    fields_of,
    format_of,
    read_row,
)
from glmtune.data.row_texts import Text, texts_of
from glmtune.data.spelled import Spelled
from glmtune.data.templates import has_rounds, parts
from glmtune.data.validation.duplicates import END_OF_PART, END_OF_ROW, Fingerprints
from glmtune.data.validation.every_flaw import every_flaw
from glmtune.data.validation.problems import Problem
from glmtune.data.windows import Batch

LONG_TEXT = 100_000
"""A row of more characters than this is surely not one question and its answer."""

NUM_PARTS = len(ALPACA)


@dataclass(slots=True)
class CheckedFile:
    """What one file holds: its rows, of which some are unusable, and the letters by language."""

    path: str
    format: str | None = None
    num_bytes: int = 0
    num_rows: int = 0
    num_unusable: int = 0
    letters: np.ndarray = field(default_factory=lambda: np.zeros(len(LANGUAGES), np.int64))
    fields: FieldUse = field(default_factory=FieldUse)
    spelled: Spelled = field(default_factory=Spelled)
    """Names of special tokens that rows hold as text."""

    @property
    def language_shares(self) -> dict[str, float]:
        """The share of each language among the letters; empty without any."""
        total = int(self.letters.sum())
        shares = (self.letters / max(total, 1)).tolist()
        return dict(zip(LANGUAGES, shares, strict=True)) if total else {}

    def as_json(self) -> dict[str, object]:
        """The same as plain data, for the report."""
        return {
            "path": self.path,
            "format": self.format,
            "bytes": self.num_bytes,
            "rows": self.num_rows,
            "unusable_rows": self.num_unusable,
            "language_shares": self.language_shares,
            "unused_fields": self.fields.unused,
            "rows_with_history": self.fields.num_with_history,
            "spelled_specials": dict(self.spelled.names.most_common()),
        }

    def __str__(self) -> str:
        num_usable = self.num_rows - self.num_unusable
        text = f"{self.path}: {self.format or 'nothing usable'}, {self.num_rows:,} rows, "
        text += f"{num_usable:,} usable, {self.num_unusable:,} not"
        if shares := self.language_shares:
            text += "; letters " + ", ".join(f"{s:.1%} {name}" for name, s in shares.items())
        spelled = [self.spelled.describe()] if self.spelled.num_rows else []
        return "\n    ".join([text, *self.fields.lines(), *spelled])


class FileCheck:
    """A check of the rows of a file; `tell` is called with each problem.

    The rows are of the named format; where none is named, the first row decides. `special_names`
    are looked for in all texts.
    """

    def __init__(
        self,
        path: str,
        tell: Callable[[Problem], None],
        format: str | None = None,
        special_names: Collection[str] = (),
    ) -> None:
        self.file = CheckedFile(path, format, spelled=Spelled(special_names))
        self.fingerprints = Fingerprints(path)
        self.is_broken = False
        """Whether something is wrong outside of rows, or with the list that they are in."""
        self._tell = tell
        self._found: list[tuple[float, Problem]] = []
        """The problems of a batch, each with its place among the rows."""

    def __getstate__(self) -> dict[str, object]:
        """What another process gets: it reports nothing any more."""
        return self.__dict__ | {"_tell": None}

    def take(self, batch: Batch) -> None:
        """Check the next rows, and tell their problems in the order of the rows."""
        self._take(batch)
        for _, problem in sorted(self._found, key=itemgetter(0)):
            self._tell(problem)
        self._found.clear()

    def add(self, part: "FileCheck", line: int) -> None:
        """Take over what was found in the rows that follow; their problems have been reported.

        Args:
            part: numbers rows and lines as if nothing stood before it.
            line: the line before it.
        """
        file, others, row = self.file, part.file, self.file.num_rows
        file.format = file.format or others.format
        for name in ("num_bytes", "num_rows", "num_unusable"):
            setattr(file, name, getattr(file, name) + getattr(others, name))
        file.letters += others.letters
        file.fields.add(others.fields)
        file.spelled.extend(others.spelled)
        self.fingerprints.extend(part.fingerprints, row, line)

    def _take(self, batch: Batch) -> None:
        first = self.file.num_rows + 1
        self.file.num_rows += len(batch.values)
        self.file.num_bytes += batch.num_bytes
        rows: Sequence[int] = range(first, first + len(batch.values))
        lines, answers = batch.lines, None
        try:
            texts, use = self._texts_at_once(batch.values)
            found = survey(END_OF_ROW.join(texts).encode())
            is_clean = found.num_controls == max(0, NUM_PARTS * len(texts) - 1)  # separators only
        except (AttributeError, LookupError, TypeError, ValueError):
            is_clean = False
        if is_clean:
            self.file.fields.add(use)
        else:
            rows, lines, texts, answers = self._texts_by_row(batch, rows)
            found = survey(END_OF_ROW.join(texts).encode())
        for num_before, line, fault in batch.between:
            self._note(first + num_before - 0.5, _problem_of(fault, self.file.path, None, line))
            self.is_broken = True
        if texts:
            if batch.num_bytes > LONG_TEXT or _has_empty_part(found.bare):
                self._warn_of_sizes(texts, rows, lines)
            self._tell_spelled(texts, rows, lines)
            self.file.letters += found.letters
            self.fingerprints.add(texts, found.bare, rows, lines, answers)

    def _texts_at_once(self, values: list) -> tuple[list[str], FieldUse]:
        """Return instruction, input and answer of each row, joined, and what else the rows hold.

        Raises AttributeError, LookupError, TypeError or ValueError where a row differs from the
        others in its fields or their types, or has an unused field that should perhaps be trained
        on.
        """
        if set(map(type, values)) != {dict}:
            raise TypeError
        self.file.format = self.file.format or _format_of(values[0])
        if self.file.format not in (RECORDS, CONTEXT_TARGET):
            raise LookupError
        names = names_of(values[0]) if self.file.format == RECORDS else None
        fields = tuple(name for name in names or ROW_FIELDS if name in values[0])
        if not (is_record(values[0]) if names else fields == ROW_FIELDS):
            raise LookupError
        join = _JOIN[len(fields)] if names else _join_row
        texts = list(map(join, map(itemgetter(*fields), values)))
        use = FieldUse()
        if names and names != ALPACA:
            use.renamed[names] = len(values)
        if sum(map(len, values)) > len(fields) * len(values):
            use.unused = Counter(chain.from_iterable(values)) - Counter(fields * len(values))
        if any(map(is_content, use.unused)):  # also an input that other rows lack
            raise LookupError
        return texts, use

    def _texts_by_row(
        self, batch: Batch, rows: Iterable[int]
    ) -> tuple[list[int], list[int], list[str], list[list[int]]]:
        """Return number, line, text and answers of the usable rows, and report what is wrong."""
        good_rows: list[int] = []
        good_lines: list[int] = []
        texts: list[str] = []
        answers: list[list[int]] = []
        for row, line, value in zip(rows, batch.lines, batch.values, strict=True):
            try:
                fields = fields_of(value)
                self.file.format = self.file.format or _format_of(fields)
                read = read_row(self.file.format, fields, self.file.path, row, line)
            except Flaw as flaw:
                self.file.num_unusable += 1
                flaws = [flaw]
                if self.file.format and isinstance(value, dict):
                    flaws = every_flaw(self.file.format, value, flaw)
                for each in flaws:
                    self._note(row, _problem_of(each, self.file.path, row, line))
                    self.is_broken |= each.breaks_list
                continue
            self.file.fields.count(read)
            good_rows.append(row)
            good_lines.append(line)
            found = texts_of(read)
            cleaned = [self._clean(text, row, line) for text in found.texts]
            texts.append(END_OF_PART.join(cleaned))
            answers.append(found.answers)
        return good_rows, good_lines, texts, answers

    def _clean(self, part: Text, row: int, line: int) -> str:
        """Return a text without forbidden characters, and report the first of them."""
        text, name, place = part
        if found := CONTROL.search(text):
            num = len(CONTROL.findall(text))
            kind = "lost character" if found[0] == "\ufffd" else "control character in text"
            where = place or f'field "{name}"'
            what = f"{where} holds U+{ord(found[0]):04X} at character {found.start() + 1}"
            what += f" and {num - 1:,} more such" if num > 1 else ""
            self._warn(kind, row, line, what, "write what should stand there, or remove it", name)
            text = CONTROL.sub("", text)
        return text

    def _warn_of_sizes(self, texts: list[str], rows: Sequence[int], lines: Sequence[int]) -> None:
        """Report rows with an empty part, or too long to be of use."""
        is_text = self.file.format == TEXT
        for text, row, line in zip(texts, rows, lines, strict=True):
            asked, _, answer = text.rpartition(END_OF_PART)
            if not answer.strip() and not is_text:
                fix = "write an answer or take the row out; tokenize drops it"
                self._warn("empty answer", row, line, "the answer is empty", fix)
            if not asked.strip(END_OF_PART + string.whitespace):
                part = "text" if is_text else "question"
                fix = f"write a {part} or take the row out"
                self._warn(f"empty {part}", row, line, f"the {part} is empty", fix)
            if len(text) > LONG_TEXT and not is_text:
                what = f"the row is {len(text):,} characters long"
                fix = "split it; tokenize cuts it at max_seq_length"
                self._warn("very long", row, line, what, fix)

    def _tell_spelled(self, texts: list[str], rows: Sequence[int], lines: Sequence[int]) -> None:
        """Report rows that spell special tokens."""
        spelled = self.file.spelled
        if not spelled.find(texts):
            return
        for text, row, line in zip(texts, rows, lines, strict=True):
            if names := spelled.count([text]):
                what = f"the row spells {', '.join(names)}, which is text and no special token"
                fix = "take it out if it is a left-over, or tokenize with --allow_special true"
                self._warn("special token as text", row, line, what, fix)

    def _warn(
        self, kind: str, row: int, line: int, what: str, fix: str, name: str | None = None
    ) -> None:
        self._note(row, Problem(kind, self.file.path, line, row, what, fix, name))

    def _note(self, place: float, problem: Problem) -> None:
        self._found.append((place, problem))


def _problem_of(flaw: Flaw, path: str, row: int | None, line: int) -> Problem:
    return Problem(flaw.kind, path, line, row, flaw.what, flaw.fix, flaw.field, unusable=True)


def _format_of(fields: Mapping[str, object]) -> str:
    is_cut_row = "context" in fields and "instruction" not in fields and not is_record(fields)
    return CONTEXT_TARGET if is_cut_row else format_of(fields)


def _has_empty_part(bare: bytes) -> bool:
    """Whether an answer, or everything before it, is empty or nothing but punctuation."""
    codes = np.frombuffer(b"\x00%b\x00" % bare, np.uint8)
    ends_row, ends_part = codes == 0, codes == 1
    is_empty = ends_part[:-1] & ends_row[1:]
    is_empty[:-1] |= ends_row[:-2] & ends_part[1:-1] & ends_part[2:]
    return bool(is_empty.any())


# How the fields of a record become instruction, input and answer; join refuses anything but
# strings.
_JOIN: dict[int, Callable[[tuple], str]] = {
    NUM_PARTS: END_OF_PART.join,
    NUM_PARTS - 1: (2 * END_OF_PART).join,
}


def _join_row(row: tuple[str, str]) -> str:
    if has_rounds(row[0]):
        raise LookupError  # it has earlier answers as well
    return END_OF_PART.join((*parts(row[0]), row[1]))
