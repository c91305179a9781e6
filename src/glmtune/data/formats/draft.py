"""A conversation while its fields are read: turns with their places, tools, what is not used."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from glmtune.data.conversations import ASSISTANT, SYSTEM, Example, Turn
from glmtune.data.fields import CONVERSATIONS, check_characters, is_content, is_empty
from glmtune.data.flaws import Flaw, kind_of, show


@dataclass(slots=True)
class Draft:
    """What a format has read off a row."""

    turns: list[tuple[str, Turn]] = field(default_factory=list)
    """Turns, each with the words for its place in the row."""
    tools: list[Mapping[str, Any]] = field(default_factory=list)
    unused: tuple[str, ...] = ()

    @property
    def example(self) -> Example:
        """The conversation."""
        return Example(tuple(turn for _, turn in self.turns), tuple(self.tools))

    def add(self, where: str, *turns: Turn) -> None:
        """Add the turns that a message makes."""
        for turn in turns:
            self.turns.append((where, turn))

    def begin_with(self, fields: Mapping[str, object], name: str = SYSTEM) -> None:
        """Put the text of a field, if there is one, before all turns."""
        if not is_empty(fields.get(name)):
            where = f'field "{name}"'
            self.turns.insert(0, (where, Turn(SYSTEM, text_in(fields, name, where))))


def list_of_turns(fields: Mapping[str, object], key_of_a_turn: str) -> str | None:
    """The name of the field that holds a list of turns with such a key; None without."""
    for name in CONVERSATIONS:
        turns = fields.get(name)
        first = turns[0] if isinstance(turns, list) and turns else None
        if isinstance(first, dict) and key_of_a_turn in first:
            return name
    return None


def turns_in(fields: Mapping[str, object], name: str) -> list[tuple[str, dict[str, Any]]]:
    """The objects of a list of turns, each with the words for its place.

    Raises:
        Flaw: there is no such list, or something else stands in it.
    """
    turns = fields.get(name)
    if name not in fields:
        what = f'field "{name}" is missing, the row has {show(list(fields))}'
        fix = "add it, keep rows of one kind in a file, or name another --format"
        raise Flaw("missing field", what, fix, name)
    if not isinstance(turns, list):
        what = f'field "{name}" is {show(turns)} ({kind_of(turns)}), not a list of turns'
        raise Flaw("turns", what, "write the turns as a list of objects", name)
    placed = []
    for number, turn in enumerate(turns, start=1):
        where = f'turn {number} of "{name}"'
        if not isinstance(turn, dict):
            what = f"{where} is {show(turn)} ({kind_of(turn)}), not an object"
            raise Flaw("turns", what, "write it with its role and its text", name)
        placed.append((where, turn))
    return placed


def text_in(fields: Mapping[str, object], name: str, where: str) -> str:
    """The text of a turn's field.

    Raises:
        Flaw: it is missing, no string, or holds half a character.
    """
    if name not in fields:
        what = f'{where} has no "{name}", it has {show(list(fields))}'
        raise Flaw("missing field", what, "add it, or rename the field that holds it", name)
    value = fields[name]
    if not isinstance(value, str):
        what = f'"{name}" of {where} is {show(value)} ({kind_of(value)}), not a string'
        raise Flaw("not a string", what, "write its text", name)
    check_characters(name, value)
    return value


THOUGHTS = ("reasoning_content", "reasoning")
"""Fields of a turn that hold the thought before its answer."""


def thought_in(turn: Mapping[str, object], where: str) -> str | None:
    """The thought before an answer; None without one.

    Raises:
        Flaw: it is no string.
    """
    name = next((name for name in THOUGHTS if turn.get(name) is not None), None)
    return None if name is None else text_in(turn, name, where)


def role_in(turn: Mapping[str, object], name: str, roles: Mapping[str, str], where: str) -> str:
    """The role of a turn, by any of its names.

    Raises:
        Flaw: it is missing, or not known.
    """
    said = text_in(turn, name, where)
    if (role := roles.get(said.lower())) is None:
        what = f'"{name}" of {where} is {show(said)}, which is no role that is known'
        raise Flaw("unknown role", what, f"make it one of {', '.join(roles)}", name)
    return role


def call_of(name: object, arguments: object, where: str, supervised: bool | None) -> Turn:
    """An assistant's turn that calls a tool; the arguments are an object, or JSON of one.

    Raises:
        Flaw: the tool has no name, or the arguments are neither.
    """
    if not isinstance(name, str) or not name.strip():
        what = f"{where} calls a tool with the name {show(name)}"
        raise Flaw("call", what, 'write the name as a string in "name"', "name")
    check_characters("name", name)
    text = arguments
    if isinstance(arguments, dict):
        text = json.dumps(arguments, ensure_ascii=False)
    elif not isinstance(arguments, str) or not isinstance(_json_of(arguments), dict):
        what = f"the arguments of {where} are {show(arguments)}, not JSON of an object"
        raise Flaw("arguments", what, "write them as an object, or as its JSON", "arguments")
    assert isinstance(text, str)
    check_characters("arguments", text)
    return Turn(ASSISTANT, text, name, supervised)


def read_tools(value: object, where: str) -> list[Mapping[str, Any]]:
    """Descriptions of tools: a list of objects, or its JSON; properties that are null are left out,
    which data sets with one schema for all rows are full of.

    Raises:
        Flaw: they are neither.
    """
    if is_empty(value):
        return []
    tools = _json_of(value) if isinstance(value, str) else value
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        what = f"{where} is {show(value)} ({kind_of(value)}), not a list of tools"
        raise Flaw("tools", what, 'write it as [{"name": ..., "parameters": ...}, ...]', "tools")
    check_characters("tools", json.dumps(tools, ensure_ascii=False))
    return [_without_nulls(tool) for tool in tools]


def _without_nulls(tool: dict[str, Any]) -> dict[str, Any]:
    inner = tool.get("function")
    if isinstance(inner, dict):
        return tool | {"function": _without_nulls(inner)}
    parameters = tool.get("parameters")
    properties = parameters.get("properties") if isinstance(parameters, dict) else None
    if not isinstance(parameters, dict) or not isinstance(properties, dict):
        return tool
    kept = {name: value for name, value in properties.items() if value is not None}
    return tool | {"parameters": parameters | {"properties": kept}}


def refuse_content(fields: Mapping[str, object], used: Iterable[str], where: str) -> None:
    """Raise Flaw where an unused field of a turn holds what users expect to be trained on."""
    for name, value in fields.items():
        if name not in used and is_content(name) and not is_empty(value):
            what = f'"{name}" of {where} is {show(value)} ({kind_of(value)}), which is not taught'
            raise Flaw(
                "content not used", what, "write it into the turn's text, or remove it", name
            )


def unused_of(
    fields: Mapping[str, object], used: Iterable[str], key: str, draft: Draft
) -> tuple[str, ...]:
    """Name the unused fields of a row; raise Flaw where one holds what should be trained on.

    A text that is one of the turns once more adds nothing.
    """
    used = tuple(used)
    unused = tuple(name for name in fields if name not in used)
    texts = {turn.text.strip() for _, turn in draft.turns} if unused else set()
    for name in unused:
        value = fields[name]
        is_known = isinstance(value, str) and value.strip() in texts
        if is_content(name) and not is_empty(value) and not is_known:
            what = f"field {show(name)} is {show(value)} ({kind_of(value)}), which is not taught"
            fix = f'write what should be taught of it into "{key}", and take the field out'
            raise Flaw("content not used", what, fix, name)
    return unused


def _json_of(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
