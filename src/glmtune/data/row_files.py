"""A file of rows of any format, looked through once and then read as a stream."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from tqdm import tqdm

from glmtune.data.conversations import ASSISTANT, USER, Example, Turn
from glmtune.data.fields import FieldUse
from glmtune.data.mixing import language_of
from glmtune.data.records import (
    TEXT,
    AnyRow,
    BadRow,
    Conversation,
    OnBadRow,
    Record,
    Row,
    TextRow,
    as_context,
    as_conversation,
    check_usable,
    each_row,
    format_in_effect,
    format_of,
    read_row,
)
from glmtune.data.row_texts import texts_of
from glmtune.data.templates import conversation_of, has_rounds, is_alpaca
from glmtune.data.thoughts import begins_with_thought
from glmtune.errors import UserError

KEPT_CHARACTERS = 1 << 23
"""Characters of rows that are kept for the second reading; most files have fewer."""


@dataclass(slots=True)
class RowFile:
    """What a file of rows holds; `rows` reads them."""

    path: str
    encoding: str | None = None
    format: str | None = None
    """The name of its format, of `FORMATS` or beside them."""
    num_good: int = 0
    bad_rows: list[BadRow] = field(default_factory=list)
    fields: FieldUse = field(default_factory=FieldUse)
    has_turns: bool = False
    """Whether its rows are read as conversations, else as contexts with their targets.

    Records without a system text or earlier rounds are the contexts that `convert` writes. If one
    of a file has either, all are conversations."""
    row_is_line: bool = True
    _kept: list[AnyRow] | None = field(default_factory=list, repr=False)
    """The good rows, while they are few."""
    template: str | None = None
    """The template of the contexts of first questions, "alpaca" or "custom"; one after earlier
    rounds has none."""
    languages: bytearray | None = None
    """The language of each good row, as of `mixing.language_of`, if that is wanted."""
    has_earlier_rounds: bool = False
    """Whether a record has a system text or earlier rounds."""
    has_thoughts: bool = False
    """Whether an answer of a record, or of a context, begins with a thought."""

    @property
    def is_text(self) -> bool:
        """Whether its rows are texts alone."""
        return self.format == TEXT

    @property
    def num_rows(self) -> int:
        """Number of its rows, good or bad."""
        return self.num_good + len(self.bad_rows)

    def talks(self, opens_thoughts: bool) -> bool:
        """Whether its rows are read as conversations for a base that begins answers with a thought,
        or for one that does not. Thoughts inside answers are text in contexts and targets.
        """
        return self.has_turns or (opens_thoughts and self.has_thoughts)

    def rows(self) -> Iterator[Row | Conversation | TextRow]:
        """Read the good rows, in their order.

        Raises:
            UserError: it has changed since it was looked through, or cannot be read any more.
        """
        number = 0
        for row in self.used(self._kept or each_row(self.path, self.encoding, self.read)):
            number += 1
            yield row
        if number != self.num_good:
            raise UserError(
                f"{self.path}: had {self.num_good:,} good rows and then {number:,}; make sure that "
                "nothing else writes it, and do it again"
            )

    def used(self, rows: Iterable[AnyRow | BadRow]) -> Iterator[Row | Conversation | TextRow]:
        """The good ones among rows, as all of the file are read."""
        for row in rows:
            if isinstance(row, Record):
                yield as_conversation(row) if self.has_turns else as_context(row)
            elif not isinstance(row, BadRow):
                yield _talk_of(row) if self.has_turns and isinstance(row, Row) else row

    def read(self, fields: dict, path: str, row: int, line: int) -> AnyRow:
        """Read a row in the file's format, which the first one decides; raises Flaw."""
        self.format = self.format or format_of(fields)
        return read_row(self.format, fields, path, row, line)

    def _look_through(self) -> None:
        rows = each_row(self.path, self.encoding, self.read)
        self.count(tqdm(rows, desc="read", unit="row", delay=1))
        self.end()

    def count(self, rows: Iterable[AnyRow | BadRow]) -> None:
        """Take what follows into account."""
        num_characters = 0
        for row in rows:
            self.row_is_line = self.row_is_line and row.row == row.line
            if isinstance(row, BadRow):
                self.bad_rows.append(row)
                continue
            self.num_good += 1
            self.fields.count(row)
            num_characters += row.num_characters
            if num_characters > KEPT_CHARACTERS:
                self._kept = None
            elif self._kept is not None:
                self._kept.append(row)
            if self.languages is not None:
                self.languages.append(language_of([text.text for text in texts_of(row).texts]))
            if isinstance(row, Record | Row) and not self.has_thoughts:
                answer = row.output if isinstance(row, Record) else row.target
                self.has_thoughts = begins_with_thought(answer)
            if isinstance(row, Record):
                self.template = "alpaca"
                self.has_earlier_rounds |= bool(row.history or row.system)
            elif isinstance(row, Conversation):
                self.has_turns = True
            elif isinstance(row, TextRow):
                self.template = TEXT
            elif self.template != "custom" and not has_rounds(row.context):
                self.template = "alpaca" if is_alpaca(row.context) else "custom"

    def end(self) -> None:
        """Conclude what only all rows together show."""
        if self.has_earlier_rounds:
            self.has_turns = True
            self.fields.num_with_history = 0  # they are turns like any others


def look_through(
    path: str,
    format: str | None = None,
    on_bad_row: OnBadRow = "fail",
    encoding: str | None = None,
    with_languages: bool = False,
) -> RowFile:
    """Read a file to its end, so that what is wrong with it is known before any row is used.

    Args:
        path: the file.
        format: the name of its format; None for that of the first row.
        on_bad_row: as of `records.read_alpaca`.
        encoding: its encoding, where that is not UTF-8.
        with_languages: whether the language of each row is wanted.

    Raises:
        UserError: as `records.read_alpaca`.
    """
    languages = bytearray() if with_languages else None
    file = RowFile(path, encoding, format_in_effect(path, format), languages=languages)
    file._look_through()
    check_usable(path, on_bad_row, file.num_good > 0, file.bad_rows)
    return file


def _talk_of(row: Row) -> Conversation:
    """A context and its target as a conversation, for a file beside one of conversations."""
    rounds, question = conversation_of(row.context)
    texts = [text for pair in [*rounds, (question, row.target)] for text in pair]
    turns = (Turn((USER, ASSISTANT)[place % 2], text) for place, text in enumerate(texts))
    return Conversation(Example(tuple(turns)), row.path, row.row, row.line, row.unused)
