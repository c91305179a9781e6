"""How long the steps of a run take in several processes, one on each card: a model.

A step lasts as long as the passes of its heaviest process; then all of them sum their gradients, as
if none of these were sent during the last pass. docs/scaling.md states the assumptions one by one,
and compares the model with measured processes.

Shapes: B rows of a pass, P processes.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from glmtune.training.plan import Plan

MOST_STEPS = 5_000
"""Steps of an epoch that are looked at, beside its last one, which may have fewer passes."""
REQUEST_BYTES = 8
"""What processes sum once more in each step: whether one of them has been asked to stop."""
NUMBERS_BESIDE = 2
"""Numbers that are summed together with the gradients: the loss and the largest weight."""


@dataclass(frozen=True)
class Link:
    """What joins two processes."""

    bytes_per_second: float
    """In each direction, as a large message gets them."""
    latency: float
    """Seconds of a message however small."""


@dataclass(frozen=True)
class World:
    """The processes of a run, and what joins them."""

    gpus: int
    """Processes of a node, each with a card of its own unless `cores` says otherwise."""
    nodes: int
    inside: Link
    """Between two processes of a node."""
    between: Link
    """Between two nodes."""
    cores: float | None = None
    """Cores of a node that its processes compute on, one each; None for cards."""

    @property
    def num_ranks(self) -> int:
        """P."""
        return self.gpus * self.nodes

    @property
    def sharing(self) -> float:
        """How many processes share a core, where there are more of them than cores; else 1."""
        return max(1.0, self.gpus / self.cores) if self.cores else 1.0

    def sum_seconds(self, num_bytes: float) -> float:
        """Seconds in which all processes get the sum of an array of each of them.

        A ring: ``2 (P - 1)`` times each process sends a P-th of the array to the next one and
        waits for the slowest link (Patarasuk and Yuan, Bandwidth optimal all-reduce algorithms for
        clusters of workstations, 2009). Processes that share a core copy one after another.

        Args:
            num_bytes: of one process's array.
        """
        return 2 * self.gather_seconds(num_bytes)

    def gather_seconds(self, num_bytes: float, num_messages: int = 1) -> float:
        """Seconds in which all processes get an array of which each holds a P-th: half of a sum.

        Args:
            num_bytes: of the whole array.
            num_messages: parts in which it comes, one after another.
        """
        links = [self.inside] * (self.gpus > 1) + [self.between] * (self.nodes > 1)
        if not links:
            return 0.0
        rate = min(link.bytes_per_second for link in links)
        latency = num_messages * max(link.latency for link in links)
        turns = self.num_ranks - 1
        return turns * (num_bytes / self.num_ranks / rate + latency) * self.sharing


_NOTHING = Link(math.inf, 0.0)
ALONE = World(1, 1, _NOTHING, _NOTHING)
"""One process."""


@dataclass(frozen=True)
class PassCost:
    """How long a pass takes: in proportion to its tokens, and a part that every pass takes."""

    seconds_per_token: float
    fixed_tokens: float = 0.0
    """The fixed part, as tokens."""
    gathering: float = 0.0
    """Seconds in which the weights of a base that is shared out come. Each layer does while the
    one before it is computed, and yet they were as much longer on two H200 (docs/scaling.md)."""

    def seconds(self, num_tokens: float) -> float:
        """Seconds of a pass; none for a pass without rows, which is left out."""
        computing = (num_tokens + self.fixed_tokens) * self.seconds_per_token
        return computing + self.gathering if num_tokens else 0.0


TokensOf = Callable[[np.ndarray], float]
"""Tokens that a pass over some rows computes, padding or filler included."""


class EpochTime(NamedTuple):
    """An epoch's steps, and the seconds of their passes."""

    num_steps: int
    heaviest: float
    """Summed over the steps, of the process that takes longest in each."""
    mean: float
    """The same, of the mean process: what it would be if all had the same work."""


def epoch_time(
    plan: Plan, num_ranks: int, cost: PassCost, tokens_of: TokensOf, scale: float = 1.0
) -> EpochTime:
    """How long the passes of an epoch take, by the same parts that a run deals out.

    Args:
        plan: which rows make up which step.
        num_ranks: P.
        cost: of a pass in one process.
        tokens_of: the size of a pass.
        scale: how many times as many rows there are as in the plan.
    """

    def of_step(step: int) -> np.ndarray:
        seconds_P = np.zeros(num_ranks)
        for number, part in enumerate(plan.parts(step, num_ranks)):
            seconds_P[number % num_ranks] += cost.seconds(tokens_of(part))
        return np.array([seconds_P.max(), seconds_P.mean()])

    there = plan.steps_in(0)
    num_steps = max(1, round(there * scale))
    whole = [of_step(step) for step in range(min(there - 1, MOST_STEPS))]
    heaviest, mean = of_step(there - 1)
    if whole:
        heaviest, mean = np.mean(whole, axis=0) * (num_steps - 1) + [heaviest, mean]
    return EpochTime(num_steps, float(heaviest), float(mean))


class StepTime(NamedTuple):
    """The parts of a mean step, in seconds."""

    passes: float
    """What the heaviest process takes for its passes."""
    waiting: float
    """How much of that the mean process waits for the heaviest."""
    summing: float
    """What the sums take: of gradients, and of requests to stop."""

    @property
    def all(self) -> float:
        """The whole step."""
        return self.passes + self.summing


def step_time(epoch: EpochTime, world: World, num_weights: int) -> StepTime:
    """A mean step of an epoch.

    Args:
        epoch: see `epoch_time`.
        world: the processes.
        num_weights: numbers that are trained, whose gradients are float32.
    """
    passes = world.sharing * epoch.heaviest / epoch.num_steps
    waiting = passes - world.sharing * epoch.mean / epoch.num_steps
    summing = world.sum_seconds(gradient_bytes(num_weights)) + world.sum_seconds(REQUEST_BYTES)
    return StepTime(passes, waiting, summing)


def gradient_bytes(num_weights: int) -> int:
    """Bytes that a process adds to the sum of each step."""
    return 4 * (num_weights + NUMBERS_BESIDE)
