"""The loss on held-out rows, at the configured steps."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from glmtune.data.eval_sets import HELD_OUT
from glmtune.runlog import RunLog
from glmtune.training.general import is_general_due, log_general
from glmtune.training.interrupt import CutShort, StopRequest, undone_when_cut_short
from glmtune.training.passes import Pass
from glmtune.training.plan import evaluation_parts
from glmtune.training.run import Run
from glmtune.training.state import TrainingState


def is_evaluation_due(run: Run, step: int, history: Sequence[Mapping[str, Any]]) -> bool:
    """Whether an evaluation is due after this step and has not been made yet."""
    return _is_loss_due(run, step, history) or is_general_due(run, step, history)


def _is_loss_due(run: Run, step: int, history: Sequence[Mapping[str, Any]]) -> bool:
    falls_due = step > 0 and (step % run.eval_steps == 0 or step == run.max_steps)
    if not falls_due or not len(run.eval_rows):  # called every step: skip the search of records
        return False
    return not any("eval_loss" in r and r["step"] == step for r in reversed(history))


def evaluate_if_due(
    run: Run, state: TrainingState, step_pass: Pass, log: RunLog, stop: StopRequest
) -> bool:
    """Evaluate if an evaluation is due, and return whether it was.

    Raises:
        CutShort: see `mean_loss`; or memory is too small for the evaluation.
    """
    if not is_evaluation_due(run, state.global_step, log.history):
        return False
    if _is_loss_due(run, state.global_step, log.history):
        _log_loss(run, state, step_pass, log, stop)
    if is_general_due(run, state.global_step, log.history):
        log_general(run, state, log, stop.is_wanted)
    return True


def _log_loss(
    run: Run, state: TrainingState, step_pass: Pass, log: RunLog, stop: StopRequest
) -> None:
    rows, size = run.rows, run.settings.per_device_eval_batch_size
    own = run.eval_rows[run.eval_rows < rows.num_own]
    sets = ({HELD_OUT: own} if len(own) else {}) | dict(rows.eval_sets)
    sums, nums = {}, {}
    with undone_when_cut_short(state, run.accelerator):
        for name, row_ids in sets.items():
            parts = evaluation_parts(rows.lengths_R, row_ids, run.forecast.pack_length, size)
            nums[name] = int(rows.num_labels_R[row_ids].sum())
            loss = mean_loss(step_pass, parts, nums[name], run.accelerator, stop.is_wanted)
            sums[name] = loss * nums[name]
    losses = {"eval_loss": sum(sums.values()) / sum(nums.values())}
    if len(sets) > 1:
        for name, total in sums.items():
            losses[f"eval_{name}_loss"] = total / nums[name]
    log.log(state.global_step, losses | {"epoch": run.plan.epoch(state.global_step)})


def mean_loss(
    step_pass: Pass,
    parts: Sequence[np.ndarray],
    num_labels: int,
    accelerator: Accelerator,
    wants_stop: Callable[[], bool] = lambda: False,
) -> float:
    """Mean loss per label token over some rows, which are divided among the processes.

    Args:
        step_pass: computes the loss of rows.
        parts: row numbers of each pass, see `evaluation_parts`.
        num_labels: label tokens of all these rows.
        accelerator: knows the device and the other processes.
        wants_stop: called before each pass.

    Raises:
        CutShort: a process was asked to stop before the end; then all raise it.
    """
    total = torch.zeros((), dtype=torch.float64, device=accelerator.device)
    is_cut = False
    for part in parts[accelerator.process_index :: accelerator.num_processes]:
        if is_cut := wants_stop():
            break
        total += step_pass.loss(part)
    sums = torch.stack((total, torch.full_like(total, float(is_cut))))
    loss_sum, num_cut = accelerator.reduce(sums, reduction="sum").tolist()
    if num_cut:
        raise CutShort
    return loss_sum / num_labels
