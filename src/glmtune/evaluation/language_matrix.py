"""Trained on one language, measured in another: what a run's rows are written in, and what changed.

An adapter trained on Chinese alone may lose English, and the rows that its run held out cannot show
it, as they are Chinese too. So the languages of the rows stand beside what changed in each.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from glmtune.evaluation.labels import Text
from glmtune.evaluation.price import Price
from glmtune.evaluation.probes import probe_of_row, spread
from glmtune.evaluation.score_tables import PART_NAMES
from glmtune.evaluation.scores import MEASURES, Part
from glmtune.evaluation.source_run import RunRows
from glmtune.evaluation.text_scores import Language, language_of_record
from glmtune.evaluation.verdict import Compared, PartVerdict, signed

MOST_COUNTED = 2_000
"""Rows of a run whose language is looked at, evenly spread over all."""
ONLY = 0.95
"""Share of the rows from which on a run counts as one of a single language."""
LANGUAGES: tuple[Language, ...] = ("zh", "en")

TITLE = Text("训练语言与各语言的变化", "Trained on, and changed, by language")
_HEADINGS = (
    Text("语言", "Language"),
    Text("训练行所占比例", "Share of the rows trained on"),
    Text("这些行：chrF 的变化", "These rows: change of chrF"),
    Text("通用题：答对率的变化", "General questions: change of those right"),
)


@dataclass(frozen=True)
class TrainedLanguages:
    """The languages of the answers that an adapter was trained on."""

    num_rows: int
    """Rows of the run, held-out ones not among them."""
    counted: Mapping[Language, int]
    """Language -> rows of it, of those that were looked at."""

    @classmethod
    def of(cls, run: RunRows, tokenizer: Any) -> "TrainedLanguages":
        """Count the languages of a run's rows, of at most `MOST_COUNTED` of them."""
        rows = run.trained_on
        counted: dict[Language, int] = dict.fromkeys(LANGUAGES, 0)
        for row in rows[spread(len(rows), MOST_COUNTED)]:
            asked, answer = (
                tokenizer.decode(ids, skip_special_tokens=True)
                for ids in probe_of_row(run.rows, int(row))
            )
            counted[language_of_record(asked, answer)] += 1
        return cls(len(rows), counted)

    def share(self, language: Language) -> float:
        """The share of the rows that are of a language."""
        return self.counted[language] / max(1, sum(self.counted.values()))

    @property
    def only(self) -> Language | None:
        """The language of nearly all rows; None where there are two."""
        return next((one for one in LANGUAGES if self.share(one) >= ONLY), None)

    def as_json(self) -> dict[str, int]:
        """The content of `trained_on` in compare.json."""
        counted = {str(language): num for language, num in self.counted.items()}
        return {"rows": self.num_rows, "counted": sum(counted.values())} | counted


def language_table(
    trained: TrainedLanguages, verdicts: Mapping[Part, PartVerdict], price: Price | None
) -> tuple[Text, list[list[Text]]]:
    """A title, and for each language how much was trained on it and what changed in it."""
    rows = [list(_HEADINGS)]
    for language in LANGUAGES:
        found = verdicts[language].compared.get("chrf") if language in verdicts else None
        general = price.parts.get(language) if price else None
        cells = (
            f"{100 * trained.share(language):.0f} %",
            _change(found, MEASURES["chrf"].digits),
            _change(general.accuracy if general else None, 1),
        )
        rows.append([PART_NAMES[language], *(Text(cell, cell) for cell in cells)])
    return TITLE, rows


def _change(compared: Compared | None, digits: int) -> str:
    if compared is None:
        return ""
    change = signed(compared.tuned - compared.base, digits)
    if compared.interval is None:
        return change
    return f"{change} ({' … '.join(signed(b, digits) for b in compared.interval[1:3])})"


def language_note(
    trained: TrainedLanguages, verdicts: Mapping[Part, PartVerdict], price: Price | None
) -> Text | None:
    """What measures a language that was not trained on; None where the rows have both."""
    own = trained.only
    if own is None or not verdicts:
        return None
    other: Language = "en" if own == "zh" else "zh"
    if verdicts[other].num_rows:
        return None
    of, rest = PART_NAMES[own], PART_NAMES[other]
    start = Text(
        f"训练的行都是{of.zh}，这里问的行也是",
        f"The rows that it was trained on are {of.en}, and so are those asked here",
    )
    if price and other in price.parts:
        return Text(
            f"{start.zh}：{rest.zh}只由通用题衡量。",
            f"{start.en}: {rest.en} is measured by the general questions alone.",
        )
    return Text(f"{start.zh}：{rest.zh}没有衡量。", f"{start.en}: {rest.en} is not measured.")
