"""The page of a comparison in a real browser: what it draws, and what keys and clicks do.

One browser and three pages serve all tests.
"""

import json
from dataclasses import replace

import pytest
from browsers import DESKTOP, PHONE, grave_faults, launched
from pages import DIAL, LEDGER, NASTY, comparison, many, pair, records

from glmtune.evaluation.page import html
from glmtune.evaluation.run_facts import RunFacts
from glmtune.evaluation.run_records import DialRecord, LedgerRecord, read_record

NUM_ROWS = 5000
MOST_NODES = 3000
"""Of a page, however many rows it has."""


@pytest.fixture(scope="module")
def browser(browser_path):
    with launched(browser_path) as browser:
        yield browser


@pytest.fixture(scope="module")
def open_page(browser, tmp_path_factory):
    """Opens a comparison's page; at the end none has complained or asked for anything."""
    folder, complaints, contexts = tmp_path_factory.mktemp("pages"), [], []

    def open(name, compared):
        file = folder / f"{name}.html"
        file.write_text(html(compared), encoding="utf-8")
        contexts.append(browser.new_context(viewport=DESKTOP, locale="en-GB"))
        page = contexts[-1].new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("dialog", lambda dialog: complaints.append(dialog.message))
        page.on("request", lambda asked: asked.url == file.as_uri() or complaints.append(asked.url))
        page.goto(file.as_uri())
        return page

    yield open
    for context in contexts:
        context.close()
    assert complaints == []


@pytest.fixture(scope="module")
def page_of_many(open_page, tmp_path_factory):
    history = [{"step": step, "loss": 5.0 / step} for step in range(1, 30)]
    folder, found = tmp_path_factory.mktemp("run"), {}
    for name, kind, content in (("dial", DialRecord, DIAL), ("ledger", LedgerRecord, LEDGER)):
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
        found[name] = read_record(folder / name, kind)
    few = many(40, run=RunFacts(history=history, **found))
    # Scoring so many takes long, and is no matter of the page.
    chrf = [(90.0, 10.0) if n % 5 == 0 else (10.0, 90.0) for n in range(1, NUM_ROWS + 1)]
    return open_page("large", replace(few, pairs=list(records(NUM_ROWS)), chrf=chrf))


@pytest.fixture
def large(page_of_many):
    """5,000 records, of which every fifth became worse and every seventh tuned answer was cut."""
    page_of_many.fill("#search", "")
    page_of_many.check("[name=kind][value='']", force=True)
    page_of_many.select_option("#sort", "file")
    page_of_many.evaluate("document.activeElement.blur()")
    scroll(page_of_many, "document.querySelector('.rows').scrollIntoView()")
    return page_of_many


@pytest.fixture(scope="module")
def small(open_page):
    """Few records, of which the texts are strange, equal or long."""
    names = ("instruction", "input", "expected")
    fields = {name: f"{name} {NASTY}\x1b[31m\u202e" for name in names}
    pairs = [pair(f"x {NASTY}", f"y {NASTY}", **fields), pair("same", "same", 2, True)]
    pairs.append(pair("long", "\n".join(f"line {i}" for i in range(200)), 3, True))
    return open_page("small", comparison(*pairs))


def numbers(page):
    """The numbers of the rows that are drawn, in their order."""
    return [int(text) for text in page.locator("#rows .number").all_inner_texts()]


def shown(page):
    """How many rows match."""
    return int(page.locator("#shown").inner_text().split(" / ")[0].replace(",", ""))


def focused(page):
    """The number of the row that has the focus; None without one."""
    found = page.evaluate("document.activeElement.id")
    return int(found.removeprefix("row-")) if found.startswith("row-") else None


def find(page, text):
    page.fill("#search", text)
    return shown(page)


def scroll(page, how):
    """Scroll by a line of JavaScript, and wait until the page has drawn what is there."""
    page.evaluate(
        f"new Promise(done => {{ {how}; "
        "requestAnimationFrame(() => requestAnimationFrame(done)); })"
    )


def test_of_many_rows_only_those_that_are_visible_are_drawn(large):
    assert shown(large) == NUM_ROWS
    num_nodes = "document.querySelectorAll('*').length"
    assert large.evaluate(num_nodes) < MOST_NODES
    scroll(large, "scrollTo(0, document.documentElement.scrollHeight / 2)")
    middle = numbers(large)
    assert NUM_ROWS / 3 < middle[0] < 2 * NUM_ROWS / 3
    assert middle == list(range(middle[0], middle[-1] + 1))
    assert len(middle) < 40
    scroll(large, "scrollTo(0, document.documentElement.scrollHeight)")
    last = large.locator(f"#row-{NUM_ROWS}")
    assert 0 < last.bounding_box()["y"] < DESKTOP["height"]
    assert last.get_attribute("aria-posinset") == str(NUM_ROWS)
    assert large.evaluate(num_nodes) < MOST_NODES


def test_what_the_reader_looks_at_stays_where_it_is(large):
    """Rows above become known by drawing them, and may be higher than was thought."""
    scroll(large, "document.querySelector('#rows').scrollIntoView(); scrollBy(0, 400_000)")
    assert numbers(large)[0] > 1000
    for _ in range(5):
        before = {n: large.locator(f"#row-{n}").bounding_box()["y"] for n in numbers(large)}
        scroll(large, "scrollBy(0, -300)")
        stayed = [n for n in numbers(large) if 0 <= before.get(n, -1) < 500]
        assert stayed
        for n in stayed:
            y = large.locator(f"#row-{n}").bounding_box()["y"]
            assert y == pytest.approx(before[n] + 300, abs=2)


@pytest.mark.parametrize(
    "text, num",
    [
        ("第 4321 号", 1),
        ("苹果 红色", NUM_ROWS // 2),
        ("ＰＥＡＲ 42 green", 61),
        ("unheard-of", 0),
        ("", NUM_ROWS),
    ],
)
def test_rows_are_found_by_words_in_either_language(large, text, num):
    found = find(large, text)
    if num != 61:
        assert found == num
    else:  # full width, upper case, and several words
        assert 0 < found < NUM_ROWS / 10
        assert all("pear" in of.lower() for of in large.locator("#rows h3").all_inner_texts())
    assert large.locator("#nothing").is_visible() == (num == 0)


@pytest.mark.parametrize(
    "kind, holds",
    [
        ("better", lambda n: n % 5),
        ("worse", lambda n: n % 5 == 0),
        ("not_stopped", lambda n: n % 7 == 0),
        ("collapsed", lambda n: n == 2),
        ("differs", lambda _: True),
    ],
)
def test_filters_let_through_what_they_say(large, kind, holds):
    expected = [n for n in range(1, NUM_ROWS + 1) if holds(n)]
    large.locator(f".chips label:has([value={kind}])").click()
    assert shown(large) == len(expected)
    drawn = numbers(large)
    assert drawn
    assert drawn == expected[: len(drawn)]
    assert find(large, "pear") == sum(n % 2 == 0 for n in expected), "and search within them"


def test_rows_are_ordered_by_what_changed(large):
    large.select_option("#sort", "log_prob down")
    assert numbers(large)[0] == NUM_ROWS - 1, "the largest change; 5,000 became worse"
    large.select_option("#sort", "chrf up")
    assert all(n % 5 == 0 for n in numbers(large))
    large.select_option("#sort", "file")
    assert numbers(large)[:2] == [1, 2]


def test_the_keyboard_is_enough(large):
    large.keyboard.press("/")
    large.keyboard.type("pear 42")
    matching = shown(large)
    assert 0 < matching < NUM_ROWS
    large.keyboard.press("Enter")
    first = focused(large)
    assert first == numbers(large)[0]
    large.keyboard.press("j")
    large.keyboard.press("ArrowDown")
    assert focused(large) == numbers(large)[2]
    large.keyboard.press("k")
    large.keyboard.press("ArrowUp")
    large.keyboard.press("k")
    assert focused(large) == first
    large.keyboard.press("Escape")
    assert focused(large) is None
    large.keyboard.press("/")
    large.keyboard.press("Escape")
    assert shown(large) == NUM_ROWS
    large.keyboard.press("Escape")
    for n in range(1, 31):  # past what was drawn
        large.keyboard.press("j")
        assert focused(large) == n
    box = large.locator("#row-30").bounding_box()
    assert 0 < box["y"] < DESKTOP["height"]


def test_words_that_were_found_are_marked(large):
    find(large, "苹果 红色")
    words = "[...CSS.highlights.get('found')].map(String)"
    assert set(large.evaluate(words)) == {"苹果", "红色"}
    find(large, "")
    assert large.evaluate(words) == []


def test_a_long_text_is_cut_until_it_is_asked_for(small):
    row = small.locator("#row-3")
    more = row.get_by_role("button")
    height = row.bounding_box()["height"]
    assert height < 900
    assert small.locator("#row-2").get_by_role("button").count() == 0
    more.click()
    assert row.bounding_box()["height"] > 3 * height
    assert more.get_attribute("aria-expanded") == "true"
    row.focus()
    small.keyboard.press("Enter")
    assert row.bounding_box()["height"] == pytest.approx(height, abs=1)


def test_no_text_of_a_record_acts(small):
    question = small.locator("#row-1 h3").inner_text()
    assert "</script><script>alert('x')</script>" in question
    assert "\\x1b[31m\\u202e" in question
    assert small.locator("#rows script, #rows b, #rows p p").count() == 0
    assert small.locator("#row-1 del, #row-1 ins").all_inner_texts() == ["x", "y"]
    assert small.locator("#row-2 del, #row-2 ins").count() == 0


def test_texts_carry_their_language(large):
    assert large.locator("#row-1 h3").get_attribute("lang") == "zh-CN"
    assert large.locator("#row-2 h3").get_attribute("lang") == "en"


def test_the_language_is_switched_everywhere(large):
    def speaks():
        texts = (".verdict", "#sort option >> nth=0", "#row-1 h4 >> nth=0")
        named = (("#search", "placeholder"), ("#search", "aria-label"), ("html", "lang"))
        return (
            *(large.locator(place).inner_text() for place in texts),
            *(large.locator(place).get_attribute(name) for place, name in named),
        )

    english = speaks()
    assert english[0].startswith("Better: over")
    assert english[1].startswith("in the file")
    assert english[2].startswith("Base")
    assert english[3:] == ("Search", "Search", "en")
    large.click("#language")
    chinese = speaks()
    assert chinese[0].startswith("更好：")
    assert chinese[1].startswith("按文件")
    assert chinese[2].startswith("原模型")
    assert chinese[3:] == ("搜索", "搜索", "zh-CN")
    large.click("#language")
    assert speaks() == english


def test_all_matching_rows_are_printed_whole(large):
    find(large, "pear 12")
    num = shown(large)
    assert num > 100
    large.evaluate(
        "addEventListener('beforeprint', () => { window.printed = [document.querySelectorAll("
        "'#rows > li').length, document.querySelectorAll('details:not([open])').length]; })"
    )
    assert large.pdf().startswith(b"%PDF")
    assert large.evaluate("window.printed") == [num, 0]
    assert len(numbers(large)) < num, "and afterwards only the visible ones are drawn again"
    assert large.locator("details[open]").count() == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_nobody_is_kept_out(large, size, scheme):
    """No serious fault that axe knows, and nothing to scroll sideways."""
    large.set_viewport_size(size)
    large.emulate_media(color_scheme=scheme)
    unfold = "document.querySelectorAll('details').forEach((one) => { one.open = %s; })"
    large.evaluate(unfold % "true")
    assert large.evaluate("document.documentElement.scrollWidth") == size["width"]
    assert grave_faults(large) == []
    large.evaluate(unfold % "false")
    large.set_viewport_size(DESKTOP)
    large.emulate_media(color_scheme="light")


def test_without_scripts_the_first_screen_is_readable(browser, tmp_path):
    file = tmp_path / "page.html"
    file.write_text(html(many(20)), encoding="utf-8")
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(file.as_uri())
    for told in ("Better:", "更好：", "Gain", "compare.md has them"):
        assert told in page.locator("body").inner_text()
    assert not page.locator(".tools").is_visible()
    page.locator("summary").last.click()
    assert page.locator("table").first.is_visible()
    context.close()
