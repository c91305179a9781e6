"""Conversations from a file to an adapter, and the same folder of rows in transformers' Trainer."""

import json
from pathlib import Path

import datasets
import pytest
import torch
from glm_folders import write_model
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

from glmtune.cli import main
from glmtune.models.families import FAMILIES
from glmtune.models.loading import load_base_model, load_tokenizer

TOOL = {"type": "function", "function": {"name": "twice", "parameters": {"type": "object"}}}


def talk(i):
    """Four turns, the third of which may be a call."""
    turns = [
        ("user", f"说 {i}"),
        ("assistant", f"{i}"),
        ("user", "again"),
        ("assistant", f"{i} {i}"),
    ]
    messages = [{"role": role, "content": text} for role, text in turns]
    if i % 3 == 0:
        call = {"function": {"name": "twice", "arguments": json.dumps({"n": i})}}
        messages[3:3] = [
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": f"{i} {i}"},
        ]
    return {"messages": messages} | ({"tools": [TOOL]} if i % 3 == 0 else {})


@pytest.fixture(scope="module")
def model(shared, tmp_path_factory):
    family = next(family for family in FAMILIES if family.name == "GLM-4-0414")
    folder = tmp_path_factory.mktemp("glm-4-9b-0414", numbered=False) / "base"
    return write_model(folder, family, shared / "golden" / "glm" / "glm4_tokenizer.model")


@pytest.fixture
def here(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = (json.dumps(talk(i), ensure_ascii=False) for i in range(9))
    Path("talks.jsonl").write_text("\n".join(rows), encoding="utf-8")
    return str(model)


def glmtune(line, base):
    assert main([*line.split(), "--base", base]) == 0


def test_from_conversations_to_an_adapter(here, capsys):
    glmtune("tokenize talks.jsonl --save_path rows", here)
    assert "9 read, 9 kept" in capsys.readouterr().out
    losses = {}
    for layout, more in (("padded", ""), ("packed", " --tokens_per_step 4096")):
        line = f"train --dataset_path rows --output_dir {layout} --layout {layout}{more} "
        line += "--max_steps 6 --learning_rate 0.02 --lora_dropout 0 --logging_steps 1 "
        line += "--per_device_train_batch_size 9 --use_cpu true --report_to none --eval_ratio 0.1"
        glmtune(line, here)
        lines = Path(layout, "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        losses[layout] = [x["loss"] for x in map(json.loads, lines) if "loss" in x]
    assert len(losses["padded"]) == 6
    assert losses["packed"] == pytest.approx(losses["padded"], abs=2e-4)
    assert losses["padded"][-1] < losses["padded"][0] - 0.2
    capsys.readouterr()
    glmtune("plan --dataset_path rows --use_cpu true", here)
    brief = ["--max_new_tokens", "4"]
    assert main(["check", "packed", *brief, "--base", here, "--use_cpu", "true"]) in (0, 1)
    assert "rows that the run held out" in capsys.readouterr().out


def test_the_trainer_of_transformers_trains_on_the_folder_as_it_is(here):
    glmtune("tokenize talks.jsonl --save_path rows", here)
    tokenizer = load_tokenizer(here)
    tokenizer.padding_side = "right"
    base = load_base_model(here, dtype=torch.float32)
    rows = datasets.load_from_disk("rows")
    trainer = Trainer(
        base,
        TrainingArguments(
            "out", max_steps=8, learning_rate=1e-2, per_device_train_batch_size=3, logging_steps=1,
            use_cpu=True, report_to=[], save_strategy="no",
        ),
        train_dataset=rows,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
    )  # fmt: skip
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.5
    ids, labels = rows[0]["input_ids"], rows[0]["labels"]
    supervised = [i for i, label in enumerate(labels) if label != -100]
    with torch.inference_mode():
        logits = base(torch.tensor([ids])).logits[0].float()
        loss = base(torch.tensor([ids]), labels=torch.tensor([labels])).loss
    logprobs = torch.log_softmax(logits, -1)
    expected = -torch.stack([logprobs[i - 1, ids[i]] for i in supervised]).mean()
    assert float(loss) == pytest.approx(float(expected), rel=1e-4)
