"""Calls of tools in an answer: the name of a tool, a newline and its arguments.

Sources: the published fine-tuning code and chat templates of ChatGLM3-6B (arguments as Python in a
fence), GLM-4-9B and GLM-4-0414 (arguments as JSON). They write several calls one after another,
with role tokens between them that have no text.
"""

import ast
import json
from collections.abc import Collection

from glmtune.data.thoughts import CLOSE

_FENCE, _PYTHON_CALL = "```", "tool_call"


def read_json_calls(text: str, names: Collection[str]) -> list[tuple[str, str]] | None:
    """The calls of an answer whose arguments are JSON; None where it is anything else."""
    rest, calls = text.rpartition(CLOSE)[2].strip(), []
    while rest:
        name, _, rest = rest.partition("\n")
        if name.strip() not in names:
            return None
        try:
            arguments, end = json.JSONDecoder().raw_decode(rest.lstrip())
        except (ValueError, RecursionError):
            return None
        if not isinstance(arguments, dict):
            return None
        calls.append((name.strip(), json.dumps(arguments, ensure_ascii=False)))
        rest = rest.lstrip()[end:].strip()
    return calls or None


def read_python_calls(text: str, names: Collection[str]) -> list[tuple[str, str]] | None:
    """The call of an answer whose arguments are those of Python's `tool_call`."""
    name, _, rest = text.strip().partition("\n")
    if name.strip() not in names:
        return None
    code = rest.strip().removeprefix(_FENCE).removeprefix("python")
    code = code.rstrip().removesuffix(_FENCE).strip()
    try:
        call = ast.parse(code, mode="eval").body
        if not isinstance(call, ast.Call) or call.args or ast.unparse(call.func) != _PYTHON_CALL:
            return None
        values = {each.arg: ast.literal_eval(each.value) for each in call.keywords}
        if None in values:
            return None
        return [(name.strip(), json.dumps(values, ensure_ascii=False))]
    except (SyntaxError, TypeError, ValueError, MemoryError, RecursionError):
        return None
