"""A comparison as one HTML page that needs nothing else: no network, no other file."""

import re
from base64 import b64encode
from collections.abc import Callable, Iterator, Sequence
from difflib import SequenceMatcher
from hashlib import sha256
from html import escape as escape_html
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

STYLE = """
:root {
  color-scheme: light dark;
  --page: #f6f6f3; --card: #fff; --ink: #1d2126; --soft: #666d75; --line: #e2e2dc;
  --accent: #0b6b5d; --accent-soft: #e3f1ee; --gone: #fbe3df; --gone-line: #c9503d;
  --new: #d9f0df; --new-line: #2b8a57; --alarm: #8a5a00; --alarm-soft: #fdf1d6;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #14171a; --card: #1c2024; --ink: #e4e6e8; --soft: #98a0a8; --line: #30363c;
    --accent: #63cdb9; --accent-soft: #17332f; --gone: #4a2723; --gone-line: #e58a7b;
    --new: #1f4230; --new-line: #6cc795; --alarm: #f0c26a; --alarm-soft: #3a2f17;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; max-width: 84rem; padding: 2.5rem 1.5rem 5rem;
  background: var(--page); color: var(--ink); line-height: 1.65;
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "PingFang SC", "Hiragino Sans GB",
    "Microsoft YaHei", "Noto Sans CJK SC", "Noto Sans SC", sans-serif;
  font-variant-numeric: tabular-nums; -webkit-text-size-adjust: 100%;
}
h1, h2, h3, p, dl, dd { margin: 0; }
[hidden], [data-ui=zh] .en, [data-ui=en] .zh { display: none !important; }
.zh + .en::before { content: " "; }
.top { display: flex; justify-content: space-between; align-items: center; color: var(--soft); }
.brand { font-size: .85rem; letter-spacing: .04em; }
button {
  font: inherit; font-size: .85rem; color: inherit; background: none; cursor: pointer;
  border: 1px solid var(--line); border-radius: 99px; padding: .15rem .8rem;
}
h1 { margin-top: .6rem; font-size: clamp(1.6rem, 4vw, 2.3rem); line-height: 1.25; }
.verdict { margin-top: .4rem; font-size: 1.1rem; color: var(--soft); }
.verdict.alarm {
  display: inline-block; margin-top: .9rem; padding: .5rem .9rem; border-radius: .5rem;
  color: var(--alarm); background: var(--alarm-soft);
}
.figures { display: grid; grid-template-columns: repeat(3, 1fr); gap: 1rem; margin-top: 1.6rem; }
.figure {
  padding: .9rem 1.1rem; background: var(--card); border: 1px solid var(--line);
  border-radius: .7rem;
}
.figure dt { font-size: .82rem; color: var(--soft); }
.figure dd { display: flex; gap: 1.6rem; margin-top: .2rem; }
.figure b { display: block; font-size: 1.5rem; font-weight: 600; line-height: 1.3; }
.figure small { color: var(--soft); font-size: .78rem; font-weight: 400; }
.bar { flex: 1; align-self: end; height: .4rem; margin-bottom: .6rem; border-radius: 99px; }
.figure .of-tuned b { color: var(--accent); }
.panels {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); gap: 1rem;
  margin-top: 1.6rem;
}
.panels + .figures { margin-top: 1rem; }
.panel {
  padding: 1.1rem 1.3rem 1.2rem; background: var(--card); border: 1px solid var(--line);
  border-radius: .7rem; min-width: 0;
}
.panel h2 { font-size: .95rem; font-weight: 600; }
.facts {
  display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem; margin-top: 1.3rem;
  font-size: .88rem;
}
.facts dt { color: var(--soft); }
.facts dd { overflow-wrap: anywhere; }
.tools {
  position: sticky; top: 0; z-index: 1; display: flex; flex-wrap: wrap; align-items: center;
  gap: .5rem 1.3rem; margin: 1.4rem -1.5rem 0; padding: .8rem 1.5rem; font-size: .92rem;
  background: color-mix(in srgb, var(--page) 92%, transparent); backdrop-filter: blur(8px);
}
.tools input[type=search] {
  flex: 1 1 14rem; max-width: 26rem; font: inherit; color: inherit; background: var(--card);
  border: 1px solid var(--line); border-radius: 99px; padding: .35rem 1rem;
}
.tools label { display: flex; gap: .5rem; align-items: center; cursor: pointer; }
.tools input[type=checkbox] {
  appearance: none; position: relative; width: 2.1rem; height: 1.2rem; margin: 0; cursor: pointer;
  border-radius: 99px; background: var(--line); transition: background .15s;
}
.tools input[type=checkbox]::after {
  content: ""; position: absolute; inset: .15rem auto .15rem .15rem; width: .9rem;
  border-radius: 99px; background: var(--card); transition: translate .15s;
}
.tools input:checked { background: var(--accent); }
.tools input:checked::after { translate: .9rem; }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
.tools output { margin-left: auto; color: var(--soft); }
.pair {
  margin-top: 1rem; background: var(--card); border: 1px solid var(--line); border-radius: .7rem;
  overflow: clip;
}
.question { padding: 1rem 1.2rem .9rem; }
.question header { display: flex; gap: .8rem; align-items: baseline; }
.question h2 { flex: 1; font-size: 1.05rem; font-weight: 600; line-height: 1.5; }
.number { color: var(--soft); font-size: .85rem; }
.badge {
  flex: none; padding: .05rem .6rem; border-radius: 99px; font-size: .78rem; color: var(--soft);
  border: 1px solid var(--line);
}
.differs .badge {
  color: var(--accent); background: var(--accent-soft); border-color: transparent;
}
.input {
  margin-top: .6rem; padding-left: .9rem; border-left: 3px solid var(--line); color: var(--soft);
}
.answers {
  display: grid; grid-template-columns: repeat(3, 1fr); border-top: 1px solid var(--line);
}
.answers section { padding: .9rem 1.2rem 1.1rem; min-width: 0; }
.answers section + section { border-left: 1px solid var(--line); }
.answers h3 {
  display: flex; flex-wrap: wrap; gap: 0 .7rem; align-items: baseline; font-size: .82rem;
  font-weight: 600; color: var(--soft); margin-bottom: .35rem;
}
.answers h3 small { font-size: .75rem; font-weight: 400; }
.answers h3 .cut { color: var(--alarm); }
.answers h3 .right { margin-left: auto; color: var(--new-line); font-weight: 600; }
.answers .of-tuned { box-shadow: inset 0 2px var(--accent); }
.answers .of-tuned h3 > span { color: var(--accent); }
.answers .expected { background: color-mix(in srgb, var(--page) 55%, var(--card)); }
.text { white-space: pre-wrap; overflow-wrap: anywhere; }
.none, .nothing { color: var(--soft); }
.nothing { margin-top: 3rem; text-align: center; }
del, ins { text-decoration: none; border-radius: .15rem; }
del { background: var(--gone); border-bottom: 1px dashed var(--gone-line); }
ins { background: var(--new); border-bottom: 1px solid var(--new-line); }
@media (max-width: 60rem) {
  .answers { grid-template-columns: 1fr 1fr; }
  .answers .expected { grid-column: 1 / -1; border-left: 0; border-top: 1px solid var(--line); }
}
@media (max-width: 36rem) {
  body { padding: 1.2rem .8rem 3rem; }
  .figures { grid-template-columns: 1fr 1fr; gap: .6rem; }
  .figure:first-child { grid-column: 1 / -1; }
  .tools { margin-inline: -.8rem; padding-inline: .8rem; }
  .tools input[type=search] { flex-basis: 100%; max-width: none; }
  .answers { grid-template-columns: 1fr; }
  .answers section + section { border-left: 0; border-top: 1px solid var(--line); }
}
@media print {
  body { max-width: none; padding: 0; }
  .tools, button { display: none; }
  .pair { break-inside: avoid; }
}
"""

SCRIPT = """
const root = document.documentElement;
const find = (id) => document.getElementById(id);
const speak = (language) => {
  root.dataset.ui = language;
  root.lang = language === "zh" ? "zh-CN" : "en";
};
speak(navigator.language.startsWith("zh") ? "zh" : "en");
find("language").onclick = () => speak(root.dataset.ui === "zh" ? "en" : "zh");

const pairs = [...document.querySelectorAll(".pair")];
const texts = pairs.map((pair) =>
  [...pair.querySelectorAll("[dir=auto]")].map((e) => e.textContent).join("\\n").toLowerCase());
const show = () => {
  const words = find("filter").value.toLowerCase().split(/\\s+/);
  let shown = 0;
  pairs.forEach((pair, i) => {
    const wanted = pair.classList.contains("differs") || !find("differences").checked;
    pair.hidden = !(wanted && words.every((word) => texts[i].includes(word)));
    shown += !pair.hidden;
  });
  find("shown").textContent = `${shown} / ${pairs.length}`;
  find("nothing").hidden = shown > 0;
};
find("filter").oninput = find("differences").onchange = show;
show();
"""

FILTER = Text("筛选", "Filter")
DIFFERENCES_ONLY = Text("只看不同", "Differences only")
NOTHING_FOUND = Text("没有符合条件的记录。", "No record matches.")
NUM_DIFFERENT = Text("不同的回答", "Answers that differ")
TOKENS = Text("词元", "tokens")

# Less of a match between two answers than this is chance, and marking the rest would mark all.
MIN_SIMILARITY = 0.25
# Nor is a match of fewer letters inside a change worth breaking it up.
MIN_MATCH = 3
_WORDS = re.compile(r"[^\W\u3040-\u30ff\u3400-\u9fff]+|\s+|.", re.DOTALL)
_CHINESE = re.compile(r"[\u3400-\u9fff]")


class Panel(NamedTuple):
    """More to show above the answers: a heading, and HTML as it stands, with its own style."""

    title: Text
    body: str
    style: str = ""


def html(
    comparison: Comparison,
    *,
    command: str = "glmtune compare",
    title: Text = TITLE,
    verdict: Text | None = None,
    panels: Sequence[Panel] = (),
) -> str:
    """The page. Every text in it is escaped, and its policy lets no script run but its own.

    Args:
        comparison: the answers.
        command: what made the page.
        title: its heading.
        verdict: what came of it; by default how many answers differ.
        panels: shown under the heading.
    """
    script_hash = b64encode(sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{script_hash}'"
    alarm = "" if comparison.num_different else " alarm"
    facts = "".join(
        f"<dt>{both(label)}</dt><dd>{escape(value)}</dd>"
        for label, value in comparison.facts.items()
    )
    shown = "".join(
        f'<section class="panel"><h2>{both(panel.title)}</h2>{panel.body}</section>'
        for panel in panels
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{escape(comparison.base)} · {escape(comparison.adapter)} · {escape(command)}</title>
<style>{STYLE}{"".join(panel.style for panel in panels)}</style>
</head>
<body>
<header>
<div class="top"><span class="brand">{escape(command)}</span>
<button id="language" type="button">中文 / English</button></div>
<h1>{both(title)}</h1>
<p class="verdict{alarm}">{both(verdict or comparison.verdict)}</p>
{f'<div class="panels">{shown}</div>' if panels else ""}
<dl class="figures">{"".join(_figures(comparison))}</dl>
<dl class="facts">{facts}</dl>
</header>
<div class="tools">
<input id="filter" type="search" placeholder="{FILTER}" aria-label="{FILTER}">
<label><input id="differences" type="checkbox">{both(DIFFERENCES_ONLY)}</label>
<output id="shown"></output>
</div>
<main>
{"".join(map(_pair, comparison.pairs))}
<p id="nothing" class="nothing" hidden>{both(NOTHING_FOUND)}</p>
</main>
<script>{SCRIPT}</script>
</body>
</html>
"""


def escape(text: str) -> str:
    """A text as it is shown on the page, whatever stands in it."""
    return escape_html(visible(text))


def both(text: Text) -> str:
    """A label in both languages, of which the page shows one."""
    return (
        f'<span class="zh" lang="zh-CN">{text.zh}</span><span class="en" lang="en">{text.en}</span>'
    )


def _figures(comparison: Comparison) -> Iterator[str]:
    total = f"<small> / {len(comparison.pairs)}</small>"
    share = f"{comparison.num_different / len(comparison.pairs):.1%}"
    bar = f"background: linear-gradient(to right, var(--accent) {share}, var(--line) {share})"
    yield _figure(
        NUM_DIFFERENT,
        f'<div><b>{comparison.num_different}{total}</b></div><div class="bar" style="{bar}"></div>',
    )

    def sides(show: Callable[[Callable[[Pair], Answer]], str]) -> str:
        return "".join(
            f'<div class="{name}"><b>{show(side)}</b><small>{both(label)}</small></div>'
            for name, label, side in (("of-base", BASE, base_of), ("of-tuned", TUNED, tuned_of))
        )

    yield _figure(STOPPED, sides(lambda side: f"{comparison.num_stopped(side)}{total}"))
    yield _figure(MEAN_LENGTH, sides(lambda side: f"{comparison.mean_length(side):.1f}"))


def _figure(label: Text, value: str) -> str:
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
