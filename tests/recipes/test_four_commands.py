"""The original's four commands, as a user types them, on real records with the real vocabulary.

The base is a small random model with the full vocabulary, made by the test.
"""

import json
import math
import os
import subprocess
import sys

import datasets
import pytest

from glmtune.models.chatglm.configuration import ChatGLMConfig
from glmtune.models.chatglm.random_init import write_random_model

NUM_RECORDS = 400
# One thread: these matrices are small, and other tests run beside this one.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def run(root, folder, command):
    """Run one command in a folder with links to the project's scripts; returns its output."""
    script, *arguments = command.split()
    done = subprocess.run(
        [sys.executable, str(root / script), *arguments],
        cwd=folder,
        env=ENVIRONMENT | {"GLMTUNE_MODEL": "base"},
        capture_output=True,
        encoding="utf-8",
        check=False,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module", params=["zh", "en"])
def language(request):
    return request.param


@pytest.fixture(scope="module")
def folder(shared, tmp_path_factory, language):
    folder = tmp_path_factory.mktemp(f"recipe_{language}")
    (folder / "data").mkdir()
    records = json.loads((shared / "data" / f"alpaca_data_{language}.json").read_text("utf-8"))
    text = json.dumps(records[:NUM_RECORDS], ensure_ascii=False)
    (folder / "data" / f"alpaca_data_{language}.json").write_text(text, encoding="utf-8")
    shape = ChatGLMConfig(
        hidden_size=128,
        num_layers=2,
        num_attention_heads=4,
        inner_hidden_size=256,
        max_sequence_length=512,
        initializer_range=0.1,
    )
    write_random_model(folder / "base", shape, shared / "golden" / "ice_text.model", num_shards=2)
    return folder


def test_the_four_commands_of_the_original_run(root, folder, language):
    lang = language
    run(
        root,
        folder,
        f"cover_alpaca2jsonl.py --data_path data/alpaca_data_{lang}.json "
        f"--save_path data/alpaca_data_{lang}.jsonl",
    )
    lines = (folder / "data" / f"alpaca_data_{lang}.jsonl").read_text("utf-8").splitlines()
    assert len(lines) == NUM_RECORDS
    assert "\\u" not in lines[0]

    said = run(
        root,
        folder,
        f"tokenize_dataset_rows.py --jsonl_path data/alpaca_data_{lang}.jsonl "
        f"--save_path data/alpaca_{lang} --max_seq_length 40 --skip_overlength true",
    )
    rows = datasets.load_from_disk(str(folder / "data" / f"alpaca_{lang}"))
    assert set(rows.column_names) == {"input_ids", "seq_len"}
    assert max(map(len, rows["input_ids"])) <= 40
    assert "400 read" in said

    run(
        root,
        folder,
        f"finetune.py --dataset_path data/alpaca_{lang} --lora_rank 8 "
        "--per_device_train_batch_size 6 --gradient_accumulation_steps 1 --max_steps 30 "
        "--save_steps 15 --save_total_limit 2 --learning_rate 1e-2 --fp16 false "
        f"--remove_unused_columns false --logging_steps 5 --output_dir output_{lang}",
    )
    output = folder / f"output_{lang}"
    state = json.loads((output / "trainer_state.json").read_text("utf-8"))
    losses = [record["loss"] for record in state["log_history"] if "loss" in record]
    assert all(map(math.isfinite, losses))
    assert losses[-1] < losses[0] - 2
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (output / file).is_file()
        assert (output / "checkpoint-30" / file).is_file()
    assert {path.name for path in output.glob("checkpoint-*")} == {"checkpoint-15", "checkpoint-30"}
    for file in ("metrics.jsonl", "training_loss.png", "recipe.yaml"):
        assert (output / file).is_file()

    said = run(
        root,
        folder,
        f"infer.py --data_path data/alpaca_data_{lang}.json --adapter output_{lang} "
        "--limit 4 --max_new_tokens 8",
    )
    for heading in ("Instruction: ", "Answer: ", "### "):
        assert sum(line.startswith(heading) for line in said.splitlines()) == 4
    answers = (output / "answers.jsonl").read_text("utf-8").splitlines()
    assert len(answers) == 4
