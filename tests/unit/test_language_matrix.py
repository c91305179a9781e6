"""What a run's rows are written in, beside what changed in each language."""

import numpy as np
import pytest

from glmtune.data.token_rows import TokenRows
from glmtune.evaluation import language_matrix
from glmtune.evaluation.language_matrix import TrainedLanguages, language_note, language_table
from glmtune.evaluation.price import Price
from glmtune.evaluation.scores import MEASURES, ScoreTable, Sides
from glmtune.evaluation.source_run import RunRows
from glmtune.evaluation.verdict import judge
from glmtune.general.items import Item
from glmtune.general.scores import GeneralScores
from glmtune.models.likelihood import rows_of
from glmtune.models.loading import load_tokenizer
from glmtune.models.resolve import GLM_TINY

CHINESE, ENGLISH = ("苹果是什么颜色？", "红色"), ("What colour is the apple?", "red")
BOTH = TrainedLanguages(20, {"zh": 12, "en": 8})
ONLY_CHINESE = TrainedLanguages(20, {"zh": 19, "en": 1})


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(GLM_TINY)


def run_of(tokenizer, texts, held_out=()):
    from glmtune.evaluation.probes import from_texts

    rows: TokenRows = rows_of(from_texts(tokenizer, texts), tokenizer.row_rule)
    return RunRows(rows, np.array(held_out, dtype=np.int64))


def verdicts_of(languages, change=10.0):
    base = np.zeros(len(languages))
    scores = {"chrf": Sides(base, base + change)}
    has_reference = np.ones(len(languages), dtype=bool)
    return judge(ScoreTable(languages, has_reference, scores, dict(MEASURES), {}))


def price_of(languages):
    items = [
        Item("facts", one, f"{i}?", False, "x", ("a", "b", "c")) for i, one in enumerate(languages)
    ]
    right, wrong = ([[value, -3.0, -3.0, -3.0]] * len(items) for value in (-1.0, -9.0))
    sides = (GeneralScores(items, np.array(s), np.ones(len(items))) for s in (right, wrong))
    return Price.of(*sides, "few")


def test_languages_are_those_of_the_answers_trained_on(tokenizer, monkeypatch):
    texts = (
        [CHINESE] * 6 + [ENGLISH] * 4 + [("把“红色”翻译成英语。", "red")] * 2 + [("1 + 1?", "2")]
    )
    found = TrainedLanguages.of(run_of(tokenizer, texts, held_out=[0, 1]), tokenizer)
    assert found.as_json() == {"rows": 11, "counted": 11, "zh": 4, "en": 7}
    assert found.only is None
    monkeypatch.setattr(language_matrix, "MOST_COUNTED", 4)
    found = TrainedLanguages.of(run_of(tokenizer, texts), tokenizer)
    assert (found.as_json()["rows"], found.as_json()["counted"]) == (13, 4)


def test_the_table_has_what_was_trained_and_what_changed_in_each_language():
    _, rows = language_table(BOTH, verdicts_of(["zh"] * 9), price_of(["zh"] * 8 + ["en"] * 8))
    cells = {row[0].en: [cell.en for cell in row[1:]] for row in rows[1:]}
    assert cells["Chinese"] == [
        "60 %",
        "+10.0 (+10.0 … +10.0)",
        "\u2212100.0 (\u2212100.0 … \u2212100.0)",
    ]
    assert cells["English"] == ["40 %", "", "\u2212100.0 (\u2212100.0 … \u2212100.0)"]
    _, rows = language_table(BOTH, verdicts_of(["en"] * 3), None)
    assert [cell.en for cell in rows[2][1:]] == ["40 %", "+10.0", ""]


def test_a_run_of_one_language_says_what_measures_the_other():
    of_chinese, of_both = verdicts_of(["zh"] * 9), verdicts_of(["zh"] * 9 + ["en"])
    general = price_of(["zh"] * 8 + ["en"] * 8)
    note = language_note(ONLY_CHINESE, of_chinese, general)
    assert note.en.endswith("English is measured by the general questions alone.")
    assert note.zh.endswith("英文只由通用题衡量。")
    for price in (None, price_of(["zh"] * 8)):
        note = language_note(ONLY_CHINESE, of_chinese, price)
        assert note.en.endswith("English is not measured.")
    assert language_note(ONLY_CHINESE, of_both, general) is None
    assert language_note(BOTH, of_chinese, general) is None
    turned = TrainedLanguages(9, {"zh": 0, "en": 9})
    note = language_note(turned, verdicts_of(["en"] * 9), general)
    assert note.en.startswith("The rows that it was trained on are English")
