"""The questions that a check asks: held-out rows, the user's records, or a few of our own."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from glmtune.data.conversations import PlainText
from glmtune.data.dataset import CONVERSATION
from glmtune.data.flaws import Flaw
from glmtune.data.questions import Question, read_questions
from glmtune.data.templates import alpaca
from glmtune.data.thoughts import arrange
from glmtune.data.token_rows import TokenRows
from glmtune.errors import UserError
from glmtune.models.likelihood import Probe

OWN_QUESTIONS = (
    ("用一句话解释什么是光合作用。", "植物利用阳光把二氧化碳和水变成有机物，并放出氧气。"),
    ("Explain photosynthesis in one sentence.",
     "Photosynthesis is how plants use sunlight to turn carbon dioxide and water into sugar."),
    ("给出三个保持健康的建议。", "均衡饮食，经常运动，保证充足的睡眠。"),
    ("Give three tips for staying healthy.", "Eat a balanced diet, exercise, and sleep enough."),
    ("把下面的句子翻译成英文：今天天气很好。", "The weather is very nice today."),
    ("Translate into Chinese: I like reading books.", "我喜欢读书。"),
    ("写出“高兴”的一个近义词。", "快乐。"),
    ("Name an antonym of \"fast\".", "Slow."),
)  # fmt: skip
# Together with these they cover more than any adapter's task, so that a collapse shows.
STRANGE_QUESTIONS = (
    *OWN_QUESTIONS,
    ("水在多少摄氏度沸腾？", "一百摄氏度。"),
    ("What is the capital of France?", "Paris."),
    ("讲一个关于小猫的短故事。", "从前有一只小猫，它追着蝴蝶跑进花园，玩累了就在树下睡着了。"),
    ("Write a short poem about the sea.", "The grey sea breathes, and every wave comes home."),
    ("列出三种水果。", "苹果、香蕉和橙子。"),
    ("How many days are there in a week?", "Seven."),
    ("“谢谢”用英语怎么说？", "Thank you."),
    ("Which animal barks?", "A dog."),
)  # fmt: skip


class Probes(NamedTuple):
    """At least one question, and where the questions come from."""

    probes: list[Probe]
    source: str
    of_task: bool
    """Whether they are from the task that the adapter was, or should have been, trained for."""


def from_texts(tokenizer: Any, pairs: Sequence[tuple[str, str]]) -> list[Probe]:
    """Encode contexts and their answers, uncut."""
    contexts = tokenizer.encode_contexts([context for context, _ in pairs])
    answers = tokenizer.encode_batch([answer for _, answer in pairs])
    rule = tokenizer.row_rule
    return [Probe(rule.prompt(c), rule.answer(a)) for c, a in zip(contexts, answers, strict=True)]


def own_probes(tokenizer: Any, limit: int) -> Probes:
    """Questions that come with this program, Chinese and English by turns."""
    pairs = [(alpaca(asked), answer) for asked, answer in OWN_QUESTIONS[:limit]]
    return Probes(from_texts(tokenizer, pairs), "questions that come with glmtune", of_task=False)


def strange_probes(tokenizer: Any, template: str | None) -> list[Probe]:
    """Our own questions and some more, in the template of the adapter's rows.

    Args:
        tokenizer: the model's tokenizer.
        template: template of those rows; if it is the user's own, it is unknown, and the bare
            question is the closest to it.
    """
    write = str if template in ("custom", CONVERSATION) else alpaca
    return from_texts(tokenizer, [(write(asked), answer) for asked, answer in STRANGE_QUESTIONS])


def row_probes(rows: TokenRows, row_ids: np.ndarray, limit: int) -> list[Probe]:
    """Rows that have an answer, evenly spaced among the given ones."""
    row_ids = row_ids[rows.lengths_R[row_ids] > rows.prompt_lengths_R[row_ids]]
    return [probe_of_row(rows, row) for row in row_ids[spread(len(row_ids), limit)]]


def spread(num: int, limit: int) -> np.ndarray:
    """At most `limit` places among `num`, evenly spaced, the first and the last among them."""
    return np.linspace(0, num - 1, min(limit, num)).astype(int)


def probe_of_row(rows: TokenRows, row: int) -> Probe:
    """A row's prompt and its answer."""
    ids, length = rows[row].tolist(), int(rows.prompt_lengths_R[row])
    return Probe(ids[:length], ids[length:])


def held_out_probes(rows: TokenRows, held_out: np.ndarray, limit: int) -> Probes | None:
    """Rows that a run held out; None if none of them has an answer."""
    probes = row_probes(rows, held_out, limit)
    return Probes(probes, "rows that the run held out", of_task=True) if probes else None


def record_probes(
    data_path: str,
    tokenizer: Any,
    limit: int,
    format: str | None = None,
    encoding: str | None = None,
) -> Probes:
    """Rows of a file that have an answer, and texts, as training has them.

    Raises:
        UserError: the rows cannot be read, the family cannot write one, or none has an answer.
    """
    questions, _, _ = read_questions(data_path, format, encoding=encoding)
    answered = [q for q in questions if q.expected.strip() or isinstance(q.asked, PlainText)]
    if not answered:
        raise UserError(f"{data_path}: no record has an output to compare with")
    probes = [probe_of(question, tokenizer) for question in answered[:limit]]
    return Probes(probes, f"records of {data_path}", of_task=True)


def probe_of(question: Question, tokenizer: Any) -> Probe:
    """A question and its answer, encoded as rows are."""
    asked, rule = question.asked, tokenizer.row_rule
    if isinstance(asked, str):
        return from_texts(tokenizer, [(asked, question.expected)])[0]
    if isinstance(asked, PlainText):
        ids = [*rule.text_prefix, *tokenizer.encode_batch([asked.text])[0], *rule.text_end]
        length = rule.text_start
        return Probe(ids[:length], ids[length:])
    assert question.answer is not None, "it has an expected answer"
    whole = asked._replace(turns=(*asked.turns, question.answer))
    arranged, _ = arrange(whole, None, tokenizer.opens_thoughts)
    (row,) = tokenizer.encode_examples([arranged])
    if isinstance(row, Flaw):
        raise UserError(f"{question.where}: {row}")
    return Probe(row.input_ids[: row.prompt_length], row.input_ids[row.prompt_length :])
