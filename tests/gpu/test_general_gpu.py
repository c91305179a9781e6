"""Losses of rows and the general set, computed by compiled and captured passes on a GPU."""

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from toys import draw_rows, randomise_adapter, save_rows, short_run

from glmtune.adapters import attach_lora
from glmtune.hardware import Card, can_compile
from glmtune.models.chatglm.configuration import ChatGLMConfig
from glmtune.models.chatglm.modeling import ChatGLMForConditionalGeneration
from glmtune.models.chatglm.packed import PACKED
from glmtune.models.families import DEFAULT
from glmtune.models.loading import load_tokenizer
from glmtune.models.packed import PackedModel, to_fp8
from glmtune.models.resolve import GLM_TINY
from glmtune.training.loop import train
from glmtune.training.passes import CapturedPass, PackedPass, PaddedPass

CUDA = torch.device("cuda")
CONFIG = ChatGLMConfig(
    vocab_size=8192, hidden_size=512, num_layers=3, num_attention_heads=4,
    inner_hidden_size=1024, bos_token_id=7668, eos_token_id=7669,
)  # fmt: skip
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("fresh_compiler"),
    pytest.mark.skipif(
        not torch.cuda.is_available()
        or not can_compile(Card.of(CUDA), CONFIG.head_dim, DEFAULT.head_dims),
        reason="no CUDA device of the Ampere generation or newer here, or no Triton",
    ),
]
has_float8 = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)


def make_model(dtype):
    torch.manual_seed(0)
    with CUDA:
        base = ChatGLMForConditionalGeneration._from_config(CONFIG, dtype=dtype)
    model = attach_lora(base, rank=8, dropout=0.1, targets="query_key_value")
    randomise_adapter(model, std=0.05)
    return model, [weight for weight in model.parameters() if weight.requires_grad]


@pytest.mark.parametrize("form", ["packed", "captured", "fp8"])
def test_losses_of_rows_equal_those_of_padded_rows(rows, form):
    if form == "fp8" and not has_float8:
        pytest.skip("float8 matrix units are of the Hopper generation and newer")
    dtype = torch.bfloat16 if form == "fp8" else torch.float32
    model, weights = make_model(dtype)
    accelerator = Accelerator()
    plain = PaddedPass(accelerator, model, rows)
    if form == "fp8":
        to_fp8(model)
    packed = PackedModel(model, PACKED, compiled=True, any_length=form == "captured")
    if form == "captured":
        fast = CapturedPass(accelerator, packed, rows, 0.1, None, weights)
        fast.run(np.arange(6), 300, 1)  # captured for training first, as a run does
    else:
        fast = PackedPass(accelerator, packed, rows, 0.1, 1024)
    off = []
    for row_ids in (np.arange(4), np.arange(7, 9), np.array([3])):
        mine, wanted = (way.row_losses(row_ids) for way in (fast, plain))
        assert len(mine) == len(row_ids)
        off.append(((mine - wanted).abs() / wanted).max().item())
    assert max(off) < (1e-4 if dtype == torch.float32 else 2e-2)


LAYOUTS = {
    "packed": {"layout": "packed", "tokens_per_step": 256},
    "captured": {"layout": "exact"},
    "padded": {"layout": "padded"},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_general_set_scores_as_on_a_cpu_and_changes_no_step(layout, tmp_path):
    save_rows(draw_rows([(5, 4)] * 40, load_tokenizer(GLM_TINY)), tmp_path / "rows")

    def run(name, **changes):
        AcceleratorState._reset_state(reset_partial_state=True)  # a CPU after a card
        settings = {"max_steps": 4, "eval_steps": 2, "learning_rate": 1e-3, **LAYOUTS[layout]}
        settings |= {"use_cpu": False}
        return train(short_run(tmp_path / "rows", tmp_path / name, **settings | changes))

    scored = run("gpu", general_set="true").log_history
    of_cpu = run("cpu", general_set="true", use_cpu=True).log_history
    first, wanted = (next(r for r in told if "general" in r) for told in (scored, of_cpu))
    assert first["step"] == 0
    assert first["general_log_prob"] == pytest.approx(wanted["general_log_prob"], abs=0.03)
    assert first["general"] == pytest.approx(wanted["general"], abs=1.5)
    unscored = run("none", general_set="false").log_history
    losses = [[r["loss"] for r in told if "loss" in r] for told in (scored, unscored)]
    assert len(losses[0]) == 4
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
