"""The report: figures, escaping, and the properties of the page."""

import html as standard_html
import re
from base64 import b64encode
from hashlib import sha256
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glmtune.errors import visible
from glmtune.evaluation.page import html, mark_differences
from glmtune.evaluation.report import Comparison, Pair, base_of, markdown, tuned_of
from glmtune.generation import Answer

NASTY = "</p><script>alert('x')</script> | a\n\n| --- | `*_[x](y) & <b>\u2028$1$"


def pair(base="一 二", tuned="一 三", number=1, **fields):
    fields = {"instruction": "说", "input": "", "expected": "一"} | fields
    return Pair(number=number, base=Answer(base, 2, True), tuned=Answer(tuned, 4, False), **fields)


def comparison(*pairs):
    settings = {"max_new_tokens": 150, "do_sample": False}
    return Comparison("chatglm-6b", "output_zh", "bfloat16", settings, "2026-01-02 03:04", pairs)


class Page(HTMLParser):
    """The elements of a page and the text in them."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self.open = [], "", []
        self.feed(text)
        self.close()
        assert not self.open, "every element is closed"

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def text_of(marked):
    return standard_html.unescape(re.sub(r"</?(ins|del)>", "", marked))


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


def test_the_page_is_whole_and_asks_for_nothing():
    page = Page(html(comparison(pair(), pair(number=2))))
    tags = [tag for tag, _ in page.tags]
    assert tags.count("article") == 2
    assert not {"link", "img", "iframe", "object", "base", "form"} & set(tags)
    for tag, attributes in page.tags:
        assert not {"src", "href", "srcset", "action", "onclick", "onload"} & attributes.keys(), tag
    text = html(comparison(pair()))
    assert "url(" not in text
    assert "@import" not in text
    assert "http://" not in text
    assert "https://" not in text


def test_only_its_own_script_may_run():
    text = html(comparison(pair(instruction=NASTY)))
    script = re.search(r"<script>(.*?)</script>", text, re.DOTALL)[1]
    assert f"'sha256-{b64encode(sha256(script.encode()).digest()).decode()}'" in text
    assert text.count("<script>") == 1


@given(st.text(st.characters(exclude_categories=["Cs", "Cc"]) | st.just("\n"), min_size=1))
def test_any_text_is_text_on_the_page(text):
    fields = {"instruction": text, "input": text, "expected": text}
    plain = Page(html(comparison(pair("x", "y", instruction="a", input="b", expected="c"))))
    page = Page(html(comparison(pair(text + NASTY, text + NASTY, **fields))))
    assert visible(text) in page.text
    added = [tag for tag, _ in page.tags if tag not in ("p", "span", "del", "ins")]
    assert added == [tag for tag, _ in plain.tags if tag not in ("p", "span", "del", "ins")]


def test_texts_carry_their_language():
    text = html(comparison(pair(base="你好", tuned="hello")))
    assert re.search(r'lang="zh-CN" dir="auto">(<del>)?你好', text)
    assert re.search(r'lang="en" dir="auto">(<ins>)?hello', text)


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
    assert html(comparison(pair())).count("cut at max_new_tokens") == 1


@pytest.mark.parametrize(
    "base, tuned, marked",
    [
        (
            "The car sped quickly.",
            "The car raced quickly.",
            ("The car <del>sped</del> quickly.", "The car <ins>raced</ins> quickly."),
        ),
        (
            "三原色是红黄蓝。",
            "三原色是红绿蓝。",
            ("三原色是红<del>黄</del>蓝。", "三原色是红<ins>绿</ins>蓝。"),
        ),
        ("same", "same", ("same", "same")),
        ("a < b", "a < c", ("a &lt; <del>b</del>", "a &lt; <ins>c</ins>")),
        ("好的。", "完全 different", ("好的。", "完全 different")),
    ],
)
def test_differences_are_marked_by_word_and_by_chinese_letter(base, tuned, marked):
    assert mark_differences(base, tuned) == marked


@given(st.text("ab 好的。<&\n"), st.text("ab 好的。<&\n"))
def test_marking_loses_no_letter(base, tuned):
    marked = mark_differences(base, tuned)
    assert (text_of(marked[0]), text_of(marked[1])) == (base, tuned)
    assert "<ins>" not in marked[0]
    assert "<del>" not in marked[1]
