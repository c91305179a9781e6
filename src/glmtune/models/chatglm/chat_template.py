"""The chat template of ChatGLM-6B, whose special names in a text are ordinary text.

`models.special_names` tells those that the template wrote from those in a message.
"""

from collections.abc import Callable

from glmtune.errors import UserError
from glmtune.models.special_names import mark, pattern_of

WRITTEN_NAMES = ("[gMASK]", "<sop>", "<eop>")
NAMES = pattern_of(WRITTEN_NAMES)

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


def assistant_mask(
    rendered: str, spans: list[tuple[int, int]], tokenize: Callable[[str], list[str]]
) -> list[int]:
    """For each piece of a rendered chat, 1 where a ``{% generation %}`` block wrote it.

    Args:
        rendered: as the template left it, of guarded messages.
        spans: first place and end of what each block wrote.
        tokenize: a marked text's pieces.

    Raises:
        UserError: a block begins or ends within a text, so that it has no pieces of its own.
    """
    mask: list[int] = []
    pieces: list[str] = []
    at = 0
    for end in sorted({place for span in spans for place in span} | {len(rendered)}):
        of_part = tokenize(mark(rendered[at:end], NAMES))
        mask += [int(any(start <= at < stop for start, stop in spans))] * len(of_part)
        pieces += of_part
        at = end
    if pieces != tokenize(mark(rendered, NAMES)):
        raise UserError(
            "return_assistant_tokens_mask: a generation block of this chat template begins or ends "
            "within a text; let it begin behind <sop> and end with <eop>"
        )
    return mask
