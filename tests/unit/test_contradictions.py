"""`glmtune validate` on questions that are asked twice and answered differently."""

import json
from pathlib import Path

import pytest

from glmtune.config.settings import ValidateSettings
from glmtune.data.validation import contradictions, duplicates, validate


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def record(instruction, output, **fields):
    return {"instruction": instruction, "output": output, **fields}


def talk(*texts, **fields):
    turns = [{"role": ("user", "assistant")[i % 2], "content": t} for i, t in enumerate(texts)]
    return {"messages": turns, **fields}


def write(*rows, name="a.jsonl"):
    Path(name).write_text("\n".join(json.dumps(r, ensure_ascii=False) for r in rows), "utf-8")
    return name


def told(*files):
    """What is said of contradictions, a line each."""
    found = validate(ValidateSettings(files=files, json_path="r.json")).problems
    report = json.loads(Path("r.json").read_text(encoding="utf-8"))["problems"]
    lines = [
        f"{p['file']}:{p['line']} (row {p['row']}): {p['what']}"
        for p in report
        if p["kind"] == "contradiction"
    ]
    assert len(lines) == found.counts.get("contradiction", 0)
    return lines


CAPITAL = "What is the capital of Australia, and since when?"


def test_a_contradiction_is_told_with_both_places_and_answers(capsys):
    write(record("Name a tree.", "Oak."), record(CAPITAL, "Sydney."))
    write(record("What is the capital of  australia and since when", "Canberra."), name="b.jsonl")
    assert told("a.jsonl", "b.jsonl") == [
        "b.jsonl:1 (row 1): asks what a.jsonl:2 (row 2) asks, and answers "
        '"Canberra.", not "Sydney."'
    ]
    assert "; keep one of them, unless both answers are right" in capsys.readouterr().out


def test_near_equal_questions_contradict_as_well():
    write(record(CAPITAL, "Sydney."), record("Tell me: " + CAPITAL, "Canberra."))
    assert told("a.jsonl") == [
        "a.jsonl:2 (row 2): asks nearly what a.jsonl:1 (row 1) asks, and answers "
        '"Canberra.", not "Sydney."'
    ]


def test_the_same_answer_contradicts_nothing():
    long = "The capital is Canberra, chosen in 1908 as a compromise between two larger cities"
    write(
        record(CAPITAL, long),
        record(CAPITAL, long.upper() + "!"),
        record("Tell me: " + CAPITAL, long + ", they say."),
        record("", "a"),
        record("?", "b"),
    )
    assert told("a.jsonl") == []


def test_a_group_is_one_line_which_names_all_rows():
    answers = ["Sydney.", "Canberra.", "sydney", "Perth.", "Canberra."]
    write(*(record(CAPITAL, answer) for answer in answers), record("Say: " + CAPITAL, "Hobart."))
    assert told("a.jsonl") == [
        'a.jsonl:2 (row 2): asks what a.jsonl:1 (row 1) asks, and answers "Canberra.", not '
        '"Sydney." (so do 4 more, a.jsonl: rows 3-6)'
    ]


def test_equal_questions_and_short_answers_come_first():
    poems = "Leaves fall in the red wind, and I walk", "The snow is silent on the roof of the barn"
    write(
        record("Write a poem on the seasons of the year.", poems[0]),
        record("Write a poem on the seasons of the year.", poems[1]),
        record(CAPITAL, "Yes."),
        record("Tell me: " + CAPITAL, "No."),
        record("Is water wet?", "Yes."),
        record("Is water wet?", "No."),
    )
    assert [line.partition(" asks")[0] for line in told("a.jsonl")] == [
        "a.jsonl:6 (row 6):", "a.jsonl:2 (row 2):", "a.jsonl:4 (row 4):",
    ]  # fmt: skip


@pytest.mark.parametrize("as_history", [False, True])
def test_all_that_stands_before_an_answer_is_its_question(as_history):
    """The same last question after other rounds is another one; an earlier answer counts too."""
    rows = [
        ("Think of Australia.", "I do.", CAPITAL, "Canberra."),
        ("Think of a large city.", "I do.", CAPITAL, "Sydney."),
        ("Think of Australia!", "I do!", "Now: " + CAPITAL, "Sydney."),
        ("Think of Australia.", "Why?", "Because.", "Fine."),
    ]
    if as_history:
        write(*(record(q, a, history=[[early, reply]]) for early, reply, q, a in rows))
    else:
        write(*(talk(*row) for row in rows))
    assert told("a.jsonl") == [
        'a.jsonl:4 (row 4): asks what a.jsonl:1 (row 1) asks, and answers "Why?", not "I do." '
        "(so do 2 more, a.jsonl: rows 3)".replace(
            "2 more, a.jsonl: rows 3", "1 more, a.jsonl: row 3"
        ),
        "a.jsonl:3 (row 3): asks nearly what a.jsonl:1 (row 1) asks, and answers "
        '"Sydney.", not "Canberra."',
    ]


def test_formats_are_compared_with_each_other():
    write(record(CAPITAL, "Sydney.", input="Be brief."))
    write(talk(CAPITAL + " Be brief.", "Canberra."), name="b.jsonl")
    context = f"Instruction: {CAPITAL}\nInput: Be brief.\nAnswer: "
    write({"context": context, "target": "Perth."}, name="c.jsonl")
    assert [line[:7] for line in told("a.jsonl", "b.jsonl")] == ["b.jsonl"]
    assert [line[:7] for line in told("a.jsonl", "c.jsonl")] == ["c.jsonl"]


def test_beyond_a_number_of_questions_only_equal_ones_are_compared(monkeypatch, capsys):
    for module in (duplicates, contradictions):
        monkeypatch.setattr(module, "MOST_COMPARED", 3)
    write(
        record(CAPITAL, "Sydney."),
        record("Tell me: " + CAPITAL, "Canberra."),
        record(CAPITAL, "Perth."),
        record("Name a tree.", "Oak."),
    )
    assert [line[:17] for line in told("a.jsonl")] == ["a.jsonl:3 (row 3)"]
    assert "4 questions are compared for equality alone" in capsys.readouterr().err
