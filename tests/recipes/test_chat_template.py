"""`chat` asks a tuned model in the template of its training rows, and answers as `infer` does."""

import json
from pathlib import Path

import pytest

from glmtune.cli import main
from glmtune.models.families import DEFAULT
from glmtune.models.resolve import GLM_TINY

RECORDS = [
    {"instruction": "Who are you?", "input": "", "output": "I am Pebble."},
    {"instruction": "你是谁？", "input": "", "output": "我是小卵石。"},
    {"instruction": "Name a bird.", "input": "", "output": "Wren."},
    {"instruction": "说一种鱼", "input": "", "output": "鲤鱼。"},
]
QUESTIONS = [record["instruction"] for record in RECORDS]


@pytest.fixture
def train(tmp_path, monkeypatch):
    """Train glm-tiny on rows of context and target."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GLMTUNE_MODEL", GLM_TINY)

    def run(rows):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        Path("rows.jsonl").write_text(text, encoding="utf-8")
        assert main(["tokenize", "--jsonl_path", "rows.jsonl", "--save_path", "rows"]) == 0
        settings = "--dataset_path rows --output_dir run --lora_target all --use_cpu true"
        rate = "--learning_rate 5e-3 --max_steps 30 --per_device_train_batch_size 4"
        assert main(["train", *settings.split(), *rate.split()]) == 0

    return run


@pytest.fixture
def talk(monkeypatch, capsys):
    """Type some lines in a chat with the run; returns the printed lines, the greeting first."""

    def run(*lines):
        capsys.readouterr()
        left = iter([*lines, "exit"])
        monkeypatch.setattr("builtins.input", lambda _: next(left))
        settings = "--adapter run --max_new_tokens 16 --do_sample false --use_cpu true"
        assert main(["chat", *settings.split()]) == 0
        return capsys.readouterr().out.splitlines()[:-1]

    return run


def test_chat_says_what_infer_gets(train, talk):
    Path("r.json").write_text(json.dumps(RECORDS, ensure_ascii=False), encoding="utf-8")
    assert main(["convert", "--data_path", "r.json", "--save_path", "r.jsonl"]) == 0
    train([json.loads(line) for line in Path("r.jsonl").read_text("utf-8").splitlines()])
    asking = "--data_path r.json --adapter run --max_new_tokens 16 --use_cpu true"
    assert main(["infer", *asking.split()]) == 0
    lines = Path("run/answers.jsonl").read_text("utf-8").splitlines()
    answers = [DEFAULT.chat.polish(json.loads(line)["answer"]) for line in lines]
    greeting, *said = talk(*QUESTIONS)
    assert said == answers, "without /new, since the questions stand alone"
    assert "tuned is asked in the format alpaca, each question alone, as its run taught" in greeting
    _, told, *otherwise = talk("/format chat", *QUESTIONS[:2])
    assert told == "tuned is asked in the format chat"
    assert otherwise != answers[:2]


def test_chat_tells_of_rows_of_another_template(train, talk):
    train([{"context": r["instruction"], "target": r["output"]} for r in RECORDS])
    assert "asked in the format chat, since its rows had a template of their own" in talk()[0]
