"""Gradients summed over processes: the adapter's alone cross between them.

Each process holds the whole frozen base. In the last pass of a step the gradients of the last
layers are ready first: they are sent, bucket by bucket, while the backward pass goes on to earlier
layers.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn

BUCKET_BYTES = 4 * 2**20
"""Large enough that latency does not count, small enough that the first is ready early."""


class GradientSums:
    """Gives every process the sum of all processes' gradients, as a loss over all rows has it.

    A step calls `begin`, runs its passes (the last one of this process within `during_last_pass`),
    then `send` and `receive`, whether or not this process had a pass. All processes send the same
    buckets in the same order.

    Args:
        weights: what trains, in the order of the forward pass.
        accelerator: knows the other processes.
    """

    def __init__(self, weights: Sequence[nn.Parameter], accelerator: Accelerator):
        self._is_alone = accelerator.num_processes == 1
        self._buckets: list[_Bucket] = []
        self._num_sent, self._is_last_pass = 0, False
        self._works: list[dist.Work] = []
        self._numbers: Tensor | None = None
        if self._is_alone:
            return
        for number, group in enumerate(_grouped(weights, BUCKET_BYTES)):
            self._buckets.append(_Bucket(group))
            for weight in group:
                weight.register_post_accumulate_grad_hook(partial(self._note, number))

    @property
    def num_bytes(self) -> int:
        """Bytes of gradients that a process contributes to a step."""
        return sum(bucket.flat.nbytes for bucket in self._buckets)

    @property
    def num_buckets(self) -> int:
        """How many messages a step's gradients are."""
        return len(self._buckets)

    def begin(self) -> None:
        """Start a step."""
        self._num_sent, self._works = 0, []
        for bucket in self._buckets:
            bucket.num_ready = 0

    @contextmanager
    def during_last_pass(self) -> Iterator[None]:
        """Send what is ready while the block, this process's last pass of a step, computes."""
        self._is_last_pass = True
        try:
            yield
        finally:
            self._is_last_pass = False

    def send(self, numbers: Tensor) -> None:
        """Send what has not been sent, and some numbers to be summed besides."""
        self._numbers = numbers
        if self._is_alone:
            return
        self._send_until(len(self._buckets))
        self._numbers = numbers.clone()
        self._works.append(dist.all_reduce(self._numbers, async_op=True))

    def receive(self) -> Tensor:
        """Wait for the sums, which become the weights' gradients; return those of the numbers.

        On a GPU the device waits, not the host.
        """
        for work in self._works:
            work.wait()
        for bucket in self._buckets:
            bucket.unpack()
        assert self._numbers is not None, "send comes first"
        return self._numbers

    def _note(self, number: int, _: Tensor) -> None:
        """Note that one more gradient of a bucket is ready."""
        if not self._is_last_pass:
            return
        if number < self._num_sent:
            raise RuntimeError("a gradient came after its bucket was sent")
        self._buckets[number].num_ready += 1
        ready = self._num_sent
        while ready < len(self._buckets) and self._buckets[ready].is_ready:
            ready += 1
        self._send_until(ready)

    def _send_until(self, number: int) -> None:
        for bucket in self._buckets[self._num_sent : number]:
            self._works.append(bucket.send())
        self._num_sent = number


class _Bucket:
    def __init__(self, weights: Sequence[nn.Parameter]):
        self._weights = weights
        self.flat = torch.cat([torch.zeros_like(weight).flatten() for weight in weights])
        self.num_ready = 0
        parts = self.flat.split([weight.numel() for weight in weights])
        self._views = [part.view_as(w) for part, w in zip(parts, weights, strict=True)]

    @property
    def is_ready(self) -> bool:
        return self.num_ready >= len(self._weights)

    def send(self) -> dist.Work:
        for weight, view in zip(self._weights, self._views, strict=True):
            view.zero_() if weight.grad is None else view.copy_(weight.grad)
        return dist.all_reduce(self.flat, async_op=True)

    def unpack(self) -> None:
        for weight, view in zip(self._weights, self._views, strict=True):
            weight.grad = view


def _grouped(weights: Sequence[nn.Parameter], num_bytes: int) -> list[list[nn.Parameter]]:
    """The weights from the last to the first, in groups that come to a size."""
    groups: list[list[nn.Parameter]] = [[]]
    size = 0
    for weight in reversed(weights):
        if size >= num_bytes:
            groups.append([])
            size = 0
        groups[-1].append(weight)
        size += weight.nbytes
    return groups
