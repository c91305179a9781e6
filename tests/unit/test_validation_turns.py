"""`glmtune validate` on conversations: every flaw in one pass, by row, turn and field."""

import json
from pathlib import Path

import pytest

from glmtune.cli import main
from glmtune.config.settings import ValidateSettings
from glmtune.data.validation import validate
from glmtune.errors import UserError


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def talk(*texts, roles=("user", "assistant"), **fields):
    turns = [{"role": roles[i % len(roles)], "content": text} for i, text in enumerate(texts)]
    return {"messages": turns, **fields}


def write(*rows, name="a.jsonl"):
    Path(name).write_text("\n".join(json.dumps(r, ensure_ascii=False) for r in rows), "utf-8")
    return name


CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}
GOOD = talk("Name a tree.", "Oak.", "Another?", "Elm.")


def test_all_flaws_are_reported_in_one_pass(capsys):
    badly_called = json.loads(json.dumps(CALL))
    badly_called["tool_calls"][0]["function"]["arguments"] = "{"
    flawed = {
        "user twice": talk("a", "b", roles=("user", "user")),
        "assistant first": talk("a", roles=("assistant",)),
        "unknown role": talk("a", "b", roles=("user", "bot")),
        "empty turn": talk("a", ""),
        "tools": talk("a", "b", tools={"name": "f"}),
        "arguments": {"messages": [*talk("a")["messages"], badly_called]},
        "missing field": {"messages": [*talk("a")["messages"], {"role": "assistant"}]},
        "not a string": talk("a", 7),
    }
    path = write(GOOD, *flawed.values(), GOOD | {"messages": GOOD["messages"][:2]})
    assert main(["validate", path, "--json_path", "report.json"]) == 2
    told = capsys.readouterr()
    report = json.loads(Path("report.json").read_text(encoding="utf-8"))
    assert [(p["row"], p["kind"]) for p in report["problems"]] == [
        (row, kind) for row, kind in enumerate(flawed, start=2)
    ]
    assert all(p["line"] == p["row"] and p["fix"] for p in report["problems"])
    assert all("turn " in p["what"] for p in report["problems"] if p["kind"] != "tools")
    assert "a.jsonl: messages, 10 rows, 2 usable, 8 not" in told.out
    assert "8 of 10 rows cannot be used" in told.err
    assert 'a.jsonl:2 (row 2): turn 2 of "messages" is a user\'s, and so is the turn' in told.out


def flaws_of(*rows, name="a.jsonl"):
    """The kinds of flaws that are told of each row, by its number."""
    main(["validate", write(*rows, name=name), "--json_path", "report.json"])
    problems = json.loads(Path("report.json").read_text(encoding="utf-8"))["problems"]
    found = {}
    for problem in problems:
        found.setdefault(problem["row"], []).append(problem)
    return found


def test_every_flaw_of_one_row_is_told():
    turns = talk("a", "b", "c", "", 7, roles=("user", "user", "bot", "user", "user"))["messages"]
    turns += [{"role": "assistant"}, "nothing"]
    (found,) = flaws_of({"messages": turns, "tools": 3}).values()
    assert [(p["kind"], [n for n in range(1, 9) if f"turn {n} " in p["what"]]) for p in found] == [
        ("tools", []),
        ("unknown role", [3]),
        ("not a string", [5]),
        ("missing field", [6]),
        ("turns", [7]),
        ("user twice", [2]),
        ("empty turn", [4]),
    ]


@pytest.mark.parametrize(
    ("roles", "kinds"),
    [
        (("user", "bot", "user", "assistant"), ["unknown role"]),
        (("user", "bot", "assistant"), ["unknown role"]),
        (("bot", "assistant"), ["unknown role"]),
        (("bot",), ["unknown role"]),
        (("user", "bot", "assistant", "assistant"), ["unknown role", "assistant twice"]),
        (("assistant", "user", "user"), ["assistant first", "user twice"]),
        (("user", "user"), ["user twice"]),
        (("user",), ["no answer"]),
        (("system", "assistant", "observation"), ["assistant first", "observation first"]),
    ],
)
def test_a_flaw_makes_no_other(roles, kinds):
    (found,) = flaws_of(talk(*"abcd"[: len(roles)], roles=roles)).values()
    assert [problem["kind"] for problem in found] == kinds


def test_sharegpt_rows_have_theirs_told_as_well():
    said = [("human", "a"), ("gpt", 3), ("robot", "c"), ("human", "d"), ("human", "e")]
    turns = [{"from": whom, "value": text} for whom, text in said]
    (found,) = flaws_of({"conversations": turns}).values()
    assert [p["kind"] for p in found] == ["not a string", "unknown role", "user twice"]


def test_records_have_every_field_told():
    rows = [{"instruction": 3, "input": 4, "output": None}, {"input": "x"}, {"instruction": "a"}]
    found = flaws_of({"instruction": "a", "input": "", "output": "b"}, *rows)
    assert {row: [p["field"] for p in of_row] for row, of_row in found.items()} == {
        2: ["instruction", "input", "output"],
        3: ["instruction", "output"],
        4: ["output"],
    }
    assert all('the row has ["input"]' in p["what"] for p in found[3])


def test_usable_conversations_are_compared_and_looked_through():
    other = talk("Name a tree.", "Oak.", "One more?", "Elm.")
    odd = talk("Who\0?", "I.")
    write(GOOD, name="held.jsonl")
    settings = ValidateSettings(files=(write(GOOD, other, GOOD, odd),), held_out="held.jsonl")
    found = validate(settings)
    assert found.problems.counts == {"duplicate": 1, "control character in text": 1, "leak": 2}
    assert found.num_unusable == 0
    assert found.files[0].language_shares["English"] > 0.99
    (control,) = found.problems.tallies["control character in text"].shown
    assert "a turn of the user holds U+0000 at character 4" in str(control)


def test_calls_and_tools_are_part_of_the_question():
    calls = {"messages": [*talk("a")["messages"], CALL, {"role": "tool", "content": "7"}]}
    calls["messages"].append({"role": "assistant", "content": "It is 7."})
    others = [calls | {"tools": [{"name": name}]} for name in "fg"]
    assert validate(ValidateSettings(files=(write(calls, *others),))).problems.counts == {}
    assert validate(ValidateSettings(files=(write(*others, others[1]),))).problems.counts == {
        "duplicate": 1
    }


def test_a_record_with_a_system_text_is_usable_and_differs_by_it():
    record = {"instruction": "q", "output": "a"}
    path = write(record, record | {"system": "brief"}, record | {"system": "long"})
    assert validate(ValidateSettings(files=(path,))).problems.counts == {}


def test_a_named_format_is_the_one_that_is_checked():
    with pytest.raises(UserError, match="1 of 1 rows cannot be used"):
        validate(ValidateSettings(files=(write(GOOD),), format="sharegpt"))
    assert validate(ValidateSettings(files=("a.jsonl",), format="messages")).num_unusable == 0
