"""Which rows each step trains on, and which of them share a pass.

The order of the rows is a pure function of seed and epoch, so a resumed run needs no saved position
in its data, and one process with batches of 6 sees the same rows as two with batches of 3.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from functools import lru_cache
from typing import ClassVar, Protocol

import numpy as np

from glmtune.config.settings import TrainSettings
from glmtune.data.packing import HasLengths, plan_packs

_STREAM_ORDER = 0
"""A random stream that must differ from that of `data.split`."""
# Captured passes round lengths up to 64 tokens, and supervised tokens to a quarter of the pack, so
# that few CUDA graphs cover all passes.
CAPTURED_LENGTHS, _CAPTURED_SHARES = 64, 4


def captured_supervised(num_tokens: int, num_supervised: int) -> int:
    """Round supervised tokens up to the next quarter of a pass's tokens, as its graph has them."""
    share = num_tokens // _CAPTURED_SHARES
    return share * -(-num_supervised // share)


@lru_cache(maxsize=2)
def epoch_order(num_rows: int, seed: int, epoch: int) -> np.ndarray:
    """The order of the rows in an epoch, a pure function of these three numbers."""
    order = np.random.default_rng([seed, _STREAM_ORDER, epoch]).permutation(num_rows)
    order.setflags(write=False)
    return order


def pass_seed(seed: int, step: int, number: int) -> int:
    """The seed of a pass's dropout: the same for these three numbers in every run."""
    return int(np.random.SeedSequence([seed, step, number]).generate_state(1)[0])


@dataclass(frozen=True)
class Plan(ABC):
    """Divides epochs into steps; every epoch has each row exactly once."""

    row_ids: np.ndarray
    """Row numbers to train on."""
    seed: int
    shuffle: bool
    lengths_R: np.ndarray
    """Tokens of every row of the data set."""

    def order(self, epoch: int) -> np.ndarray:
        """All row numbers in the order of an epoch."""
        if not self.shuffle:
            return self.row_ids
        return self.row_ids[epoch_order(len(self.row_ids), self.seed, epoch)]

    unit: ClassVar[str]
    """The unit in which steps are measured."""

    @property
    @abstractmethod
    def step_size(self) -> int:
        """Rows or tokens of a step; a resumed run must have the same."""

    @abstractmethod
    def steps_in(self, epoch: int) -> int:
        """Steps of an epoch, counted from 0."""

    @abstractmethod
    def passes_in(self, epoch: int) -> int:
        """Passes of an epoch, over all processes."""

    @abstractmethod
    def locate(self, step: int) -> tuple[int, int]:
        """The epoch of a step, counted from 0, and its place in that epoch."""

    @abstractmethod
    def parts(self, step: int, num_processes: int) -> list[np.ndarray]:
        """Row numbers of a step, a part for each pass of each process.

        Process i of n takes every n-th part, starting from part i. A part may be empty, and there
        may be fewer parts for one process than for another.
        """

    @abstractmethod
    def heaviest(self, num_steps: int, num_processes: int, padded: bool) -> np.ndarray:
        """Row numbers of the pass with most tokens among the first `num_steps` steps.

        Args:
            num_steps: at least one.
            num_processes: processes that share a step.
            padded: whether padding up to a pass's longest row counts as well.
        """

    def num_steps(self, num_epochs: float) -> int:
        """Steps of a number of epochs, which need not be whole."""
        whole, share = divmod(num_epochs, 1)
        steps = sum(self.steps_in(epoch) for epoch in range(int(whole)))
        return steps + int(np.ceil(share * self.steps_in(int(whole)))) if share else steps

    def epoch(self, step: int) -> float:
        """How many epochs a number of steps amounts to; not always a whole number."""
        epoch, place = self.locate(step)
        return epoch + (place / self.steps_in(epoch) if place else 0)


@dataclass(frozen=True)
class RowPlan(Plan):
    """Steps of a fixed number of rows; the last one of an epoch may have fewer."""

    unit = "rows"
    global_batch_size: int
    """Rows of one step, over all processes and accumulated passes."""
    batch_size: int
    """Most rows of one pass."""

    @property
    def step_size(self) -> int:
        """Rows of a step."""
        return self.global_batch_size

    def steps_in(self, epoch: int = 0) -> int:
        """The same in every epoch."""
        return -(-len(self.row_ids) // self.global_batch_size)

    def passes_in(self, epoch: int = 0) -> int:
        """The same in every epoch."""
        return -(-len(self.row_ids) // self.batch_size)

    def locate(self, step: int) -> tuple[int, int]:
        """See `Plan`."""
        return divmod(step, self.steps_in())

    def global_batch(self, step: int) -> np.ndarray:
        """Row numbers of a step, counted from 0."""
        epoch, place = self.locate(step)
        first = place * self.global_batch_size
        return self.order(epoch)[first : first + self.global_batch_size]

    def parts(self, step: int, num_processes: int) -> list[np.ndarray]:
        """See `Plan`; parts are as even as can be, and each process has the same number of them."""
        rows = self.global_batch(step)
        num_passes = -(-len(rows) // (self.batch_size * num_processes))
        return np.array_split(rows, num_passes * num_processes)

    def heaviest(self, num_steps: int, num_processes: int, padded: bool) -> np.ndarray:
        """See `Plan`; epochs are searched until none can have a heavier pass.

        The passes of an epoch are compared as arrays.
        """
        best, most = np.arange(0), 0
        longest = np.sort(self.lengths_R[self.row_ids])[-self.batch_size :]
        limit = longest[-1] * len(longest) if padded else longest.sum()
        for first in range(0, num_steps if self.shuffle else 1, self.steps_in()):
            if most == limit:
                break
            last = min(first + self.steps_in(), num_steps) - 1
            rows = self.order(first // self.steps_in())
            whole_PB = rows[: (last - first) * self.global_batch_size].reshape(-1, self.batch_size)
            for passes_PB in (whole_PB, *(part[None] for part in self.parts(last, num_processes))):
                lengths_PB = self.lengths_R[passes_PB]
                if not lengths_PB.size:
                    continue
                weight_P = lengths_PB.sum(1)
                if padded:
                    weight_P = lengths_PB.max(1) * lengths_PB.shape[1]
                if weight_P.max() > most:
                    best, most = passes_PB[weight_P.argmax()], weight_P.max()
        return best


@dataclass(frozen=True)
class PackPlan(Plan):
    """Steps of a fixed number of packs; see `data.packing`."""

    unit = "tokens"
    pack_length: int
    packs_per_step: int
    """Packs of one step, over all processes and accumulated passes."""
    _num_steps: dict[int, int] = field(default_factory=dict)
    """Steps of each epoch packed so far: the numbers of packs may differ by one or two."""
    _packs: dict[int, list[np.ndarray]] = field(default_factory=dict)

    @property
    def step_size(self) -> int:
        """Tokens of a step."""
        return self.pack_length * self.packs_per_step

    def packs(self, epoch: int) -> list[np.ndarray]:
        """Row numbers of each pack of an epoch."""
        if epoch not in self._packs:
            self._packs.clear()  # only one epoch is needed at a time
            self._packs[epoch] = plan_packs(self.lengths_R, self.order(epoch), self.pack_length)
        return self._packs[epoch]

    def steps_in(self, epoch: int) -> int:
        """See `Plan`; an epoch is packed only once to find out."""
        if epoch not in self._num_steps:
            self._num_steps[epoch] = -(-len(self.packs(epoch)) // self.packs_per_step)
        return self._num_steps[epoch]

    def passes_in(self, epoch: int) -> int:
        """Packs."""
        return len(self.packs(epoch))

    def locate(self, step: int) -> tuple[int, int]:
        """See `Plan`."""
        epoch = 0
        while step and step >= self.steps_in(epoch):
            step -= self.steps_in(epoch)
            epoch += 1
        return epoch, step

    def parts(self, step: int, num_processes: int) -> list[np.ndarray]:
        """See `Plan`."""
        epoch, place = self.locate(step)
        first = place * self.packs_per_step
        return self.packs(epoch)[first : first + self.packs_per_step]

    def heaviest(self, num_steps: int, num_processes: int, padded: bool) -> np.ndarray:
        """See `Plan`; all packs but an epoch's last are full, so one epoch is enough to look at."""
        packs = self.packs(0)[: num_steps * self.packs_per_step]
        return max(packs, key=lambda rows: self.lengths_R[rows].sum())


class Lengths(HasLengths, Protocol):
    """What plans and forecasts need to know about rows; `TokenRows` has it."""

    @property
    def num_labels_R(self) -> np.ndarray:
        """Supervised tokens of each row."""

    def split(self, eval_ratio: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Row numbers to train on and to evaluate on; see `data.split.split_rows`."""


def make_plan(
    settings: TrainSettings, rows: Lengths, pack_length: int | None, num_processes: int
) -> Plan:
    """Which rows make up which step.

    Args:
        settings: the run's settings.
        rows: every row, held-out ones included.
        pack_length: tokens of a pack; None where passes have a fixed number of rows.
        num_processes: processes that share a step.

    Raises:
        UserError: they cannot have equal parts of `passes_per_step`.
    """
    lengths_R = rows.lengths_R
    train_rows, _ = rows.split(settings.eval_ratio, settings.seed)
    seed = settings.seed if settings.data_seed is None else settings.data_seed
    shuffle = settings.train_sampling_strategy == "random"
    passes = settings.passes_of_all(num_processes)
    if pack_length:
        return PackPlan(train_rows, seed, shuffle, lengths_R, pack_length, passes)
    batch_size = settings.per_device_train_batch_size
    return RowPlan(train_rows, seed, shuffle, lengths_R, batch_size * passes, batch_size)


def evaluation_parts(
    lengths_R: np.ndarray, row_ids: np.ndarray, pack_length: int | None, batch_size: int
) -> list[np.ndarray]:
    """Row numbers of each evaluation pass.

    Args:
        lengths_R: tokens of every row.
        row_ids: the rows to evaluate on.
        pack_length: tokens of a pack; None where passes have a fixed number of rows.
        batch_size: rows of such a pass; rows of similar length share one, so that little is padded.
    """
    if pack_length:
        return plan_packs(lengths_R, row_ids, pack_length)
    by_length = row_ids[np.argsort(lengths_R[row_ids], kind="stable")]
    return [by_length[first : first + batch_size] for first in range(0, len(row_ids), batch_size)]


def is_saved(settings: TrainSettings, plan: Plan, step: int) -> bool:
    """Whether a checkpoint is due after a step, the last one of a run aside."""
    if settings.save_strategy == "epoch":
        return plan.locate(step)[1] == 0
    return step % settings.save_steps == 0


def count_saves(settings: TrainSettings, plan: Plan, after: int, last: int) -> int:
    """Checkpoints that a run writes after a step, the one of its last step among them."""
    if settings.save_strategy == "epoch":
        return max(0, math.ceil(plan.epoch(last)) - int(plan.epoch(after)))
    return max(0, -(-last // settings.save_steps) - after // settings.save_steps)


def count_steps(settings: TrainSettings, plan: Plan) -> int:
    """Optimiser steps of the whole run."""
    return (
        settings.max_steps if settings.max_steps > 0 else plan.num_steps(settings.num_train_epochs)
    )
