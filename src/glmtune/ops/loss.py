"""The loss: next-token cross entropy in float32.

Shapes: B rows of a batch, S tokens, V vocabulary; L supervised tokens, H hidden, C a chunk of them.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.nn import functional as F

from glmtune.ops import CHUNK
from glmtune.ops.quantised import Quantised

IGNORED = -100  # a label that is not trained on: the prompt and the padding

SoftmaxLoss = Callable[[Tensor, Tensor], Tensor]


def next_token_loss(
    logits_BSV: Tensor, labels_BS: Tensor, num_items: Tensor | int | None = None
) -> Tensor:
    """Mean cross entropy of each token's logits against the label one place further on.

    Args:
        logits_BSV: any float type; the loss is taken in float32.
        labels_BS: not shifted; `IGNORED` where a token is not supervised.
        num_items: divisor of the summed loss, for a micro-batch of a larger step; by default the
            number of labels in this batch.

    Returns:
        A float32 scalar; 0 when a batch holds no label at all.
    """
    return shifted_loss(logits_BSV[:, :-1], labels_BS[:, 1:], num_items)


def shifted_loss(
    logits_BSV: Tensor, targets_BS: Tensor, num_items: Tensor | int | None = None
) -> Tensor:
    """Like `next_token_loss`, but each token's logits meet the label in their own column."""
    targets = targets_BS.flatten()
    logits = logits_BSV.flatten(0, 1).float()
    total = F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")
    count = (targets != IGNORED).sum().clamp(min=1) if num_items is None else num_items
    return total / count


def head_loss(
    hidden_LH: Tensor,
    head: Tensor | Quantised,
    targets_L: Tensor,
    softmax_loss: SoftmaxLoss | None = None,
) -> Tensor:
    """Summed cross entropy of a frozen head's logits, never holding more than a chunk of them.

    The gradient is computed in the forward pass, chunk by chunk, and overwrites the logits: the
    head itself needs no gradient.

    Args:
        hidden_LH: outputs of the last norm for the supervised tokens only.
        head: the head's weight ``(V, H)``, or the same quantised.
        targets_L: the token that follows each of them, or `IGNORED`.
        softmax_loss: an equivalent of `softmax_loss_`, the default.

    Returns:
        A float32 scalar.
    """
    return _HeadLoss.apply(hidden_LH, head, targets_L, softmax_loss or softmax_loss_)


@torch.no_grad()
def head_log_probs(hidden_LH: Tensor, head: Tensor | Quantised, targets_L: Tensor) -> Tensor:
    """Log-probability of each target under a frozen head, in chunks like `head_loss`.

    Args:
        hidden_LH: outputs of the last norm for the supervised tokens only.
        head: the head's weight ``(V, H)``, or the same quantised.
        targets_L: the token that follows each of them, or `IGNORED`.

    Returns:
        ``(L,)`` float32; 0 where a target is ignored.
    """
    found = [hidden_LH.new_empty(0, dtype=torch.float32)]
    for start in range(0, len(targets_L), CHUNK):
        hidden_CH, targets_C = (part[start : start + CHUNK] for part in (hidden_LH, targets_L))
        pieces = (hidden_CH @ weight.T for _, weight in _pieces(head, hidden_LH.dtype))
        logits_CV = torch.cat(list(pieces), dim=1).float()
        found.append(-F.cross_entropy(logits_CV, targets_C, ignore_index=IGNORED, reduction="none"))
    return torch.cat(found)


def softmax_loss_(logits_CV: Tensor, targets_C: Tensor) -> Tensor:
    """Summed cross entropy in float32; the logits are overwritten with its gradient."""
    logits = logits_CV.detach().float().requires_grad_()
    with torch.enable_grad():
        total = F.cross_entropy(logits, targets_C, ignore_index=IGNORED, reduction="sum")
        logits_CV.copy_(torch.autograd.grad(total, logits)[0])
    return total.detach()


def _pieces(head: Tensor | Quantised, dtype: torch.dtype) -> Iterable[tuple[slice, Tensor]]:
    return [(slice(None), head)] if isinstance(head, Tensor) else head.pieces(dtype)


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_LH, head, targets_L, softmax_loss):
        total = torch.zeros((), device=hidden_LH.device)
        grad_LH = torch.empty_like(hidden_LH) if ctx.needs_input_grad[0] else None
        num_ids = len(head if isinstance(head, Tensor) else head.parts[0])
        logits_CV = hidden_LH.new_empty(min(CHUNK, len(targets_L)), num_ids)
        for start in range(0, len(targets_L), CHUNK):
            chunk = slice(start, start + CHUNK)
            logits = logits_CV[: len(targets_L[chunk])]
            for ids, weight in _pieces(head, logits.dtype):
                torch.mm(hidden_LH[chunk], weight.T, out=logits[:, ids])
            total += softmax_loss(logits, targets_L[chunk])
            if grad_LH is not None:
                grad = grad_LH[chunk]
                for ids, weight in _pieces(head, logits.dtype):
                    # With beta 0, the previous content of the memory does not matter.
                    beta = 1.0 if ids.start else 0.0
                    torch.addmm(grad, logits[:, ids], weight, beta=beta, out=grad)
        ctx.save_for_backward(grad_LH)
        return total

    @staticmethod
    def backward(ctx, grad_total):
        (grad_LH,) = ctx.saved_tensors
        return grad_LH * grad_total.to(grad_LH.dtype), None, None, None
