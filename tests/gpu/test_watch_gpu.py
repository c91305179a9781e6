"""The watch on a GPU: a bad step changes nothing, and no step waits for the device."""

import math

import pytest
import torch
from torch import nn

from glmtune.adapters import attach_lora, save_adapter, verify_saved
from glmtune.models.checkpoints import load_base_model
from glmtune.training.watch import NotFiniteError, Watch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]


class Training:
    """Weights trained as the loop does it, on a device, with gradients of our choice."""

    def __init__(self, scaler=None):
        self.device = torch.device("cuda", 0)
        self.weights = [nn.Parameter(torch.ones(64, 64, device=self.device)) for _ in range(4)]
        self.optimizer = torch.optim.AdamW(self.weights, lr=0.1, fused=True)
        self.scaler = scaler
        self.watch = Watch(self.weights, self.optimizer, scaler, self.device)
        self.num_steps = 0
        self.good = torch.ones((), device=self.device)

    def step(self, loss=1.0):
        largest = self.watch.begin(self.num_steps)
        scale = 1.0 if self.scaler is None else self.scaler.scale(self.good)
        for weight in self.weights:
            weight.grad = self.good.expand_as(weight) * scale
        self.watch.see_loss(self.good * loss, largest)
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        self.watch.see_gradient(nn.utils.get_total_norm([w.grad for w in self.weights]))
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.num_steps += 1

    def go_on(self):
        for _ in range(3):
            torch.cuda.synchronize()  # else the host may be many steps ahead
            self.step()

    def moving(self):
        states = self.optimizer.state_dict()["state"].values()
        slots = [slot for state in states for slot in state.values()]
        return [tensor.detach().clone() for tensor in (*self.weights, *slots)]


@pytest.mark.parametrize("with_scaler", [False, True])
def test_a_bad_step_changes_nothing_nor_do_those_after_it(with_scaler):
    training = Training(torch.amp.GradScaler("cuda") if with_scaler else None)
    training.step()
    training.step()
    before = training.moving()
    training.step(math.nan)
    with pytest.raises(NotFiniteError, match="the loss is nan") as stop:
        training.go_on()
    assert stop.value.fault.step == 2
    assert stop.value.fault.random_state.cuda is not None
    assert all(map(torch.equal, training.moving(), before))


def test_no_step_waits_for_the_device():
    training = Training()
    training.step()  # sets the optimiser up
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(8):
            training.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    training.watch.settle()


def test_a_saved_adapter_is_read_back(tiny_folder, tmp_path):
    base = load_base_model(str(tiny_folder), dtype=torch.bfloat16, device="cuda")
    model = attach_lora(base, rank=4)
    random_state = torch.cuda.get_rng_state()
    save_adapter(model, tmp_path / "saved", "tiny")
    assert verify_saved(model, tmp_path / "saved") == 0
    assert torch.equal(torch.cuda.get_rng_state(), random_state)
