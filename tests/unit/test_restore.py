"""A checkpoint's optimiser: what does not fit the run is refused before the first step."""

import pytest
import torch

from glmtune.errors import UserError
from glmtune.training.saving.restore import check_moments, restore


def other_state(optimizer, change):
    """A saved optimiser with one value replaced."""
    state = optimizer.state_dict()
    change(state)
    return state


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda s: s["param_groups"][0].update(lr="fast"), "of other kinds"),
        (lambda s: s["param_groups"][0].update(lr=float("nan")), "of other kinds"),
        (lambda s: s["param_groups"][0].update(betas=[0.9, 0.999]), "of other kinds"),
        (lambda s: s.pop("param_groups"), "param_groups"),
        (lambda s: s["param_groups"][0].update(params=[0, 1]), "parameter group"),
        (lambda s: s["state"][0].update(exp_avg=torch.zeros(3)), r"exp_avg of a weight .*\[2, 2\]"),
        (lambda s: s["state"][0].pop("step"), "'step'"),
        (lambda s: s["state"][0].update(step=torch.tensor(1)), "step of a weight"),
    ],
)
def test_an_optimiser_of_another_run_is_refused(tmp_path, change, words):
    weight = torch.nn.Parameter(torch.zeros(2, 2))
    optimizer = torch.optim.AdamW([weight], lr=1e-3)
    weight.grad = torch.ones(2, 2)
    optimizer.step()
    path = tmp_path / "optimizer.pt"
    torch.save(optimizer.state_dict(), path)
    fresh = torch.optim.AdamW([weight], lr=1e-4)
    put_back(fresh, path)
    assert fresh.param_groups[0]["lr"] == 1e-3
    torch.save(other_state(optimizer, change), path)
    with pytest.raises(UserError, match=rf"optimizer\.pt: is not this run's state \(.*{words}"):
        put_back(torch.optim.AdamW([weight], lr=1e-4), path)


def put_back(optimizer, path):
    restore(optimizer, path)
    check_moments(optimizer, path)
