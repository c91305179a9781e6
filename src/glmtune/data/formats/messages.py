"""Turns with `role` and `content`, under `messages` or `conversations`.

Sources: OpenAI's chat format (tool_calls, role tool, content in parts, weight); the published
fine-tuning code of ChatGLM3-6B (tools beside the turns, a `tool` turn with name, parameters and
observation, loss) and of GLM-4 (tools inside the system's turn, role observation, metadata).
"""

import json
from collections.abc import Mapping
from typing import Any

from glmtune.data.conversations import ASSISTANT, OBSERVATION, SYSTEM, USER, Turn
from glmtune.data.fields import check_characters, is_empty
from glmtune.data.flaws import Flaw, kind_of, show
from glmtune.data.formats.draft import (
    THOUGHTS,
    Draft,
    call_of,
    list_of_turns,
    read_tools,
    refuse_content,
    role_in,
    text_in,
    thought_in,
    turns_in,
    unused_of,
)

KEY = "messages"
ROLES = {
    "system": SYSTEM, "user": USER, "assistant": ASSISTANT, "observation": OBSERVATION,
    "tool": OBSERVATION, "developer": SYSTEM, "function": OBSERVATION,
}  # fmt: skip
_USED = {
    "role", "content", "name", "loss", "weight", "metadata", "tools", "tool_calls",
    "function_call", "tool_call_id", *THOUGHTS,
}  # fmt: skip
_ROLES_OF_TEXT = (SYSTEM, USER, ASSISTANT)
_CALL_AND_RESULT = {"role", "name", "parameters", "observation", "loss"}


def is_one(fields: Mapping[str, object]) -> bool:
    """Whether the row holds turns with a role."""
    return list_of_turns(fields, "role") is not None or isinstance(fields.get(KEY), list)


def read(fields: Mapping[str, object]) -> Draft:
    """The turns of a row; raises Flaw where they cannot be read."""
    key = list_of_turns(fields, "role") or next(
        (k for k in (KEY, "conversations") if k in fields), KEY
    )
    draft = Draft(tools=read_tools(fields.get("tools"), 'field "tools"'))
    turns = turns_in(fields, key)
    waiting: list[tuple[str | None, str, Turn]] = []  # calls of one turn, in want of their results
    for where, turn in turns:
        is_plain = len(turn) == 2 and "role" in turn and "content" in turn
        if is_plain and not waiting and turn["role"] in _ROLES_OF_TEXT:
            draft.add(where, Turn(turn["role"], _content(turn, where)))
            continue
        role = role_in(turn, "role", ROLES, where)
        if waiting and not (role == OBSERVATION and "parameters" not in turn):
            waiting = _end_calls(draft, waiting)
        if turn["role"] == "tool" and ("parameters" in turn or "observation" in turn):
            _add_call_and_result(draft, where, turn)
            continue
        refuse_content(turn, _USED, where)
        if role == ASSISTANT:
            waiting = _add_answer(draft, where, turn)
            continue
        content = _content(turn, where)
        if waiting:
            called = turn.get("tool_call_id")
            place = next((i for i, (id_, *_) in enumerate(waiting) if id_ and id_ == called), 0)
            _, place_of_call, call = waiting.pop(place)
            draft.add(place_of_call, call)
        tools = turn.get("tools")
        if role == SYSTEM and not is_empty(tools):
            draft.tools += read_tools(tools, f'"tools" of {where}')
            if not content.strip():
                continue
        elif not is_empty(tools):
            what, fix = f'"tools" of {where} stand in a turn of role {role}', "move them to the"
            raise Flaw("tools", what, f"{fix} row's \"tools\", or to the system's turn", "tools")
        draft.add(where, Turn(role, content, _metadata(turn, where)))
    _end_calls(draft, waiting)
    used = [key, "tools"]
    if not any(turn.role == SYSTEM for _, turn in draft.turns):
        draft.begin_with(fields)
        used.append("system")
    draft.unused = unused_of(fields, used, key, draft)
    return draft


def _end_calls(draft: Draft, waiting: list[tuple[str | None, str, Turn]]) -> list:
    """Add calls whose results the row does not have."""
    for _, where, call in waiting:
        draft.add(where, call)
    return []


def _add_answer(
    draft: Draft, where: str, turn: Mapping[str, Any]
) -> list[tuple[str | None, str, Turn]]:
    """Add an assistant's text; returns its calls, each of which goes before its own result."""
    supervised = _supervised(turn, where)
    thought = thought_in(turn, where)
    listed = turn.get("tool_calls")
    calls = [] if is_empty(listed) else listed
    if not isinstance(calls, list):
        what = f'"tool_calls" of {where} is {show(calls)} ({kind_of(calls)}), not a list'
        raise Flaw("call", what, "write it as a list of calls", "tool_calls")
    if not is_empty(turn.get("function_call")):
        calls = [*calls, {"function": turn["function_call"]}]
    waiting = []
    for call in calls:
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict):
            what = f'{where} has {show(call)} in "tool_calls"'
            fix = 'write it as {"function": {"name": ..., "arguments": ...}}'
            raise Flaw("call", what, fix, "tool_calls")
        made = call_of(function.get("name"), function.get("arguments", {}), where, supervised)
        id_ = call.get("id")
        waiting.append((id_ if isinstance(id_, str) else None, where, made))
    text = "" if calls and turn.get("content") is None else _content(turn, where)
    if text.strip() or thought or not calls:
        draft.add(where, Turn(ASSISTANT, text, _metadata(turn, where), supervised, thought))
    return waiting


def _add_call_and_result(draft: Draft, where: str, turn: Mapping[str, Any]) -> None:
    """Add the two turns that one `tool` turn stands for."""
    refuse_content(turn, _CALL_AND_RESULT, where)
    for name in ("parameters", "observation"):
        if name not in turn:
            what = f'{where} has no "{name}", it has {show(list(turn))}'
            raise Flaw("missing field", what, "add it", name)
    result = turn["observation"]
    text = result if isinstance(result, str) else json.dumps(result, ensure_ascii=False)
    check_characters("observation", text)
    call = call_of(turn.get("name"), turn["parameters"], where, _supervised(turn, where))
    draft.add(where, call, Turn(OBSERVATION, text))


def _content(turn: Mapping[str, Any], where: str) -> str:
    """The text of a turn, which may be in parts."""
    parts = turn.get("content")
    if not isinstance(parts, list):
        return text_in(turn, "content", where)
    texts = []
    for part in parts:
        if not isinstance(part, dict) or not isinstance(part.get("text"), str):
            what = f'"content" of {where} holds {show(part)}, which is no text'
            raise Flaw("not a string", what, "leave parts other than text out", "content")
        texts.append(part["text"])
    check_characters("content", text := "".join(texts))
    return text


def _metadata(turn: Mapping[str, Any], where: str) -> str:
    return "" if is_empty(turn.get("metadata")) else text_in(turn, "metadata", where)


def _supervised(turn: Mapping[str, Any], where: str) -> bool | None:
    """What a turn says about its loss: `loss`, or OpenAI's `weight` of 0 or 1."""
    name = "loss" if turn.get("loss") is not None else "weight"
    value = turn.get(name)
    if value is None or (isinstance(value, bool | int) and value in (0, 1)):
        return None if value is None else bool(value)
    what = f'"{name}" of {where} is {show(value)} ({kind_of(value)})'
    raise Flaw("loss", what, "write true or false", name)
