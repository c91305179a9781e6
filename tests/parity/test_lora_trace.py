"""The published code's own training run, step for step, through our loop."""

import json

import numpy as np
import pytest
import torch
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file

from glmtune.adapters import attach_lora
from glmtune.config.settings import TrainSettings
from glmtune.data.token_rows import TokenRows
from glmtune.models.chatglm.rows import row_rule
from glmtune.models.loading import load_base_model
from glmtune.training.interrupt import StopRequest
from glmtune.training.launch import start_accelerator
from glmtune.training.loop import fit
from glmtune.training.run import Run


@pytest.fixture(scope="module")
def recorded(tiny_folder):
    return json.loads((tiny_folder / "expected.json").read_text())["train"]


def token_rows(examples, config):
    rows = [example["prompt"] + example["answer"] for example in examples]
    return TokenRows(
        ids_T=np.concatenate(rows),
        starts_R1=np.concatenate(([0], np.cumsum([len(row) for row in rows]))),
        prompt_lengths_R=np.array([len(example["prompt"]) for example in examples]),
        rule=row_rule(config),
    )


@pytest.fixture(scope="module", params=[1, 2], ids=["whole batch", "in two passes"])
def run(request, recorded, tiny_folder, tmp_path_factory):
    """Our run of the same 20 steps: the records, and the adapter it ends with."""
    lora, passes = recorded["lora"], request.param
    config = TrainSettings(
        dataset_path="unused",
        output_dir=str(tmp_path_factory.mktemp("run")),
        per_device_train_batch_size=recorded["batch"] // passes,
        gradient_accumulation_steps=passes,
        max_steps=recorded["steps"],
        train_sampling_strategy="sequential",
        learning_rate=recorded["lr"],
        lr_scheduler_type="constant",
        weight_decay=recorded["weight_decay"],
        max_grad_norm=0,
        logging_steps=1,
        report_to="none",
        use_cpu=True,
    )
    accelerator, dtype = start_accelerator(config)
    model = load_base_model(str(tiny_folder), dtype=dtype)
    model = attach_lora(
        model,
        rank=lora["r"],
        alpha=lora["lora_alpha"],
        dropout=lora["lora_dropout"],
        targets=lora["target_modules"],
    )
    set_peft_model_state_dict(model, load_file(tiny_folder / "lora_init.safetensors"))
    rows = token_rows(recorded["examples"], model.config)
    run = Run.of(config, accelerator, rows, model, "chatglm-6b-tiny")
    result = fit(run, model, StopRequest(accelerator))
    return result, get_peft_model_state_dict(model, save_embedding_layers=False)


def test_every_step_has_the_recorded_loss(run, recorded):
    result, _ = run
    losses = [record["loss"] for record in result.log_history if "loss" in record]
    assert losses == pytest.approx(recorded["losses"], abs=1e-4, rel=0)


def test_the_adapter_ends_where_the_recorded_one_does(run, tiny_folder):
    _, weights = run
    trained = load_file(tiny_folder / "lora_trained.safetensors")
    assert weights.keys() == trained.keys()
    for name, weight in trained.items():
        torch.testing.assert_close(weights[name], weight, atol=1e-4, rtol=1e-3)
