"""The native model and the commands on a CUDA device; run by name: pytest -m gpu tests/gpu."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import glmtune.models  # noqa: F401

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]
RECORDS = [
    {"instruction": "What colour is the apple?", "input": "", "output": "red"},
    {"instruction": "苹果是什么颜色？", "input": "", "output": "红色"},
    {"instruction": "Count the words.", "input": "sun, moon", "output": "2"},
] * 8


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_logits_and_loss(tiny_folder, attention):
    model = AutoModelForCausalLM.from_pretrained(
        tiny_folder, dtype=torch.float32, device_map="cuda", attn_implementation=attention
    ).eval()
    golden = load_file(tiny_folder / "forward.safetensors", device="cuda")
    with torch.no_grad():
        output = model(golden["input_ids"], labels=golden["labels"])
    assert (output.logits - golden["logits"])[golden["valid"]].abs().max() < 1e-4
    assert abs(output.loss.item() - golden["loss"].item()) < 1e-5


def test_bfloat16_is_the_default_and_near(tiny_folder):
    model = AutoModelForCausalLM.from_pretrained(tiny_folder, device_map="cuda").eval()
    assert model.dtype == torch.bfloat16
    golden = load_file(tiny_folder / "forward.safetensors", device="cuda")
    with torch.no_grad():
        loss = model(golden["input_ids"], labels=golden["labels"]).loss
    assert abs(loss.item() - golden["loss"].item()) < 2e-2


@pytest.mark.parametrize("cache", [None, "static"])
def test_greedy_continuations(tiny_folder, cache):
    model = AutoModelForCausalLM.from_pretrained(
        tiny_folder, dtype=torch.float32, device_map="cuda"
    ).eval()
    for row in json.loads((tiny_folder / "expected.json").read_text())["generate_greedy_24"]:
        prompt = row[: row.index(model.config.bos_token_id) + 1]
        out = model.generate(
            torch.tensor([prompt], device="cuda"),
            max_new_tokens=24,
            do_sample=False,
            cache_implementation=cache,
        )
        assert out[0].tolist() == row


@pytest.mark.parametrize("precision", ["--bf16 true", "--fp16 true"])
def test_train_stop_and_resume(tmp_path, precision, monkeypatch):
    """On the embedded model: losses fall, and a resumed run equals an uninterrupted one."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data.json").write_text(json.dumps(RECORDS), encoding="utf-8")

    def run(line):
        # A process each, as a user has it: Accelerate keeps one precision for a process's life.
        subprocess.run([sys.executable, "-m", "glmtune", *line.split()], check=True)

    run("convert --data_path data.json --save_path data.jsonl")
    run("tokenize --jsonl_path data.jsonl --save_path rows")
    train = (
        "train --dataset_path rows --learning_rate 2e-3 --logging_steps 5 --save_steps 10 "
        f"--report_to none --lr_scheduler_type constant {precision}"
    )
    run(f"{train} --max_steps 20 --output_dir whole")
    run(f"{train} --max_steps 10 --output_dir broken")
    run(f"{train} --max_steps 20 --output_dir broken --resume_from_checkpoint true")

    def losses(folder):
        history = json.loads((tmp_path / folder / "trainer_state.json").read_text())["log_history"]
        return [record["loss"] for record in history if "loss" in record]

    assert losses("whole")[-1] < losses("whole")[0] - 0.5
    assert losses("broken") == pytest.approx(losses("whole"), abs=5e-2)
    run("infer --data_path data.json --adapter broken --limit 3 --max_new_tokens 4")
