"""Formats of conversations: what each makes of a row's fields, and what it refuses, by turn."""

import json

import pytest

from glmtune.data.conversations import ASSISTANT, OBSERVATION, SYSTEM, USER, Turn
from glmtune.data.fields import history_of
from glmtune.data.flaws import Flaw
from glmtune.data.formats import FORMATS, read_example, recognise
from glmtune.data.records import Conversation, Row, format_of
from glmtune.data.row_files import look_through
from glmtune.errors import UserError

TOOL = {"type": "function", "function": {"name": "find", "parameters": {"type": "object"}}}
HELLO, HI = Turn(USER, "hello"), Turn(ASSISTANT, "hi")


def said(*pairs):
    """Turns of a role and a text each, as OpenAI has them."""
    return [{"role": role, "content": text} for role, text in pairs]


def openai(*turns, **fields):
    return {"messages": list(turns), **fields}


def sharegpt(*pairs, **fields):
    return {"conversations": [{"from": who, "value": text} for who, text in pairs], **fields}


def example_of(fields):
    return read_example(recognise(fields), fields)[0]


def turns_of(fields):
    return list(example_of(fields).turns)


PLAIN = said((USER, "hello"), (ASSISTANT, "hi"))
CALLED_BADLY = {"name": "f", "arguments": "{"}
CALL = {"function": {"name": "find", "arguments": '{"q": 1}'}}


@pytest.mark.parametrize(
    ("fields", "turns"),
    [
        (openai(*PLAIN), [HELLO, HI]),
        ({"conversations": PLAIN}, [HELLO, HI]),
        (sharegpt(("human", "hello"), ("gpt", "hi")), [HELLO, HI]),
        (sharegpt(("user", "hello"), ("assistant", "hi")), [HELLO, HI]),
        (openai(*said(("developer", "brief")), *PLAIN), [Turn(SYSTEM, "brief"), HELLO, HI]),
        (openai(*PLAIN, system="brief"), [Turn(SYSTEM, "brief"), HELLO, HI]),
        (
            sharegpt(("human", "hello"), ("gpt", "hi"), system="brief"),
            [Turn(SYSTEM, "brief"), HELLO, HI],
        ),
        (
            openai({"role": USER, "content": [{"type": "text", "text": t} for t in ("hel", "lo")]},
                   PLAIN[1]),
            [HELLO, HI],
        ),
        (openai(PLAIN[0], PLAIN[1] | {"loss": False}), [HELLO, HI._replace(supervised=False)]),
        (openai(PLAIN[0], PLAIN[1] | {"weight": 1}), [HELLO, HI._replace(supervised=True)]),
        (openai(PLAIN[0] | {"loss": True}, PLAIN[1]), [HELLO, HI]),
    ],
)  # fmt: skip
def test_turns_of_text(fields, turns):
    assert turns_of(fields) == turns


def test_a_call_and_its_result_are_turns_of_their_own_in_every_format():
    call, result = Turn(ASSISTANT, '{"q": 1}', "find"), Turn(OBSERVATION, "42")
    expected = [HELLO, call, result, Turn(ASSISTANT, "it is 42")]
    end = said((ASSISTANT, "it is 42"))
    asks = {"role": ASSISTANT, "content": None, "tool_calls": [CALL | {"id": "a"}]}
    answers = {"role": "tool", "tool_call_id": "a", "content": "42"}
    both = {"role": "tool", "name": "find", "parameters": {"q": 1}, "observation": 42}
    named = {"role": ASSISTANT, "metadata": "find", "content": '{"q": 1}'}
    for fields in (
        openai(PLAIN[0], asks, answers, *end, tools=[TOOL]),
        {"conversations": [PLAIN[0], both, *end], "tools": [TOOL]},
        openai(
            {"role": SYSTEM, "content": "", "tools": [TOOL]},
            PLAIN[0], named, *said((OBSERVATION, "42")), *end,
        ),
        sharegpt(
            ("human", "hello"), ("function_call", '{"name": "find", "arguments": {"q": 1}}'),
            ("observation", "42"), ("gpt", "it is 42"), tools=json.dumps([TOOL]),
        ),
    ):  # fmt: skip
        example = example_of(fields)
        assert list(example.turns) == expected
        assert list(example.tools) == [TOOL]


def test_calls_of_one_turn_each_precede_their_own_result():
    def function(name):
        return {"name": "find", "arguments": json.dumps({"q": name})}

    calls = [{"id": name, "function": function(name)} for name in "abc"]
    results = [{"role": "tool", "tool_call_id": name, "content": name} for name in "cab"]
    asks = {"role": ASSISTANT, "content": "I look", "tool_calls": calls}
    turns = turns_of(openai(PLAIN[0], asks, *results, *said((ASSISTANT, "done"))))
    made = {name: Turn(ASSISTANT, json.dumps({"q": name}), "find") for name in "abc"}
    in_pairs = [turn for name in "cab" for turn in (made[name], Turn(OBSERVATION, name))]
    assert turns == [HELLO, Turn(ASSISTANT, "I look"), *in_pairs, Turn(ASSISTANT, "done")]
    unanswered = turns_of(openai(PLAIN[0], asks))
    assert unanswered == [HELLO, Turn(ASSISTANT, "I look"), *made.values()]


def test_a_thought_stands_beside_its_answer():
    thinks = PLAIN[1] | {"reasoning_content": "a greeting"}
    turns = turns_of(openai(PLAIN[0], thinks, PLAIN[0], PLAIN[1]))
    assert turns == [HELLO, HI._replace(thought="a greeting"), HELLO, HI]
    shared = [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "hi", "reasoning": "x"}]
    turns = FORMATS["sharegpt"].read({"conversations": shared}).example.turns
    assert turns[1] == HI._replace(thought="x")
    bad = PLAIN[1] | {"reasoning_content": ["a"]}
    with pytest.raises(Flaw, match='"reasoning_content" of turn 2 of "messages" is'):
        turns_of(openai(PLAIN[0], bad))


def test_a_thought_before_a_call_is_a_turn_of_its_own():
    call = {"function": {"name": "find", "arguments": {"q": "a"}}}
    thinks = {"role": ASSISTANT, "content": None, "reasoning_content": "hm", "tool_calls": [call]}
    turns = turns_of(openai(PLAIN[0], thinks))
    assert turns[1:] == [
        Turn(ASSISTANT, "", thought="hm"), Turn(ASSISTANT, json.dumps({"q": "a"}), "find")
    ]  # fmt: skip


def test_a_property_that_is_null_is_left_out_of_a_tool():
    parameters = {"type": "object", "properties": {"q": {"type": "string"}, "year": None}}
    tool = {"type": "function", "function": {"name": "find", "parameters": parameters}}
    kept = example_of(openai(*PLAIN, tools=[tool])).tools[0]
    assert kept["function"]["parameters"]["properties"] == {"q": {"type": "string"}}


FLAWS = [
    (openai(*PLAIN[:1], *PLAIN), 'turn 2 of "messages" is a user\'s, and so is the turn before'),
    (openai(PLAIN[1]), 'turn 1 of "messages" is the assistant\'s, and no user'),
    (openai(PLAIN[0], PLAIN[1], PLAIN[1]), 'turn 3 of "messages" is the assistant\'s, and so is'),
    (openai(*said((SYSTEM, "a"), (ASSISTANT, "b"))), 'turn 2 of "messages" is the assistant\'s'),
    (openai(*said((USER, "a"), (OBSERVATION, "b"))), "is an observation, and no call stands"),
    (openai(*said((USER, "a"), ("bot", "b"))), '"role" of turn 2 of "messages" is "bot", which'),
    (openai(*said((USER, " "), (ASSISTANT, "b"))), 'turn 1 of "messages" (user) is empty'),
    (openai(*said((USER, "a"), (ASSISTANT, "\n"))), 'turn 2 of "messages" (assistant) is empty'),
    (openai(*said((USER, "a"))), "no turn is an assistant's"),
    (openai(PLAIN[0], {"role": ASSISTANT}), 'turn 2 of "messages" has no "content", it has'),
    (openai(PLAIN[0], {"content": "b"}), 'turn 2 of "messages" has no "role", it has'),
    (openai(PLAIN[0], "hi"), 'turn 2 of "messages" is "hi" (a string), not an object'),
    (openai(PLAIN[0], PLAIN[1] | {"content": 7}), '"content" of turn 2 of "messages" is 7'),
    (openai(PLAIN[0], PLAIN[1] | {"loss": "no"}), '"loss" of turn 2 of "messages" is "no"'),
    (openai(PLAIN[0], PLAIN[1] | {"chosen": "x"}), '"chosen" of turn 2 of "messages" is "x"'),
    (openai(PLAIN[0], {"role": USER, "content": [{"type": "image_url"}]}), "which is no text"),
    (openai(*PLAIN, tools={"name": "find"}), 'field "tools" is {"name": "find"} (an object), not'),
    (openai(*PLAIN, tools="find"), 'field "tools" is "find" (a string), not a list of tools'),
    (openai(*PLAIN, system="x", text="more"), 'field "text" is "more"'),
    (openai(PLAIN[0], PLAIN[1] | {"tool_calls": 7}), '"tool_calls" of turn 2 of "messages" is 7'),
    (openai(PLAIN[0], PLAIN[1] | {"tool_calls": [7]}), 'turn 2 of "messages" has 7 in'),
    (
        openai(PLAIN[0], PLAIN[1] | {"tool_calls": [{"function": CALLED_BADLY}]}),
        'the arguments of turn 2 of "messages" are "{", not JSON of an object',
    ),
    (
        openai(PLAIN[0], PLAIN[1] | {"tool_calls": [{"function": {"arguments": "{}"}}]}),
        'turn 2 of "messages" calls a tool with the name null',
    ),
    (
        {"conversations": [PLAIN[0], {"role": "tool", "name": "f", "parameters": {}}]},
        'turn 2 of "conversations" has no "observation"',
    ),
    (openai(PLAIN[0] | {"tools": [TOOL]}, PLAIN[1]), "stand in a turn of role user; move them"),
    (sharegpt(("human", "a"), ("alien", "b")), '"from" of turn 2 of "conversations" is "alien"'),
    (sharegpt(("human", "a"), ("function_call", "x")), '"value" of turn 2 of "conversations" is'),
    (sharegpt(("gpt", "a")), 'turn 1 of "conversations" is the assistant\'s'),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "what"), FLAWS)
def test_a_flaw_names_the_turn_and_the_field(fields, what):
    with pytest.raises(Flaw) as refused:
        example_of(fields)
    assert what in str(refused.value)
    assert "; " in str(refused.value)


def test_a_text_of_the_conversation_once_more_is_no_content():
    fields = openai(*PLAIN, prompt="hello", id=7)
    _, unused = read_example(FORMATS["messages"], fields)
    assert unused == ("prompt", "id")


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        (openai(*PLAIN), "messages"),
        ({"dialogue": PLAIN}, "messages"),
        (sharegpt(("human", "a")), "sharegpt"),
        ({"context": "a", "target": "b"}, "context/target"),
        ({"instruction": "a", "output": "b"}, "alpaca"),
        ({"prompt": "a", "response": "b", "history": []}, "alpaca"),
        ({"instruction": "a", "output": "b", "messages": PLAIN}, "alpaca"),
    ],
)
def test_a_format_is_recognised_by_its_keys(fields, name):
    assert format_of(fields) == name


@pytest.mark.parametrize(
    "history",
    ['[["q", "a"], ["r", "b"]]', "[['q', 'a'], ['r', 'b']]", "[('q', 'a'), ('r', 'b')]"],
)
def test_a_history_may_be_the_text_of_a_list(history):
    assert history_of({"history": history}) == (("q", "a"), ("r", "b"))


def write(path, *rows):
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    return str(path)


def test_records_become_conversations_only_where_one_has_rounds_or_a_system_text(tmp_path):
    path = tmp_path / "a.jsonl"
    plain = {"instruction": "q", "input": "i", "output": "a"}
    found = look_through(write(path, plain, plain | {"history": [], "system": ""}))
    assert [row.context for row in found.rows()] == 2 * ["Instruction: q\nInput: i\nAnswer: "]
    assert found.format == "alpaca"
    assert all(isinstance(row, Row) for row in found.rows())
    asked, answered = Turn(USER, "q\ni"), Turn(ASSISTANT, "a")
    found = look_through(write(path, plain, plain | {"system": "brief"}))
    first, second = found.rows()
    assert isinstance(first, Conversation)
    assert first.example.turns == (asked, answered)
    assert second.example.turns == (Turn(SYSTEM, "brief"), asked, answered)
    (row,) = look_through(write(path, plain | {"history": [["x", "y"]]})).rows()
    assert row.example.turns == (Turn(USER, "x"), Turn(ASSISTANT, "y"), asked, answered)
    assert row.line == row.row == 1


def test_a_flaw_is_reported_with_file_and_row_and_may_be_skipped(tmp_path):
    path = write(tmp_path / "a.jsonl", openai(*PLAIN), openai(PLAIN[1]), openai(*PLAIN))
    with pytest.raises(UserError, match=r"a\.jsonl:2 \(row 2\): turn 1 of \"messages\" is the"):
        look_through(path)
    found = look_through(path, on_bad_row="skip")
    assert [row.row for row in found.rows()] == [1, 3]
    assert [bad.row for bad in found.bad_rows] == [2]


def test_a_format_that_is_named_is_the_one_that_is_read(tmp_path):
    rows = {"instruction": "a", "output": "b", "messages": PLAIN}
    path = write(tmp_path / "a.jsonl", rows)
    with pytest.raises(UserError, match='field "instruction" is "a"'):
        look_through(path, "messages")
    with pytest.raises(UserError, match='field "messages" is'):
        look_through(path)
    with pytest.raises(UserError, match='field "conversations" is missing'):
        look_through(path, "sharegpt")
