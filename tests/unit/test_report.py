"""A comparison as figures and as Markdown."""

import re

import pytest
from pages import COLLAPSE, NASTY, comparison, pair, price

from glmtune.evaluation.page import html
from glmtune.evaluation.report import base_of, markdown, tuned_of


def test_figures_of_a_comparison():
    both = comparison(pair(), pair(tuned="一 二", number=2))
    assert both.num_different == 1
    assert (both.num_stopped(base_of), both.num_stopped(tuned_of)) == (2, 0)
    assert (both.mean_length(base_of), both.mean_length(tuned_of)) == (2.0, 4.0)
    assert both.verdict.en == "1 of 2 answers differ."
    assert "2 条记录中有 1 条" in both.verdict.zh


@pytest.mark.parametrize("write", [markdown, html])
def test_equal_answers_are_told_plainly_in_both_languages(write):
    for told in ("the adapter changes nothing here", "适配器在这里没有带来任何变化"):
        assert told in write(comparison(pair(tuned="一 二")))
        assert told not in write(comparison(pair()))


@pytest.mark.parametrize("write", [markdown, html])
def test_header_and_texts_are_there(write):
    text = write(comparison(pair(input="某物")))
    wanted = ("chatglm-6b", "output", "2026-01-02 03:04", "bfloat16", "150", "说", "某物")
    assert [part for part in wanted if part not in text] == []


@pytest.mark.parametrize("name", ["", NASTY])
def test_any_text_stays_in_its_markdown_cell(name):
    report = markdown(comparison(pair(name, "b", instruction=NASTY, input=NASTY, expected=NASTY)))
    tables = [line for line in report.splitlines() if line.startswith("|")]
    cells = [len(re.findall(r"(?<!\\)\|", line)) - 1 for line in tables]
    assert cells == [3] * len(tables)
    assert "<script" not in report
    assert len(tables) == 4 + 3


def test_an_answer_that_was_cut_is_marked():
    assert markdown(comparison(pair())).count("cut at max_new_tokens") == 1


def test_a_collapse_is_told_with_its_examples():
    report = markdown(comparison(pair(), collapse=[COLLAPSE]))
    assert COLLAPSE.sentence.zh in report
    (example,) = re.findall(r"^  - 2: Why\? .* → So\. .*$", report, re.MULTILINE)
    assert "<script" not in example
    assert "None was found" in markdown(comparison(pair()))


def test_the_price_or_its_absence_is_told():
    assert price().sentence.en in markdown(comparison(pair(), price=price())).replace("\\", "")
    assert "The price was not measured" in markdown(comparison(pair()))
