"""Turns with `from` and `value`, as ShareGPT's exports and LLaMA-Factory's data sets have them."""

import json
from collections.abc import Mapping

from glmtune.data.conversations import ASSISTANT, OBSERVATION, SYSTEM, USER, Turn
from glmtune.data.fields import is_empty
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

KEY = "conversations"
_CALL = "function_call"
ROLES = {
    "system": SYSTEM, "human": USER, "user": USER, "gpt": ASSISTANT, "assistant": ASSISTANT,
    "chatgpt": ASSISTANT, "bot": ASSISTANT, "model": ASSISTANT, "function_call": _CALL,
    "tool_call": _CALL, "observation": OBSERVATION, "tool": OBSERVATION,
    "function_response": OBSERVATION, "tool_response": OBSERVATION,
}  # fmt: skip
_USED = {"from", "value", "loss", *THOUGHTS}


def is_one(fields: Mapping[str, object]) -> bool:
    """Whether the row holds turns that say whom they are from."""
    return list_of_turns(fields, "from") is not None


def read(fields: Mapping[str, object]) -> Draft:
    """The turns of a row; raises Flaw where they cannot be read."""
    key = list_of_turns(fields, "from") or KEY
    draft = Draft(tools=read_tools(fields.get("tools"), 'field "tools"'))
    for where, turn in turns_in(fields, key):
        refuse_content(turn, _USED, where)
        role, text = role_in(turn, "from", ROLES, where), text_in(turn, "value", where)
        loss = turn.get("loss")
        if not (loss is None or isinstance(loss, bool)):
            what = f'"loss" of {where} is {show(loss)} ({kind_of(loss)})'
            raise Flaw("loss", what, "write true or false", "loss")
        if role == _CALL:
            draft.add(where, *_calls(text, where, loss))
        else:
            said = (loss, thought_in(turn, where)) if role == ASSISTANT else (None, None)
            draft.add(where, Turn(role, text, "", *said))
    draft.begin_with(fields)
    draft.unused = unused_of(fields, (key, "tools", "system"), key, draft)
    return draft


def _calls(text: str, where: str, supervised: bool | None) -> list[Turn]:
    """The calls that a value lists: one object with name and arguments, or a list of such."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    calls = found if isinstance(found, list) else [found]
    if is_empty(found) or not all(isinstance(call, dict) for call in calls):
        what = f'"value" of {where} is {show(text)}, not JSON of a call'
        fix = 'write it as {"name": ..., "arguments": {...}}'
        raise Flaw("arguments", what, fix, "value")
    return [
        call_of(call.get("name"), call.get("arguments", {}), where, supervised) for call in calls
    ]
