"""The price of a tuning: how base and tuned weights score on a general set, beside any task."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from glmtune.evaluation.labels import Text
from glmtune.evaluation.score_tables import PART_NAMES
from glmtune.evaluation.scores import PARTS, Part, Sides
from glmtune.evaluation.verdict import Compared, intervals_of, signed
from glmtune.general.items import OWN_NAME
from glmtune.general.scores import GeneralScores

ACCURACY = Text("通用题答对率（分）", "General questions right, of 100")
LOG_PROB = Text(
    "正确答案的对数概率（nat/词元）", "Log-probability of the right answer, nats a token"
)
NAMES = {"accuracy": ACCURACY, "log_prob": LOG_PROB}
DIGITS = {"accuracy": 1, "log_prob": 3}
OWN = Text("glmtune 自带的题目", "glmtune's own questions")
KINDS = {
    "facts": Text("事实", "facts"),
    "sums": Text("计算", "sums"),
    "reading": Text("阅读", "reading"),
    "translation": Text("翻译", "translation"),
    "safety": Text("安全", "safety"),
    "format": Text("格式", "format"),
    "identity": Text("身份", "identity"),
    "common_sense": Text("常识", "common sense"),
    "logic": Text("推理", "logic"),
    "language": Text("语言", "language"),
    "classification": Text("分类", "classification"),
    "code": Text("代码与单位", "code and units"),
    "colour": Text("颜色", "colour"),
    "place": Text("位置", "place"),
    "material": Text("材料", "material"),
    "food": Text("食物", "food"),
    "home": Text("住处", "home"),
    "job": Text("职业", "job"),
    "sum": Text("加法", "sum"),
    "opposite": Text("反义词", "opposite"),
    "order": Text("顺序", "order"),
    "counting": Text("数数", "counting"),
    "story": Text("故事", "story"),
}
"""Kinds of our own items and of glm-tiny's; those of another set are shown as they are named."""


@dataclass(frozen=True)
class KindPrice:
    """The items of one kind: how many, and how many in a hundred each side has right."""

    num_items: int
    before: float
    after: float

    def as_json(self) -> dict[str, float]:
        """The figures, by the names of compare.json."""
        return {"n": self.num_items, "before": self.before, "after": self.after}


@dataclass(frozen=True)
class PartPrice:
    """The price in one language, or over all items."""

    compared: Mapping[str, Compared]
    """`accuracy` in points, `log_prob` in nats a token."""
    kinds: Mapping[str, KindPrice]

    @property
    def accuracy(self) -> Compared:
        """How many items in a hundred each side has right."""
        return self.compared["accuracy"]

    def as_json(self) -> dict[str, Any]:
        """The figures, by the names of compare.json."""
        accuracy, log_prob = (_figures(self.compared[name]) for name in NAMES)
        kinds = {name: kind.as_json() for name, kind in self.kinds.items()}
        return {"n": self.accuracy.num_rows, **accuracy, "log_prob": log_prob, "kinds": kinds}


def _figures(compared: Compared) -> dict[str, float | None]:
    low, high = compared.interval[1:3] if compared.interval else (None, None)
    return {"before": compared.base, "after": compared.tuned, "low": low, "high": high}


@dataclass(frozen=True)
class Price:
    """What a tuning cost, in each language that has items and over all."""

    parts: Mapping[Part, PartPrice]
    set_name: str
    """See `GeneralSet.name`."""

    @classmethod
    def of(cls, base: GeneralScores, tuned: GeneralScores, set_name: str) -> "Price":
        """Compare both sides' scores on the same items."""
        parts = {part: _part(base, tuned, part) for part in PARTS if base.is_in(part).any()}
        return cls(parts, set_name)

    def as_json(self) -> dict[str, Any]:
        """The content of `price` in compare.json."""
        return {part: found.as_json() for part, found in self.parts.items()}

    @property
    def sentence(self) -> Text:
        """The price over all items, in one line."""
        found = self.parts["all"].accuracy
        num, before, after = found.num_rows, f"{found.base:.1f}", f"{found.tuned:.1f}"
        origin = OWN if self.set_name == OWN_NAME else Text(self.set_name, self.set_name)
        zh = f"代价：{num} 道通用题（{origin.zh}）的答对率从 {before}% 变为 {after}%"
        en = f"The price: of {num} general questions ({origin.en}) the base has {before} % right "
        en += f"and the tuned weights {after} %"
        if found.interval is None:
            few = Text("题目太少，没有区间", "too few for an interval")
            return Text(f"{zh}（{few.zh}）。", f"{en} ({few.en}).")
        change, low, high = (signed(value, 1) for value in found.interval[:3])
        word = _WORDS[found.interval.sign]
        zh += f"，变化 {change} 个百分点（95% 区间 {low} 至 {high}）：{word.zh}。"
        en += f", {change} points (95 % interval {low} to {high}): {word.en}."
        return Text(zh, en)

    def tables(self) -> Iterator[tuple[Text, list[list[Text]]]]:
        """A title and the rows of each table, as `score_tables` gives them."""
        parts: list[Part] = [part for part in self.parts if part != "all"] or ["all"]
        if len(parts) > 1:
            parts.append("all")
        rows = [list(_HEADINGS)]
        for part in parts:
            for name, compared in self.parts[part].compared.items():
                of, what = PART_NAMES[part], NAMES[name]
                label = Text(f"{of.zh}：{what.zh}", f"{of.en}: {what.en}")
                rows.append([label, *_cells(compared, DIGITS[name])])
        yield Text("代价：通用题", "The price: general questions"), rows
        heading = [Text("题型，答对率", "Kind, of 100 right")]
        for part in parts:
            for side in _HEADINGS[1:3]:
                of = PART_NAMES[part]
                heading.append(Text(f"{of.zh}，{side.zh}", f"{of.en}, {side.en}"))
        kinds = [[KINDS.get(kind, Text(kind, kind)), *self._kind(kind, parts)]
                 for kind in self.parts["all"].kinds]  # fmt: skip
        yield Text("各题型的代价", "The price by kind"), [heading, *kinds]

    def _kind(self, kind: str, parts: list[Any]) -> Iterator[Text]:
        for part in parts:
            found = self.parts[part].kinds.get(kind)
            for value in (found.before, found.after) if found else (None, None):
                cell = "" if value is None else f"{value:.0f}"
                yield Text(cell, cell)


_WORDS = {
    -1: Text("通用能力有损失", "general ability was lost"),
    0: Text("看不出通用能力有损失", "no loss of general ability is seen"),
    1: Text("通用能力没有损失", "no general ability was lost"),
}
_HEADINGS = (
    Text("得分", "Score"),
    Text("微调前", "Before"),
    Text("微调后", "After"),
    Text("变化", "Change"),
    Text("95% 区间", "95 % interval"),
)


def _cells(compared: Compared, digits: int) -> list[Text]:
    cells = [f"{compared.base:.{digits}f}", f"{compared.tuned:.{digits}f}"]
    cells.append(signed(compared.tuned - compared.base, digits))
    bounds = compared.interval[1:3] if compared.interval else ()
    cells.append(" … ".join(signed(bound, digits) for bound in bounds))
    return [Text(cell, cell) for cell in cells]


def _part(base: GeneralScores, tuned: GeneralScores, part: Part) -> PartPrice:
    is_in_N = base.is_in(part)
    chosen = {
        "accuracy": Sides(base.accuracy_N[is_in_N], tuned.accuracy_N[is_in_N]),
        "log_prob": Sides(base.log_prob_N[is_in_N], tuned.log_prob_N[is_in_N]),
    }
    found = intervals_of(chosen)
    compared = {name: Compared.of(sides, found.get(name)) for name, sides in chosen.items()}
    items = [item for item, is_in in zip(base.items, is_in_N, strict=True) if is_in]
    kinds = {}
    for kind in dict.fromkeys(item.kind for item in items):
        is_kind_N = [item.kind == kind for item in items]
        before, after = (side[is_kind_N].mean() for side in chosen["accuracy"])
        kinds[kind] = KindPrice(sum(is_kind_N), float(before), float(after))
    return PartPrice(compared, kinds)
