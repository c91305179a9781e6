"""transformers' own Trainer on our model: label smoothing, evaluation, prediction."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments

from glmtune.models import ChatGLMConfig, ChatGLMForConditionalGeneration

GMASK, SOP, EOP = 101, 104, 105
ROWS = [[7, 8, GMASK, SOP, 9, 10, EOP], [11, 12, GMASK, SOP, 13, 14, EOP]]
IDS = torch.tensor(ROWS)
LABELS = IDS.where(torch.arange(7) > 2, -100)
DATA = [
    {"input_ids": ids, "labels": labels} for ids, labels in zip(IDS, LABELS, strict=True)
]  # fmt: skip


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = ChatGLMConfig(
        vocab_size=128, hidden_size=32, num_layers=2, num_attention_heads=2, inner_hidden_size=64,
        bos_token_id=SOP, eos_token_id=EOP, initializer_range=0.5,
    )  # fmt: skip
    return ChatGLMForConditionalGeneration(config).eval()


def make_trainer(model, folder, **settings):
    fixed = {"output_dir": str(folder), "report_to": "none", "use_cpu": True, "max_steps": 2}
    return Trainer(
        model=model,
        args=TrainingArguments(**fixed | settings),
        train_dataset=DATA,
        eval_dataset=DATA,
    )


@pytest.mark.parametrize("is_adapted", [False, True])
def test_label_smoothing_smooths_the_label_one_place_on(model, tmp_path, is_adapted):
    smoothing = 0.1
    with torch.no_grad():
        log_probs = model(IDS).logits[:, :-1].log_softmax(-1)
    targets = LABELS[:, 1:]
    supervised = targets != -100
    of_labels = F.nll_loss(log_probs[supervised], targets[supervised])
    expected = (1 - smoothing) * of_labels - smoothing * log_probs[supervised].mean()
    if is_adapted:
        lora = LoraConfig(task_type="CAUSAL_LM", target_modules=["query_key_value"])
        model = get_peft_model(model, lora)  # without effect before training
    trainer = make_trainer(model, tmp_path, label_smoothing_factor=smoothing)
    inputs = {"input_ids": IDS, "labels": LABELS}
    with torch.no_grad():
        loss = trainer.compute_loss(model, dict(inputs))
    torch.testing.assert_close(loss, expected)
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("strategy", ["steps", "epoch"])
def test_evaluation_while_training(model, tmp_path, strategy):
    trainer = make_trainer(model, tmp_path, eval_strategy=strategy, eval_steps=1, logging_steps=1)
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(losses) == 2
    assert losses[1] < losses[0]


def test_prediction_returns_logits_and_no_cache(model, tmp_path):
    trainer = make_trainer(model, tmp_path)
    predicted = trainer.predict(DATA)
    with torch.no_grad():
        whole = model(IDS, labels=LABELS)
    torch.testing.assert_close(torch.from_numpy(predicted.predictions), whole.logits)
    assert predicted.metrics["test_loss"] == pytest.approx(whole.loss.item(), rel=1e-4)


def test_rows_as_trl_makes_them_of_text_stop_a_trainer(model, tmp_path):
    row = torch.tensor([7, 8, 9, 10, EOP, GMASK, SOP])
    trainer = make_trainer(model, tmp_path)
    trainer.train_dataset = [{"input_ids": row, "labels": row}]
    with pytest.raises(ValueError, match="labels: row 0 has 7 at or before its <sop>"):
        trainer.train()


def test_rows_without_an_answer_stop_a_trainer_that_passes_no_labels(model, tmp_path):
    """Label smoothing in Trainer passes none, and TRL makes such rows of plain text."""
    row = torch.tensor([7, 8, 9, 10, EOP, GMASK, SOP])
    trainer = make_trainer(model, tmp_path, label_smoothing_factor=0.1)
    trainer.train_dataset = [{"input_ids": row, "labels": row}]
    with pytest.raises(ValueError, match="input_ids: row 0 has no answer after its <sop>"):
        trainer.train()
    assert model.eval()(row[None]).logits.isfinite().all()
    assert model.train().generate(row[None], max_new_tokens=2).shape == (1, 9)
    assert model.transformer.train()(IDS).last_hidden_state.requires_grad
    bare = type(model.transformer)(model.config).train()
    assert bare(row[None]).last_hidden_state.requires_grad  # which may be trained in another way
