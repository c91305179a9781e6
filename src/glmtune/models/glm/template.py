"""A folder's chat template beside the layout of rows: how answers begin, and where the two differ.

Templates are rendered as transformers does it, but without transformers, so that rows can be
checked before they are made.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glmtune.data.conversations import ASSISTANT, SYSTEM, USER, Turn
from glmtune.data.files import read_json_object, read_text
from glmtune.data.flaws import Flaw, show
from glmtune.data.row_rule import as_ids
from glmtune.data.thoughts import OPEN
from glmtune.errors import reason_of
from glmtune.models.glm.layouts import ROLES
from glmtune.models.special_names import MARK, guard, mark

if TYPE_CHECKING:
    from glmtune.models.glm.conversations import ConversationEncoder

TEMPLATE_FILE, SETTINGS_FILE = "chat_template.jinja", "tokenizer_config.json"
GENERATION_FILE = "generation_config.json"

_ASKED = (USER, "Why is it 17?")
_ANSWERED = (ASSISTANT, "因为 3 + 14 = 17。")
_PROBES = {
    "one turn": [_ASKED],
    "two turns": [_ASKED, _ANSWERED, (USER, "再说一遍。")],
    "a system message": [(SYSTEM, "Answer briefly."), _ASKED],
}
_WHOLE = "a whole conversation"
_SHOWN_BEFORE, _SHOWN_AFTER = 3, 4


def read_template(folder: Path) -> str | None:
    """The chat template of a folder, the default one where there are several; None without.

    Raises:
        UserError: a file that cannot be read.
    """
    if (folder / TEMPLATE_FILE).is_file():
        return read_text(str(folder / TEMPLATE_FILE))
    file = folder / SETTINGS_FILE
    found = read_json_object(file).get("chat_template") if file.is_file() else None
    if isinstance(found, list):
        named = {t.get("name"): t.get("template") for t in found if isinstance(t, dict)}
        found = named.get("default")
    return found if isinstance(found, str) else None


def render(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool,
    **variables: Any,
) -> str:
    """What a chat template makes of messages; raises jinja2's errors, and those of its code."""
    return _compiled(template).render(
        messages=messages, add_generation_prompt=add_generation_prompt, **variables
    )


@lru_cache(maxsize=4)
def _compiled(template: str) -> Any:
    """A chat template as a program."""
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """``{% generation %}`` blocks, whose text is kept as it stands."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body).set_lineno(line)

    def refuse(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = lambda value, **options: json.dumps(
        value, **{"ensure_ascii": False, **options}
    )
    environment.globals["raise_exception"] = refuse
    return environment.from_string(template)


def _template_ids(
    encoder: ConversationEncoder, probe: list[tuple[str, str]], *, begin_answer: bool = True
) -> list[int]:
    """The ids of the folder's own rendering of a conversation."""
    assert encoder.folder_template is not None
    messages = guard([{"role": r, "content": text} for r, text in probe], encoder.beginnings)
    text = render(encoder.folder_template, messages, add_generation_prompt=begin_answer)
    return encoder.written_ids(mark(text, encoder.written_names))


def _row_ids(
    encoder: ConversationEncoder, probe: list[tuple[str, str]], *, begin_answer: bool = True
) -> list[int]:
    turns = [Turn(role, text) for role, text in probe]
    return encoder.conversation_ids(turns, begin_answer=begin_answer)


def generation_ids(encoder: ConversationEncoder) -> tuple[int, ...]:
    """The ids of the newline, where the folder's template ends a prompt with it; else none."""
    newline = encoder.newline_ids
    if encoder.folder_template is None or not newline:
        return ()
    probe = _PROBES["one turn"]
    try:
        theirs = _template_ids(encoder, probe)
    except Exception:  # a template is a program; `check_template` reports that it fails
        return ()
    ours = [*_row_ids(encoder, probe), *newline]
    return newline if theirs[: len(ours)] == ours else ()


def opens_thought(template: str | None) -> bool:
    """Whether a chat template ends a prompt with the beginning of a thought."""
    if template is None or OPEN not in template:
        return False
    messages = [{"role": role, "content": text} for role, text in _PROBES["one turn"]]
    try:
        return render(template, messages, add_generation_prompt=True).rstrip().endswith(OPEN)
    except Exception:  # a template is a program; `check_template` reports that it fails
        return False


def tools_of_template(
    encoder: ConversationEncoder, tools: Sequence[Mapping[str, Any]]
) -> str | None:
    """The system message in which a folder's chat template describes tools; None where it does not.

    Templates take tools as a variable of their own, or from the message.

    Raises:
        Flaw: it leaves one of the tools out.
    """
    if encoder.folder_template is None or "tools" not in encoder.folder_template:
        return None
    return _written_tools(
        encoder.folder_template,
        json.dumps([_as_function(tool) for tool in tools]),
        encoder.beginnings,
        encoder.written_names,
    )


@lru_cache(maxsize=256)  # most data sets describe a few tools again and again
def _written_tools(
    template: str, tools_json: str, beginnings: re.Pattern, names: re.Pattern
) -> str | None:
    tools = guard(json.loads(tools_json), beginnings)
    asked = {"role": USER, "content": _ASKED[1]}
    head = f"{MARK}{ROLES[SYSTEM]}\n"
    for messages, variables in (
        ([asked], {"tools": tools}),
        ([{"role": SYSTEM, "content": "", "tools": tools}, asked], {}),
    ):
        try:
            text = render(template, messages, add_generation_prompt=False, **variables)
        except Exception:  # a template is a program; `check_template` reports that it fails
            continue
        _, found, rest = mark(text, names).partition(head)
        written = rest.partition(MARK)[0]
        if not found or not written:
            continue
        for tool in json.loads(tools_json):
            name = tool.get("function", {}).get("name", tool.get("type"))
            if f"## {name}\n" not in written:
                what = f"the tool {show(tool)}, which the folder's chat template leaves out"
                fix = 'describe it as {"type": "function", "function": {"name": ...}}'
                raise Flaw("tools", what, f"{fix}, or leave it out", "tools")
        return written
    return None


def _as_function(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    """A tool as templates take it: a function says that it is one."""
    if isinstance(tool.get("function"), dict):
        return {"type": "function", **tool}
    return {"type": "function", "function": tool} if isinstance(tool.get("name"), str) else tool


def check_template(encoder: ConversationEncoder) -> list[str]:
    """Compare the rows with a folder's chat template, token by token, and with its settings' ids.

    Returns:
        A message for each difference, of up to three lines; the first of the template's alone.

    Raises:
        UserError: a settings file that cannot be read.
    """
    return [*_compare_template(encoder), *_compare_ids(encoder)]


def _compare_template(encoder: ConversationEncoder) -> list[str]:
    """Compare the folder's chat template with the rows, token by token.

    An end that rows have no part in may differ: a newline behind the last role, which
    `generation_ids` repeats, the end of an answer, and the role that GLM-Edge's template always
    writes. Nor does the blank matter that ChatGLM3-6B's templates write before a newline or behind
    it, since no tokenizer of the model made it part of its ids.
    """
    if encoder.folder_template is None:
        return []
    newline = list(encoder.newline_ids)
    # Such a template leaves the prefix to the tokenizer, which begins every text with it.
    prefix = [] if encoder.layout.has_roles else [encoder.ids[n] for n in encoder.layout.prefix]
    for what, probe in _PROBES.items():
        if not encoder.layout.has_roles and probe[0][0] == SYSTEM:
            continue
        try:
            theirs = _template_ids(encoder, probe)
        except Exception as error:
            return [f"chat template: fails on {what} ({reason_of(error)[:200]})"]
        theirs = theirs if theirs[: len(prefix)] == prefix else prefix + theirs
        ours = _row_ids(encoder, probe)
        if theirs in (ours, ours + newline):
            continue
        if newline and theirs[: len(ours + newline)] == ours + newline:
            more = _shown(encoder, theirs[len(ours + newline) :][:_SHOWN_AFTER])
            have = (
                "its thought, or else the answer itself"
                if encoder.opens_thoughts
                else "the answer itself"
            )
            return [
                f"chat template: a prompt goes on behind the newline of the answer with {more}; "
                f"rows have {have} there, and answers are generated without it"
            ]
        return [_difference(encoder, what, ours, theirs)]
    probe = [_ASKED, _ANSWERED]
    ours = _row_ids(encoder, probe, begin_answer=False)
    try:
        theirs = _template_ids(encoder, probe, begin_answer=False)
    except Exception as error:
        return [f"chat template: fails on {_WHOLE} ({reason_of(error)[:200]})"]
    theirs = theirs if theirs[: len(prefix)] == prefix else prefix + theirs
    ends = [*([encoder.ids[name]] for name in _endings(encoder)), []]
    return (
        []
        if theirs in [ours + end for end in ends]
        else [_difference(encoder, _WHOLE, ours, theirs)]
    )


def _endings(encoder: ConversationEncoder) -> list[str]:
    """What a template may write behind a last answer."""
    names = [*encoder.layout.stops, *([ROLES[ASSISTANT]] if encoder.layout.has_roles else [])]
    return [name for name in names if name in encoder.ids]


def _difference(encoder: ConversationEncoder, what: str, ours: list[int], theirs: list[int]) -> str:
    """The first difference between two rows of ids, and what stands around it."""
    pairs = zip(ours, theirs, strict=False)
    place = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(ours), len(theirs)))
    start = max(0, place - _SHOWN_BEFORE)
    lines = [
        f"chat template: differs from the rows at token {place + 1} of {what}:",
        f"  rows:     {_shown(encoder, ours[start : place + _SHOWN_AFTER])}",
        f"  template: {_shown(encoder, theirs[start : place + _SHOWN_AFTER])}",
    ]
    return "\n".join(lines)


def _shown(encoder: ConversationEncoder, ids: Sequence[int]) -> str:
    return " ".join(f"{id_} {encoder.piece_of(id_)!r}" for id_ in ids) or "(nothing)"


def _compare_ids(encoder: ConversationEncoder) -> list[str]:
    """Compare special ids and stop ids with the folder's settings: a line for each difference."""
    from glmtune.models.glm.conversations import SPARE_ROWS

    folder, found = encoder.folder, []
    for name, id_ in encoder.ids.items():
        published = encoder.layout.specials.get(name)
        is_whole = abs(encoder.layout.num_rows - encoder.vocab_size) < SPARE_ROWS
        if is_whole and published not in (None, id_):
            found.append(f"{name}: the vocabulary has id {id_}, the published one {published}")
    for name, id_ in _named_ids(folder / SETTINGS_FILE).items():
        if encoder.ids.get(name, id_) != id_:
            found.append(
                f"{SETTINGS_FILE}: says {name} has id {id_}, the vocabulary {encoder.ids[name]}"
            )
    file = folder / GENERATION_FILE
    settings = read_json_object(file) if file.is_file() else {}
    eos, pad = settings.get("eos_token_id"), settings.get("pad_token_id")
    stops = as_ids(eos)
    end, ours = encoder.ids[encoder.layout.end], list(encoder.stop_ids)
    if eos is not None and (end not in stops or not set(stops) <= set(ours)):
        found.append(
            f"{GENERATION_FILE}: ends answers at {stops}, rows at {end} "
            f"({encoder.layout.end}), and answers here at {ours}"
        )
    if pad not in (None, encoder.ids[encoder.layout.pad]):
        found.append(
            f"{GENERATION_FILE}: pads with {pad}, rows with {encoder.ids[encoder.layout.pad]} "
            f"({encoder.layout.pad})"
        )
    return found


def _named_ids(file: Path) -> dict[str, int]:
    """The added tokens that a tokenizer_config.json lists, by name."""
    listed = read_json_object(file).get("added_tokens_decoder") if file.is_file() else None
    if not isinstance(listed, dict):
        return {}
    return {
        token["content"]: int(id_)
        for id_, token in listed.items()
        if str(id_).isdecimal()
        and isinstance(token, dict)
        and isinstance(token.get("content"), str)
    }
