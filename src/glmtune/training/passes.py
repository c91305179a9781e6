"""One pass, forward and backward, over given rows: padded, packed, or captured.

A pass adds its share to the gradients of the adapter's weights and returns its share of the loss,
without waiting for the device. `PaddedPass` is the reference, with transformers' and PEFT's own
modules on padded rows; the others compute the same on rows laid end to end.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from accelerate import Accelerator
from peft import PeftModel
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from glmtune.data.packing import Pack, lay_out
from glmtune.data.token_rows import TokenRows
from glmtune.hardware import capture_graph
from glmtune.models.family import layers_of
from glmtune.models.packed import Dropouts, PackedModel, PackTensors, base_of, move
from glmtune.training.batches import collate
from glmtune.training.plan import CAPTURED_LENGTHS, captured_supervised

LossAndGradients = tuple[Tensor, Sequence[Tensor]]


class Pass(ABC):
    """The interface of a pass, as the training loop uses it."""

    @abstractmethod
    def run(self, row_ids: np.ndarray, num_labels: float, seed: int) -> Tensor:
        """Forward and backward; adds to `grad` of the weights.

        Args:
            row_ids: rows of this pass; at least one.
            num_labels: label tokens of the whole step, by which the summed loss is divided;
                infinity for a pass that does not count.
            seed: seed of this pass's dropout.

        Returns:
            The pass's share of the step's loss, a float32 scalar on the device.
        """

    @abstractmethod
    def row_losses(self, row_ids: np.ndarray) -> Tensor:
        """Summed loss over the labels of each row, without dropout or gradient: float64."""

    @abstractmethod
    def gradients(self, row_ids: np.ndarray, weights: Sequence[nn.Parameter]) -> LossAndGradients:
        """Summed loss over the labels of rows and its gradients, without dropout."""


@dataclass(frozen=True)
class PaddedPass(Pass):
    """The reference: transformers' forward over rows padded to the longest."""

    accelerator: Accelerator
    model: PeftModel
    rows: TokenRows
    recompute: int = 0
    """How many layers, from the first, keep only their input and are recomputed."""

    def __post_init__(self) -> None:
        enable_recompute(base_of(self.model), self.recompute)

    def run(self, row_ids: np.ndarray, num_labels: float, seed: int) -> Tensor:
        """See `Pass`; dropout is a function of the seed, whichever process runs the pass."""
        self.model.train()
        device = self.accelerator.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            loss = self._forward(row_ids, num_labels)
            self.accelerator.backward(loss)
        return loss.detach()

    @torch.no_grad()
    def row_losses(self, row_ids: np.ndarray) -> Tensor:
        """See `Pass`."""
        self.model.eval()
        batch = collate(self.rows, row_ids)
        batch = {name: move(tensor, self.accelerator.device) for name, tensor in batch.items()}
        labels_BS = batch.pop("labels")
        with self.accelerator.autocast():
            logits_BSV = self.model(**batch, use_cache=False).logits
        losses_B = [
            F.cross_entropy(logits_SV[:-1].float(), labels_S[1:], reduction="sum")
            for logits_SV, labels_S in zip(logits_BSV, labels_BS, strict=True)
        ]
        return torch.stack(losses_B).double()

    def gradients(self, row_ids: np.ndarray, weights: Sequence[nn.Parameter]) -> LossAndGradients:
        """See `Pass`."""
        self.model.eval()
        for layer in layers_of(base_of(self.model)):
            # Set the layer's own flag only, not that of modules inside it, such as dropout:
            # transformers recomputes only layers in training mode.
            layer.training = True
        loss = self._forward(row_ids, 1)
        return loss.detach(), torch.autograd.grad(loss, weights)

    def _forward(self, row_ids: np.ndarray, num_labels: float) -> Tensor:
        batch = collate(self.rows, row_ids)
        batch = {name: move(tensor, self.accelerator.device) for name, tensor in batch.items()}
        with self.accelerator.autocast():
            return self.model(**batch, num_items_in_batch=num_labels).loss


def enable_recompute(model: PreTrainedModel, num_layers: int) -> None:
    """Recompute the first `num_layers` layers in the backward pass instead of keeping them."""
    if num_layers:
        # transformers 5.23 renamed this parameter, and warns of the name that 5.17 uses.
        names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
        enable = next(getattr(model, name) for name in names if hasattr(model, name))
        enable({"use_reentrant": False})
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    for layer in layers[num_layers:]:
        layer.gradient_checkpointing = False


@dataclass(frozen=True)
class PackedPass(Pass):
    """Rows laid end to end in a pack."""

    accelerator: Accelerator
    model: PackedModel
    rows: TokenRows
    dropout_rate: float
    pack_length: int | None
    """T of every pack; None for packs as short as their rows allow."""

    def run(self, row_ids: np.ndarray, num_labels: float, seed: int) -> Tensor:
        """See `Pass`; dropout is a function of the seed alone."""
        dropouts = self.dropouts(self.dropout_rate, seed)
        loss = self.model.loss(self.model.to_tensors(self.pack(row_ids)), dropouts) / num_labels
        self.accelerator.backward(loss)
        return loss.detach()

    def row_losses(self, row_ids: np.ndarray) -> Tensor:
        """See `Pass`."""
        pack = self.model.to_tensors(self.pack(row_ids))
        log_probs_L = self.model.log_probs(pack, self.dropouts(0.0)).double()
        counts = self.rows.num_labels_R[row_ids]
        row_L = torch.from_numpy(np.repeat(np.arange(len(row_ids)), counts)).to(log_probs_L.device)
        losses_R = log_probs_L.new_zeros(len(row_ids))
        return losses_R.index_add_(0, row_L, -log_probs_L[: len(row_L)])

    def gradients(self, row_ids: np.ndarray, weights: Sequence[nn.Parameter]) -> LossAndGradients:
        """See `Pass`."""
        pack = self.model.to_tensors(self.pack(row_ids))
        loss = self.model.loss(pack, self.dropouts(0.0))
        return loss.detach(), torch.autograd.grad(loss, weights)

    def dropouts(self, rate: float, seed: int = 0) -> Dropouts | None:
        """Dropout at a rate; None if this run has no dropout."""
        return self.model.dropouts(rate, seed) if self.dropout_rate else None

    def pack(self, row_ids: np.ndarray) -> Pack:
        """Lay rows end to end."""
        return lay_out(self.rows, row_ids, self.pack_length or self.length(row_ids))

    def length(self, row_ids: np.ndarray) -> int:
        """T of a pack that has no fixed length."""
        return int(self.rows.lengths_R[row_ids].sum())


@dataclass(frozen=True)
class _Capture:
    """A captured pass: its graph, and the tensors that it reads from and writes to."""

    graph: torch.cuda.CUDAGraph
    pack: PackTensors
    dropouts: Dropouts | None
    divisor: Tensor
    loss: Tensor


@dataclass(frozen=True)
class CapturedPass(PackedPass):
    """A few rows end to end in one launch, for passes so small that single launches would dominate.

    Each length of packs (a multiple of 64 tokens) is captured as a CUDA graph when it first occurs.
    """

    weights: Sequence[nn.Parameter]
    _captures: dict[tuple[int, int], _Capture] = field(default_factory=dict)
    _grads: list[Tensor] = field(default_factory=list)

    def run(self, row_ids: np.ndarray, num_labels: float, seed: int) -> Tensor:
        """See `Pass`."""
        pack = self.pack(row_ids)
        length = len(pack.input_ids_T)
        num_supervised = captured_supervised(length, len(pack.targets_L))
        tensors = self.model.to_tensors(pack, num_supervised)
        dropouts = self.dropouts(self.dropout_rate, seed)
        self._attach_grads()
        key = length, num_supervised
        if key not in self._captures:
            self._captures[key] = self._capture(tensors, dropouts)
        capture = self._captures[key]
        _copy(tensors, capture.pack)
        if dropouts is not None and capture.dropouts is not None:
            _copy(dropouts, capture.dropouts)
        capture.divisor.fill_(num_labels)
        capture.graph.replay()
        return capture.loss.clone()

    def length(self, row_ids: np.ndarray) -> int:
        """See `PackedPass`."""
        return CAPTURED_LENGTHS * -(-super().length(row_ids) // CAPTURED_LENGTHS)

    def _attach_grads(self) -> None:
        """Set the weights' `grad` to the tensors that the graphs add to."""
        if not self._grads:
            self._grads.extend(torch.zeros_like(weight) for weight in self.weights)
        if self.weights[0].grad is None:
            torch._foreach_zero_(self._grads)
            for weight, grad in zip(self.weights, self._grads, strict=True):
                weight.grad = grad

    def _capture(self, pack: PackTensors, dropouts: Dropouts | None) -> _Capture:
        divisor = torch.ones((), device=self.accelerator.device)

        def run() -> tuple[Tensor, Sequence[Tensor]]:
            loss = self.model.loss(pack, dropouts) / divisor
            scaler = self.accelerator.scaler
            scaled = loss if scaler is None else scaler.scale(loss)
            return loss.detach(), torch.autograd.grad(scaled, self.weights)

        def run_and_add() -> Tensor:
            loss, grads = run()
            torch._foreach_add_(self._grads, list(grads))
            return loss

        pool = next(iter(self._captures.values())).graph.pool() if self._captures else None
        graph, loss = capture_graph(run, 2, run_and_add, pool)
        return _Capture(graph, pack, dropouts, divisor, loss)


def _copy(source: tuple, target: tuple) -> None:
    for new, old in zip(source, target, strict=True):
        old.copy_(new) if isinstance(new, Tensor) else _copy(new, old)
