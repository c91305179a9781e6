"""A comparison as figures and as Markdown; `page` makes the HTML."""

import html
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from glmtune.data.questions import shown_question
from glmtune.errors import visible
from glmtune.evaluation.findings import Finding
from glmtune.evaluation.labels import Text
from glmtune.evaluation.language_matrix import TrainedLanguages, language_note, language_table
from glmtune.evaluation.price import Price
from glmtune.evaluation.replay_savings import Saved
from glmtune.evaluation.run_facts import RunFacts
from glmtune.evaluation.score_tables import PART_NAMES, score_tables
from glmtune.evaluation.scores import Part
from glmtune.evaluation.verdict import PartVerdict
from glmtune.generation import Answer
from glmtune.runlog import format_seconds

TITLE = Text("原模型与微调后，逐条对照", "Base and tuned, side by side")
INSTRUCTION = Text("指令", "Instruction")
INPUT = Text("输入", "Input")
BASE = Text("原模型", "Base")
TUNED = Text("微调后", "Tuned")
EXPECTED = Text("原始答案", "Expected")
MODEL = Text("模型", "Model")
ADAPTER = Text("适配器", "Adapter")
DATE = Text("日期", "Date")
SETTINGS = Text("回答的设置", "Answered with")
TRAINED = Text("用什么训练了什么", "What was trained on what")
COST = Text("花费", "Cost")
LANGUAGES = Text("数据的语言", "Languages")
ANSWERING = Text("回答", "Answering")
NO_COST = Text("没有记录", "not recorded")
NO_PRICE = Text(
    "这次对比没有测量代价。收获再大，通用能力也可能已经变差。",
    "The price was not measured in this comparison: general skills may have become worse.",
)
STOPPED = Text("自行停止", "Stopped by themselves")
MEAN_LENGTH = Text("平均长度（词元）", "Mean length, tokens")
SAME = Text("相同", "same")
DIFFERS = Text("不同", "differs")
AS_EXPECTED = Text("与原始答案一致", "as expected")
CUT = Text("达到长度上限", "cut at max_new_tokens")
EMPTY = Text("（空）", "(empty)")
COLLAPSE = Text("回答坍缩", "Collapse")
NO_COLLAPSE = Text("没有发现。", "None was found.")
NOTHING_CHANGED = Text(
    "两边的回答全部相同：适配器在这里没有带来任何变化。",
    "All answers are the same on both sides: the adapter changes nothing here.",
)


@dataclass(frozen=True)
class Pair:
    """One record, answered twice."""

    number: int
    """The record's row in its file."""
    instruction: str
    input: str
    expected: str
    base: Answer
    tuned: Answer
    log_probs: tuple[float | None, float | None] = (None, None)
    """The expected answer's, on both sides, in nats a token; None where it was not scored."""
    num_reference_tokens: int = 0
    """Tokens of the expected answer, its end included; 0 where it was not scored."""

    @classmethod
    def from_line(cls, line: dict[str, Any]) -> "Pair":
        """Read a line of `compare.jsonl`; what was said before stands before its instruction."""
        instruction, input = shown_question(line)
        scored = line.get("reference")
        num_tokens = scored["num_tokens"] if scored else 0
        log_probs = (scored["base"] / num_tokens, scored["tuned"] / num_tokens) if scored else None
        return cls(
            number=line["row"],
            instruction=instruction,
            input=input,
            expected=line["output"],
            base=Answer(**line["base"]),
            tuned=Answer(**line["tuned"]),
            log_probs=log_probs or (None, None),
            num_reference_tokens=num_tokens,
        )

    @property
    def question(self) -> str:
        """What was asked, instruction and input."""
        return "\n".join(filter(None, (self.instruction, self.input)))

    @property
    def sides(self) -> tuple[tuple[Answer, float | None], tuple[Answer, float | None]]:
        """Base, then tuned: the answer, and the log-probability of the expected one."""
        return (self.base, self.log_probs[0]), (self.tuned, self.log_probs[1])

    @property
    def differs(self) -> bool:
        """Whether the two answers are different texts."""
        return self.base.text != self.tuned.text

    def is_expected(self, answer: Answer) -> bool:
        """Whether an answer is the record's own output, word for word."""
        return answer.stopped and answer.text.strip() == self.expected.strip() != ""


@dataclass(frozen=True)
class Comparison:
    """All pairs of a run, and their origin."""

    base: str
    adapter: str
    dtype: str
    settings: dict[str, int | float | bool]
    date: str
    pairs: Sequence[Pair]
    verdicts: Mapping[Part, PartVerdict] = field(default_factory=dict)
    """The verdict on each language and on all rows; empty where nothing was scored."""
    sets: Mapping[str, PartVerdict] = field(default_factory=dict)
    """The verdict on each set of held-out rows, where there are several."""
    collapse: Sequence[Finding] = ()
    """What is wrong with the tuned answers as a whole."""
    cost: Mapping[str, float] | None = None
    """What answering took; None where that is not known."""
    price: Price | None = None
    """What the tuning cost on a general set; None where none was asked."""
    saved: Saved | None = None
    """What replay saved, beside a run without it; None where no such run was named."""
    trained_on: TrainedLanguages | None = None
    """The languages of the run's rows; None where they are not there."""
    passes_gate: bool = True
    """False where `--gate` asked for a better verdict."""
    chrf: Sequence[tuple[float | None, float | None]] | None = None
    """The answers' of each pair, on both sides; None inside where a record has no reference."""
    run: RunFacts | None = None
    """What the adapter's run recorded; None where nothing of it is beside the adapter."""

    @property
    def num_different(self) -> int:
        """How many records got two different answers."""
        return sum(pair.differs for pair in self.pairs)

    @property
    def verdict(self) -> Text:
        """The result in one line."""
        if not self.num_different and self.judged_by is None:
            return NOTHING_CHANGED
        found = self.verdicts.get("all")
        return found.sentence if found and found.num_rows else self.differences

    @property
    def differences(self) -> Text:
        """How many answers differ, in one line."""
        num, total = self.num_different, len(self.pairs)
        return Text(f"{total} 条记录中有 {num} 条回答不同。", f"{num} of {total} answers differ.")

    def summary(self) -> Iterator[str]:
        """The result as lines for a terminal, in English."""
        yield self.verdict.en
        for part, found in self.verdicts.items():
            if part != "all" and 0 < found.num_rows < self.verdicts["all"].num_rows:
                yield f"{PART_NAMES[part].en}: {found.sentence.en}"
        for name, found in self.sets.items():
            yield visible(f"{name}: {found.sentence.en}")
        if self.verdict != self.differences:
            yield self.differences.en
        if self.price:
            yield self.price.sentence.en
        if self.saved:
            yield visible(self.saved.sentence.en)
        if self.language_note:
            yield self.language_note.en
        for finding in self.collapse:
            yield visible(f"{COLLAPSE.en}: {finding.sentence.en}")

    def as_json(self) -> dict[str, Any]:
        """The content of compare.json."""
        found = {part: verdict.as_json() for part, verdict in self.verdicts.items()}
        origin = {"base": self.base, "adapter": self.adapter, "dtype": self.dtype}
        return {
            **origin,
            "settings": self.settings,
            "date": self.date,
            "answers": {"asked": len(self.pairs), "differ": self.num_different},
            "sentence": self.verdict._asdict(),
            "languages": found,
            "sets": {name: verdict.as_json() for name, verdict in self.sets.items()},
            "price": self.price and self.price.as_json(),
            "general_set": self.price and self.price.set_name,
            "replay_saved": self.saved and self.saved.as_json(),
            "trained_on": self.trained_on and self.trained_on.as_json(),
            "collapse": [finding.as_json() for finding in self.collapse],
            "cost": self.cost,
        }

    def tables(self) -> Iterator[tuple[Text, list[list[Text]]]]:
        """The scores and the price as tables: title, and rows of which the first is the heading."""
        yield from score_tables(self.verdicts)
        if self.trained_on and self.verdicts:
            yield language_table(self.trained_on, self.verdicts, self.price)
        if self.price:
            yield from self.price.tables()

    @property
    def language_note(self) -> Text | None:
        """What measures the language that was not trained on, if one was not."""
        if self.trained_on is None:
            return None
        return language_note(self.trained_on, self.verdicts, self.price)

    @property
    def judged_by(self) -> str | None:
        """The score that decides on all rows; None where none does."""
        found = self.verdicts.get("all")
        return found.judge if found else None

    def num_stopped(self, side: Callable[[Pair], Answer]) -> int:
        """How many answers of one side ended by themselves, within the limit."""
        return sum(side(pair).stopped for pair in self.pairs)

    def mean_length(self, side: Callable[[Pair], Answer]) -> float:
        """The mean number of tokens of one side's answers."""
        return sum(side(pair).num_tokens for pair in self.pairs) / len(self.pairs)

    @property
    def trained(self) -> dict[Text, str | Text]:
        """What was trained on what, and the origin of the answers: label -> value."""
        settings = {"dtype": self.dtype} | self.settings
        return {
            MODEL: self.base,
            ADAPTER: self.adapter,
            **(self.run.trained if self.run else {}),
            **self._languages,
            SETTINGS: ", ".join(f"{name} {value}".lower() for name, value in settings.items()),
            DATE: self.date,
        }

    @property
    def _languages(self) -> dict[Text, str | Text]:
        if self.trained_on is None:
            return {}
        shares = [
            (name, f"{self.trained_on.share(part):.0%}")
            for part, name in PART_NAMES.items()
            if part != "all"
        ]
        return {LANGUAGES: Text(*(", ".join(f"{n[i]} {s}" for n, s in shares) for i in (0, 1)))}

    @property
    def costs(self) -> dict[Text, Text]:
        """What training and answering took, as far as that was recorded: label -> value."""
        found = self.run.cost if self.run else {}
        if (cost := self.cost) is not None:
            seconds, tokens = format_seconds(cost["seconds"]), f"{cost['tokens']:,.0f}"
            memory = f"{cost['peak_memory_gib']:.1f} GiB"
            found[ANSWERING] = Text(
                f"{seconds}，{cost['records']:,.0f} 题各答两次，{tokens} 个词元，内存至多 {memory}",
                f"{seconds}, {cost['records']:,.0f} questions answered twice, {tokens} tokens, "
                f"at most {memory}",
            )
        return found or {ANSWERING: NO_COST}


def base_of(pair: Pair) -> Answer:
    """The base's answer: one side of the report."""
    return pair.base


def tuned_of(pair: Pair) -> Answer:
    """The tuned model's answer: the other side."""
    return pair.tuned


def markdown(comparison: Comparison) -> str:
    """The comparison as Markdown: a table of figures, then one of answers per record."""
    total = len(comparison.pairs)
    lines = [f"# {TITLE}", ""]
    facts = comparison.trained | comparison.costs
    lines += [f"- {label}: {_escape(str(value))}" for label, value in facts.items()]
    lines += ["", f"**{comparison.verdict}**", ""]
    lines += [f"- {_escape(name)}: {found.sentence}" for name, found in comparison.sets.items()]
    lines += [""] * bool(comparison.sets)
    if not comparison.collapse:
        lines += [f"- {COLLAPSE}: {NO_COLLAPSE}", ""]
    for finding in comparison.collapse:
        lines += [f"- {COLLAPSE}: {_escape(str(finding.sentence))}"]
        for example in finding.examples:
            row = "" if example.row is None else f"{example.row}: "
            lines += [f"  - {row}{_escape(example.question)} → {_escape(example.answer) or EMPTY}"]
    lines += [""] * bool(comparison.collapse)
    sides = base_of, tuned_of
    stopped = (f"{comparison.num_stopped(side)} / {total}" for side in sides)
    lengths = (f"{comparison.mean_length(side):.1f}" for side in sides)
    lines += table_lines([["", BASE, TUNED], [STOPPED, *stopped], [MEAN_LENGTH, *lengths]])
    price = comparison.price.sentence if comparison.price else NO_PRICE
    lines += ["", f"**{_escape(str(price))}**"]
    if comparison.saved:
        lines += ["", _escape(str(comparison.saved.sentence))]
    if comparison.language_note:
        lines += ["", _escape(str(comparison.language_note))]
    if comparison.run and comparison.run.dial:
        lines += ["", _escape(str(comparison.run.dial.sentence))]
    for title, rows in comparison.tables():
        cells = [[_escape(str(cell)) for cell in row] for row in rows]
        lines += ["", f"**{title}**", "", *table_lines(cells)]
    for pair in comparison.pairs:
        lines += ["", f"## {pair.number} · {DIFFERS if pair.differs else SAME}", ""]
        lines += [f"**{INSTRUCTION}**: {_escape(pair.instruction)}", ""]
        if pair.input:
            lines += [f"**{INPUT}**: {_escape(pair.input)}", ""]
        answers = [_answer(pair.base), _answer(pair.tuned), _escape(pair.expected) or EMPTY]
        lines += table_lines([[BASE, TUNED, EXPECTED], answers])
    return "\n".join(lines) + "\n"


def table_lines(rows: Sequence[Sequence[object]]) -> list[str]:
    """The lines of a Markdown table; its first row is the heading."""
    lines = [f"| {' | '.join(map(str, row))} |" for row in rows]
    lines.insert(1, "|" + " --- |" * len(rows[0]))
    return lines


def _answer(answer: Answer) -> str:
    text = _escape(answer.text) or str(EMPTY)
    return text if answer.stopped else f"{text} … *({CUT})*"


def _escape(text: str) -> str:
    """Escape any text for one line of Markdown, also within a table."""
    one_kind = re.sub(r"\r\n|[\n\r\v\f\x85\u2028\u2029]", "\n", text.strip())
    shown = html.escape(visible(one_kind), quote=False)
    return re.sub(r"([\\`*_~#|$\[\]])", r"\\\1", shown).replace("\n", "<br>")
