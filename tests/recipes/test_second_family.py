"""A family that the project does not know: every verb serves it, told by one entry of the list."""

import json
from pathlib import Path

import pytest
import torch
from toy_family import CONFIG, TOY

from glmtune.cli import main
from glmtune.models import families


@pytest.fixture
def base(tmp_path, monkeypatch):
    monkeypatch.setattr(families, "FAMILIES", [*families.FAMILIES, TOY])
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    TOY.model_class(CONFIG).save_pretrained("base")
    return "base"


@pytest.fixture
def rows(base):
    """Token rows of that family."""
    pairs = [(f"say {word}", word * 2) for word in ("ha", "la", "na", "好", "ba", "da", "ta", "wa")]
    with open("rows.jsonl", "w", encoding="utf-8") as file:
        for context, target in pairs:
            file.write(json.dumps({"context": context, "target": target}) + "\n")
    assert main(["tokenize", *words("--jsonl_path rows.jsonl --save_path tokens")]) == 0
    return "tokens"


def words(text):
    return [*text.split(), "--chatglm_path", "base"]


def train(name, *flags):
    line = f"train --dataset_path tokens --output_dir {name} --max_steps 6 --logging_steps 1 "
    line += "--per_device_train_batch_size 8 --learning_rate 0.02 --lora_target all "
    line += "--lora_dropout 0 --use_cpu true --report_to none"
    assert main([*words(line), *flags]) == 0
    lines = Path(name, "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["loss"] for line in lines]


def test_padded_and_packed_training_have_the_same_losses(rows):
    padded = train("padded", "--layout", "padded")
    packed = train("packed", "--layout", "packed", "--tokens_per_step", "256")
    assert packed == pytest.approx(padded, abs=1e-5)
    assert padded[-1] < padded[0] - 0.5
