"""What was found out about an adapter after its training, as panels: its dial and its ledger."""

from collections.abc import Iterator

from glmtune.evaluation.document import Panel, both, escape
from glmtune.evaluation.labels import Text
from glmtune.evaluation.line_plot import Line, line_plot, linear_ticks
from glmtune.evaluation.run_plots import NOTHING
from glmtune.evaluation.run_records import DialRecord, LedgerRecord, LedgerRow

DIAL = Text("适配器的缩放：收获与代价", "Scales of the adapter: gain and price")
SCALE = Text("倍", "times")
GAINS = {
    "chrf": Text("收获（chrF，分）", "Gain, points of chrF"),
    "log_prob": Text("收获（对数概率，nat/词元）", "Gain, log-probability in nats a token"),
}
GENERAL = Text("通用题的正确率（%）", "General questions right, %")
LEDGER = Text("训练行：损失的前后变化", "Training rows: loss before and after")
KINDS = {
    "not_learnt": Text("仍然难", "Stayed hard"),
    "memorised": Text("背了下来", "Memorised"),
    "worse": Text("变差", "Made worse"),
    "contradiction": Text("问题几乎相同，答案不同", "Near-equal questions, different answers"),
}
ROW = Text("第 {} 行", "Row {}")
MORE = Text("其余 {} 行见 ledger.json。", "{} more: see ledger.json.")
NO_LEDGER_ROWS = Text("没有这样的行。", "No row stands out.")
MOST_SHOWN = 20
"""Rows of each kind on the page."""


def dial_panel(dial: DialRecord) -> Panel:
    """Gain and general questions over the scales, with the recommended one marked."""
    plots = ""
    named = ((GAINS[dial.measure], dial.gains(), ".2f"), (GENERAL, dial.general(), ".0f"))
    for name, points, form in named:
        if not points:
            continue
        values = [value for _, value in points]
        line = Line(NOTHING, "smooth", points, f"{points[-1][1]:{form}}")
        ticks = linear_ticks(min(values), max(values))
        plot = line_plot([line], ticks, name=name, x_name=SCALE, mark=dial.recommended)
        plots += f"<h3>{both(name)}</h3>{plot}"
    return Panel(DIAL, f"<p>{both(dial.sentence)}</p>{plots}")


def ledger_panel(ledger: LedgerRecord) -> Panel:
    """The rows that stand out, by kind, each kind folded."""
    found = "".join(_kinds(ledger))
    return Panel(LEDGER, found or f'<p class="none">{both(NO_LEDGER_ROWS)}</p>')


def _kinds(ledger: LedgerRecord) -> Iterator[str]:
    for kind in dict.fromkeys((*KINDS, *(row.kind for row in ledger.rows))):
        name = KINDS.get(kind, Text(kind, kind))
        rows = [row for row in ledger.rows if row.kind == kind][:MOST_SHOWN]
        if not rows:
            continue
        num = max(ledger.counts.get(kind, 0), len(rows))
        left = num - len(rows)
        more = Text(*(text.format(f"{left:,}") for text in MORE))
        yield (
            f"<details><summary>{both(name)} <small>{num:,}</small></summary>"
            f'<ul class="examples">{"".join(map(_row, rows))}</ul>'
            f"{f'<p>{both(more)}</p>' if left else ''}</details>"
        )


def _row(row: LedgerRow) -> str:
    place = Text(*(text.format(f"{row.row:,}") for text in ROW))
    return (
        f"<li><small>{both(place)} · {row.before:.2f} → {row.after:.2f}</small>"
        f'<span class="text">{escape(row.question)}</span>'
        f'<span class="text">{escape(row.answer)}</span></li>'
    )
