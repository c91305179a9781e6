"""Faults as users meet them, on glm-tiny: damaged bases, learning rates, stop tokens."""

import json
import math
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from glmtune.cli import main
from glmtune.models.resolve import GLM_TINY

RECORDS = [
    {"instruction": "说出一种水果。", "input": "", "output": "苹果。"},
    {"instruction": "Name a colour.", "input": "", "output": "Red."},
] * 12


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with tokenised rows, and a copy of the base that may be damaged."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("GLMTUNE_MODEL", "base")
    shutil.copytree(GLM_TINY, "base")
    Path("records.json").write_text(json.dumps(RECORDS, ensure_ascii=False), encoding="utf-8")
    assert run("convert --data_path records.json --save_path rows.jsonl") == 0
    assert run("tokenize --jsonl_path rows.jsonl --save_path rows") == 0
    return tmp_path


TRAIN = "train --dataset_path rows --output_dir run --use_cpu true --logging_steps 2 --max_steps 6"


def run(command):
    return main(command.split())


def train(flags=""):
    return run(f"{TRAIN} {flags}")


def test_a_damaged_base_and_its_replay(folder, capsys):
    tensors = load_file("base/model.safetensors")
    tensors["transformer.layers.2.mlp.dense_4h_to_h.weight"][0, 0] = math.inf
    save_file(tensors, "base/model.safetensors", metadata={"format": "pt"})
    assert train() == 2
    (told,) = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert "first the output of transformer.layers.2.mlp.dense_4h_to_h (its weight is" in told
    assert "`glmtune replay run/crash-1`" in told
    places = json.loads(Path("run/crash-1/crash.json").read_text())["rows"]
    assert all(place["source"].startswith("rows.jsonl:") for place in places)
    assert run("replay run/crash-1 --use_cpu true") == 0
    assert "reproduced\n" in capsys.readouterr().out
    # On an undamaged base the same step is fine.
    assert run(f"replay run/crash-1 --use_cpu true --base {GLM_TINY}") == 1
    assert "not reproduced\n" in capsys.readouterr().out


def test_a_learning_rate_of_a_million(folder, capsys):
    assert train("--learning_rate 1e6") == 2
    (told,) = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert "lower learning_rate (1000000.0)" in told
    (bundle,) = Path("run").glob("crash-*")
    assert main(["replay", str(bundle), "--use_cpu", "true"]) == 0
    assert "reproduced\n" in capsys.readouterr().out


def test_a_run_ends_with_a_check_up_that_can_be_had_again(folder, capsys):
    # Equal questions stay on one side, so that those that are held out differ by a number.
    numbered = [
        record | {"instruction": f"{record['instruction']} ({number})"}
        for number, record in enumerate(RECORDS)
    ]
    Path("numbered.json").write_text(json.dumps(numbered), encoding="utf-8")
    assert run("tokenize --jsonl_path numbered.json --save_path rows") == 0
    assert train("--learning_rate 1e-2 --eval_ratio 0.2 --max_steps 20") == 0
    out = capsys.readouterr().out
    assert "Check-up\n  changed" in out
    assert "5 rows that the run held out" in out
    verdict = out.rpartition("verdict")[2].strip()
    code = run("check run --use_cpu true --max_new_tokens 64 --json_path found.json")
    found = json.loads(Path("found.json").read_text(encoding="utf-8"))
    assert found["divergence"]["tuned_loss"] < found["divergence"]["base_loss"]
    assert found["verdict"] == verdict
    assert code == (0 if verdict.startswith("fine") else 1)


def test_a_learning_rate_that_changes_nothing(folder, capsys):
    assert train("--learning_rate 1e-9") == 0
    assert "verdict            changes nothing" in capsys.readouterr().out
    assert run("check run --use_cpu true --max_new_tokens 4") == 1


@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
def test_stop_tokens_that_disagree(folder, file, capsys):
    assert train() == 0
    path = Path("base", file)
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(settings | {"eos_token_id": 2}))
    capsys.readouterr()
    answer = "--data_path records.json --adapter run --use_cpu true"
    for command in (
        f"{TRAIN} --overwrite_output_dir true",
        f"infer {answer}",
        f"compare {answer}",
        "chat --adapter run --use_cpu true",
        "check run --use_cpu true",
    ):
        assert run(command) == 2, command
        (told,) = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
        assert "eos_token_id" in told, command
    assert Path("run/adapter_model.safetensors").is_file()


def test_cut_answers_are_told_by_training_too(folder, capsys):
    targets = ["a b c d e f"] * 6 + ["a"]  # one is whole, or no end would be taught
    long = "\n".join(json.dumps({"context": "q", "target": target}) for target in targets)
    Path("long.jsonl").write_text(long, encoding="utf-8")
    assert run("tokenize --jsonl_path long.jsonl --save_path cut --max_seq_length 4") == 0
    assert "lost        " in capsys.readouterr().out
    assert train("--dataset_path cut") == 0
    assert "note: cut: " in capsys.readouterr().err
