"""Chat templates of our own, for folders that have none: they write what rows have.

Names in capitals are filled in from a layout. An answer and what ends it, which may be the role of
the next message, are a ``{% generation %}`` block. The blank that ChatGLM's vocabulary puts before
each text is written out, as in the published templates, so that a text is encoded by itself.
"""

from glmtune.models.glm.layouts import Layout

_ROLES = """\
{%- if tools %}
    {{- raise_exception('tools: the folder has no chat template, which would say how') }}
{%- endif %}
{{- 'PREFIX' }}
{%- for message in messages %}
    {%- set where = 'message ' ~ loop.index ~ ' (' ~ message.role ~ '): ' %}
    {%- if message.role not in ['system', 'user', 'assistant', 'observation'] %}
        {{- raise_exception(where ~ 'the roles are system, user, assistant and observation') }}
    {%- elif message.content is not string %}
        {{- raise_exception(where ~ 'its content has to be a text') }}
    {%- endif %}
    {%- if loop.first or loop.previtem.role != 'assistant' %}
        {{- '<|' ~ message.role ~ '|>' }}
    {%- endif %}
    {%- set text = (message.metadata or '') ~ '\\n' ~ 'BLANK' ~ message.content %}
    {%- if message.role == 'assistant' %}
        {%- generation %}
            {%- if not loop.last %}
                {{- text ~ '<|' ~ loop.nextitem.role ~ '|>' }}
            {%- else %}
                {{- text ~ ('<|observation|>' if message.metadata else 'END') }}
            {%- endif %}
        {%- endgeneration %}
    {%- else %}
        {{- text }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>' }}
{%- endif %}
"""
_ROUNDS = """\
{%- if tools %}
    {{- raise_exception('tools: the model knows none; leave them out') }}
{%- endif %}
{{- 'PREFIX' }}
{%- for message in messages %}
    {%- set where = 'message ' ~ loop.index ~ ' (' ~ message.role ~ '): ' %}
    {%- if message.role != ['user', 'assistant'][loop.index0 % 2] %}
        {{- raise_exception(where ~ 'a question and its answer have to take turns') }}
    {%- elif message.content is not string %}
        {{- raise_exception(where ~ 'its content has to be a text') }}
    {%- elif message.role == 'user' %}
        {{- '' if loop.first else '\\n\\n' }}
        {%- set number = (loop.index0 / 2 + 1) | int %}
        {{- '[Round ' ~ number ~ ']\\n\\n问：' ~ message.content ~ '\\n\\n答：' }}
    {%- elif loop.last %}
        {%- generation %}
            {{- 'BLANK' ~ message.content ~ 'END' }}
        {%- endgeneration %}
    {%- else %}
        {{- message.content }}
    {%- endif %}
{%- endfor %}
"""


def own_template(layout: Layout, *, has_blank: bool) -> str:
    """A chat template that writes a layout.

    Args:
        layout: whose names it writes.
        has_blank: the vocabulary puts a blank before each text.
    """
    template = _ROLES if layout.has_roles else _ROUNDS
    filled = {
        "PREFIX": "".join(layout.prefix),
        "END": layout.end,
        "BLANK": " " if has_blank else "",
    }
    for name, text in filled.items():
        template = template.replace(f"'{name}", f"'{text}").replace(f"{name}'", f"{text}'")
    return template
