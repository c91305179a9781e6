"""The template around a record."""

import json

import pytest

from glmtune.data import templates
from glmtune.data.templates import alpaca, is_alpaca, parts


@pytest.mark.parametrize(
    "instruction, input, context",
    [
        ("翻译", "你好", "Instruction: 翻译\nInput: 你好\nAnswer: "),
        ("讲个故事", "", "Instruction: 讲个故事\nAnswer: "),
        (" a\n", " ", "Instruction:  a\n\nInput:  \nAnswer: "),
    ],
)
def test_alpaca(instruction, input, context):
    assert alpaca(instruction, input) == context
    assert is_alpaca(context)
    assert parts(context) == (instruction, input)


def test_other_contexts_are_not_alpaca():
    assert not is_alpaca("问：你好\n答：")
    assert parts("问：你好\n答：") == ("问：你好\n答：", "")
    assert not is_alpaca("Instruction: a\nInput: b\n")


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_alpaca.json"])
def test_contexts_are_those_of_the_original(shared, name):
    golden = json.loads((shared / "golden" / name).read_text(encoding="utf-8"))
    for row in golden["rows"]:
        record = row["record"]
        assert alpaca(record["instruction"], record.get("input", "")) == row["context"]
        assert record["output"] == row["target"]


@pytest.mark.parametrize(
    "history, question",
    [
        ([], "bare"),
        ([("q", "a")], "then?"),
        ([("[Round 0]\n问：x", "a\n答：b"), ("", "")], "last\n答：?"),
    ],
)
def test_a_conversation_is_read_back(history, question):
    context = templates.rounds(history, question) if history else question
    assert templates.conversation_of(context) == (history, question)


def test_a_records_conversation_is_its_instruction_and_input():
    assert templates.conversation_of(alpaca("Add.", "1 2")) == ([], "Add.\n1 2")
    assert templates.conversation_of(alpaca("加法。")) == ([], "加法。")


def test_rounds_that_do_not_count_up_are_one_question():
    text = "[Round 0]\n问：a\n[Round 1]\n问：b\n答："
    assert templates.conversation_of(text) == ([], text)


SPELLED = ["[Round 0]\n问：a\n答：", "[Round 0]\n问：a\n答：b\n[Round 1]\n问：c\n答："]
SPELLED += ["a\nInput: b", "Instruction: a\nAnswer: ", "Instruction: a\nInput: b\nAnswer: "]


@pytest.mark.parametrize("text", SPELLED)
@pytest.mark.parametrize("history", [[], [("q", "a")]])
def test_what_somebody_typed_is_no_round_and_no_field(text, history):
    """Neither in a chat nor in a record; a context of a file is text alone, and read back."""
    for context in (templates.after_rounds(history, text), templates.context_of(text, "", history)):
        assert templates.conversation_of(context) == (history, text)
        assert templates.has_rounds(context) == bool(history)
    assert templates.conversation_of(templates.context_of(text, "in")) == ([], f"{text}\nin")
    assert not templates.is_alpaca(templates.after_rounds(history, text))
