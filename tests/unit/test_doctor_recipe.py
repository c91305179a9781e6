"""`glmtune doctor RECIPE`: whether it would start."""

import json
from pathlib import Path

import pytest

from glmtune import cli
from glmtune.config.settings import DoctorSettings
from glmtune.doctor import run

pytestmark = pytest.mark.usefixtures("offline")


def write_recipe(folder, **train):
    lines = "".join(f"  {name}: {value}\n" for name, value in train.items())
    path = folder / "r.yaml"
    path.write_text(f"train:\n  dataset_path: rows\n  output_dir: out\n{lines}")
    return str(path)


def findings_of(path):
    return {f"{f.check} {f.status}": f.text for f in run.examine(DoctorSettings(recipe_path=path))}


@pytest.fixture
def rows(tmp_path, monkeypatch):
    """Token rows of glm-tiny in a fresh folder, half of them cut."""
    monkeypatch.chdir(tmp_path)
    lines = [{"context": "Who is it?", "target": "word " * n} for n in (1, 1, 40, 40)]
    Path("x.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    line = "tokenize --jsonl_path x.jsonl --save_path rows --max_seq_length 16"
    assert cli.main([*line.split(), "--base", "glm-tiny"]) == 0
    return tmp_path / "rows"


def test_a_recipe_that_would_start(rows, tmp_path, capsys):
    path = write_recipe(tmp_path, max_steps=3, save_total_limit=2)
    capsys.readouterr()
    assert cli.main(["doctor", path, "--json_path", "report.json"]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[-1].endswith(f"{path} would start")
    report = json.loads(Path("report.json").read_text())
    assert report["counts"]["problem"] == 0
    assert {finding["check"] for finding in report["findings"]} >= {
        "python", "packages", "imports", "recipe", "card", "hub", "hub cache", "base model",
        "tokenizer", "stop ids", "data", "run folder",
    }  # fmt: skip
    assert "2 of 4 rows were cut to max_seq_length" in out
    assert not Path("out").exists(), "a look leaves nothing behind"


@pytest.mark.parametrize(
    "settings, finding, words",
    [
        ({"lora_rnk": 8}, "recipe problem", "did you mean lora_rank"),
        ({"fp16": "true", "bf16": "true"}, "recipe problem", "fp16 and bf16 are both true"),
        ({"base": "./no/such"}, "base model problem", "is no folder"),
        ({"resume_from_checkpoint": "true"}, "run folder problem", "is no folder"),
        ({"lora_rank": 100_000_000}, "run folder problem", "MB are free, but 1 checkpoint(s) of"),
        ({"max_steps": -1}, "run folder warning", "set save_total_limit"),
        ({"per_device_train_batch_size": 4, "use_cpu": "true"}, "memory ok", "GiB of "),
        ({"lora_rank": 100_000_000, "use_cpu": "true"}, "memory warning", "take a larger card"),
    ],
)
def test_a_recipe_that_would_not(rows, tmp_path, settings, finding, words):
    assert words in findings_of(write_recipe(tmp_path, **settings))[finding]


def test_a_recipe_whose_rows_are_of_another_tokenizer(rows, tmp_path):
    card = json.loads((rows / "glmtune_data.json").read_text())
    (rows / "glmtune_data.json").write_text(json.dumps(card | {"tokenizer_sha256": "0" * 64}))
    assert "tokenised with another tokenizer" in findings_of(write_recipe(tmp_path))["data problem"]


def test_a_recipe_whose_rows_are_not_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "no such folder" in findings_of(write_recipe(tmp_path))["data problem"]


def test_files_of_the_published_recipes(root, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path = str(root / "recipes" / "chatglm-6b-alpaca-zh.yaml")
    assert cli.main(["doctor", path]) == 1
    out = capsys.readouterr().out
    assert "convert: data_path data/alpaca_data_zh.json is not there" in out
    assert "tokenize: jsonl_path data/alpaca_data_zh.jsonl is what convert will write" in out
    assert "data/alpaca_zh is what tokenize will write" in out
    assert out.splitlines()[-1].endswith("would not start")
    Path("data").mkdir()
    Path("data/alpaca_data_zh.json").write_text("version https://git-lfs.github.com/spec/v1\n")
    assert "is a Git-LFS pointer" in findings_of(path)["files problem"]
    Path("data/alpaca_data_zh.json").write_text("[]")
    assert cli.main(["doctor", path]) == 0


def test_each_file_of_a_data_set_is_looked_for(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("a.jsonl").write_text("")
    sets = "[a.jsonl#5, no.jsonl]"
    Path("r.yaml").write_text(f"tokenize:\n  save_path: rows\n  datasets: {sets}\n  replay: b\n")
    cli.main(["doctor", "r.yaml"])
    out = capsys.readouterr().out
    assert "tokenize: datasets a.jsonl\n" in out
    assert "tokenize: datasets no.jsonl is not there" in out
    assert "tokenize: replay b is not there" in out


def test_doctor_without_a_recipe(tmp_path, capsys):
    assert cli.main(["doctor", str(tmp_path / "none.yaml")]) == 1
    assert "cannot read the recipe" in capsys.readouterr().out
