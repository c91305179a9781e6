"""Rows, token by token, as one self-contained HTML page: no network, no other file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from glmtune.data.row_stats import WORDS_EN, WORDS_ZH, RowStats, count_words
from glmtune.evaluation.bars import bar
from glmtune.evaluation.document import both, document, escape, facts_list, figure
from glmtune.evaluation.page_rows import TOKENS
from glmtune.evaluation.report import MODEL, Text
from glmtune.evaluation.row_view import ShownRow, ShownToken

if TYPE_CHECKING:
    from glmtune.evaluation.inspect import Inspection

TITLE = Text("模型眼中的训练数据", "Rows as the model sees them")
FILE = Text("数据", "Rows from")
ROWS = Text("样本", "Rows")
TEACH_END = Text("教会何时结束", "teach an end")
SUPERVISED = Text("监督词元", "Supervised")
PREFIX = Text("双向可见的前缀", "Prefix, seen both ways")
SPECIAL = Text("特殊词元", "Special")
NOT_SUPERVISED = Text("只读，不算损失", "Read only")
LENGTH = Text("长度（词元）", "Length in tokens")
MEDIAN, MOST = Text("中位数", "median"), Text("最长", "longest")
LANGUAGES = Text("回答的语言", "Languages of answers")
ANSWERS = Text("每条的监督段数", "Supervised stretches")
TURNS = Text("轮次（消息数）", "Turns")
THOUGHTS = Text("含思考的样本", "Rows with a thought")
TOOLS = Text("含工具的样本", "Rows with tools")
NOTE = Text("说明", "Note")
IDS = Text("显示 id", "Show ids")
PLACE, ID, POSITION = Text("位置", "place"), Text("id", "id"), Text("位置编码", "position")
TOUCH = Text("点一个词元看它的编号。", "Point at a token for its numbers.")
PADDING = Text("个填充", "padding")
FROM = Text("样本拼接中从", "in a pack from")
ANSWER_AT = Text("最后一个回答从", "last answer from")
REFUSED = Text("tokenize 与 train 拒绝这份数据", "Refused by tokenize and train")
NAMES_OF_LANGUAGES = {
    "Chinese": Text("中文", "Chinese"),
    "English": Text("英文", "English"),
    "other": Text("其他", "other"),
}


def page_of_rows(found: Inspection) -> str:
    """Build the page; all texts are escaped."""
    stats = found.stats
    if stats is None:
        verdict = Text("没有样本留下。", "No row is kept.")
    elif found.refusal:
        # The reason is the one line that the commands print, which is English.
        verdict = Text(*(f"{text}: {escape(found.refusal)}" for text in REFUSED))
    else:
        verdict = Text(
            f"{stats.num_rows:,} 条样本，{stats.share:.1%} 的词元参与损失。",
            f"{stats.num_rows:,} rows; {stats.share:.1%} of the tokens are supervised.",
        )
    facts: dict[Text, str | Text] = {FILE: found.path, MODEL: found.base}
    figures = ""
    if stats:
        figures = f'<dl class="figures">{"".join(_figures(stats))}</dl>'
        facts |= dict(_facts(stats))
    notes = "".join(f'<p class="note">{both(NOTE)}: {escape(note)}</p>' for note in found.notes)
    legend = "".join(
        f'<span><i class="{css}">&nbsp;</i>{both(text)}</span>'
        for css, text in (("s", SUPERVISED), ("p", PREFIX), ("x", SPECIAL), ("", NOT_SUPERVISED))
    )
    return document(
        title=f"{found.path} · glmtune inspect",
        command="glmtune inspect",
        heading=TITLE,
        verdict=verdict,
        tone="alarm" if found.refusal or stats is None else "",
        header=f"{figures}\n{facts_list(facts)}\n{notes}",
        body=f"""<div class="tools">
<div class="legend">{legend}</div>
<label><input id="ids" type="checkbox">{both(IDS)}</label>
<output id="token"><span id="touch">{both(TOUCH)}</span><span id="about" hidden>
{both(PLACE)} <b id="place"></b> · {both(ID)} <b id="number"></b> ·
{both(POSITION)} <b id="position"></b></span></output>
</div>
{"".join(map(_row, found.shown))}""",
        files=("page.css", "inspect.css", "language.js", "inspect.js"),
    )


def _figures(stats: RowStats) -> Iterator[str]:
    yield figure(
        ROWS,
        f"<div><b>{stats.num_rows:,}</b></div>"
        f"<div><b>{stats.num_ends:,}</b><small>{both(TEACH_END)}</small></div>",
    )
    share = f"{stats.share:.1%}"
    yield figure(
        SUPERVISED,
        f"<div><b>{share}</b><small>{stats.num_supervised:,} / {stats.num_tokens:,}</small></div>"
        f"{bar(100 * stats.share)}",
    )
    lengths = stats.lengths
    numbers = ((lengths.median, both(MEDIAN)), (lengths.p95, "95 %"), (lengths.max, both(MOST)))
    yield figure(
        LENGTH,
        "".join(f"<div><b>{number:,}</b><small>{name}</small></div>" for number, name in numbers),
    )


def _facts(stats: RowStats) -> Iterator[tuple[Text, str | Text]]:
    counted = [(NAMES_OF_LANGUAGES[name], num) for name, num in stats.languages.items()]
    in_both = (" · ".join(f"{name[i]} {num:,}" for name, num in counted) for i in range(2))
    yield LANGUAGES, Text(*in_both)
    yield ANSWERS, _counted(stats.answers)
    if stats.turns is not None:
        yield TURNS, _counted(stats.turns)
    yield THOUGHTS, f"{stats.num_thoughts:,}"
    if stats.num_tools is not None:
        yield TOOLS, f"{stats.num_tools:,}"


def _counted(rows_of: Mapping[int, int]) -> Text:
    zh, en = (count_words(rows_of, words) for words in (WORDS_ZH, WORDS_EN))
    return Text(zh, en)


def _row(row: ShownRow) -> str:
    if row.fate:
        return (
            f'<article class="pair out"><div class="question"><header><h2 class="text" dir="auto">'
            f'{escape(row.where)}</h2></header><p class="input text">{escape(row.fate)}</p></div>'
            "</article>\n"
        )
    badge = f"{len(row.tokens)} {both(TOKENS)} · {row.num_supervised} {both(SUPERVISED)}"
    about = [f"{both(ANSWER_AT)} {row.answer_at}", f"{both(FROM)} {row.start}"]
    if row.prefix:
        about.append(f"{both(PREFIX)} {row.prefix}")
    if row.padding:
        about.append(f"{row.padding} {both(PADDING)}")
    return f"""<article class="pair">
<div class="question"><header><h2 class="text" dir="auto">{escape(row.where)}</h2>
<span class="badge">{badge}</span></header>
<p class="about">{" · ".join(about)}</p></div>
<div class="tokens" dir="auto">{"".join(map(_token, row.tokens))}</div>
</article>
"""


def _token(token: ShownToken) -> str:
    kinds = (("s", token.is_supervised), ("p", token.is_in_prefix), ("x", token.is_special))
    css = " ".join(name for name, holds in kinds if holds)
    position = ",".join(map(str, token.positions))
    text = escape(token.text).replace("\n", "↵\n") or "·"
    return (
        f"<i{f' class={css!r}' if css else ''} data-t={token.place} data-n={token.id} "
        f'data-p="{position}">{text}</i>'
    )
