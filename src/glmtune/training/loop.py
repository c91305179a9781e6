"""Training: set-up, then one flat loop over Accelerate.

The base model is frozen and stays in its compute type; only the adapter's weights train, in
float32. A step computes on one global batch; its loss is the sum of the token losses divided by the
number of label tokens, however the rows are divided among passes and processes.
"""

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor

from glmtune.config.settings import TrainSettings
from glmtune.data.token_rows import TokenRows
from glmtune.errors import UserError, note
from glmtune.hardware import memory_gib
from glmtune.run_files import METRICS_FILE
from glmtune.runlog import RunLog
from glmtune.training.console import Pace, memory_advice, print_banner, print_summary
from glmtune.training.faults.crash import bundle_on_fault, versions
from glmtune.training.faults.loss_watch import check_course
from glmtune.training.first_step import check_first_step
from glmtune.training.general import of_this_set
from glmtune.training.held_out import answer_samples, evaluate_if_due, is_evaluation_due
from glmtune.training.interrupt import CutShort, StopRequest, undone_when_cut_short
from glmtune.training.launch import start_accelerator
from glmtune.training.launch_options import asks_for_shares
from glmtune.training.passes import Pass
from glmtune.training.peers import Peers
from glmtune.training.plan import pass_seed
from glmtune.training.prepare import prepare
from glmtune.training.processes import MemoryOfOneError, deal, memory_of_all, on_main
from glmtune.training.run import Run, build_pass, build_state
from glmtune.training.saving import checkpoints, run_folder
from glmtune.training.saving.run_folder import evaluations_at
from glmtune.training.saving.save import open_log, save
from glmtune.training.saving.status import kept_status
from glmtune.training.state import TrainingState


@dataclass(frozen=True)
class TrainResult:
    """The result of a run."""

    output_dir: Path
    global_step: int
    log_history: list[dict[str, Any]]
    interrupted: bool
    """Stopped by Ctrl+C or SIGTERM before the end; `checkpoint-N` of that step can be resumed."""
    is_done: bool
    """Whether all steps were taken, or as many as early_stopping asked for."""


AtEnd = Callable[[PeftModel, Any, TokenRows, np.ndarray], object]
"""Called with the trained model, its tokenizer, the rows, and which of them were held out."""


def train(settings: TrainSettings, at_end: AtEnd | None = None) -> TrainResult:
    """Train a LoRA adapter on tokenised rows into a run folder.

    Nothing is written until everything that can be checked beforehand has been checked.

    Args:
        settings: the run's settings.
        at_end: called in the first process when all steps are done and saved.

    Raises:
        UserError: run folder, data, base model or checkpoint do not fit the settings, the device's
            memory or the disk is too small, or the loss is no longer finite.
        KeyboardInterrupt: a signal came before the first step.
    """
    if asks_for_shares():
        settings = settings.model_copy(update={"shard_base": True})
    peers = Peers.of_launch(settings.dataset_path, str(Path(settings.output_dir, METRICS_FILE)))
    stop = StopRequest(max_hours=settings.max_hours)
    # torchrun sends SIGTERM once a process is gone: the others have to say which before they end.
    with stop, peers.watched(failed=stop.begin):
        peers.tell_restart()
        peers.compare("packages", versions())
        accelerator, dtype = start_accelerator(settings)
        stop.accelerator = accelerator
        ready = prepare(settings, accelerator, dtype)
        run, model = replace(ready.run, peers=peers), ready.model
        peers.compare("run", run.shared_facts())
        on_main(accelerator, lambda: run_folder.claim_output_dir(ready.recipe, ready.resume))
        try:
            result = fit(run, model, stop, ready.resume)
        except torch.OutOfMemoryError as error:
            raise UserError(f"{memory_advice(run)}; checkpoints are as they were") from error
        except MemoryOfOneError as error:
            raise UserError(f"{memory_advice(run)}; {peers.what_is_kept()}") from error
    if at_end is not None and accelerator.is_main_process and result.is_done:
        if run.is_sharded:
            note("no check-up (one process alone cannot gather the base); `glmtune check` makes it")
        else:
            at_end(model, ready.tokenizer, run.rows, run.eval_rows)
    return result


def fit(run: Run, model: PeftModel, stop: StopRequest, resume: Path | None = None) -> TrainResult:
    """Train to the last step, or until something ends the run earlier; write checkpoints.

    Args:
        run: the settings, whose `output_dir` exists, and the data.
        model: the base with an adapter attached, on the run's device.
        stop: says when to stop before the last step.
        resume: a whole checkpoint of the same run to resume from.

    Raises:
        UserError: the checkpoint does not fit, nothing can be written, the loss is no longer
            finite, or the device's memory is too small for a step; the steps before that one are
            saved.
    """
    settings, accelerator = run.settings, run.accelerator
    state = build_state(run, model)
    step_pass = build_pass(run, model, state.weights)
    torch.manual_seed(settings.seed + accelerator.process_index)
    history = checkpoints.load_checkpoint(resume, state, accelerator) if resume else []
    history = of_this_set(run, history)
    state.evaluations = evaluations_at(run, resume, state.global_step)
    if accelerator.is_main_process:
        print_banner(run, state)
    check_first_step(run, state, step_pass)

    with (
        kept_status(run, state) as end,
        bundle_on_fault(run, state),
        open_log(run, state, history) as log,
    ):
        stop.begin()
        run.peers.begin(partial(run_folder.what_is_kept, run, state))
        since_start = Pace(state)
        try:
            take_steps(run, state, step_pass, log, stop)
        except CutShort as cut:  # the state is that after the last whole step
            save(run, state, log)
            if cut.out_of_memory:
                evaluating = is_evaluation_due(run, state.global_step, log.history)
                kept = run_folder.what_is_kept(run, state)
                advice = on_main(accelerator, lambda: memory_advice(run, evaluating))
                raise UserError(
                    f"{advice}; {kept}, with --resume_anyway true where packs, layout or bits are "
                    "to be others"
                ) from cut
        has_ended = state.global_step >= run.max_steps or ends_early(run, state)
        is_done = bool(has_ended) and not is_evaluation_due(run, state.global_step, log.history)
        end(is_done)
    if accelerator.is_main_process:
        print_summary(run, state, log.history, since_start, is_done)
        if not is_done and not stop.by_signal and not since_start.tokens:
            note(f"max_hours ({settings.max_hours:g}) was over before the first step: raise it")
    interrupted = stop.by_signal and not is_done
    return TrainResult(
        Path(settings.output_dir), state.global_step, log.history, interrupted, is_done
    )


def ends_early(run: Run, state: TrainingState) -> str | None:
    """Why the run ends before its last step, its held-out loss being no better; or None."""
    return state.evaluations.why_no_better(run.settings.early_stopping)


def take_steps(
    run: Run, state: TrainingState, step_pass: Pass, log: RunLog, stop: StopRequest
) -> None:
    """The loop: step after step, with records, evaluations and checkpoints in between.

    Raises:
        CutShort: something ends the run before its last step.
        UserError, NotFiniteError: see `fit` and `train_step`.
    """
    # Before the first step, and where the earlier run stopped during an evaluation.
    evaluate_if_due(run, state, step_pass, log, stop)
    if not state.global_step:  # the base's own answers
        answer_samples(run, state)
    if state.global_step >= run.max_steps or ends_early(run, state):
        save(run, state, log)  # only complete the run folder
    pace = Pace(state)
    while state.global_step < run.max_steps and not ends_early(run, state):
        if stop.is_agreed():
            raise CutShort
        learning_rate = state.optimizer.param_groups[0]["lr"]
        grad_norm = train_step(run, state, step_pass, stop.is_wanted)
        log.advance()
        waits = (
            record_if_due(run, state, log, pace, learning_rate, grad_norm),
            evaluate_if_due(run, state, step_pass, log, stop),
            save_if_due(run, state, log),
        )
        if any(waits):  # measure the speed of steps alone
            pace = Pace(state)


def record_if_due(
    run: Run,
    state: TrainingState,
    log: RunLog,
    pace: Pace,
    learning_rate: float,
    grad_norm: Tensor,
) -> bool:
    """Log the first step, the last, and every `logging_steps`-th; return whether it was one.

    Here the host waits for the device.

    Raises:
        UserError: the losses so far show that the run should stop, see `check_course`.
    """
    step = state.global_step
    if step % run.settings.logging_steps and step not in (1, run.max_steps):
        return False
    record = {
        "loss": take_loss(run, state),
        "grad_norm": float(grad_norm),
        "learning_rate": learning_rate,
        "epoch": run.plan.epoch(step),
        "tokens_per_second": pace.tokens_per_second,
        "memory_gib": memory_gib(run.accelerator.device),
    }
    log.log(step, record)
    check_course(run, state, log)
    return True


def save_if_due(run: Run, state: TrainingState, log: RunLog) -> bool:
    """Save after the last step and where a checkpoint is due; return whether this was one."""
    if not run.is_saved(state.global_step) and not ends_early(run, state):
        return False
    save(run, state, log)
    return True


def train_step(
    run: Run,
    state: TrainingState,
    step_pass: Pass,
    wants_stop: Callable[[], bool] = lambda: False,
) -> Tensor:
    """One optimiser step on one global batch, without waiting for the device.

    Returns:
        The norm of the gradient before clipping, on the device.

    Raises:
        CutShort: memory is too small, here or in another process, or a request to stop came between
            two passes of the only process; nothing has changed.
        NotFiniteError: this step, or one shortly before it, was not applied; see `watch`.
    """
    settings, accelerator = run.settings, run.accelerator
    parts = run.plan.parts(state.global_step, accelerator.num_processes)
    row_ids = np.concatenate(parts)
    num_labels = int(run.rows.num_labels_R[row_ids].sum())
    mine = deal(parts, accelerator, run.is_sharded)
    largest_weight = state.watch.begin(state.global_step)
    loss = torch.zeros_like(state.loss_sum)
    sums = state.gradients
    sums.begin()

    def send() -> None:
        sums.send(torch.stack([loss, largest_weight]))

    with undone_when_cut_short(state), memory_of_all(accelerator, send, run.is_sharded):
        for place, (number, counts) in enumerate(mine, start=1):
            if number and accelerator.num_processes == 1 and wants_stop():
                raise CutShort
            run.peers.beat(state.global_step, parts[number])
            seed = pass_seed(settings.seed, state.global_step, number)
            with sums.during_last_pass() if place == len(mine) else nullcontext():
                # What does not count is divided by infinity: it adds 0 to loss and gradients.
                loss += step_pass.run(parts[number], num_labels if counts else math.inf, seed)
    state.loss_sum += loss
    state.watch.see_loss(*sums.receive())
    grad_norm = accelerator.clip_grad_norm_(state.weights, settings.max_grad_norm or math.inf)
    state.watch.see_gradient(grad_norm)
    state.optimizer.step()
    if not accelerator.optimizer_step_was_skipped:  # float16: the scale was too large this time
        state.scheduler.step()
    state.optimizer.zero_grad()
    state.global_step += 1
    state.num_loss_steps += 1
    state.num_tokens += int(run.rows.lengths_R[row_ids].sum())
    return grad_norm


def take_loss(run: Run, state: TrainingState) -> float:
    """The mean loss of the steps since the last call, over all processes.

    Raises:
        NotFiniteError: one of these steps was not applied.
    """
    state.watch.sync()
    total = run.accelerator.reduce(state.loss_sum, reduction="sum").item()
    loss = total / state.num_loss_steps
    state.loss_sum.zero_()
    state.num_loss_steps = 0
    return loss
