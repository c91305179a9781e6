"""What an adapter changes in a model: its weights, and its next-token distributions.

Shapes: O output rows of a linear, I inputs, R rank; A tokens of an answer, V vocabulary.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn import functional as F

from glmtune.models.likelihood import Probe
from glmtune.models.low_rank import split_lora
from glmtune.models.quantised import frozen_of
from glmtune.ops.linear import Dense
from glmtune.ops.lora import LowRank
from glmtune.ops.quantised import Quantised


@dataclass(frozen=True)
class LayerChange:
    """What an adapter adds to one linear."""

    module: str
    norm: float
    """``||scale * B @ A||`` (Frobenius)."""
    relative: float | None
    """The same relative to the weight's norm; None where the weight cannot be read."""


@dataclass(frozen=True)
class Divergence:
    """How the tuned model's next tokens differ from the base's, over the tokens of answers."""

    kl: float
    """KL(tuned || base), in nats a token."""
    other_tokens: float
    """Share of positions whose likeliest token differs."""
    base_loss: float
    tuned_loss: float


def measure_layers(model: PeftModel) -> list[LayerChange]:
    """The norm of what the adapter adds to each linear; only those that it changes."""
    changes = []
    for name, module in model.get_base_model().named_modules():
        linear, updates = split_lora(module)
        if updates and (norm := _norm_of(updates)):
            weight = _weight_norm(linear)
            relative = norm / weight if weight else None
            changes.append(LayerChange(name, norm, relative))
    return changes


@torch.inference_mode()
def measure_divergence(model: PeftModel, probes: Sequence[Probe]) -> Divergence:
    """Read each answer with and without the adapter, and compare the next-token distributions."""
    sums = torch.zeros(4, dtype=torch.float64)
    num_tokens = 0
    for probe in probes:
        with model.disable_adapter():
            base_AV = _answer_logits(model, probe)
        tuned_AV = _answer_logits(model, probe)
        targets_A = torch.tensor(probe.answer_ids, device=tuned_AV.device)
        log_base, log_tuned = base_AV.log_softmax(-1), tuned_AV.log_softmax(-1)
        numbers = (
            F.kl_div(log_base, log_tuned, reduction="sum", log_target=True),
            (base_AV.argmax(-1) != tuned_AV.argmax(-1)).sum(),
            F.nll_loss(log_base, targets_A, reduction="sum"),
            F.nll_loss(log_tuned, targets_A, reduction="sum"),
        )
        sums += torch.stack([number.double().cpu() for number in numbers])
        num_tokens += len(probe.answer_ids)
    return Divergence(*(sums / num_tokens).tolist())


def _answer_logits(model: PeftModel, probe: Probe) -> Tensor:
    """Logits of an answer's tokens, ``(A, V)`` float32."""
    ids = torch.tensor([probe.prompt_ids + probe.answer_ids], device=model.device)
    num_answer = len(probe.answer_ids)
    logits = model(input_ids=ids, use_cache=False, logits_to_keep=num_answer + 1).logits
    return logits[0, :-1].float()


def _norm_of(updates: Sequence[LowRank]) -> float:
    """Frobenius norm of ``scale * B @ A``, summed over updates, without that ``(O, I)`` matrix."""
    a_RI = torch.cat([update.a_RI for update in updates]).double()
    b_OR = torch.cat([update.b_OR * update.scale for update in updates], dim=1).double()
    square = ((b_OR.T @ b_OR) * (a_RI @ a_RI.T)).sum().item()
    return math.sqrt(max(0.0, square))


def _weight_norm(linear: nn.Module) -> float | None:
    frozen = frozen_of(linear)
    if isinstance(frozen, Dense):
        return frozen.weight_NK.float().norm().item()
    return frozen.weight(torch.float32).norm().item() if isinstance(frozen, Quantised) else None
