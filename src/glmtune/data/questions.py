"""Rows of any format as questions: what is asked, what is expected, and both as plain data."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from glmtune.data.conversations import ASSISTANT, SYSTEM, USER, Asked, Example, Turn
from glmtune.data.fields import FieldUse
from glmtune.data.records import (
    AnyRow,
    BadRow,
    Conversation,
    OnBadRow,
    Record,
    TextRow,
    as_context,
    as_conversation,
    has_turns,
    read_typed,
)
from glmtune.data.templates import parts

_FIELDS = ("row", "instruction", "input", "system", "history", "messages", "tools", "text")


@dataclass(frozen=True, slots=True)
class Question:
    """A row as a question."""

    asked: Asked
    expected: str
    """The answer in the row as text; empty without one."""
    answer: Turn | None
    """The same as the last turn of a conversation; None of other rows, and without one."""
    fields: Mapping[str, Any]
    """The row's number and what is asked, by the names that a line of an answer file has."""
    path: str
    row: int
    line: int
    where: str

    @property
    def as_line(self) -> dict[str, Any]:
        """The question as a line of an answer file holds it."""
        return {**self.fields, "output": self.expected}


def read_questions(
    path: str,
    format: str | None = None,
    on_bad_row: OnBadRow = "fail",
    encoding: str | None = None,
    needs_answer: bool = False,
) -> tuple[list[Question], list[BadRow], FieldUse]:
    """Read a file's rows as questions; see `records.read_typed`.

    Of a conversation all before the last answer is asked, or all of it where a question stands
    last; a text alone is to be continued. What is asked is what training has before an answer: of
    records one by one, unless one of the file has a system text or earlier rounds.

    Raises:
        UserError: see `records.read_alpaca`.
    """
    rows, bad_rows = read_typed(path, format, on_bad_row, encoding, needs_answer)
    use = FieldUse.of(rows)
    use.num_with_history = 0  # they are asked as turns like any others
    turns = has_turns(rows)
    return [_question(row, turns) for row in rows], bad_rows, use


def _question(row: AnyRow, is_conversation: bool) -> Question:
    asked: Asked
    fields: dict[str, Any]
    answer = None
    if isinstance(row, TextRow):
        asked, expected, fields = row.text, "", {"text": row.text.text}
    elif is_conversation:
        example = as_conversation(row).example
        asked, expected = example.asked, example.expected
        answer = example.turns[-1] if example.turns[-1].is_answer else None
        fields = _fields_of(row) if isinstance(row, Record) else written_turns(asked)
    else:
        context = as_context(row)
        asked, expected = context.context, context.target
        instruction, input = parts(asked)
        fields = {"instruction": instruction, "input": input}
        if isinstance(row, Record):
            fields = _fields_of(row)
    fields = {"row": row.row, **fields}
    return Question(asked, expected, answer, fields, row.path, row.row, row.line, row.where)


def _fields_of(record: Record) -> dict[str, Any]:
    """What a record asks, under alpaca's names."""
    fields: dict[str, Any] = {"instruction": record.instruction, "input": record.input}
    if record.system:
        fields["system"] = record.system
    if record.history:
        fields["history"] = list(map(list, record.history))
    return fields


def written_turns(example: Example) -> dict[str, Any]:
    """A conversation as a row of the format messages, which reads it back as it is."""
    fields: dict[str, Any] = {"messages": [_message(turn) for turn in example.turns]}
    return fields | ({"tools": list(example.tools)} if example.tools else {})


def _message(turn: Turn) -> dict[str, Any]:
    message: dict[str, Any] = {"role": turn.role, "content": turn.text}
    if turn.metadata:
        message["metadata"] = turn.metadata
    if turn.thought is not None:
        message["reasoning_content"] = turn.thought
    if turn.supervised is not None:
        message["loss"] = turn.supervised
    return message


def written_row(row: AnyRow, is_conversation: bool) -> dict[str, Any]:
    """A row as `convert` writes it, which `tokenize` reads back as the same.

    Args:
        row: of any format.
        is_conversation: `records.has_turns` of its file.
    """
    if isinstance(row, TextRow):
        return {"text": row.text.text}
    if is_conversation:
        return written_turns(as_conversation(row).example)
    context = as_context(row)
    return {"context": context.context, "target": context.target}


def as_question(row: AnyRow, is_conversation: bool) -> dict[str, Any]:
    """A row as one of a file of questions, such that each is asked as its own file asks it.

    Of a text it is the first half, which is to be continued. See `written_row`.
    """
    if isinstance(row, TextRow):
        return {"text": row.text.text[: -(-len(row.text.text) // 2)]}
    if isinstance(row, Record) and not is_conversation:
        fields = {"instruction": row.instruction, "input": row.input}
        return {**fields, "output": row.output}
    return written_row(row, is_conversation)


def lacks_answer(row: AnyRow) -> bool:
    """Whether a row has nothing to learn: no answer, or an empty text."""
    if isinstance(row, TextRow):
        return not row.text.text.strip()
    if isinstance(row, Conversation):
        last = row.example.turns[row.example.answers[-1]]
        return not (last.text.strip() or last.metadata)
    return not as_context(row).target.strip()


def question_in(line: Mapping[str, Any]) -> dict[str, Any]:
    """The question that a line of an answer file answers."""
    return {name: line[name] for name in (*_FIELDS, "output") if name in line}


def shown_question(line: Mapping[str, Any]) -> tuple[str, str]:
    """A question of an answer file as a reader sees it: what is asked, and an input apart."""
    if "text" in line:
        return line["text"], ""
    if "messages" in line:
        return shown_turns(line["messages"], line.get("tools", ())), ""
    messages = [{"role": SYSTEM, "content": line["system"]}] if line.get("system") else []
    for asked, answered in line.get("history", ()):
        messages += [{"role": USER, "content": asked}, {"role": ASSISTANT, "content": answered}]
    messages.append({"role": USER, "content": line["instruction"]})
    return shown_turns(messages), line["input"]


def shown_turns(
    messages: Iterable[Mapping[str, Any]], tools: Iterable[Mapping[str, Any]] = ()
) -> str:
    """Messages for a reader: a question alone as it stands, others each behind its role."""
    messages = list(messages)
    if len(messages) == 1 and messages[0]["role"] == USER and not tools:
        return messages[0]["content"]
    named = [tool.get("function", tool).get("name", "?") for tool in tools]
    texts = [f"tools: {', '.join(map(str, named))}"] if named else []
    for message in messages:
        call = f" {message['metadata']}" if message.get("metadata") else ""
        texts.append(f"{message['role']}{call}: {message['content']}")
    return "\n\n".join(texts)
