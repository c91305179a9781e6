"""`replay-rows`: a base's own answers to general questions, as rows to mix into a training."""

import json
from pathlib import Path

import pytest

from glmtune.cli import main
from glmtune.data.dataset import load_dataset
from glmtune.demo.general import prompt_lines
from glmtune.evaluation import replay_rows
from glmtune.evaluation.replay_rows import as_row
from glmtune.general.items import LANGUAGES, PROMPTS_OF_BASE, find_general, find_prompts, own_set
from glmtune.models.resolve import GLM_TINY


def lines_of(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def write(*flags):
    return main(["replay-rows", *flags, "--base", "glm-tiny", "--use_cpu", "true"])


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_no_question_for_replay_is_one_that_is_scored(tmp_path):
    asked = [line["instruction"] for line in lines_of(find_prompts(str(tmp_path)))]
    assert len(set(asked)) == len(asked) == 120
    assert not {item.asked for item in own_set().items} & set(asked)
    beginnings = {line["text"] for line in lines_of(find_prompts(GLM_TINY))}
    scored = find_general(True, GLM_TINY).items
    assert len(beginnings) > 230
    assert not {item.asked for item in scored} & beginnings


def test_the_toy_worlds_questions_are_those_that_its_grammar_makes():
    """Where this fails: python tools/write_toy_general.py."""
    kept = Path(GLM_TINY, PROMPTS_OF_BASE).read_text(encoding="utf-8").splitlines()
    assert kept == [line for language in LANGUAGES for line in prompt_lines(language)]


def test_the_bases_answers_become_rows_that_tokenize_mixes_in(here, capsys):
    assert write("general.jsonl", "--limit", "60", "--per_device_eval_batch_size", "60") == 0
    rows = lines_of("general.jsonl")
    asked = lines_of(find_prompts(GLM_TINY))[:60]
    assert len(rows) == 60
    assert all(row["text"].startswith(of["text"]) for row, of in zip(rows, asked, strict=True))
    assert all(len(row["text"]) > len(of["text"]) for row, of in zip(rows, asked, strict=True))
    assert "60 rows; mix them in with tokenize --replay general.jsonl" in capsys.readouterr().out
    records = [{"context": f"{i}?", "target": str(i)} for i in range(190)]
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    flags = "--jsonl_path rows.jsonl --replay general.jsonl --save_path rows --base glm-tiny"
    assert main(["tokenize", *flags.split()]) == 0
    assert "10 taken" in capsys.readouterr().out
    # A second time nothing is answered again.
    before = Path("general.answers.jsonl").stat().st_mtime_ns
    assert write("general.jsonl", "--limit", "60", "--per_device_eval_batch_size", "60") == 0
    assert Path("general.answers.jsonl").stat().st_mtime_ns == before
    assert "nothing was left to do" in capsys.readouterr().out


def test_answers_that_were_cut_are_no_rows(here, capsys):
    texts = ["The apple is", "Words: apple, dog"]
    lines = [json.dumps({"text": text}) for text in texts]
    Path("mine.jsonl").write_text("\n".join(lines), encoding="utf-8")
    named = ("--data_path", "mine.jsonl", "--max_new_tokens")
    assert write("cut.jsonl", *named, "1") == 2
    err = capsys.readouterr().err
    assert "none of 2 answers is a row" in err
    assert not Path("cut.jsonl").exists()
    assert write("whole.jsonl", *named, "40") == 0
    assert lines_of("whole.jsonl")[0]["text"].startswith("The apple is ")


def test_every_kind_of_question_becomes_its_kind_of_row():
    said = {"answer": "Yes", "num_tokens": 1, "stopped": True, "row": 3, "output": ""}
    record = {"instruction": "Is it?", "input": "that"} | said
    assert as_row(record) == {"instruction": "Is it?", "input": "that", "output": "Yes"}
    turns = [{"role": "user", "content": "Is it?"}]
    row = as_row({"messages": turns} | said)
    assert row == {"messages": [*turns, {"role": "assistant", "content": "Yes"}]}
    assert as_row({"text": "It is"} | said) == {"text": "It is Yes"}
    assert as_row({"text": "它是"} | said | {"answer": "红色。"}) == {"text": "它是红色。"}
    assert as_row({"text": "It is"} | said | {"answer": ", yes"}) == {"text": "It is, yes"}


@pytest.fixture
def few_prompts(here, monkeypatch):
    """Twelve questions for replay, and a cache of this test's own."""
    lines = find_prompts(GLM_TINY).read_text(encoding="utf-8").splitlines(keepends=True)[:12]
    Path("prompts.jsonl").write_text("".join(lines), encoding="utf-8")
    monkeypatch.setattr(replay_rows, "find_prompts", lambda base: here / "prompts.jsonl")
    monkeypatch.setenv("XDG_CACHE_HOME", str(here / "cache"))


def tokenize(name, *flags, num=57):
    records = [{"instruction": f"{i}?", "output": str(i)} for i in range(num)]
    Path(f"{name}.json").write_text(json.dumps(records), encoding="utf-8")
    return main(["tokenize", f"{name}.json", "--save_path", name, "--base", "glm-tiny", *flags])


def test_a_share_mixes_in_answers_that_are_made_once(here, few_prompts, spy, capsys):
    calls = spy(replay_rows, "infer")
    # The format is that of the user's rows; the base's own answers have theirs.
    assert tokenize("one", "--replay", "0.05", "--format", "alpaca") == 0
    assert "12 rows, 3 taken, 3 kept (5.0%)" in capsys.readouterr().out
    assert len(load_dataset("one")[0]) == 60
    assert tokenize("two", "--replay", "0.5") == 0
    assert "12 rows, 57 taken (weight 4.75), 57 kept (50.0%)" in capsys.readouterr().out
    assert len(calls) == 1
    (kept,) = (here / "cache" / "glmtune" / "replay").glob("glm-tiny-*[0-9a-f].jsonl")
    assert len(lines_of(kept)) == 12
    recipe = "tokenize:\n  jsonl_path: one.json\n  save_path: three\n  base: glm-tiny\n"
    Path("recipe.yaml").write_text(f"{recipe}  replay: 0.05\n", encoding="utf-8")
    assert main(["tokenize", "recipe.yaml"]) == 0
    one, three = (load_dataset(name)[0]["input_ids"] for name in ("one", "three"))
    assert one.equals(three)


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--replay", "1"], "replay 1 is no share of the rows: set one between 0 and 1"),
        (["--replay", "-0.1"], "replay -0.1 is no share of the rows"),
        (["--replay", "nan"], "replay nan is no share of the rows"),
        (["--replay", "5%"], "replay 5% is no share of the rows: set one between 0 and 1"),
        (["--replay", "0.1", "--replay_share", "0.2"], "are both shares: set replay alone"),
        (["--replay_share", "0.2"], "set replay 0.2, for the base's own answers, or replay FILE"),
        (["--replay", "0.001"], "a replay_share of 0.001 beside 57 other rows is no row"),
    ],
)
def test_what_is_no_share_is_refused(few_prompts, flags, told, capsys):
    assert tokenize("rows", *flags) == 2
    assert told in capsys.readouterr().err
    assert not Path("rows").exists()
