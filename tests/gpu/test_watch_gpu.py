"""The watch on a GPU: a bad step changes nothing, and no step waits for the device."""

import math

import pytest
import torch

from glmtune.adapters import attach_lora, save_adapter, verify_saved
from glmtune.models.loading import load_base_model
from glmtune.training.watch import NotFiniteError

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]


CUDA = torch.device("cuda", 0)


@pytest.mark.parametrize("with_scaler", [False, True])
def test_a_bad_step_and_those_after_it_change_nothing(hand_training, with_scaler):
    scaler = torch.amp.GradScaler("cuda") if with_scaler else None
    training = hand_training(CUDA, at_once=None, scaler=scaler)
    training.step()
    training.step()
    before = training.snapshot()
    training.step(math.nan)

    def go_on():
        for _ in range(3):
            torch.cuda.synchronize()  # else the host may be many steps ahead
            training.step()

    with pytest.raises(NotFiniteError, match="the loss is nan") as stop:
        go_on()
    assert stop.value.fault.step == 2
    assert stop.value.fault.random_state.cuda is not None
    assert all(map(torch.equal, training.snapshot(), before))


def test_no_step_waits_for_the_device(hand_training):
    training = hand_training(CUDA, at_once=None)
    training.step()  # sets the optimiser up
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(8):
            training.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    training.watch.sync()


def test_a_saved_adapter_is_read_back(tiny_folder, tmp_path):
    base = load_base_model(str(tiny_folder), dtype=torch.bfloat16, device="cuda")
    model = attach_lora(base, rank=4)
    random_state = torch.cuda.get_rng_state()
    save_adapter(model, tmp_path / "saved", "tiny")
    assert verify_saved(model, tmp_path / "saved") == 0
    assert torch.equal(torch.cuda.get_rng_state(), random_state)
