"""A comparison as one self-contained HTML page: what was gained, what it cost, and every answer."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from glmtune.evaluation.bars import gain_panel, kinds_panel, price_panel, saved_panel
from glmtune.evaluation.document import (
    Panel,
    both,
    document,
    escape,
    facts_list,
    table,
)
from glmtune.evaluation.findings import Finding
from glmtune.evaluation.page_rows import row_data, rows_section
from glmtune.evaluation.report import (
    COLLAPSE,
    COST,
    EMPTY,
    NO_COLLAPSE,
    TITLE,
    TRAINED,
    Comparison,
    Text,
)
from glmtune.evaluation.run_facts import RunFacts
from glmtune.evaluation.run_panels import dial_panel, ledger_panel
from glmtune.evaluation.run_plots import general_panel, loss_panel

SCORES = Text("全部得分", "All scores")


def html(
    comparison: Comparison,
    *,
    command: str = "glmtune compare",
    title: Text = TITLE,
    lead: Text | None = None,
    panels: Sequence[Panel] = (),
) -> str:
    """Build the page of a comparison; all texts are escaped.

    Args:
        comparison: the answers.
        command: the command that made the page.
        title: its heading.
        lead: a sentence below the verdict.
        panels: shown beside the plots.
    """
    found, rows = comparison.as_json(), row_data(comparison)
    first = (
        gain_panel(found["languages"]),
        price_panel(found["price"], comparison.price.sentence if comparison.price else None),
        Panel(TRAINED, facts_list(comparison.trained)),
        Panel(COST, facts_list(comparison.costs)),
    )
    plots = (*panels, *_plots(comparison, found), _collapse(comparison.collapse))
    of_sets = (
        Text(*(f"{name}: {text}" for text in of.sentence)) for name, of in comparison.sets.items()
    )
    notes = filter(None, (lead, *of_sets, comparison.language_note))
    word = found["languages"].get("all", {}).get("verdict", "undecided")
    tone = word if comparison.num_different or word != "undecided" else "alarm"
    return document(
        title=f"{comparison.base} · {comparison.adapter} · {command}",
        command=command,
        heading=title,
        verdict=comparison.verdict,
        tone=tone,
        header="".join(f'<p class="lead">{both(text)}</p>' for text in notes),
        body=f"""{_grid("pairs", first)}
{_grid("plots", plots)}
{_scores(comparison)}
{rows_section(rows)}""",
        files=("page.css", "rows.css", "language.js", "rows.js"),
        data=rows,
    )


def _grid(name: str, panels: Iterator[Panel] | Sequence[Panel]) -> str:
    shown = "".join(panel.html for panel in panels)
    return f'<div class="panels {name}">{shown}</div>' if shown else ""


def _plots(comparison: Comparison, found: Mapping[str, Any]) -> Iterator[Panel]:
    run = comparison.run or RunFacts()
    drawn = (
        loss_panel(run.history),
        general_panel(run.history),
        saved_panel(comparison.saved) if comparison.saved else None,
        dial_panel(run.dial) if run.dial else None,
        kinds_panel(found["price"] or {}),
        ledger_panel(run.ledger) if run.ledger else None,
    )
    yield from filter(None, drawn)


def _collapse(findings: Sequence[Finding]) -> Panel:
    """What is wrong with the answers as a whole, with examples."""
    if not findings:
        return Panel(COLLAPSE, f'<p class="none">{both(NO_COLLAPSE)}</p>')
    body = ""
    for finding in findings:
        examples = "".join(
            f'<li><span class="text">{escape(example.question)}</span>'
            f'<span class="text">{escape(example.answer) or both(EMPTY)}</span></li>'
            for example in finding.examples
        )
        body += f'<p>{both(finding.sentence)}</p><ul class="examples">{examples}</ul>'
    return Panel(COLLAPSE, body)


def _scores(comparison: Comparison) -> str:
    """A table of scores for each language, and for all rows, which a click unfolds."""
    tables = _grid("scores", _score_panels(comparison))
    return f"<details><summary>{both(SCORES)}</summary>{tables}</details>" if tables else ""


def _score_panels(comparison: Comparison) -> Iterator[Panel]:
    for title, (headings, *rows) in comparison.tables():
        lines: list[list[Text | str]] = [
            [label, *(escape(cell.en) for cell in cells)] for label, *cells in rows
        ]
        yield Panel(title, table(headings, lines))
