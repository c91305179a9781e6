"""`glmtune inspect`: rows as the model sees them, by the collator of training."""

import json
import re
from pathlib import Path

import pytest

from glmtune.cli import main
from glmtune.data.conversations import IGNORED
from glmtune.data.dataset import load_dataset
from glmtune.models.loading import load_tokenizer
from glmtune.models.resolve import GLM_TINY

TINY = ["--base", str(GLM_TINY)]
TOKEN = re.compile(r"^ +(\d+) +(\d+) ([* ]) (.+)$")


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write(*rows):
    Path("a.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return "a.jsonl"


def talk(*texts, **of_last):
    roles = ("user", "assistant")
    turns = [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]
    turns[-1] |= of_last
    return {"messages": turns}


def shown(capsys, *arguments):
    """The heads of the rows, and for each row its tokens: place, id, mark, text."""
    capsys.readouterr()
    assert main(["inspect", *arguments, *TINY]) == 0
    heads, rows = [], []
    for line in capsys.readouterr().out.splitlines()[1:]:
        if found := TOKEN.match(line):
            rows[-1].append(found.groups())
        elif not line.startswith(" "):
            heads.append(line)
            rows.append([])
    return heads, rows


def test_rows_of_a_file_are_those_that_tokenize_writes(capsys):
    path = write(talk("Name a tree.", "Oak."), talk("Hello", "Hi", "And?", "Well."), talk("a", "b"))
    heads, rows = shown(capsys, path, "--limit", "2")
    assert heads == ["a.jsonl:1 (row 1)", "a.jsonl:2 (row 2)"]
    assert main(["tokenize", path, "--save_path", "rows", *TINY]) == 0
    for tokens, row in zip(rows, load_dataset("rows")[0].to_pylist(), strict=False):
        assert [int(place) for place, *_ in tokens] == list(range(len(row["input_ids"])))
        assert [int(id_) for _, id_, _, _ in tokens] == row["input_ids"]
        marks = [mark == "*" for _, _, mark, _ in tokens]
        assert marks == [label != IGNORED for label in row["labels"]]
    assert [text for *_, mark, text in rows[0] if mark == "*"][-1] == "<eop>"
    heads, of_folder = shown(capsys, "rows", "--limit", "2")
    assert heads == ["rows (row 1)", "rows (row 2)"]
    assert of_folder == rows


def test_rows_of_a_context_and_a_target_are_shown_as_well(capsys):
    ((_,), (tokens,)) = shown(capsys, write({"context": "a", "target": "b"}))
    tokenizer = load_tokenizer(str(GLM_TINY))
    rule = tokenizer.row_rule
    (context,), (target,) = (tokenizer.encode_batch([text]) for text in "ab")
    assert [int(id_) for _, id_, _, _ in tokens] == rule.prompt(context) + rule.answer(target)
    assert [text for *_, text in tokens if text.startswith(("[", "<"))] == [
        "[gMASK]", "<sop>", "<eop>"
    ]  # fmt: skip


def test_rows_that_are_left_out_say_why(capsys):
    tools = talk("a", "b") | {"tools": [{"name": "f"}]}
    path = write(talk("a", "b", loss=False), talk("a", "b " * 99), talk("a", "b"), tools)
    flags = ["--max_seq_length", "40", "--limit", "9", "--on_bad_row", "skip"]
    heads, rows = shown(capsys, path, *flags)
    assert heads[:3] == [
        "a.jsonl:1 (row 1): dropped, nothing is supervised",
        "a.jsonl:2 (row 2): dropped, too long",
        "a.jsonl:3 (row 3)",
    ]
    assert heads[3].startswith("a.jsonl:4 (row 4): bad, tools, which this base knows none of")
    assert [bool(tokens) for tokens in rows] == [False, False, True, False]


def test_a_folder_of_another_tokenizer_is_refused(capsys):
    path = write(talk("a", "b"))
    assert main(["tokenize", path, "--save_path", "rows", *TINY]) == 0
    card = Path("rows", "glmtune_data.json")
    card.write_text(
        re.sub(r'"tokenizer_sha256": ".{8}', '"tokenizer_sha256": "00000000', card.read_text())
    )
    assert main(["inspect", "rows", *TINY]) == 2
    assert "tokenised with another tokenizer" in capsys.readouterr().err
