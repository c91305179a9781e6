"""Files of every kind through the verbs that ask and that go from a file to a page."""

import json
from pathlib import Path

import pytest
from glm_folders import toy_tiktoken, write_folder, write_model

from glmtune.cli import main
from glmtune.models.families import FAMILIES

TALK = [
    {"role": "system", "content": "Answer in a word."},
    {"role": "user", "content": "Name a tree."},
    {"role": "assistant", "content": "Oak."},
    {"role": "user", "content": "And a bird?"},
    {"role": "assistant", "content": "Wren."},
]
ASKED = "system: Answer in a word.\n\nuser: Name a tree.\n\nassistant: Oak.\n\nuser: And a bird?"
FILES = {
    "messages": {"messages": TALK},
    "sharegpt": {
        "system": TALK[0]["content"],
        "conversations": [
            {"from": "human" if turn["role"] == "user" else "gpt", "value": turn["content"]}
            for turn in TALK[1:]
        ],
    },
    "chatglm3": {"conversations": TALK},
    "alpaca": {
        "system": TALK[0]["content"],
        "history": [["Name a tree.", "Oak."]],
        "instruction": "And a bird?",
        "input": "",
        "output": "Wren.",
    },
    "history as text": {
        "system": TALK[0]["content"],
        "prompt": "And a bird?",
        "response": "Wren.",
        "history": "[['Name a tree.', 'Oak.']]",
    },
}
ANSWERING = "--max_new_tokens 3 --use_cpu true"
NO_PRICE = "--general_set false"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """GLM-Edge's layout with a vocabulary of bytes: tiny, and with roles."""
    family = next(family for family in FAMILIES if family.name == "GLM-Edge")
    return str(write_model(tmp_path_factory.mktemp("edge") / "base", family, None))


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write(*rows, name="a.jsonl"):
    Path(name).write_text("\n".join(json.dumps(r, ensure_ascii=False) for r in rows), "utf-8")
    return name


def glmtune(line, base):
    return main([*line.split(), "--base", base])


def lines(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    """An adapter trained on two steps of conversations."""
    folder = tmp_path_factory.mktemp("run")
    rows = folder / "a.jsonl"
    rows.write_text("\n".join(json.dumps(FILES["messages"]) for _ in range(6)), encoding="utf-8")
    assert main(["tokenize", str(rows), "--save_path", str(folder / "rows"), "--base", base]) == 0
    line = f"train --dataset_path {folder}/rows --output_dir {folder}/run --max_steps 2 "
    assert glmtune(line + "--learning_rate 0.01 --use_cpu true --report_to none", base) == 0
    return str(folder / "run")


@pytest.mark.parametrize("kind", FILES)
def test_a_conversation_of_any_kind_is_asked_up_to_its_last_answer(kind, base, capsys):
    write(FILES[kind])
    assert glmtune(f"infer --data_path a.jsonl --output_path b.jsonl {ANSWERING}", base) == 0
    (line,) = lines("b.jsonl")
    told = capsys.readouterr().out
    assert "And a bird?" in told
    assert "Expected:" in told
    assert line["output"] == "Wren."
    if "messages" in line:
        assert line["messages"] == TALK[:-1]
    else:
        assert (line["system"], line["history"]) == (TALK[0]["content"], [["Name a tree.", "Oak."]])
    assert glmtune(f"infer --data_path a.jsonl --output_path b.jsonl {ANSWERING}", base) == 0
    assert "nothing was left to do" in capsys.readouterr().out


def test_all_kinds_of_one_conversation_get_one_answer(base):
    answers = set()
    for number, fields in enumerate(FILES.values()):
        name = write(fields, name=f"{number}.jsonl")
        line = f"infer --data_path {name} --output_path {number}.out.jsonl {ANSWERING}"
        assert glmtune(line, base) == 0
        answers |= {entry["answer"] for entry in lines(f"{number}.out.jsonl")}
    assert len(answers) == 1


def test_compare_and_check_take_conversations_and_texts(base, adapter, capsys):
    write(FILES["messages"], FILES["messages"] | {"messages": TALK[:-1]})
    line = (
        f"compare --data_path a.jsonl --adapter {adapter} --output_dir page {ANSWERING} {NO_PRICE}"
    )
    assert glmtune(line, base) == 0
    assert ASKED in Path("page/compare.md").read_text(encoding="utf-8").replace("<br>", "\n")
    assert [entry["output"] for entry in lines("page/compare.jsonl")] == ["Wren.", ""]
    write({"text": "Once upon a time"}, name="t.jsonl")
    line = (
        f"compare --data_path t.jsonl --adapter {adapter} --output_dir texts {ANSWERING} {NO_PRICE}"
    )
    assert glmtune(line, base) == 0
    assert "Once upon a time" in Path("texts/compare.html").read_text(encoding="utf-8")
    for name in ("a.jsonl", "t.jsonl"):
        capsys.readouterr()
        line = f"check {adapter} --data_path {name} --limit 2 {ANSWERING}"
        assert glmtune(line, base) in (0, 1)
        assert f"1 records of {name}" in capsys.readouterr().out


def test_what_convert_writes_becomes_the_same_rows():
    folder = write_folder(Path("base"), "glm4", toy_tiktoken(), padded_vocab_size=70_000)
    base = str(folder)  # which knows tools
    call = {"role": "assistant", "content": "", "tool_calls": [
        {"function": {"name": "find", "arguments": '{"a": 1}'}}]}  # fmt: skip
    marked = [*TALK[:2], TALK[2] | {"loss": False}, *TALK[3:]]
    with_call = [TALK[1], call, {"role": "tool", "content": "an oak"}, TALK[2]]
    files = {
        "messages": [{"messages": marked}, {"messages": with_call}],
        "sharegpt": [FILES["sharegpt"]],
        "history": [FILES["alpaca"], {"instruction": "q", "output": "a"}],
        "records": [{"instruction": "q", "input": "i", "output": "a"}],
        "texts": [{"text": "Once upon a time"}],
    }
    for kind, rows in files.items():
        write(*rows)
        assert main(["convert", "--data_path", "a.jsonl", "--save_path", "b.jsonl"]) == 0
        for name in "ab":
            assert glmtune(f"tokenize {name}.jsonl --save_path {name}", base) == 0
        before, after = (
            Path(name, "data-00000-of-00001.arrow").read_bytes() for name in "ab"
        )  # fmt: skip
        assert before == after, kind


SAID = [f"say {i}" for i in range(24)]


@pytest.mark.parametrize(("model", "kind"), [("edge", "messages"), ("glm-tiny", "texts")])
def test_tune_goes_from_any_file_to_the_page(model, kind, base, capsys):
    turns = [[*TALK[1:3], {"role": "user", "content": text}, TALK[4]] for text in SAID]
    rows = [{"messages": talk} for talk in turns] if kind == "messages" else []
    rows = rows or [{"text": f"{text} " * (1 + i % 3)} for i, text in enumerate(SAID)]
    name = write(*rows)
    base = base if model == "edge" else model
    line = f"tune {name} --out tuned --max_steps 2 --limit 2 --max_new_tokens 3 --use_cpu true"
    assert glmtune(line, base) in (0, 1), capsys.readouterr().err
    page = Path("tuned/tune.html").read_text(encoding="utf-8")
    assert "say" in page
    asked = json.loads(Path("tuned/questions.json").read_text(encoding="utf-8"))
    assert asked
    if kind == "messages":
        assert all(row in rows for row in asked)
    else:
        halves = {text["text"][: (len(text["text"]) + 1) // 2] for text in rows}
        assert {row["text"] for row in asked} <= halves
    capsys.readouterr()
    assert glmtune(line, base) in (0, 1)
    assert capsys.readouterr().out.count("done before") == 8
