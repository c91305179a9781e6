"""The loss on held-out rows, at the configured steps.

Shapes: E rows that are evaluated on.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
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
from glmtune.training.processes import deal, memory_of_all
from glmtune.training.run import Run
from glmtune.training.state import TrainingState


def is_evaluation_due(run: Run, step: int, history: Sequence[Mapping[str, Any]]) -> bool:
    """Whether an evaluation is due after this step and has not been made yet."""
    return _is_loss_due(run, step, history) or is_general_due(run, step, history)


def _is_loss_due(run: Run, step: int, history: Sequence[Mapping[str, Any]]) -> bool:
    # Called every step: the search of records comes last.
    if not len(run.eval_rows) or not run.is_evaluated(step):
        return False
    return not any("eval_loss" in r and r["step"] == step for r in reversed(history))


def evaluate_if_due(
    run: Run, state: TrainingState, step_pass: Pass, log: RunLog, stop: StopRequest
) -> bool:
    """Evaluate if an evaluation is due, and return whether it was.

    Raises:
        CutShort: see `row_losses`; or memory is too small for the evaluation.
        UserError: the scores cannot be written.
    """
    step, folder = state.global_step, Path(run.settings.output_dir)
    if not is_evaluation_due(run, step, log.history):
        return False
    is_main = run.accelerator.is_main_process
    is_loss_due = _is_loss_due(run, step, log.history)
    if is_loss_due:
        state.evaluations.losses[step] = _log_losses(run, state, step_pass, log, stop)
        if is_main:
            state.evaluations.append_losses(step, folder)
    if is_general_due(run, step, log.history):
        scores = log_general(run, state, log, stop.is_wanted)
        state.evaluations.right[step] = scores.accuracy_N
        if is_main:
            state.evaluations.append_right(step, folder)
    if is_loss_due:
        answer_samples(run, state)
    return True


def answer_samples(run: Run, state: TrainingState) -> None:
    """Answer the questions that a run shows, where it has some; the first process does.

    Raises:
        UserError: the answers cannot be written.
    """
    if run.samples and run.accelerator.is_main_process:
        run.samples.answer(state)


def _log_losses(
    run: Run, state: TrainingState, step_pass: Pass, log: RunLog, stop: StopRequest
) -> np.ndarray:
    """The mean loss of each held-out row's supervised tokens; logs that of each set and of all."""
    rows, eval_rows = run.rows, run.eval_rows
    size = run.settings.per_device_eval_batch_size
    parts = evaluation_parts(rows.lengths_R, eval_rows, run.forecast.pack_length, size)
    with undone_when_cut_short(state):
        losses_E = row_losses(
            step_pass, parts, eval_rows, run.accelerator, stop.is_wanted, run.is_sharded
        )
    nums_E = rows.num_labels_R[eval_rows]
    own = eval_rows[eval_rows < rows.num_own]
    sets = ({HELD_OUT: own} if len(own) else {}) | dict(rows.eval_sets)
    record = {"eval_loss": float(losses_E.sum() / nums_E.sum())}
    if len(sets) > 1:
        for name, row_ids in sets.items():
            is_in_E = np.isin(eval_rows, row_ids)
            record[f"eval_{name}_loss"] = float(losses_E[is_in_E].sum() / nums_E[is_in_E].sum())
    log.log(state.global_step, record | {"epoch": run.plan.epoch(state.global_step)})
    return losses_E / np.maximum(nums_E, 1)


def row_losses(
    step_pass: Pass,
    parts: Sequence[np.ndarray],
    row_ids: np.ndarray,
    accelerator: Accelerator,
    wants_stop: Callable[[], bool] = lambda: False,
    in_step: bool = False,
) -> np.ndarray:
    """Summed loss over the labels of some rows, which are divided among the processes.

    Args:
        step_pass: computes the losses of rows.
        parts: row numbers of each pass, see `evaluation_parts`.
        row_ids: the rows of all passes, ascending.
        accelerator: knows the device and the other processes.
        wants_stop: called before each pass.
        in_step: whether all compute as many passes, see `deal`; then none stops before the end.

    Returns:
        The loss of each of `row_ids`, ``(E,)`` float64, in nats.

    Raises:
        CutShort: a process was asked to stop before the end; then all raise it.
        torch.OutOfMemoryError: a process has too little memory; then all raise it.
        MemoryOfOneError: this one has, and the others are waiting for it.
    """
    losses_E1 = torch.zeros(len(row_ids) + 1, dtype=torch.float64, device=accelerator.device)
    with memory_of_all(accelerator, in_step=in_step):
        for number, counts in deal(parts, accelerator, in_step):
            if not in_step and wants_stop():
                losses_E1[-1] = 1
                break
            found = step_pass.row_losses(parts[number])
            if counts:
                places = torch.from_numpy(np.searchsorted(row_ids, parts[number]))
                losses_E1[places.to(accelerator.device)] = found
    losses_E1 = accelerator.reduce(losses_E1, reduction="sum").cpu().numpy()
    if losses_E1[-1]:
        raise CutShort
    return losses_E1[:-1]
