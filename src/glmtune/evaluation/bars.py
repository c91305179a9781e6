"""What a tuning gained and what it cost, as bars with intervals; and the price by kind."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from glmtune.evaluation.document import Panel, both, table
from glmtune.evaluation.labels import Text
from glmtune.evaluation.price import KINDS
from glmtune.evaluation.replay_savings import SAVED, WITH, WITHOUT, Saved
from glmtune.evaluation.report import BASE, NO_PRICE, TUNED
from glmtune.evaluation.score_tables import PART_NAMES
from glmtune.evaluation.verdict import VERDICTS, Verdict, signed
from glmtune.training.planning.power import LEAST_ROWS

GAIN = Text("收获：你的数据上的回答（chrF，0–100 分）", "Gain: answers on your rows, chrF of 100")
PRICE = Text("代价：通用题的正确率（0–100 分）", "Price: general questions, right choices of 100")
PRICE_BY_KIND = Text("代价，按题目种类", "Price by kind of question")
KIND = Text("种类", "Kind")
NO_GAIN = Text(
    "没有测量：这些记录都没有参考答案。", "Not measured: none of these rows has an answer."
)
NO_INTERVAL = Text("行数太少，没有区间", "too few rows for an interval")
INTERVAL = Text("95% 区间", "95 % interval")
BY_LOG_PROB = Text("（以对数概率计）", ", by log-probability")
ROWS = Text("行", "rows")
QUESTIONS = Text("道题", "questions")
POINTS = Text("分", "points")
# A kind's cell is tinted from this many points on.
TINTED_FROM = 5


class Change(NamedTuple):
    """A score of both sides, from 0 to 100, with the interval of its change."""

    name: Text
    num_rows: int
    base: float
    tuned: float
    low: float | None = None
    high: float | None = None
    verdict: Verdict | None = None
    judge: str | None = None
    """The measure that the verdict is by."""
    what: Text = ROWS
    """What was counted."""
    sides: tuple[Text, Text] = (BASE, TUNED)

    @property
    def direction(self) -> str:
        """A CSS class: better or worse where the interval leaves no room for the opposite."""
        if self.verdict:
            return self.verdict if self.judge == "chrf" else ""
        if self.low is None or self.high is None:
            return ""
        return "better" if self.low > 0 else "worse" if self.high < 0 else ""

    @property
    def html(self) -> str:
        """Two bars, of base and tuned, and the change."""
        change = signed(self.tuned - self.base, 1)
        word, note, whisker = "", "", None
        if self.low is not None and self.high is not None:
            bounds = f"{signed(self.low, 1)} … {signed(self.high, 1)}"
            note = both(Text(*(f"{text} {bounds}" for text in INTERVAL)))
            whisker = self.base + self.low, self.base + self.high
        elif self.num_rows < LEAST_ROWS:
            note = both(NO_INTERVAL)
        if self.verdict and self.low is not None:
            told = VERDICTS[self.verdict]
            if self.judge == "log_prob":
                told = Text(*map("{}{}".format, told, BY_LOG_PROB))
            word = f'<span class="word {self.verdict}">{both(told)}</span>'
        return f"""<div class="change"><h3>{both(self.name)}
<small>{self.num_rows:,} {both(self.what)}</small>{word}</h3>
<dl><dt>{both(self.sides[0])}</dt><dd class="of-base">{bar(self.base)}<b>{self.base:.1f}</b></dd>
<dt>{both(self.sides[1])}</dt><dd class="of-tuned {self.direction}">{bar(self.tuned, whisker)}\
<b>{self.tuned:.1f}</b></dd></dl>
<p><b class="{self.direction}">{change}</b> {both(POINTS)} <small>{note}</small></p></div>"""


def bar(share: float, whisker: tuple[float, float] | None = None) -> str:
    """A bar of 0 to 100 %, with an interval at its end if there is one."""
    inner = ""
    if whisker:
        low, high = (f"{min(100.0, max(0.0, end)):.2f}%" for end in whisker)
        inner = f'<line class="interval" x1="{low}" x2="{high}" y1="50%" y2="50%"/>'
        inner += "".join(
            f'<line class="interval" x1="{end}" x2="{end}" y1="20%" y2="80%"/>'
            for end in (low, high)
        )
    width = f"{min(100.0, max(0.0, share)):.2f}%"
    return (
        '<svg class="bar" aria-hidden="true"><rect class="whole" width="100%" height="100%"/>'
        f'<rect class="part" width="{width}" height="100%"/>{inner}</svg>'
    )


def gain_panel(languages: Mapping[str, Mapping[str, Any]]) -> Panel:
    """The change of chrF in each language, from `languages` of compare.json."""
    changes = []
    for name, of in _by_language(languages, lambda of: "chrf" in of["metrics"]):
        base, tuned, low, high = map(of["metrics"]["chrf"].get, ("base", "tuned", "low", "high"))
        changes.append(
            Change(name, of["n"], base, tuned, low, high, of["verdict"], of["judged_by"])
        )
    return Panel(GAIN, _bars(changes, NO_GAIN))


def price_panel(
    price: Mapping[str, Mapping[str, Any]] | None, sentence: Text | None = None
) -> Panel:
    """The change of the general questions in each language, from `price` of compare.json."""
    changes = [
        Change(name, of["n"], of["before"], of["after"], of["low"], of["high"], what=QUESTIONS)
        for name, of in _by_language(price or {}, lambda of: bool(of["n"]))
    ]
    told = f'<p class="note">{both(sentence)}</p>' if sentence else ""
    return Panel(PRICE, _bars(changes, NO_PRICE) + told)


def saved_panel(saved: Saved) -> Panel:
    """What replay saved in each language, beside a run without it."""
    parts = saved.as_json()
    of_parts = {str(part): parts[part] for part in PART_NAMES if part in parts}
    changes = [
        Change(
            name, of["n"], of["without"], of["with"], of["low"], of["high"],
            what=QUESTIONS, sides=(WITHOUT, WITH),
        )
        for name, of in _by_language(of_parts, lambda of: bool(of["n"]))
    ]  # fmt: skip
    return Panel(SAVED, _bars(changes, NO_PRICE) + f'<p class="note">{both(saved.sentence)}</p>')


def kinds_panel(price: Mapping[str, Mapping[str, Any]]) -> Panel | None:
    """The price as a table of kinds and languages; None where no kinds are known."""
    parts = {part: of for part, of in price.items() if of.get("kinds") and part != "all"}
    kinds = list(dict.fromkeys(kind for of in parts.values() for kind in of["kinds"]))
    if not kinds:
        return None
    rows: list[list[Text | str]] = []
    for kind in kinds:
        cells = (_kind(of["kinds"].get(kind)) for of in parts.values())
        rows.append([KINDS.get(kind, Text(kind, kind)), *cells])
    headings = [KIND, *(_part_name(part) for part in parts)]
    return Panel(PRICE_BY_KIND, table(headings, rows))


def _kind(of: Mapping[str, float] | None) -> str:
    if of is None:
        return ""
    change = of["after"] - of["before"]
    css = "better" if change >= TINTED_FROM else "worse" if change <= -TINTED_FROM else ""
    sides = f"{of['before']:.0f} → {of['after']:.0f}"
    return f'<span class="kind {css}">{signed(change, 0)} <small>{sides}</small></span>'


def _bars(changes: list[Change], nothing: Text) -> str:
    if not changes:
        return f'<p class="none">{both(nothing)}</p>'
    return "".join(change.html for change in changes)


def _by_language(parts: Mapping[str, Any], is_known: Any) -> Iterator[tuple[Text, Any]]:
    """Each language that was measured; all rows where their language is another."""
    known = {part: of for part, of in parts.items() if is_known(of)}
    for part, of in known.items():
        if part != "all" or len(known) == 1:
            yield _part_name(part), of


def _part_name(part: str) -> Text:
    return next((name for key, name in PART_NAMES.items() if key == part), Text(part, part))
