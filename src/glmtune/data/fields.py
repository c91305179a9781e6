"""Which field of a row is the question, which its answer, and which others must not be lost.

Names beside `instruction`, `input` and `output` are those of published data sets: Firefly and BELLE
(input, target), AdvertiseGen (content, summary), the published ChatGLM-6B fine-tuning (prompt,
response, history), Dolly (instruction, context, response), ms-swift (query, response).
"""

import ast
import contextlib
import json
from collections import Counter
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple, Protocol

from glmtune.data.flaws import Flaw, kind_of, show

ROW_FIELDS = ("context", "target")
HISTORY = "history"
CONVERSATIONS = ("messages", "conversations", "conversation", "dialogue", "dialog", "turns")

_QUESTIONS = ("instruction", "prompt", "question", "query")
_ANSWERS = ("output", "response", "answer", "target", "completion")
_INPUTS = ("input", "context")
_PAIRS = (("input", "target"), ("inputs", "targets"), ("content", "summary"))
"""Names that mark a question only beside that answer: elsewhere they are text to work on."""

_ELSE = """
    system system_prompt tools functions function_call text chosen rejected examples
    knowledge passage passages document documents background persona
    reasoning reasoning_content thinking thought thoughts cot chain_of_thought rationale explanation
    image images audio audios video videos
"""
_CONTENT = {
    *(HISTORY, *ROW_FIELDS, *CONVERSATIONS, *_QUESTIONS, *_ANSWERS, *_INPUTS, *_ELSE.split()),
    *(name for pair in _PAIRS for name in pair),
}
_NOTHING: tuple[object, ...] = (None, "", [], {}, False)


class Names(NamedTuple):
    """The names that the fields of a record have in its file; no `input` where it can have none."""

    instruction: str = "instruction"
    input: str | None = "input"
    output: str = "output"

    def __str__(self) -> str:
        renamed = [
            (role, name) for role, name in self._asdict().items() if name not in (role, None)
        ]
        return ", ".join(f"{show(name)} read as {role}" for role, name in renamed)


ALPACA = Names()


def names_of(fields: Mapping[str, object]) -> Names:
    """Decide which fields make a record; a missing one has the name that alpaca gives it."""
    return _names_among(tuple(fields))


@lru_cache(1024)  # the millions of rows of a file have the same few sets of fields
def _names_among(fields: tuple[str, ...]) -> Names:
    instruction, output = _first(_QUESTIONS, fields), _first(_ANSWERS, fields)
    for asked, answer in () if instruction else _PAIRS:
        if asked in fields and answer in fields:
            return Names(asked, None if asked == "input" else "input", answer)
    input = _first(_INPUTS, fields) or "input"
    return Names(instruction or "instruction", input, output or "output")


def is_record(fields: Mapping[str, object]) -> bool:
    """Whether there is a question and an answer by any of their names."""
    names = names_of(fields)
    return names.instruction in fields and names.output in fields


def _first(names: Iterable[str], fields: Container[str]) -> str | None:
    return next((name for name in names if name in fields), None)


def is_row(fields: Mapping[str, object]) -> bool:
    """Whether this is a row of context and target, no record with a context beside its question."""
    return all(name in fields for name in ROW_FIELDS) and _first(_QUESTIONS, fields) is None


def is_text(fields: Mapping[str, object]) -> bool:
    """Whether this is a text alone: no question and no answer stands beside it."""
    return "text" in fields and _first((*_QUESTIONS, *_ANSWERS), fields) is None


def is_content(name: str) -> bool:
    """Whether a user would expect the content of a field of this name to be trained on."""
    return name.lower() in _CONTENT


def is_empty(value: object) -> bool:
    """Whether a value is empty, so that nothing is lost without it."""
    return value in _NOTHING or (isinstance(value, str) and not value.strip())


def unused_fields(fields: Mapping[str, object], used: Iterable[str]) -> tuple[str, ...]:
    """Name the unused fields; raise Flaw where one holds what should be trained on.

    `used` starts with the question's name and ends with the answer's. A text that contains both of
    them is the row once more, as in the published alpaca files, and adds nothing.
    """
    used = tuple(used)
    named = " or ".join(f'"{name}"' for name in dict.fromkeys((used[0], used[-1])))
    unused = tuple(name for name in fields if name not in used)
    for name in unused:
        value = fields[name]
        if not is_content(name) or is_empty(value):
            continue
        if isinstance(value, str) and _stand_in(value, fields.get(used[0]), fields.get(used[-1])):
            continue
        raise Flaw(
            "content not used",
            f"field {show(name)} is {show(value)} ({kind_of(value)}), which is not taught",
            f"put what should be taught of it into {named}, and take the field out",
            name,
        )
    return unused


def _stand_in(text: str, *parts: object) -> bool:
    return all(isinstance(part, str) and part.strip() and part in text for part in parts)


def history_of(fields: Mapping[str, object]) -> tuple[tuple[str, str], ...]:
    """Return the earlier rounds of a record, question and answer each; raise Flaw if malformed."""
    rounds = _list_in(fields.get(HISTORY))
    if is_empty(rounds):
        return ()
    if not isinstance(rounds, list) or not all(map(_is_round, rounds)):
        raise Flaw(
            "history",
            f'field "{HISTORY}" is {show(rounds)}, not a list of earlier rounds',
            'write it as [["earlier question", "its answer"], ...]',
            HISTORY,
        )
    for text in (text for pair in rounds for text in pair):
        check_characters(HISTORY, text)
    return tuple((question, answer) for question, answer in rounds)


def _list_in(value: object) -> object:
    """A list that stands as text, in JSON or as Python shows it; any other value as it is."""
    if not isinstance(value, str) or not value.strip().startswith("["):
        return value
    for read in (json.loads, ast.literal_eval):
        with contextlib.suppress(ValueError, SyntaxError, RecursionError, MemoryError):
            return [list(pair) if isinstance(pair, tuple) else pair for pair in read(value.strip())]
    return value


def _is_round(value: object) -> bool:
    return isinstance(value, list) and list(map(type, value)) == [str, str]


def text_of(fields: Mapping[str, object], name: str) -> str:
    """Return a field's text; raise Flaw where it has none."""
    if name not in fields:
        part = "answer" if name in (*_ANSWERS, "target") else "question"
        part = "text" if name == "text" else part
        what = f'field "{name}" is missing, the row has {show(list(fields))}'
        fix = f'rename the one that holds the {part} to "{name}", or add it'
        raise Flaw("missing field", what, fix, name)
    value = fields[name]
    if not isinstance(value, str):
        what = f'field "{name}" is {show(value)} ({kind_of(value)}), not a string'
        fix = "write its text" if value is None or isinstance(value, list | dict) else "quote it"
        raise Flaw("not a string", what, fix, name)
    check_characters(name, value)
    return value


def check_characters(name: str, text: str) -> None:
    """Raise Flaw where a field holds half of a character (a lone surrogate)."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        what = f'field "{name}" holds \\u{ord(text[error.start]):04x}, half of a character'
        raise Flaw("half a character", what, "remove it", name) from error


class _Read(Protocol):
    @property
    def names(self) -> Names: ...
    @property
    def unused(self) -> tuple[str, ...]: ...
    @property
    def history(self) -> tuple[tuple[str, str], ...]: ...


@dataclass(slots=True)
class FieldUse:
    """What to report of a file's fields: rows with other names, earlier rounds, unused fields."""

    unused: Counter[str] = field(default_factory=Counter)
    renamed: Counter[Names] = field(default_factory=Counter)
    num_with_history: int = 0

    def count(self, row: _Read) -> None:
        """Count a row."""
        if row.unused:
            self.unused.update(row.unused)
        if row.names != ALPACA:
            self.renamed[row.names] += 1
        self.num_with_history += bool(row.history)

    def add(self, other: "FieldUse") -> None:
        """Count the rows of another part of the file."""
        self.unused.update(other.unused)
        self.renamed.update(other.renamed)
        self.num_with_history += other.num_with_history

    @classmethod
    def of(cls, rows: Iterable[_Read]) -> "FieldUse":
        """Count all rows of a file."""
        use = cls()
        for row in rows:
            use.count(row)
        return use

    def lines(self) -> list[str]:
        """Return the findings, a line each."""
        lines = [f"{count:,} with {names}" for names, count in self.renamed.items()]
        if self.num_with_history:
            lines.append(f"{self.num_with_history:,} with earlier rounds")
        lines += [
            f"{count:,} with a field {show(name)}, which is not used"
            for name, count in self.unused.items()
        ]
        return lines
