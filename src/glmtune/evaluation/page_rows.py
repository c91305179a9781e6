"""The answers of a comparison as plain data, which page.js draws, and the words that it writes."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from glmtune.errors import visible
from glmtune.evaluation.document import both, spoken
from glmtune.evaluation.labels import Text
from glmtune.evaluation.report import (
    AS_EXPECTED,
    BASE,
    CUT,
    EMPTY,
    EXPECTED,
    SAME,
    TUNED,
    Comparison,
    Pair,
)
from glmtune.evaluation.text_diff import split_differences
from glmtune.evaluation.verdict import TIE

TOKENS = Text("词元", "tokens")
SEARCH = Text("搜索", "Search")
SHOW = Text("显示", "Show")
SORT = Text("排序", "Sort")
ANSWERS = Text("逐条回答", "Answers")
NOTHING_FOUND = Text("没有符合条件的记录。", "No record matches.")
NEEDS_SCRIPT = Text(
    "逐条回答由 JavaScript 画出，这里没有运行。同样的内容在旁边的 compare.md 中。",
    "The answers are drawn by JavaScript, which does not run here; compare.md has them as text.",
)
KEYS = Text(
    "/ 搜索 · j k 上下移动 · Enter 展开 · Esc 返回",
    "/ search · j k next and previous · Enter whole text · Esc back",
)
WORDS = {
    "base": BASE,
    "tuned": TUNED,
    "expected": EXPECTED,
    "empty": EMPTY,
    "cut": CUT,
    "right": AS_EXPECTED,
    "tokens": TOKENS,
    "same": SAME,
    "log_prob": Text("对数概率", "log-probability"),
    "more": Text("展开全文", "Show all"),
    "less": Text("收起", "Show less"),
    "better": Text("变好", "better"),
    "worse": Text("变差", "worse"),
    "collapsed": Text("坍缩", "collapsed"),
    "not_stopped": Text("没有停下", "not stopped"),
    "differs": Text("不同", "differs"),
}
FILTERS = ("better", "worse", "collapsed", "not_stopped", "differs")
ALL = Text("全部", "all")
SORTS = {
    "file": Text("按文件顺序", "in the file's order"),
    "chrf up": Text("chrF 变差最多的在前", "chrF: worst change first"),
    "chrf down": Text("chrF 变好最多的在前", "chrF: best change first"),
    "log_prob up": Text("对数概率变差最多的在前", "log-probability: worst change first"),
    "log_prob down": Text("对数概率变好最多的在前", "log-probability: best change first"),
}


def row_data(comparison: Comparison) -> dict[str, Any]:
    """What page.js reads: words in both languages, and a dictionary for each record.

    Texts are as they are shown, see `errors.visible`; answers are in the pieces of
    `split_differences`.
    """
    examples = (example for finding in comparison.collapse for example in finding.examples)
    collapsed = {example.row for example in examples}
    chrf = comparison.chrf or [(None, None)] * len(comparison.pairs)
    rows = [
        _row(pair, sides, pair.number in collapsed)
        for pair, sides in zip(comparison.pairs, chrf, strict=True)
    ]
    return {"words": WORDS, "rows": rows}


def _row(pair: Pair, chrf: tuple[float | None, float | None], is_collapsed: bool) -> dict[str, Any]:
    shown = [visible(answer.text) for answer in (pair.base, pair.tuned)]
    base, tuned = split_differences(*shown)
    row: dict[str, Any] = {
        "number": pair.number,
        "question": visible(pair.instruction),
        "input": visible(pair.input),
        "expected": visible(pair.expected),
        "base": base,
        "tuned": tuned,
        "tokens": [pair.base.num_tokens, pair.tuned.num_tokens],
        "stopped": [pair.base.stopped, pair.tuned.stopped],
        "right": [pair.is_expected(pair.base), pair.is_expected(pair.tuned)],
        "is": list(_kinds(pair, chrf, is_collapsed)),
    }
    for name, sides, digits in (("chrf", chrf, 1), ("log_prob", pair.log_probs, 3)):
        if None not in sides:
            row[name] = [round(side, digits) for side in sides if side is not None]
    return row


def _kinds(
    pair: Pair, chrf: tuple[float | None, float | None], is_collapsed: bool
) -> Iterator[str]:
    """The filters that let a record through."""
    base, tuned = chrf
    if base is not None and tuned is not None and abs(tuned - base) > TIE:
        yield "better" if tuned > base else "worse"
    if is_collapsed:
        yield "collapsed"
    if not pair.tuned.stopped:
        yield "not_stopped"
    if pair.differs:
        yield "differs"


def rows_section(data: Mapping[str, Any]) -> str:
    """Search, filters, order, and the empty list that page.js fills."""
    rows: Sequence[Mapping[str, Any]] = data["rows"]
    counts = {name: sum(name in row["is"] for row in rows) for name in FILTERS}
    chips = "".join(
        f'<label><input type="radio" name="kind" value="{name}"'
        f"{' checked' if not name else ''}{' disabled' if name and not counts[name] else ''}>"
        f"<span>{both(WORDS.get(name, ALL))} <small>{counts.get(name, len(rows)):,}</small></span>"
        "</label>"
        for name in ("", *FILTERS)
    )
    known = {name for row in rows for name in ("chrf", "log_prob") if name in row}
    options = "".join(
        f'<option value="{value}" data-zh="{word.zh}" data-en="{word.en}">{word}</option>'
        for value, word in SORTS.items()
        if value == "file" or value.split()[0] in known
    )
    return f"""<section class="rows"><h2>{both(ANSWERS)}</h2>
<noscript><p class="none">{both(NEEDS_SCRIPT)}</p></noscript>
<div class="tools">
<input id="search" type="search" placeholder="{SEARCH}" autocomplete="off" spellcheck="false"
 {spoken(SEARCH)}>
<select id="sort" {spoken(SORT)}>{options}</select>
<div class="chips" role="radiogroup" {spoken(SHOW)}>{chips}</div>
<output id="shown" aria-live="polite"></output>
</div>
<p class="keys">{both(KEYS)}</p>
<ol id="rows" role="list"></ol>
<p id="nothing" class="nothing" hidden>{both(NOTHING_FOUND)}</p>
</section>"""
