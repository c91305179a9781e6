"""The chat template of ChatGLM-6B, and marks on the special names that the template itself writes.

``[gMASK]``, ``<sop>`` and ``<eop>`` in a message are ordinary text; those that the template writes
have to become ids, even if the rendered text is stored as a string first. So `guard` breaks up
these names in messages with `GUARD` before the template runs. The names that are whole afterwards
were written by the template; `mark` puts `MARK` before them, which the tokenizer looks for. Both
are noncharacters, which Unicode reserves for use within a program (U+FDD0 to U+FDEF); in a message
they are replaced by U+FFFD, the replacement character.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

from glmtune.errors import UserError

MARK, GUARD = "\ufdd0", "\ufdd1"
WRITTEN_NAMES = ("[gMASK]", "<sop>", "<eop>")

_NAME = re.compile("|".join(map(re.escape, WRITTEN_NAMES)))
_OPENING = re.compile(r"[\[<]")
_INTERNAL = re.compile(f"[{MARK}{GUARD}]")

# Source of the rounds: the published code's `chat`, as revision v1.1 has it.
CHAT_TEMPLATE = """\
{%- if tools %}{{ raise_exception('tools: ChatGLM-6B knows none; leave them out') }}{% endif %}
{%- if documents %}
    {{- raise_exception('documents: ChatGLM-6B knows none; write them into the question') }}
{%- endif %}
{%- set ns = namespace(system='', earlier='', round=0, question=none, answer=none) %}
{%- for message in messages %}
    {%- set where = 'message ' ~ loop.index ~ ' (' ~ message.role ~ '): ' %}
    {%- if message.tool_calls %}
        {{- raise_exception(where ~ 'ChatGLM-6B calls no tools; leave tool_calls out') }}
    {%- endif %}
    {%- set ns.text = '' %}
    {%- if message.content is string %}
        {%- set ns.text = message.content %}
    {%- elif message.content is not defined or message.content is not sequence %}
        {{- raise_exception(where ~ 'has no text; give it a content') }}
    {%- else %}
        {%- for part in message.content %}
            {%- if part.text is not string %}
                {{- raise_exception(where ~ 'ChatGLM-6B reads text alone; leave other parts out') }}
            {%- endif %}
            {%- set ns.text = ns.text ~ part.text %}
        {%- endfor %}
    {%- endif %}
    {%- if message.role == 'system' %}
        {%- if not loop.first %}
            {{- raise_exception(where ~ 'only the first message may be of the system') }}
        {%- endif %}
        {%- set ns.system = ns.text ~ '\\n' %}
    {%- elif message.role == 'user' %}
        {%- if ns.answer is not none %}
            {%- set ns.earlier = ns.earlier ~ '[Round ' ~ ns.round ~ ']\\n问：' ~ ns.question %}
            {%- set ns.earlier = ns.earlier ~ '\\n答：' ~ ns.answer ~ '\\n' %}
            {%- set ns.round = ns.round + 1 %}
            {%- set ns.answer = none %}
        {%- elif ns.question is not none %}
            {{- raise_exception(where ~ 'no answer before it; join the two questions') }}
        {%- endif %}
        {%- set ns.question = ns.system ~ ns.text %}
        {%- set ns.system = '' %}
    {%- elif message.role == 'assistant' %}
        {%- if ns.question is none or ns.answer is not none %}
            {{- raise_exception(where ~ 'no question before it; begin with one of the user') }}
        {%- endif %}
        {%- set ns.answer = ns.text %}
    {%- else %}
        {{- raise_exception(where ~ 'the roles are system, user and assistant') }}
    {%- endif %}
{%- endfor %}
{%- if ns.question is none %}
    {{- raise_exception('no question: begin with a message of the user') }}
{%- elif add_generation_prompt and ns.answer is not none %}
    {{- raise_exception('add_generation_prompt: the last message is an answer; ask, or leave it') }}
{%- elif ns.earlier %}
    {{- ns.earlier ~ '[Round ' ~ ns.round ~ ']\\n问：' ~ ns.question ~ '\\n答：' }}
{%- else %}
    {{- ns.question }}
{%- endif %}
{{- '[gMASK]<sop>' }}
{%- if ns.answer is not none %}
    {%- generation %}
        {{- ns.answer ~ '<eop>' }}
    {%- endgeneration %}
{%- endif %}
"""


def guard(value: Any) -> Any:
    """Break up special names in all strings of messages, tools, documents or variables.

    Objects become dictionaries, which a template can read; keys whose value is None are left out.
    """
    if isinstance(value, str):
        return _OPENING.sub(rf"\g<0>{GUARD}", _INTERNAL.sub("\ufffd", value))
    if hasattr(value, "messages"):
        return guard(value.messages)
    if isinstance(value, Mapping):
        return {key: guard(part) for key, part in value.items() if part is not None}
    if isinstance(value, list | tuple):
        return [guard(part) for part in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return guard({f.name: getattr(value, f.name) for f in dataclasses.fields(value)})
    if callable(dump := getattr(value, "model_dump", None)) and not isinstance(value, type):
        return guard(dump())
    return value


def mark(rendered: str) -> str:
    """Mark the names that the template wrote, and restore those in messages."""
    return _NAME.sub(rf"{MARK}\g<0>", rendered).replace(GUARD, "")


def assistant_mask(
    rendered: str, spans: list[tuple[int, int]], tokenize: Callable[[str], list[str]]
) -> list[int]:
    """For each piece of a rendered chat, 1 where a ``{% generation %}`` block wrote it.

    Args:
        rendered: the template's output for guarded messages.
        spans: start and end of what each block wrote, in characters.
        tokenize: splits a marked text into pieces.

    Raises:
        UserError: a block begins or ends within a text, so that it has no pieces of its own.
    """
    mask: list[int] = []
    pieces: list[str] = []
    at = 0
    for end in sorted({place for span in spans for place in span} | {len(rendered)}):
        of_part = tokenize(mark(rendered[at:end]))
        mask += [int(any(start <= at < stop for start, stop in spans))] * len(of_part)
        pieces += of_part
        at = end
    if pieces != tokenize(mark(rendered)):
        raise UserError(
            "return_assistant_tokens_mask: a generation block of this chat template begins or ends "
            "within a text; let it begin after <sop> and end with <eop>"
        )
    return mask
