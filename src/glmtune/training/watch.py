"""What stops a run at once: a number that is not finite.

Losses, gradients and weights are checked in every step, before the optimiser changes anything. On a
GPU the host would have to wait for these numbers; so a flag on the device turns this and all later
steps into steps that change nothing, and the host reads the flag without waiting, once it arrives.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

# lora_A has no gradient before lora_B has changed, which warm-up delays by a step.
FIRST_STEPS = 4
# Float16's gradient scaler halves its scale whenever a gradient overflows; an overflow at this
# scale is a fault.
SMALLEST_SCALE = 1.0


class RandomState(NamedTuple):
    """The states of torch's generators, from which dropout on padded rows draws."""

    cpu: Tensor
    cuda: Tensor | None

    @classmethod
    def of(cls, device: torch.device) -> "RandomState":
        """The current states, without waiting for a GPU."""
        on_gpu = device.type == "cuda"
        return cls(torch.get_rng_state(), torch.cuda.get_rng_state(device) if on_gpu else None)

    def restore(self, device: torch.device) -> None:
        """Restore them, on the GPU too if there is one."""
        torch.set_rng_state(self.cpu)
        if self.cuda is not None and device.type == "cuda":
            torch.cuda.set_rng_state(self.cuda, device)


@dataclass(frozen=True)
class Fault:
    """The numbers of the first step with one that is not finite; it changed nothing."""

    step: int
    """The step, counted from 0, which is also the number of good steps before it."""
    loss: float
    grad_norm: float
    largest_weight: float
    random_state: RandomState
    """Random states of this process when the step began."""

    @property
    def what(self) -> str:
        """The number at fault: where one is not finite, those computed from it are not either."""
        if not math.isfinite(self.largest_weight):
            return "weight"
        return "gradient" if math.isfinite(self.loss) else "loss"

    @property
    def words(self) -> str:
        """The fault as text, such as "the loss is nan"."""
        if self.what == "loss":
            return f"the loss is {self.loss}"
        if self.what == "weight":
            return f"a weight of the adapter is {self.largest_weight}"
        return f"the norm of the gradient is {self.grad_norm}"


class NotFiniteError(Exception):
    """A step had a number that is not finite; every process raises this for the same step."""

    def __init__(self, fault: Fault):
        super().__init__(fault.words)
        self.fault = fault


class Watch:
    """Checks a run's steps, one after the other: `begin`, `see_loss`, `see_gradient`, each once.

    Args:
        weights: the trainable weights.
        optimizer: AdamW itself; a fused one where `at_once` is false and there is no scaler, since
            only fused AdamW can be made to skip a step by a flag on the device.
        scaler: gradient scaler of float16, or None.
        device: device of the weights.
        num_processes: processes that take the same steps.
        at_once: read the numbers within the step; by default where that costs no waiting.
    """

    def __init__(
        self,
        weights: Sequence[nn.Parameter],
        optimizer: Optimizer,
        scaler: Any,
        device: torch.device,
        num_processes: int = 1,
        at_once: bool | None = None,
    ):
        self._weights, self._optimizer, self._scaler = weights, optimizer, scaler
        self._device, self._num_processes = device, num_processes
        self._at_once = device.type != "cuda" if at_once is None else at_once
        self._first_step: int | None = None
        self._num_seen = 0
        self._random_states: dict[int, RandomState] = {}
        self._is_bad = self._was_bad = torch.zeros((), dtype=torch.bool, device=device)
        # Loss, gradient norm and largest weight of the last step or of the first bad one, and the
        # number of good steps.
        self._numbers_4 = torch.zeros(4, dtype=torch.float64, device=device)
        self._largest_grad_W: Tensor | None = torch.zeros(len(weights), device=device)
        self._in_flight: _Copy | None = None

    def begin(self, step: int) -> Tensor:
        """Note the start of a step, counted from 0; a step that was cut short may start again.

        Returns:
            The size of the largest weight, on the device.
        """
        if self._first_step is None:
            self._first_step = step
        self._was_bad = self._is_bad
        self._random_states[self._num_seen + 1] = RandomState.of(self._device)
        return nn.utils.get_total_norm([w.detach() for w in self._weights], norm_type=math.inf)

    def see_loss(self, loss: Tensor, largest_weight: Tensor) -> None:
        """Check a step's loss and weights, both over all processes, before gradients are clipped.

        If they are not finite, or an earlier step was bad, the scaler is given gradients that make
        it skip the step.
        """
        self._num_seen += 1
        self._loss, self._largest_weight = loss.detach(), largest_weight
        self._is_bad = self._was_bad | ~(self._loss + largest_weight).isfinite()
        grads = [weight.grad for weight in self._weights if weight.grad is not None]
        if self._scaler is not None and grads:
            torch._foreach_add_(grads, torch.where(self._is_bad, math.nan, 0.0))
        if self._largest_grad_W is not None and self._num_seen <= FIRST_STEPS:
            all_grads = [torch.zeros_like(w) if w.grad is None else w.grad for w in self._weights]
            norms_W = torch.stack(torch._foreach_norm(all_grads))
            self._largest_grad_W = torch.maximum(self._largest_grad_W, norms_W)

    def see_gradient(self, grad_norm: Tensor) -> None:
        """Check the norm of a step's gradient, before the optimiser's step.

        If anything is not finite, the optimiser's step changes neither weights nor moments, nor
        does any later one.

        Raises:
            NotFiniteError: this step or an earlier one, as soon as the host knows.
        """
        is_fault = ~grad_norm.isfinite()
        if self._scaler is not None:
            scale = self._scaler.scale(torch.ones((), device=self._device))
            is_fault = is_fault & (scale <= SMALLEST_SCALE)
        self._is_bad = self._is_bad | is_fault
        num_good = self._numbers_4[3] + ~self._is_bad
        now = [
            number.double() for number in (self._loss, grad_norm, self._largest_weight, num_good)
        ]
        self._numbers_4 = torch.where(self._was_bad, self._numbers_4, torch.stack(now))
        if self._at_once:
            self.sync()
            return
        if self._scaler is None:
            self._optimizer.found_inf = self._is_bad.float()  # type: ignore[attr-defined]
        self._look()

    def sync(self) -> None:
        """Wait for the device, and check every step so far.

        Raises:
            NotFiniteError: one of them was bad.
        """
        self._judge(self._numbers_4.tolist(), self._num_seen)

    def unmoved(self) -> list[int]:
        """Which weights, by index, had a gradient of exactly zero in all of the first steps.

        Reported once, when those steps are over. Waits for the device.
        """
        if self._num_seen < FIRST_STEPS or self._largest_grad_W is None:
            return []
        unmoved = (self._largest_grad_W == 0).nonzero().flatten().tolist()
        self._largest_grad_W = None
        return unmoved

    def _look(self) -> None:
        """Check an earlier step if its numbers have arrived, and start copying this one's."""
        if self._in_flight is not None:
            if self._num_processes > 1:
                self._in_flight.wait()  # so that all processes know it in the same step
            if not self._in_flight.has_come():
                return
            self._judge(self._in_flight.numbers_4.tolist(), self._in_flight.num_seen)
        self._in_flight = _Copy.of(self._numbers_4, self._num_seen)

    def _judge(self, numbers: list[float], num_seen: int) -> None:
        num_good = int(numbers[3])
        for number in [n for n in self._random_states if n <= num_good]:
            del self._random_states[number]
        if num_good < num_seen:
            assert self._first_step is not None
            loss, grad_norm, largest_weight, _ = numbers
            fault = Fault(
                self._first_step + num_good,
                loss,
                grad_norm,
                largest_weight,
                self._random_states[num_good + 1],
            )
            raise NotFiniteError(fault)


@dataclass(frozen=True)
class _Copy:
    """Numbers being copied to the host."""

    numbers_4: Tensor
    num_seen: int
    event: "torch.cuda.Event | None"

    @classmethod
    def of(cls, numbers_4: Tensor, num_seen: int) -> "_Copy":
        if not numbers_4.is_cuda:
            return cls(numbers_4, num_seen, None)
        on_host = torch.empty(4, dtype=numbers_4.dtype, pin_memory=True)
        on_host.copy_(numbers_4, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        return cls(on_host, num_seen, event)

    def wait(self) -> None:
        if self.event is not None:
            self.event.synchronize()

    def has_come(self) -> bool:
        return self.event is None or self.event.query()
