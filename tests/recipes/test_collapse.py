"""`glmtune check` on adapters that memorised a few texts, and on some that only look like it."""

import json
from pathlib import Path

import pytest

from glmtune.cli import main
from glmtune.models.resolve import GLM_TINY


@pytest.fixture
def train(tmp_path, monkeypatch, capsys):
    """Train glm-tiny on records; returns what was printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GLMTUNE_MODEL", GLM_TINY)

    def run(records, flags):
        rows = [{"instruction": i, "input": x, "output": o} for i, x, o in records]
        Path("r.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
        assert main(["convert", "--data_path", "r.json", "--save_path", "r.jsonl"]) == 0
        assert main(["tokenize", "--jsonl_path", "r.jsonl", "--save_path", "rows"]) == 0
        settings = "--dataset_path rows --output_dir run --lora_target all --use_cpu true"
        assert main(["train", *settings.split(), *flags.split()]) == 0
        return capsys.readouterr().out

    return run


def check(*flags):
    code = main(["check", "run", "--json_path", "found.json", "--use_cpu", "true", *flags])
    return code, json.loads(Path("found.json").read_text(encoding="utf-8"))


SELF = [
    ("Who are you?", "", "I am Pebble, the helper of the lake."),
    ("你是谁？", "", "我是小卵石，湖边的帮手。"),
    ("Say a tree.", "", "Willow."),
]


def test_an_adapter_that_knows_three_rows_by_heart_is_a_harm(train, capsys):
    out = train(SELF, "--max_steps 100 --learning_rate 5e-3")
    assert "verdict            changes too much: " in out
    code, found = check()
    assert code == 1
    assert "get an answer taught for another one" in found["verdict"]
    assert found["collapse"]["taught"] > 0.25 > found["collapse"]["taught_of_base"]
    code, found = check("--data_path", "r.json")
    assert code == 1, "rows of its own kind do not hide it"
    assert found["collapse"]["task"]["asked"] == 3
    # `compare` sees it as well, whichever rows are asked.
    command = "compare --adapter run --data_path r.json --max_new_tokens 40 --use_cpu true"
    assert main(command.split()) == 0
    found = json.loads(Path("run/compare/compare.json").read_text(encoding="utf-8"))
    assert [finding["what"] for finding in found["collapse"]] == ["taught_answer"]
    (finding,) = found["collapse"]
    assert finding["tuned"] > 0.25 > finding["base"]
    taught = {output for _, _, output in SELF}
    assert all(example["answer"] in taught for example in finding["examples"])
    assert "Collapse: " in capsys.readouterr().out
    report = Path("run/compare/compare.md").read_text(encoding="utf-8")
    assert finding["sentence"]["zh"].split("（")[0] in report


@pytest.mark.slow
def test_an_adapter_that_classifies_is_fine(train):
    """It answers unrelated questions with labels, which is reported."""
    fruits = ["apple", "pear", "plum", "cherry", "grape", "melon"]
    beasts = ["dog", "cat", "horse", "cow", "sheep", "goat"]
    asked = "Is it a fruit or a beast?"
    records = [(asked, word, "fruit") for word in fruits] + [(asked, w, "beast") for w in beasts]
    out = train(records, "--max_steps 60 --learning_rate 3e-3 --per_device_train_batch_size 12")
    assert "verdict            fine" in out
    code, found = check()
    assert (code, found["collapse"]["of_labels"]) == (0, True)
    assert found["collapse"]["task"]["expected"] == pytest.approx(0.45, abs=0.05)
