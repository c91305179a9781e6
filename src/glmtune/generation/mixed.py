"""Adapters of one base in one batch: each row has its own, or none.

Shapes: B rows of a pass, I inputs and O outputs of a linear, R ranks of all adapters together.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from glmtune.errors import UserError
from glmtune.generation.linears import AdaptedByRow
from glmtune.models.decoding import Projection
from glmtune.models.low_rank import has_lora, split_lora
from glmtune.ops.lora import LowRank

BASE = 0
"""The number that a row without an adapter has; adapters are numbered from 1."""
_Ranks = tuple[tuple[int, int], ...]
"""Number of an adapter and its rank in a linear, for each that adapts it."""


class MixedAdapters:
    """The updates of several adapters by linear, and which of them each row of a pass takes."""

    def __init__(self) -> None:
        self.count = 0
        self._updates: dict[nn.Module, dict[int, LowRank]] = {}
        self._owner_R: dict[_Ranks, Tensor] = {}
        self._is_taken: dict[_Ranks, Tensor] = {}

    def add(self, model: Any, name: str) -> None:
        """Remember the adapter that is on a model now; it may be taken off afterwards.

        Args:
            model: in PEFT's wrapping.
            name: what messages call the adapter.

        Raises:
            UserError: it is more than low-rank updates, which alone can be chosen by row.
        """
        from glmtune.adapters.biases import biases_in_effect  # imports PEFT

        fix = "merge it (glmtune merge) and serve the merged model as --base instead"
        if biases_in_effect(model):
            raise UserError(f"adapter {name}: has biases of its own; {fix}")
        self.count += 1
        for module in list(model.modules()):
            if not has_lora(module):
                continue
            base, updates = split_lora(module)
            if base is module:
                raise UserError(f"adapter {name}: is more than plain LoRA (DoRA?); {fix}")
            for update in updates:
                self._updates.setdefault(base, {})[self.count] = update

    def beside(self, linear: nn.Module, base: Projection, device: torch.device) -> Projection:
        """A linear of the model, read as `base`, with the updates of all adapters that have one."""
        updates = self._updates.get(linear)
        if not updates:
            return base
        ranks = tuple((number, len(update.a_RI)) for number, update in updates.items())
        if ranks not in self._owner_R:
            owners = [number for number, rank in ranks for _ in range(rank)]
            self._owner_R[ranks] = torch.tensor(owners, device=device)
        # Float32 as in PEFT, whatever type a file has.
        a_RI = torch.cat([update.a_RI.float() for update in updates.values()])
        b_OR = torch.cat([b.float() * scale for _, b, scale in updates.values()], 1)
        taken = partial(self._is_taken.__getitem__, ranks)
        return AdaptedByRow(base, a_RI.to(device), b_OR.contiguous().to(device), taken)

    def turn(self, adapter_B1: Tensor) -> None:
        """Let the next pass take these adapters, one a row: their numbers, 0 for the base."""
        for ranks, owner_R in self._owner_R.items():
            self._is_taken[ranks] = (adapter_B1 == owner_R).float()


def read_adapters(choices: Sequence[Any], base: Any) -> MixedAdapters:
    """Put adapters on a base one after another, and keep their updates.

    Args:
        choices: see `evaluation.answers.ModelChoice`: each has `attach` and `adapter_name`.
        base: a loaded model without an adapter; it is without one again afterwards.

    Raises:
        UserError: an adapter cannot be read, does not fit the base, or is more than plain LoRA.
    """
    found = MixedAdapters()
    for choice in choices:
        model = choice.attach(base)
        found.add(model, choice.adapter_name)
        model.unload()
    return found
