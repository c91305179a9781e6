"""The frame of a self-contained HTML page: no network, no other file, no script but its own.

Styles and scripts are files beside this module, and are embedded in the page.
"""

import json
from base64 import b64encode
from collections.abc import Mapping, Sequence
from hashlib import sha256
from html import escape as escape_html
from importlib import resources
from typing import NamedTuple

from glmtune.errors import visible
from glmtune.evaluation.labels import Text

LANGUAGE_SWITCH = "中文 / English"


class Panel(NamedTuple):
    """A part of a page with a heading."""

    title: Text
    body: str
    """HTML that is inserted unchanged."""

    @property
    def html(self) -> str:
        """The panel."""
        return f'<section class="panel"><h2>{both(self.title)}</h2>{self.body}</section>'


def document(
    *,
    title: str,
    command: str,
    heading: Text,
    verdict: Text,
    tone: str = "",
    header: str = "",
    body: str,
    files: Sequence[str],
    data: object = None,
) -> str:
    """A whole page around a body. Its content policy allows only its own script and style.

    Args:
        title: of the browser's tab.
        command: the command that made the page.
        heading: of the page.
        verdict: the result in a sentence.
        tone: the verdict's CSS class, such as "alarm".
        header: HTML under it.
        body: HTML below the header.
        files: names of CSS and scripts beside this module, which are embedded.
        data: what the script reads, as JSON in the element `data`; None without any.
    """
    folder = resources.files(__package__)
    css, script = (
        "".join(folder.joinpath(name).read_text("utf-8") for name in files if name.endswith(kind))
        for kind in (".css", ".js")
    )
    policy = (
        f"default-src 'none'; style-src '{_hash(css)}'; script-src '{_hash(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    embedded = "" if data is None else f'<script type="application/json" id="data">{as_json(data)}'
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{escape(title)}</title>
<style>{css}</style>
</head>
<body>
<header>
<div class="top"><span class="brand">{escape(command)}</span>
<button id="language" type="button">{LANGUAGE_SWITCH}</button></div>
<h1>{both(heading)}</h1>
<p class="verdict {tone}">{both(verdict)}</p>
{header}
</header>
<main>
{body}
</main>
{embedded and embedded + "</script>"}
<script>{script}</script>
</body>
</html>
"""


def as_json(data: object) -> str:
    """JSON for a script element, which no text in it can end: `<`, `>` and `&` are escapes.

    So are the line breaks that scripts know and JSON does not.
    """
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def escape(text: str) -> str:
    """Any text as escaped HTML."""
    return escape_html(visible(text))


def both(text: Text) -> str:
    """A label in both languages, of which the page shows one; escaped, as it may name a metric."""
    zh, en = map(escape, text)
    return f'<span class="zh" lang="zh-CN">{zh}</span><span class="en" lang="en">{en}</span>'


def spoken(text: Text) -> str:
    """Attributes of an element that is read out or written by language.js in one language."""
    zh, en = map(escape, text)
    return f'aria-label="{zh} / {en}" data-zh="{zh}" data-en="{en}"'


def facts_list(facts: Mapping[Text, str | Text]) -> str:
    """Labels and values as a list; a value may be in both languages."""
    listed = "".join(
        f"<dt>{both(name)}</dt><dd>{both(value) if isinstance(value, Text) else escape(value)}</dd>"
        for name, value in facts.items()
    )
    return f'<dl class="facts">{listed}</dl>'


def figure(label: Text, value: str) -> str:
    """A number with its label; `value` is HTML."""
    return f'<div class="figure"><dt>{both(label)}</dt><dd>{value}</dd></div>'


def table(headings: Sequence[Text], rows: Sequence[Sequence[Text | str]]) -> str:
    """A table whose first column names the rows; a cell that is no Text is HTML."""
    head = "".join(f'<th scope="col">{both(text)}</th>' for text in headings)
    lines = (
        "<tr>"
        + "".join(
            f'<th scope="row">{cell}</th>' if place == 0 else f"<td>{cell}</td>"
            for place, cell in enumerate(both(c) if isinstance(c, Text) else c for c in row)
        )
        + "</tr>"
        for row in rows
    )
    # A wide table scrolls in its own frame, which the keyboard has to reach.
    return (
        f'<div class="wide" tabindex="0"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _hash(text: str) -> str:
    return f"sha256-{b64encode(sha256(text.encode()).digest()).decode()}"
