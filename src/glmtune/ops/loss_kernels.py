"""The cross entropy of `ops.loss` as a Triton kernel: the gradient takes the logits' place.

Shapes: C supervised tokens of a chunk, V vocabulary.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from glmtune.ops.loss import IGNORED

BLOCK = 4096


@triton.jit
def _softmax_loss(logits, targets, losses, V, IGNORED: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    x = logits + row.to(tl.int64) * V
    target = tl.load(targets + row)
    column = tl.arange(0, BLOCK)
    if target == IGNORED:
        for start in range(0, V, BLOCK):
            zeros = tl.zeros([BLOCK], logits.dtype.element_ty)
            tl.store(x + start + column, zeros, start + column < V)
        tl.store(losses + row, 0.0)
    else:
        largest = tl.full([BLOCK], -1e30, tl.float32)
        total = tl.zeros([BLOCK], tl.float32)
        for start in range(0, V, BLOCK):
            logit = tl.load(x + start + column, start + column < V, -float("inf")).to(tl.float32)
            larger = tl.maximum(largest, logit)
            total = total * tl.exp(largest - larger) + tl.exp(logit - larger)
            largest = larger
        top = tl.max(largest, 0)
        lse = top + tl.log(tl.sum(total * tl.exp(largest - top), 0))
        tl.store(losses + row, lse - tl.load(x + target).to(tl.float32))
        tl.debug_barrier()  # the target's logit is read before it is overwritten
        for start in range(0, V, BLOCK):
            mask = start + column < V
            logit = tl.load(x + start + column, mask, -float("inf")).to(tl.float32)
            grad = tl.exp(logit - lse) - (start + column == target).to(tl.float32)
            tl.store(x + start + column, grad.to(logits.dtype.element_ty), mask)


def softmax_loss_(logits_CV: Tensor, targets_C: Tensor) -> Tensor:
    """Do what `ops.loss.softmax_loss_` does, in one kernel."""
    assert logits_CV.is_contiguous()
    losses_C = torch.empty(len(targets_C), device=logits_CV.device)
    _softmax_loss[(len(targets_C),)](
        logits_CV, targets_C, losses_C, logits_CV.shape[1], IGNORED, BLOCK, num_warps=8
    )
    return losses_C.sum()
