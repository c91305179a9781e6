"""Invisible characters of records and answers are printed as escapes everywhere."""

import json
import re
import unicodedata
from pathlib import Path

import pytest

from glmtune.cli import main
from glmtune.config.settings import ChatSettings, CompareSettings, InferSettings
from glmtune.errors import visible
from glmtune.evaluation.chat import chat
from glmtune.evaluation.compare import compare
from glmtune.evaluation.infer import infer
from glmtune.models.resolve import GLM_TINY

UNSEEN = "\x1b[31m \x07 \x08 \x7f \x9b \r \u202e \u2066 \u200f \u061c \u200b \ufeff \U000e0041"


def acting(text):
    """The invisible characters of a text."""
    return {c for c in text if unicodedata.category(c) in ("Cc", "Cf", "Zl", "Zp")} - {"\n", "\t"}


def test_what_acts_unseen_becomes_an_escape():
    assert acting(UNSEEN)
    assert acting(visible(UNSEEN)) == set()
    assert visible("a\x1b[2Jb\u202ec") == "a\\x1b[2Jb\\u202ec"
    assert visible("half \ud83d") == "half \\ud83d"


@pytest.mark.parametrize(
    "text",
    [
        "一行\n\t二行",
        "全\u3000角",
        "père\u00a0!",
        "\U0001f469\u200d\U0001f680",
        "می\u200cخواهم",
        "",
    ],
)
def test_what_is_only_written_stays(text):
    assert visible(text) == text


def test_line_ends_of_windows_are_line_ends():
    assert visible("a\r\nb") == "a\nb"


RECORDS = [
    {"instruction": f"Say {UNSEEN}", "input": f"5 {UNSEEN}", "output": f"A {UNSEEN} pancake."},
    {"instruction": "Say 3", "output": "three"},
]


@pytest.fixture
def strange(answering, records_file, word_tokenizer, monkeypatch):
    """Settings under which questions, answers and what is expected hold such characters."""
    records_file.write_text(json.dumps(RECORDS), encoding="utf-8")
    monkeypatch.setattr(
        type(word_tokenizer), "decode", lambda *_, **__: f"answer {UNSEEN}", raising=True
    )
    return answering


@pytest.mark.parametrize("form", ["labels", "original"])
def test_infer_prints_unseen_characters_as_escapes(strange, capsys, form):
    infer(InferSettings(**strange, print_form=form))
    out = capsys.readouterr().out
    assert acting(out) == set()
    assert out.count("\\u202e") == 5  # three of the record, one in each answer
    line = Path(strange["adapter"], "answers.jsonl").read_text("utf-8").splitlines()[0]
    assert json.loads(line)["answer"] == f"answer {UNSEEN}", "the file holds what was said"


def test_compare_prints_unseen_characters_as_escapes(strange, capsys):
    compare(CompareSettings(**strange, general_set=False))
    folder = Path(strange["adapter"], "compare")
    for name in ("compare.md", "compare.html"):
        text = (folder / name).read_text(encoding="utf-8")
        assert acting(text) == set(), name
        assert "u202e" in text
    assert acting(capsys.readouterr().out) == set()


def test_chat_prints_unseen_characters_as_escapes(monkeypatch, capsys):
    lines = iter([f"hello {UNSEEN}", "/undo", "/exit"])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    monkeypatch.setattr("glmtune.evaluation.chat.polish", lambda *_: f"answer {UNSEEN}")
    monkeypatch.setattr("glmtune.evaluation.chat.polish_beginning", lambda *_: "answer ")
    chat(ChatSettings(base=GLM_TINY, max_new_tokens=3, do_sample=False, use_cpu=True))
    out = capsys.readouterr().out
    assert acting(out) == set()
    assert "answer \\x1b[31m" in out
    assert "forgotten: hello \\x1b[31m" in out


@pytest.mark.parametrize(
    "command",
    [
        "validate r.json",
        "convert --data_path r.json --save_path r.jsonl",
        "convert --data_path r.json --save_path r.jsonl --on_bad_row skip",
        f"infer --data_path r.json --base {GLM_TINY} --output_path a.jsonl --use_cpu true",
        f"infer --data_path r.json --base {GLM_TINY} --output_path a.jsonl --use_cpu true "
        "--on_bad_row skip --max_new_tokens 1",
    ],
)
def test_refused_rows_are_quoted_with_escapes(tmp_path, monkeypatch, capsys, command):
    monkeypatch.chdir(tmp_path)
    rows = [{f"in{UNSEEN}struction": "a"}, {"instruction": [UNSEEN], "output": ""}, *RECORDS]
    Path("r.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    main(command.split())
    told = capsys.readouterr()
    text = re.sub(r"\rLoading.*", "", told.err) + told.out
    assert acting(re.sub("\r[^\n]*", "", text) if "Loading weights" in text else text) == set()
    assert "u202e" in text
