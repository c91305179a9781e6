"""A row of any format as the texts in it, one after another, and which of them are answers."""

import json
from typing import NamedTuple

from glmtune.data.conversations import SYSTEM
from glmtune.data.fields import HISTORY
from glmtune.data.records import TEXT, AnyRow, Conversation, Row, TextRow
from glmtune.data.templates import conversation_of, has_rounds, parts


class Text(NamedTuple):
    """A text of a row, and its field, or the words for its place where it is no field's own."""

    text: str
    field: str | None
    place: str | None = None


class Texts(NamedTuple):
    """The texts of a row up to its last answer."""

    texts: list[Text]
    answers: list[int]
    """Places of the answers among them; the last is the last text."""


def texts_of(read: AnyRow) -> Texts:
    """The texts of a row, in the order in which a model reads them."""
    if isinstance(read, Conversation):
        return _of_conversation(read)
    if isinstance(read, Row):
        return _of_row(read)
    if isinstance(read, TextRow):  # it answers nothing
        return Texts([Text(read.text.text, TEXT), Text("", TEXT)], [1])
    system = [Text(read.system, SYSTEM)] if read.system else []
    earlier = [Text(text, HISTORY) for pair in read.history for text in pair]
    values = read.instruction, read.input, read.output
    last = [Text(t, n or "input") for n, t in zip(read.names, values, strict=True)]
    return _answered([*system, *earlier, *last], len(system) + 1, len(earlier))


def _of_row(row: Row) -> Texts:
    rounds: list[tuple[str, str]] = []
    instruction, input = parts(row.context)
    if has_rounds(row.context):
        rounds, instruction = conversation_of(row.context)
    earlier = [Text(text, "context") for pair in rounds for text in pair]
    asked = [Text(text, "context") for text in (instruction, input)]
    return _answered([*earlier, *asked, Text(row.target, "target")], 1, len(earlier))


def _answered(texts: list[Text], first: int, num_earlier: int) -> Texts:
    """Texts of which the last is an answer, and every other one of the earlier ones."""
    return Texts(texts, [*range(first, first + num_earlier, 2), len(texts) - 1])


def _of_conversation(read: Conversation) -> Texts:
    tools = [Text(json.dumps(tool), "tools") for tool in read.example.tools]
    answers = read.example.answers
    turns = []
    for turn in read.example.turns[: answers[-1] + 1]:
        called = f"{turn.metadata}\n" if turn.metadata else ""
        turns.append(Text(called + turn.text, None, f"a turn of the {turn.role}"))
    return Texts([*tools, *turns], [len(tools) + place for place in answers])
