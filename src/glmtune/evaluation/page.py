"""A comparison as one self-contained HTML page: no network, no other file.

Styles and scripts are files beside this module, and are embedded in it.
"""

import re
from base64 import b64encode
from collections.abc import Callable, Iterator, Mapping, Sequence
from difflib import SequenceMatcher
from hashlib import sha256
from html import escape as escape_html
from importlib import resources
from typing import NamedTuple

from glmtune.errors import visible
from glmtune.evaluation.report import (
    AS_EXPECTED,
    BASE,
    CUT,
    DIFFERS,
    EMPTY,
    EXPECTED,
    MEAN_LENGTH,
    SAME,
    STOPPED,
    TITLE,
    TUNED,
    Comparison,
    Pair,
    Text,
    base_of,
    tuned_of,
)
from glmtune.generation import Answer

FILTER = Text("筛选", "Filter")
DIFFERENCES_ONLY = Text("只看不同", "Differences only")
NOTHING_FOUND = Text("没有符合条件的记录。", "No record matches.")
NUM_DIFFERENT = Text("不同的回答", "Answers that differ")
TOKENS = Text("词元", "tokens")

# Below this similarity a match of two answers is chance, and marking the rest would mark all.
MIN_SIMILARITY = 0.25
# A match of fewer letters than this inside a change does not split the change.
MIN_MATCH = 3
_WORDS = re.compile(r"[^\W\u3040-\u30ff\u3400-\u9fff]+|\s+|.", re.DOTALL)
_CHINESE = re.compile(r"[\u3400-\u9fff]")


class Panel(NamedTuple):
    """A panel to show above the answers: a heading, and HTML that is inserted unchanged."""

    title: Text
    body: str


def document(
    *,
    title: str,
    command: str,
    heading: Text,
    verdict: Text,
    is_alarm: bool,
    summary: str,
    body: str,
    files: Sequence[str],
    style: str = "",
) -> str:
    """A whole page around a body. Its content policy allows only its own script.

    Args:
        title: of the browser's tab.
        command: the command that made the page.
        heading: of the page.
        verdict: the result in one line.
        is_alarm: whether that is bad.
        summary: HTML under it.
        body: HTML below the header.
        files: names of CSS and scripts beside this module, which are embedded.
        style: more CSS.
    """
    folder = resources.files(__package__)
    css, script = (
        "".join(folder.joinpath(name).read_text("utf-8") for name in files if name.endswith(kind))
        for kind in (".css", ".js")
    )
    script_hash = b64encode(sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{script_hash}'"
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{escape(title)}</title>
<style>{css}{style}</style>
</head>
<body>
<header>
<div class="top"><span class="brand">{escape(command)}</span>
<button id="language" type="button">中文 / English</button></div>
<h1>{both(heading)}</h1>
<p class="verdict{" alarm" * is_alarm}">{both(verdict)}</p>
{summary}
</header>
{body}
<script>{script}</script>
</body>
</html>
"""


def facts_list(facts: Mapping[Text, str | Text]) -> str:
    """Labels and values as a list; a value may be in both languages."""
    listed = "".join(
        f"<dt>{both(name)}</dt><dd>{both(value) if isinstance(value, Text) else escape(value)}</dd>"
        for name, value in facts.items()
    )
    return f'<dl class="facts">{listed}</dl>'


def html(
    comparison: Comparison,
    *,
    command: str = "glmtune compare",
    title: Text = TITLE,
    verdict: Text | None = None,
    panels: Sequence[Panel] = (),
    style: str = "",
) -> str:
    """Build the page of a comparison; all texts are escaped.

    Args:
        comparison: the answers.
        command: the command that made the page.
        title: its heading.
        verdict: the result in one line; by default how many answers differ.
        panels: shown under the heading.
        style: CSS for the panels.
    """
    shown = "".join(
        f'<section class="panel"><h2>{both(panel.title)}</h2>{panel.body}</section>'
        for panel in (*panels, *_score_panels(comparison))
    )
    return document(
        title=f"{comparison.base} · {comparison.adapter} · {command}",
        command=command,
        heading=title,
        verdict=verdict or comparison.verdict,
        is_alarm=not comparison.num_different,
        summary=f"""{f'<div class="panels">{shown}</div>' if shown else ""}
<dl class="figures">{"".join(_figures(comparison))}</dl>
{facts_list(comparison.facts)}""",
        body=f'''<div class="tools">
<input id="filter" type="search" placeholder="{FILTER}" aria-label="{FILTER}">
<label><input id="differences" type="checkbox">{both(DIFFERENCES_ONLY)}</label>
<output id="shown"></output>
</div>
<main>
{"".join(map(_pair, comparison.pairs))}
<p id="nothing" class="nothing" hidden>{both(NOTHING_FOUND)}</p>
</main>''',
        files=("page.css", "language.js", "page.js"),
        style=style,
    )


def escape(text: str) -> str:
    """Any text as escaped HTML."""
    return escape_html(visible(text))


def both(text: Text) -> str:
    """A label in both languages, of which the page shows one; escaped, as it may name a metric."""
    zh, en = map(escape, text)
    return f'<span class="zh" lang="zh-CN">{zh}</span><span class="en" lang="en">{en}</span>'


def _score_panels(comparison: Comparison) -> Iterator[Panel]:
    """A table of scores for each language, and for all rows."""
    for title, (headings, *rows) in comparison.tables():
        head = "".join(f'<th scope="col">{both(text)}</th>' for text in headings)
        body = "".join(
            f'<tr><th scope="row">{both(label)}</th>'
            + "".join(f"<td>{escape(cell.en)}</td>" for cell in cells)
            + "</tr>"
            for label, *cells in rows
        )
        table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        yield Panel(title, f'<div class="wide">{table}</div>')


def _figures(comparison: Comparison) -> Iterator[str]:
    total = f"<small> / {len(comparison.pairs)}</small>"
    share = f"{comparison.num_different / len(comparison.pairs):.1%}"
    bar = f"background: linear-gradient(to right, var(--accent) {share}, var(--line) {share})"
    yield figure(
        NUM_DIFFERENT,
        f'<div><b>{comparison.num_different}{total}</b></div><div class="bar" style="{bar}"></div>',
    )

    def sides(show: Callable[[Callable[[Pair], Answer]], str]) -> str:
        return "".join(
            f'<div class="{name}"><b>{show(side)}</b><small>{both(label)}</small></div>'
            for name, label, side in (("of-base", BASE, base_of), ("of-tuned", TUNED, tuned_of))
        )

    yield figure(STOPPED, sides(lambda side: f"{comparison.num_stopped(side)}{total}"))
    yield figure(MEAN_LENGTH, sides(lambda side: f"{comparison.mean_length(side):.1f}"))


def figure(label: Text, value: str) -> str:
    """A number with its label; `value` is HTML."""
    return f'<div class="figure"><dt>{both(label)}</dt><dd>{value}</dd></div>'


def _pair(pair: Pair) -> str:
    base, tuned = mark_differences(pair.base.text, pair.tuned.text)
    given = f'<p class="input text"{_language(pair.input)}>{escape(pair.input)}</p>'
    return f"""<article class="pair{" differs" if pair.differs else ""}">
<div class="question"><header><span class="number">{pair.number}</span>
<h2 class="text"{_language(pair.instruction)}>{escape(pair.instruction)}</h2>
<span class="badge">{both(DIFFERS if pair.differs else SAME)}</span></header>
{given if pair.input else ""}</div>
<div class="answers">
{_answer("of-base", BASE, pair.base, base, pair.is_expected(pair.base))}
{_answer("of-tuned", TUNED, pair.tuned, tuned, pair.is_expected(pair.tuned))}
<section class="expected"><h3>{both(EXPECTED)}</h3>
{_text(pair.expected, escape(pair.expected))}</section>
</div>
</article>
"""


def _answer(name: str, label: Text, answer: Answer, marked: str, right: bool) -> str:
    tick = f'<small class="right">✓ {both(AS_EXPECTED)}</small>' if right else ""
    cut = "" if answer.stopped else f'<small class="cut">{both(CUT)}</small>'
    return (
        f'<section class="{name}"><h3><span>{both(label)}</span>'
        f"<small>{answer.num_tokens} {both(TOKENS)}</small>{cut}{tick}</h3>\n"
        f"{_text(answer.text, marked)}</section>"
    )


def _text(text: str, marked: str) -> str:
    if not text.strip():
        return f'<p class="none">{both(EMPTY)}</p>'
    return f'<p class="text"{_language(text)}>{marked}</p>'


def _language(text: str) -> str:
    """Attributes by which a browser picks the right glyphs and direction."""
    return f' lang="{"zh-CN" if _CHINESE.search(text) else "en"}" dir="auto"'


def mark_differences(base: str, tuned: str) -> tuple[str, str]:
    """Both texts as HTML: what only the first has in <del>, what only the second has in <ins>.

    Words are compared whole, Chinese character by character. Texts that have little in common are
    left unmarked.
    """
    words_a, words_b = _WORDS.findall(base), _WORDS.findall(tuned)
    matcher = SequenceMatcher(None, words_a, words_b, autojunk=False)
    if base == tuned or matcher.ratio() < MIN_SIMILARITY:
        return escape(base), escape(tuned)
    marked_a, marked_b, end_a, end_b = "", "", 0, 0
    for a, b, size in matcher.get_matching_blocks():
        common = "".join(words_a[a : a + size])
        at_an_end = a == b == 0 or (a + size, b + size) == (len(words_a), len(words_b))
        if len(common.strip()) < MIN_MATCH and not at_an_end:
            continue
        marked_a += _mark("del", words_a[end_a:a]) + escape(common)
        marked_b += _mark("ins", words_b[end_b:b]) + escape(common)
        end_a, end_b = a + size, b + size
    return marked_a, marked_b


def _mark(tag: str, words: list[str]) -> str:
    return f"<{tag}>{escape(''.join(words))}</{tag}>" if words else ""
