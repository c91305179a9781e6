"""Find where in a step the first number appears that is not finite.

The step is computed again by the reference path, with hooks on the output of every module and, in
the backward pass, on that output's gradient.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from glmtune.training.passes import PaddedPass
from glmtune.training.watch import RandomState

_PREFIX, _MODEL = "base_model.model.", "the model"


@dataclass(frozen=True)
class Culprit:
    """The first module or weight with a number that is not finite."""

    way: Literal["weight", "forward", "backward"]
    """A weight before the step, a module's output, or the gradient of a module's output."""
    name: str
    detail: str = ""

    def __str__(self) -> str:
        what = {
            "weight": "weight",
            "forward": "output of",
            "backward": "gradient of the output of",
        }[self.way]
        return f"{what} {self.name}" + (f" ({self.detail})" if self.detail else "")

    def is_like(self, other: "Culprit | None") -> bool:
        """Whether both name the same place; the detail may differ."""
        return other is not None and (self.way, self.name) == (other.way, other.name)


@dataclass(frozen=True)
class PassOfStep:
    """A pass of a step: the process that ran it, the seed of its dropout, its row numbers."""

    rank: int
    seed: int
    row_ids: np.ndarray


@dataclass(frozen=True)
class Outcome:
    """The result of computing a step again."""

    loss: float
    grad_norm: float
    culprit: Culprit | None


def compute_again(
    plain: PaddedPass,
    weights: Sequence[nn.Parameter],
    passes: Sequence[PassOfStep],
    num_labels: int,
    random_states: Sequence[RandomState],
    whole_passes: bool,
) -> Outcome:
    """Run one step by the reference path, and find the first place that is not finite.

    Dropout is the run's own if the run used the reference path; otherwise its masks differ.

    Args:
        plain: the reference.
        weights: the trainable weights; their gradients are dropped.
        passes: passes of the step, in order.
        num_labels: label tokens of the step.
        random_states: random state of each process before the step.
        whole_passes: compute a pass's rows at once, as padded passes do; otherwise one by one,
            since the rows of a pack would take more memory when padded.
    """
    device = plain.accelerator.device
    loss = torch.zeros((), device=device)
    _drop_gradients(weights)
    with _lookout(plain.model) as found:
        for rank, random_state in enumerate(random_states):
            random_state.restore(device)
            for one in (p for p in passes if p.rank == rank):
                for part in np.split(one.row_ids, 1 if whole_passes else len(one.row_ids)):
                    loss += plain.run(part, num_labels, one.seed)
    scaler = plain.accelerator.scaler
    scale = 1.0 if scaler is None else scaler.get_scale()
    grads = {
        name: weight.grad
        for name, weight in plain.model.named_parameters()
        if weight.grad is not None
    }
    grad_norm = nn.utils.get_total_norm(list(grads.values())) / scale
    if not found:
        bad = (name for name, grad in grads.items() if not grad.isfinite().all())
        found += [Culprit("backward", _short(name)) for name in bad]
    _drop_gradients(weights)
    return Outcome(loss.item(), grad_norm.item(), found[0] if found else None)


def _drop_gradients(weights: Sequence[nn.Parameter]) -> None:
    for weight in weights:
        weight.grad = None


@contextmanager
def _lookout(model: nn.Module) -> Iterator[list[Culprit]]:
    """Fill a list with the first culprit that appears inside the `with` block."""
    found = [
        Culprit("weight", _short(name))
        for name, weight in model.named_parameters()
        if weight.requires_grad and not weight.isfinite().all()
    ][:1]

    def look_ahead(name: str, module: nn.Module, inputs: Any) -> None:
        if not found and not all(tensor.isfinite().all() for tensor in _floats(inputs)):
            parent, _, child = name.rpartition(".")
            found.append(
                Culprit("forward", parent or _MODEL, f"in what it computes before {child}")
            )

    def look(name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        for tensor in _floats(output):
            if found:
                return
            if not tensor.isfinite().all():
                found.append(Culprit("forward", name, _explain(module, inputs)))
            elif tensor.requires_grad:
                tensor.register_hook(partial(look_back, name))

    def look_back(name: str, grad: Tensor) -> None:
        if not found and not grad.isfinite().all():
            found.append(Culprit("backward", name))

    hooks = []
    for name, module in model.named_modules():
        hooks += [
            module.register_forward_pre_hook(partial(look_ahead, _short(name))),
            module.register_forward_hook(partial(look, _short(name))),
        ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _explain(module: nn.Module, inputs: Any) -> str:
    """Say whether a module's own weights or the size of its input explain its output."""
    for name, weight in module.named_parameters():
        if not weight.isfinite().all():
            return f"its {name} is not finite"
    sizes = [tensor.abs().max().item() for tensor in _floats(inputs) if tensor.numel()]
    return f"its weights are finite, its input is up to {max(sizes):.3g}" if sizes else ""


def _floats(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, dict):
        yield from _floats(list(value.values()))
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _floats(part)


def _short(name: str) -> str:
    """A module's name within the base model; empty for the model itself."""
    return name.removeprefix(_PREFIX) or _MODEL
