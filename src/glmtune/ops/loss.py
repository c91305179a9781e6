"""The loss: next-token cross entropy in float32.

Shapes: B rows of a batch, S tokens, V vocabulary; L learned tokens, H hidden, C a chunk of them.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.nn import functional as F

from glmtune.ops import CHUNK
from glmtune.ops.quantised import Quantised

IGNORED = -100  # a label that is not trained on: the prompt and the padding
# Learned tokens whose logits are held at a time: 0.25 GiB in bfloat16 for ChatGLM-6B.

SoftmaxLoss = Callable[[Tensor, Tensor], Tensor]


def next_token_loss(
    logits_BSV: Tensor, labels_BS: Tensor, num_items: Tensor | int | None = None
) -> Tensor:
    """Mean cross entropy of each token's logits against the label one place further on.

    Args:
        logits_BSV: any float type; the loss is taken in float32.
        labels_BS: not shifted; `IGNORED` where nothing is to be learned.
        num_items: what the summed loss is divided by, for batches that are one part of a larger
            step; the number of labels in this batch by default.

    Returns:
        A float32 scalar; 0 when a batch holds no label at all.
    """
    return shifted_loss(logits_BSV[:, :-1], labels_BS[:, 1:], num_items)


def shifted_loss(
    logits_BSV: Tensor, targets_BS: Tensor, num_items: Tensor | int | None = None
) -> Tensor:
    """As `next_token_loss`, of logits each against the label in its own column."""
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
    """Summed cross entropy of a frozen head's logits, of which it never holds more than a chunk.

    The gradient is taken on the way forward, chunk by chunk, in the place of the logits: the head
    itself needs none.

    Args:
        hidden_LH: outputs of the last norm, of the learned tokens alone.
        head: its weight ``(V, H)``, or the same in packed integers.
        targets_L: what follows each of them, or `IGNORED`.
        softmax_loss: does what `softmax_loss_` does, which is the default.

    Returns:
        A float32 scalar.
    """
    return _HeadLoss.apply(hidden_LH, head, targets_L, softmax_loss or softmax_loss_)


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
                    # At beta 0 it does not matter what the memory held before.
                    beta = 1.0 if ids.start else 0.0
                    torch.addmm(grad, logits[:, ids], weight, beta=beta, out=grad)
        ctx.save_for_backward(grad_LH)
        return total

    @staticmethod
    def backward(ctx, grad_total):
        (grad_LH,) = ctx.saved_tensors
        return grad_LH * grad_total.to(grad_LH.dtype), None, None, None
