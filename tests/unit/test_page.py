"""The page of a comparison: it is whole, asks for nothing, and no text in it acts."""

import json
import re
from base64 import b64encode
from hashlib import sha256

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pages import COLLAPSE, DIAL, LEDGER, NASTY, Page, comparison, judged, many, pair, price

from glmtune.errors import visible
from glmtune.evaluation.bars import Change, gain_panel, kinds_panel, price_panel
from glmtune.evaluation.document import as_json
from glmtune.evaluation.labels import Text
from glmtune.evaluation.language_matrix import TrainedLanguages
from glmtune.evaluation.line_plot import Line, line_plot, linear_ticks
from glmtune.evaluation.page import html
from glmtune.evaluation.run_facts import RunFacts
from glmtune.evaluation.run_panels import MOST_SHOWN, dial_panel, ledger_panel
from glmtune.evaluation.run_plots import general_panel, loss_panel
from glmtune.evaluation.run_records import DialRecord, LedgerRecord, read_record

LINE_BREAKS = "\u2028\u2029"


def test_the_page_is_whole_and_asks_for_nothing():
    text = html(many(40, run=RunFacts(history=[{"step": 1, "loss": 2.0}])))
    page = Page(text)
    assert not {"link", "img", "iframe", "object", "base", "form"} & {tag for tag, _ in page.tags}
    acting = {"src", "href", "srcset", "action", "style", "onclick", "onload"}
    for tag, attributes in page.tags:
        assert not acting & attributes.keys(), tag
    for words in ("url(", "@import", "http://", "https://"):
        assert words not in text
    assert [row["number"] for row in page.data["rows"]] == list(range(1, 41))


def test_only_its_own_script_and_style_may_act():
    text = html(comparison(pair(instruction=NASTY)))
    for tag in ("script", "style"):
        (own,) = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        digest = b64encode(sha256(own.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in text
    assert text.count("<script") == 2, "the script, and what it reads"
    assert "unsafe" not in text.partition("</head>")[0]


@pytest.mark.parametrize("text", [NASTY, "</script", "<!--<script>", LINE_BREAKS, "&lt;"])
def test_no_text_ends_the_data(text):
    embedded = as_json({"a": text})
    assert not set("<>&" + LINE_BREAKS) & set(embedded)
    assert Page(f'<script type="application/json" id="data">{embedded}</script>').data == {
        "a": text
    }


strange = st.text(
    st.characters(exclude_categories=[]) | st.sampled_from("<>&\"'/\\\n\x1b\u202e\u2028\ud800"),
    min_size=1,
)


@settings(max_examples=25)
@given(strange)
def test_any_text_is_text_on_the_page(text):
    fields = {"instruction": text, "input": text, "expected": text}
    plain = html(comparison(pair("x", "y", instruction="a", input="b", expected="c")))
    page = Page(html(comparison(pair(text + NASTY, f"{text}{NASTY}.", **fields))))
    assert page.tags == Page(plain).tags
    (row,) = page.data["rows"]
    assert [row[name] for name in ("question", "input", "expected")] == [visible(text)] * 3
    assert "".join(row["base"]) == visible(text + NASTY)
    assert "".join(row["tuned"]) == visible(text + NASTY + ".")


def test_examples_of_a_collapse_are_text():
    page = Page(html(comparison(pair(), pair(number=2), collapse=[COLLAPSE])))
    assert visible(f"Why? {NASTY}") in page.text
    assert "alert" not in "".join(str(attributes) for _, attributes in page.tags)


# --- what it shows ---


def test_the_first_screen_has_verdict_gain_price_origin_and_cost():
    cost = {"records": 40, "seconds": 83.0, "tokens": 2000, "peak_memory_gib": 1.26}
    compared = many(40, cost=cost)
    first = html(compared).partition('class="panels plots"')[0]
    for told in (
        compared.verdict.en, compared.verdict.zh, 'class="verdict better"', "Gain", "收获", "Price",
        "代价", "chatglm-6b", "output_zh", "max_new_tokens 150", "01:23", "2,000 tokens", "1.3 GiB",
    ):  # fmt: skip
        assert told in first, told
    numbers = re.findall(r'<b class="(\w*)">([+\u2212][\d.]+)</b>', first)
    assert numbers[2:] == [("worse", "\u221217.5")] * 2, "the price of each language"
    assert [of for of, _ in numbers[:2]] == ["better", "better"]


def test_what_was_not_measured_is_said():
    page = Page(html(comparison(pair(expected=""))))
    for told in (
        "Not measured: none of these rows has an answer", "没有测量：这些记录都没有参考答案",
        "The price was not measured", "这次对比没有测量代价", "None was found", "not recorded",
    ):  # fmt: skip
        assert told in page.text, told


def test_a_collapse_is_told_with_its_examples_and_marks_its_rows():
    page = Page(html(comparison(pair(), pair(number=2), collapse=[COLLAPSE])))
    assert COLLAPSE.sentence.zh in page.text
    assert ["collapsed" in row["is"] for row in page.data["rows"]] == [False, True]


def found_by(file, content, kind):
    file.write_text(json.dumps(content))
    return read_record(file, kind)


def test_a_dial_is_plotted_with_what_it_recommends(tmp_path):
    dial = found_by(tmp_path / "dial.json", DIAL, DialRecord)
    text = html(comparison(pair(), run=RunFacts(dial=dial)))
    assert "Scale 0.75 is recommended." in Page(text).text
    gain, general = re.findall(r'class="mark" x1="([\d.]+)%".*?d="M([^"]*)"', text, re.DOTALL)
    assert gain == ("75.00", "0.0 1000.0L500.0 500.0L750.0 250.0L1000.0 0.0")
    assert general == ("75.00", "0.0 0.0L500.0 500.0L750.0 750.0L1000.0 1000.0")
    without = [scale | {"price": None} for scale in DIAL["scales"]]
    dial = found_by(tmp_path / "dial.json", DIAL | {"scales": without}, DialRecord)
    assert dial_panel(dial).body.count("<svg class") == 1


def test_a_ledger_lists_its_rows_by_kind_as_text(tmp_path):
    ledger = found_by(tmp_path / "ledger.json", LEDGER, LedgerRecord)
    body = ledger_panel(ledger).body
    page = Page(body)
    assert visible(f"Why? {NASTY}") in page.text
    assert "Row 1,234 · 1.25 → 2.50" in re.sub(r"第 1,234 行", "", page.text)
    assert body.count("<details>") == 2
    assert body.count("<li>") == 1 + MOST_SHOWN
    assert f"{50 - MOST_SHOWN} more: see ledger.json" in page.text
    assert "script" not in {tag for tag, _ in page.tags}
    none = found_by(tmp_path / "ledger.json", {"counts": {}, "rows": []}, LedgerRecord)
    assert "No row stands out." in ledger_panel(none).body


def test_each_set_of_held_out_rows_has_its_sentence():
    compared = many(20)
    page = Page(html(many(20, sets={"law<b>": compared.verdicts["all"]})))
    assert f"law<b>: {compared.verdicts['all'].sentence.en}" in page.text


def test_a_language_that_only_the_price_measures_is_told():
    chinese = [pair(number=i, instruction=f"第 {i} 号") for i in range(9)]
    trained = TrainedLanguages(100, {"zh": 100, "en": 0})
    page = Page(html(judged(*chinese, trained_on=trained, price=price())))
    assert "English is measured by the general questions alone" in page.text
    assert "Chinese 100%, English 0%" in page.text


def test_equal_answers_are_an_alarm():
    assert 'class="verdict alarm"' in html(comparison(pair(tuned="一 二")))
    assert 'class="verdict undecided"' in html(comparison(pair()))


def test_rows_say_what_filters_and_orders_need():
    rows = Page(html(many(70))).data["rows"]
    for row in rows:
        i = row["number"]
        expected = {"differs", "worse" if i % 5 == 0 else "better"}
        expected |= set() if i % 7 else {"not_stopped"}
        expected |= {"collapsed"} if i == 2 else set()  # by the example of pages.COLLAPSE
        assert set(row["is"]) == expected
        assert (row["chrf"][1] < row["chrf"][0]) == (i % 5 == 0)
        assert (row["log_prob"][1] < row["log_prob"][0]) == (i % 5 == 0)
    (same,) = Page(html(judged(pair(tuned="一 二", stopped=True)))).data["rows"]
    assert same["is"] == []
    (bare,) = Page(html(judged(pair(expected="")))).data["rows"]
    assert not {"chrf", "log_prob"} & bare.keys()


def test_better_and_worse_rows_are_those_that_the_verdict_counts():
    compared = many(35)
    found = compared.verdicts["all"]
    rows = Page(html(compared)).data["rows"]
    for kind, num in (("better", found.wins), ("worse", found.losses)):
        assert sum(kind in row["is"] for row in rows) == num


# --- bars, tables and plots ---


def test_a_bar_stays_in_its_frame_and_has_its_interval():
    change = Change(Text("中文", "Chinese"), 40, 90.0, 97.0, 2.0, 12.5)
    assert change.direction == "better"
    widths = re.findall(r'class="part" width="([\d.]+)%"', change.html)
    assert widths == ["90.00", "97.00"]
    assert 'x1="92.00%" x2="100.00%"' in change.html
    assert "+2.0 … +12.5" in change.html
    assert change._replace(low=-2.0).direction == ""
    assert change._replace(low=-9.0, high=-1.0).direction == "worse"
    few = change._replace(num_rows=5, low=None, high=None)
    assert 'class="interval"' not in few.html
    assert "too few rows for an interval" in few.html


def test_a_language_without_rows_has_no_bar():
    metric = {"base": 1.0, "tuned": 3.0, "difference": 2.0, "low": 1.0, "high": 3.0, "n": 9}
    of = {"n": 9, "verdict": "better", "judged_by": "chrf", "metrics": {"chrf": metric}}
    none = {"n": 0, "verdict": "undecided", "judged_by": None, "metrics": {}}
    body = gain_panel({"zh": of, "en": none, "all": of}).body
    assert (body.count("<h3>"), "Chinese" in body, "English" in body) == (1, True, False)
    assert "<h3>" in gain_panel({"zh": none, "en": none, "all": of}).body, "another language"
    few = {"n": 5, "before": 1.0, "after": 2.0, "low": None, "high": None, "kinds": {}}
    assert price_panel({"zh": few}).body.count("<h3>") == 1
    assert kinds_panel({"zh": few}) is None


def test_a_verdict_by_log_probability_is_told_as_such():
    change = Change(Text("中文", "Chinese"), 40, 50.0, 51.0, -1.0, 3.0, "better", "log_prob")
    assert change.direction == "", "not by the bars"
    assert "Better, by log-probability" in change.html
    assert "by log" not in change._replace(judge="chrf").html


def test_kinds_stand_in_a_table_of_languages():
    body = kinds_panel(price().as_json()).body
    assert re.findall(r'<th scope="row">.*?"en" lang="en">([\w ]+)<', body) == ["facts", "sums"]
    assert "计算" in body
    assert body.count('class="kind worse"') == body.count('class="kind better"') == 2
    assert "90 → 50" in body


def test_the_curve_lies_within_its_frame():
    history = [{"step": i, "loss": 9 / i, "lr": 1.0} for i in range(1, 50)]
    more = [{"step": 49, "eval_loss": 1.0}, {"step": 50, "loss": None}]
    body = loss_panel([*history, *more]).body
    raw, smoothed, held_out = re.findall(r' d="M([^"]*)"', body)
    points = [tuple(map(float, point.split())) for point in raw.split("L")]
    assert len(points) == 49
    assert (points[0][0], points[-1][0]) == (0, 1000)
    assert all(0 <= y <= 1000 for _, y in points)
    assert [y for _, y in points] == sorted(y for _, y in points), "a loss that falls goes down"
    assert smoothed != raw
    assert held_out.startswith("1000.0 ")
    ticks = re.findall(r'class="y"[^>]*>([^<]*)<', body)
    assert ticks[0] in ("0.1", "0.03")
    assert ticks[-1] == "10"
    assert "Rows held out" in body


def test_the_curve_of_one_step_and_of_none():
    assert "M0.0" in loss_panel([{"step": 1, "loss": 2.0}]).body
    assert loss_panel([{"step": 1, "eval_loss": 2.0}]) is None


def test_general_questions_have_a_line_for_each_language():
    history = [{"step": step, "general_zh": 80 - step, "general_en": 70.0} for step in (0, 10, 20)]
    body = general_panel(history).body
    assert re.findall(r'<path class="(\w+)"', body) == ["smooth", "other"]
    assert all(word in body for word in ("Chinese", "English", ">60<", ">70<", "20 steps"))
    one = general_panel([{"step": 0, "general": 50.0}]).body
    assert one.count("<path") == 1
    assert general_panel([{"step": 1, "loss": 2.0}]) is None


def test_a_line_is_to_scale():
    line = Line(Text("收获", "Gain"), "smooth", [(0.0, -10.0), (0.5, 0.0), (1.0, 30.0)])
    name, unit = Text("图", "Plot"), Text("倍", "scale")
    plot = line_plot([line], [-10, 10, 30], name=name, x_name=unit, mark=0.5)
    assert 'd="M0.0 1000.0L500.0 750.0L1000.0 0.0"' in plot
    assert 'class="mark" x1="50.00%"' in plot


@pytest.mark.parametrize(
    "lowest, highest, ticks",
    [
        (0, 100, [0, 50, 100]),
        (-3, 9, [-5, 0, 5, 10]),
        (2, 2, [2, 2.5]),
        (0, 0.07, [0, 0.02, 0.04, 0.06, 0.08]),
    ],
)
def test_ticks_are_round_and_enclose(lowest, highest, ticks):
    assert linear_ticks(lowest, highest) == ticks
