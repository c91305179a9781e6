"""TRL's own trainer on messages, beside rows made by hand: the same losses."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

import glmtune.models  # noqa: F401
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
    from datasets import Dataset

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
