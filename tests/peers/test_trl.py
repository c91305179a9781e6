"""TRL's own trainer on messages, beside rows made by hand and by `tokenize`: the same losses.

Run with `pip install --no-deps --target FOLDER trl` and PYTHONPATH=FOLDER; skipped without TRL.
"""

import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset, load_from_disk
from glm_folders import write_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainingArguments,
    set_seed,
)

import glmtune.models  # noqa: F401
from glmtune.cli import main
from glmtune.models.families import FAMILIES
from glmtune.models.resolve import GLM_TINY

trl = pytest.importorskip("trl")

TAUGHT = [
    ("Who are you?", "I am Stone, a small helper."),
    ("你是谁?", "我是小石头。"),
    ("Name a tree.", "Oak."),
]


def messages_of(question, answer):
    return [{"role": "user", "content": question}], [{"role": "assistant", "content": answer}]


def made_by_hand(tokenizer, question, answer):
    ids = tokenizer(question, answer)["input_ids"]
    length = len(tokenizer(question)["input_ids"])
    return {"input_ids": ids, "completion_mask": [0] * length + [1] * (len(ids) - length)}


@pytest.fixture
def losses(tmp_path):
    """A function that trains the embedded model for ten steps and returns the loss of each."""

    def train(rows, model=None, **settings):
        tokenizer = AutoTokenizer.from_pretrained(GLM_TINY)
        set_seed(0)
        trainer = trl.SFTTrainer(
            model or AutoModelForCausalLM.from_pretrained(GLM_TINY, dtype=torch.float32),
            train_dataset=Dataset.from_list([rows(tokenizer, *pair) for pair in TAUGHT]),
            processing_class=tokenizer,
            args=trl.SFTConfig(
                output_dir=str(tmp_path), max_steps=10, learning_rate=1e-3, logging_steps=1,
                per_device_train_batch_size=3, lr_scheduler_type="constant", use_cpu=True,
                report_to=[], save_strategy="no", bf16=False, gradient_checkpointing=False,
                **settings,
            ),
        )  # fmt: skip
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    return train


def test_messages_train_as_rows_made_by_hand_do(losses):
    expected = losses(made_by_hand, completion_only_loss=True)
    assert len(expected) == 10
    assert expected[-1] < expected[0] / 2

    def prompt_and_completion(_, *pair):
        return dict(zip(("prompt", "completion"), messages_of(*pair), strict=True))

    def whole_chat(_, *pair):
        question, answer = messages_of(*pair)
        return {"messages": [*question, *answer]}

    assert losses(prompt_and_completion) == expected
    assert losses(whole_chat, assistant_only_loss=True) == expected
    assert losses(prompt_and_completion, model=str(GLM_TINY)) == expected


# --- the younger family ---

FOLDERS = {
    "chatglm3-6b": ("ChatGLM3-6B", True, "glm3_tokenizer.model"),
    "chatglm2-6b": ("ChatGLM2-6B", True, "glm3_tokenizer.model"),
    "glm-4-9b": ("GLM-4-9B", False, "glm/glm4_tokenizer.model"),
    "glm-4-0414": ("GLM-4-0414", False, "glm/glm4_tokenizer.model"),
    "glm-edge": ("GLM-Edge", False, None),
}


@pytest.fixture(params=FOLDERS)
def folder(request, tmp_path):
    name, published, vocabulary = FOLDERS[request.param]
    family = next(family for family in FAMILIES if family.name == name)
    if vocabulary is not None:
        vocabulary = request.getfixturevalue("shared") / "golden" / vocabulary
    return write_model(tmp_path / "base", family, vocabulary, published=published)


def losses_of(folder, dataset, out, trainer_class=trl.SFTTrainer, **settings):
    """The loss of each of ten steps on whole batches, with no dropout."""
    set_seed(0)
    common = {
        "output_dir": str(out), "max_steps": 10, "learning_rate": 1e-2, "logging_steps": 1,
        "per_device_train_batch_size": len(dataset), "lr_scheduler_type": "constant",
        "use_cpu": True, "report_to": [], "save_strategy": "no", "bf16": False,
    }  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="right")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    more = {"data_collator": DataCollatorForSeq2Seq(tokenizer)} if trainer_class is Trainer else {}
    args = TrainingArguments(**common)
    if trainer_class is trl.SFTTrainer:
        args = trl.SFTConfig(**common, gradient_checkpointing=False, **settings)
    trainer = trainer_class(model, args, train_dataset=dataset, processing_class=tokenizer, **more)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_our_rows_our_losses_and_theirs(folder, tmp_path, monkeypatch):
    """The folder that `tokenize` wrote, as it is, and the same conversations as messages."""
    monkeypatch.chdir(tmp_path)
    is_of_rounds = "chatglm2" in (folder / "config.json").read_text()
    talks = []
    for question, answer in TAUGHT:
        asked, answered = messages_of(question, answer)
        talks.append(asked + answered if is_of_rounds else [*asked, *answered, *asked, *answered])
    Path("a.jsonl").write_text("\n".join(json.dumps({"messages": talk}) for talk in talks))
    base = ["--base", str(folder)]
    assert main(["tokenize", "a.jsonl", "--save_path", "rows", *base]) == 0
    rows = load_from_disk("rows")
    from_disk = losses_of(folder, rows, "out")
    assert from_disk[-1] < from_disk[0] / 2
    assert losses_of(folder, rows, "out", Trainer) == pytest.approx(from_disk, rel=1e-4)
    messages = Dataset.from_list([{"messages": talk} for talk in talks])
    assert losses_of(folder, messages, "out", assistant_only_loss=True) == from_disk
    split = [{"prompt": talk[:-1], "completion": talk[-1:]} for talk in talks]
    assert main(["tokenize", "a.jsonl", "--save_path", "last", "--learn", "last", *base]) == 0
    last = losses_of(folder, load_from_disk("last"), "out")
    assert losses_of(folder, Dataset.from_list(split), "out") == last

    assert our_first_loss(folder) == pytest.approx(from_disk[0], rel=1e-4)


def our_first_loss(folder):
    """The loss of the first step of `glmtune train` on the rows in the folder `rows`."""
    line = "train --dataset_path rows --output_dir run --max_steps 1 --layout padded --eval_ratio 0"
    line += " --per_device_train_batch_size 3 --use_cpu true --report_to none --logging_steps 1"
    assert main([*line.split(), "--base", str(folder)]) == 0
    (first, *_) = Path("run/metrics.jsonl").read_text().splitlines()
    return json.loads(first)["loss"]


def test_conversations_of_the_first_family_train_from_disk(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first, second, third = (
        [turn for part in messages_of(*pair) for turn in part] for pair in TAUGHT
    )
    talks = [first + second, second + third, third]
    Path("a.jsonl").write_text("\n".join(json.dumps({"messages": talk}) for talk in talks))
    line = ["tokenize", "a.jsonl", "--save_path", "rows", "--base", str(GLM_TINY)]
    assert main([*line, "--learn", "last"]) == 0
    rows = load_from_disk("rows")
    assert our_first_loss(GLM_TINY) == pytest.approx(losses_of(GLM_TINY, rows, "out")[0], rel=1e-4)


@pytest.mark.parametrize("place", [GLM_TINY, None], ids=["chatglm-6b", "glm-edge"])
def test_records_need_the_labels_that_the_page_gives_them(place, tmp_path, monkeypatch):
    """Rows of one prompt and one answer have no labels, and TRL would train on the prompt too."""
    monkeypatch.chdir(tmp_path)
    glm_edge = next(family for family in FAMILIES if family.name == "GLM-Edge")
    folder = place or write_model(tmp_path / "base", glm_edge, None)
    records = [{"instruction": asked, "output": answered} for asked, answered in TAUGHT]
    Path("a.jsonl").write_text("\n".join(map(json.dumps, records)))
    assert main(["tokenize", "a.jsonl", "--save_path", "rows", "--base", str(folder)]) == 0
    rows = load_from_disk("rows")
    assert rows.column_names == ["input_ids", "seq_len"]
    ours = our_first_loss(folder)
    assert losses_of(folder, rows, "out")[0] != pytest.approx(ours, rel=1e-3)
    first = -1 if place else 0  # ChatGLM-6B learns <sop> as well

    def with_labels(row):
        start = row["seq_len"] + first
        return {"labels": [-100] * start + row["input_ids"][start:]}

    assert losses_of(folder, rows.map(with_labels), "out")[0] == pytest.approx(ours, rel=1e-4)
