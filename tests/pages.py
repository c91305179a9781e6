"""Comparisons and their pages, for tests."""

import json
import re
from html.parser import HTMLParser

from glmtune.evaluation.findings import Example, Finding
from glmtune.evaluation.intervals import Interval
from glmtune.evaluation.labels import Text
from glmtune.evaluation.price import KindPrice, PartPrice, Price
from glmtune.evaluation.report import Comparison, Pair
from glmtune.evaluation.scores import score_pairs
from glmtune.evaluation.verdict import Compared, judge
from glmtune.general.items import OWN_NAME
from glmtune.generation import Answer

NASTY = "</p></script><script>alert('x')</script><!-- | a\n\n| --- | `*_[x](y) & <b>\u2028$1$"
COLLAPSE = Finding(
    "same_answer",
    0.6,
    0.1,
    Text("六成问题得到同一个回答。", "Six of ten get one answer."),
    (
        Example(2, f"Why? {NASTY}", f"So. {NASTY}"),
        Example(None, "A question of our own", ""),
    ),
)


# As `adapters dial` and `ledger` write them.
DIAL = {
    "adapter": "run", "measure": "log_prob", "recommended": 0.75, "source": "rows",
    "sentence": {"zh": "建议缩放 0.75。", "en": "Scale 0.75 is recommended."},
    "scales": [
        {
            "scale": scale,
            "log_prob": {"value": scale - 9, "gain": scale, "low": None, "high": None},
            "price": {"all": {"n": 9, "before": 100.0, "after": 100 - 4 * scale}},
            "general_lost": scale > 0.75,
        }
        for scale in (0.0, 0.5, 0.75, 1.0)
    ],
}  # fmt: skip
LEDGER = {
    "counts": {"trained_on": 99, "held_out": 0, "worse": 1, "contradiction": 50},
    "rows": [
        {"row": 1234, "question": f"Why? {NASTY}", "answer": "So.", "before": 1.25, "after": 2.5,
         "kind": "worse"},
        *({"row": i, "question": "Who?", "answer": f"{i}", "before": 2.0, "after": 1.0,
           "kind": "contradiction"} for i in range(30)),
    ],
}  # fmt: skip


def price(names=("zh", "en", "all"), num=24):
    """A price of 17.5 points in each language, most of it in facts."""
    interval = Interval(-17.5, -25.0, -9.5, 12)
    accuracy = Compared(num, 80.0, 62.5, interval, 30.0)
    log_prob = Compared(num, -1.2, -1.6, Interval(-0.4, -0.6, -0.2, num), 0.5)
    compared = {"accuracy": accuracy, "log_prob": log_prob}
    kinds = {"facts": KindPrice(12, 90.0, 50.0), "sums": KindPrice(12, 70.0, 75.0)}
    return Price({name: PartPrice(compared, kinds) for name in names}, OWN_NAME)


def pair(base="一 二", tuned="一 三", number=1, stopped=False, **fields):
    fields = {"instruction": "说", "input": "", "expected": "一"} | fields
    return Pair(
        number=number, base=Answer(base, 2, True), tuned=Answer(tuned, 4, stopped), **fields
    )


def comparison(*pairs, **fields):
    settings = {"max_new_tokens": 150, "do_sample": False}
    date = "2026-01-02 03:04"
    return Comparison("chatglm-6b", "output_zh", "bfloat16", settings, date, pairs, **fields)


def judged(*pairs, **fields):
    """A comparison with scores and verdicts."""
    table = score_pairs(pairs)
    scores = {"verdicts": judge(table), "chrf": table.of_rows("chrf")}
    return comparison(*pairs, **scores, **fields)


def records(num):
    """Records in both languages, of which every fifth became worse and every seventh was cut."""
    for i in range(1, num + 1):
        asked, right, wrong = (
            (f"第 {i} 号苹果是什么颜色？", f"第 {i} 号苹果是红色的。", f"第 {i} 号桥很长很长。")
            if i % 2
            else (f"Which colour has pear {i}?", f"Pear {i} is green.", f"Bridge {i} is long.")
        )
        sides = (right, wrong) if i % 5 == 0 else (wrong, right)
        log_probs = (-1.0, -2.0) if i % 5 == 0 else (-3.0 - i / 100, -1.0)
        yield pair(
            *sides, i, i % 7 > 0, instruction=asked, expected=right, log_probs=log_probs,
            num_reference_tokens=5,
        )  # fmt: skip


def many(num, **fields):
    """A judged comparison of `records`, with a price and a collapse."""
    fields = {"price": price(), "collapse": [COLLAPSE]} | fields
    return judged(*records(num), **fields)


class Page(HTMLParser):
    """The elements of a page, the text in them, and the data that its script reads."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self.open = [], "", []
        self.feed(text)
        self.close()
        assert not self.open, "every element is closed"
        found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
        self.data = json.loads(found[1]) if found else None

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "input"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
