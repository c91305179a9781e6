"""Before the first step: the fast pass and the plain one must agree on the user's own model."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from glmtune.errors import UserError
from glmtune.training.passes import PaddedPass, Pass

# Largest difference of the loss and of the gradient, relative to their size. 16-bit numbers are
# rounded at other places in the two ways; a row that saw another's tokens would differ far more.
TOLERANCES = {
    torch.float32: (1e-4, 1e-3),
    torch.bfloat16: (5e-3, 0.1),
    torch.float16: (5e-3, 0.05),
}
_PLAIN_ROWS = 6


def check_agreement(
    fast: Pass,
    plain: PaddedPass,
    row_ids: np.ndarray,
    weights: Sequence[nn.Parameter],
    dtype: torch.dtype,
) -> tuple[float, float]:
    """Compute one pass both ways, without dropout; nothing of the run is changed by it.

    Args:
        fast: the pass that the run is to use.
        plain: the reference.
        row_ids: rows of a pass.
        weights: what trains.
        dtype: the compute type, which sets what may differ.

    Returns:
        How much loss and gradient differ, relative to their size; NaN where the reference itself is
        not finite.

    Raises:
        UserError: they differ by more than the rounding of the compute type explains.
    """
    loss, grads = fast.gradients(row_ids, weights)
    wanted_loss, wanted = torch.zeros_like(loss), [torch.zeros_like(weight) for weight in weights]
    for part in np.array_split(row_ids, -(-len(row_ids) // _PLAIN_ROWS)):
        part_loss, part_grads = plain.gradients(part, weights)
        wanted_loss += part_loss
        torch._foreach_add_(wanted, list(part_grads))
    torch._foreach_sub_(wanted, list(grads))
    difference = torch.nn.utils.get_total_norm(wanted)
    torch._foreach_add_(wanted, list(grads))
    size = torch.nn.utils.get_total_norm(wanted)
    if not (wanted_loss + size).isfinite():
        return math.nan, math.nan  # the first step will stop, and say where this comes from
    off_loss = ((loss - wanted_loss).abs() / wanted_loss.abs().clamp(min=1e-6)).item()
    off_grad = (difference / size.clamp(min=1e-12)).item()
    most_loss, most_grad = TOLERANCES[dtype]
    if not (off_loss <= most_loss and off_grad <= most_grad):  # not: NaN must not pass
        raise UserError(
            f"packing: one pack of {len(row_ids)} rows gives another result than its rows by "
            f"themselves (loss off by {off_loss:.2%}, gradient by {off_grad:.2%}), so nothing was "
            "trained; set packing false and exact_batch false, and please report this"
        )
    return off_loss, off_grad
