"""Before the first step: the heaviest pass must fit, and the fast path agree with the reference."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from glmtune.errors import UserError
from glmtune.models.quantised import unrounded_inputs
from glmtune.training.passes import PaddedPass, Pass
from glmtune.training.planning.forecast import rows_of_reference
from glmtune.training.run import Run
from glmtune.training.state import TrainingState

# Largest difference of the loss and of the gradient, relative to their size. The two paths round
# 16-bit numbers at different places; a row that saw another's tokens would differ far more.
TOLERANCES = {
    torch.float32: (1e-4, 1e-3),
    torch.bfloat16: (5e-3, 0.1),
    torch.float16: (5e-3, 0.05),
}
TO_REFERENCE = "set layout padded and tokens_per_step none"
"""The advice if a fast path is at fault; it overrides a recipe that gives packs a length."""
# Floor of the denominator, per label: at a small loss (a resumed run) the gradient is a difference
# of nearly equal numbers, and rounding dominates.
_LEAST_LOSS = 2.0


def check_first_step(run: Run, state: TrainingState, step_pass: Pass) -> None:
    """Check that the heaviest pass fits, and that a pass gives what its rows give alone.

    Raises:
        torch.OutOfMemoryError: the pass does not fit.
        UserError: the two results differ.
    """
    accelerator = run.accelerator
    dry_run_heaviest(step_pass, run.heaviest_part(), state.weights)
    if run.layout == "padded":
        return
    plain = PaddedPass(accelerator, state.model, run.rows, run.forecast.recompute)
    first = run.plan.parts(state.global_step, accelerator.num_processes)[0]
    at_once = rows_of_reference(run.forecast, int(run.rows.lengths_R[first].max()))
    off = check_agreement(step_pass, plain, first, state.weights, run.dtype, at_once)
    if accelerator.is_main_process and math.isfinite(off[0]):
        print(f"checked: a pass over {len(first)} rows, {run.layout} and row by row: loss and "
              f"gradient differ by {off[0]:.1e} and {off[1]:.1e}", flush=True)  # fmt: skip


def dry_run_heaviest(step_pass: Pass, row_ids: np.ndarray, weights: Sequence[nn.Parameter]) -> None:
    """Compute the heaviest pass of a run once, so that what does not fit fails in the first minute.

    This leaves the run unchanged: gradients are dropped, and random states restored.

    Args:
        step_pass: the pass that the run will use.
        row_ids: rows of its heaviest pass.
        weights: the trainable weights.

    Raises:
        torch.OutOfMemoryError: the pass does not fit.
    """
    with _same_random_numbers(weights[0].device):
        step_pass.run(row_ids, 1, 0)
    for weight in weights:
        weight.grad = None


@contextmanager
def _same_random_numbers(device: torch.device) -> Iterator[None]:
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield


def check_agreement(
    fast: Pass,
    plain: PaddedPass,
    row_ids: np.ndarray,
    weights: Sequence[nn.Parameter],
    dtype: torch.dtype,
    rows_at_once: int = 6,
) -> tuple[float, float]:
    """Compute one pass by both paths, without dropout; this leaves the run unchanged.

    Args:
        fast: the pass that the run will use.
        plain: the reference.
        row_ids: rows of a pass.
        weights: the trainable weights.
        dtype: the compute type, which sets the tolerance.
        rows_at_once: rows of a reference pass, whose logits take most memory.

    Returns:
        How much loss and gradient differ, relative to their size; NaN where the reference itself is
        not finite.

    Raises:
        UserError: they differ by more than the rounding of the compute type explains.
    """
    loss, grads = fast.gradients(row_ids, weights)
    wanted_loss, wanted = torch.zeros_like(loss), [torch.zeros_like(weight) for weight in weights]
    with unrounded_inputs(plain.model):  # or LLM.int8's rounding would dominate
        for part in np.array_split(row_ids, -(-len(row_ids) // rows_at_once)):
            part_loss, part_grads = plain.gradients(part, weights)
            wanted_loss += part_loss
            torch._foreach_add_(wanted, list(part_grads))
    torch._foreach_sub_(wanted, list(grads))
    difference = torch.nn.utils.get_total_norm(wanted)
    torch._foreach_add_(wanted, list(grads))
    size = torch.nn.utils.get_total_norm(wanted)
    if not (wanted_loss + size).isfinite():
        return math.nan, math.nan  # the first step will stop, and report the origin
    least_loss = _LEAST_LOSS * plain.rows.num_labels_R[row_ids].sum()
    off_loss = ((loss - wanted_loss).abs() / wanted_loss.clamp(min=least_loss)).item()
    off_grad = (difference / size.clamp(min=1e-12)).item()
    most_loss, most_grad = TOLERANCES[dtype]
    most_grad *= (wanted_loss / least_loss).clamp(min=1e-3, max=1.0).item() ** -0.5
    if not (off_loss <= most_loss and off_grad <= most_grad):  # not: NaN must not pass
        raise UserError(
            f"layout: one pass of {len(row_ids)} rows gives another result than its rows by "
            f"themselves (loss off by {off_loss:.2%}, gradient by {off_grad:.2%}), so nothing was "
            f"trained; {TO_REFERENCE}, and please report this"
        )
    return off_loss, off_grad
