"""Training: a set-up, then one flat loop over Accelerate.

The base model is frozen and stays in its compute type; the adapter's weights are float32 and the
only ones that train. A step works on one global batch, and its loss is the sum of the losses of its
tokens over the number of its label tokens, however the rows are dealt out to passes and processes.
"""

import math
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from peft import PeftModel
from torch import Tensor

from glmtune.adapters import attach_lora, save_adapter
from glmtune.config import TrainConfig, write_recipe
from glmtune.data.dataset import check_data_card, load_dataset
from glmtune.errors import UserError
from glmtune.hardware import memory_gib
from glmtune.models.checkpoints import (
    base_name,
    check_pair,
    load_base_model,
    load_tokenizer,
    resolve_base,
)
from glmtune.runlog import PLOT_FILE, RunLog
from glmtune.training import checkpoints
from glmtune.training.batches import TokenRows, collate, micro_batches
from glmtune.training.checkpoints import RECIPE_FILE, STATE_FILE, TrainingState
from glmtune.training.console import Pace, print_banner, print_summary
from glmtune.training.interrupt import StopRequest
from glmtune.training.run import (
    Run,
    build_state,
    enable_recompute,
    start_accelerator,
    wants_recompute,
)


@dataclass(frozen=True)
class TrainResult:
    """What a run came to."""

    output_dir: Path
    global_step: int
    log_history: list[dict[str, Any]]
    interrupted: bool
    """Stopped by Ctrl+C or SIGTERM before the last step; `checkpoint-N` of that step goes on."""


def train(config: TrainConfig) -> TrainResult:
    """Train a LoRA adapter on tokenised rows, as the settings say, into a run folder.

    Raises:
        UserError: run folder, data, base model or checkpoint do not fit the settings, the device's
            memory is too small, or the loss is no longer finite.
    """
    accelerator, dtype = start_accelerator(config)
    resume = checkpoints.resume_point(config)
    base = resolve_base(config.chatglm_path, str(resume) if resume else None)
    tokenizer = load_tokenizer(base)
    dataset, card = load_dataset(config.dataset_path)
    check_data_card(card, tokenizer, config.dataset_path)
    rows = TokenRows.from_dataset(dataset)

    model = load_base_model(base, dtype=dtype, device=accelerator.device)
    check_pair(model.config, tokenizer)
    rows.check(model.config, config.dataset_path)
    torch.manual_seed(config.seed)
    peft_model = attach_lora(
        model,
        rank=config.lora_rank,
        alpha=config.lora_alpha,
        dropout=config.lora_dropout,
        targets=config.lora_target,
    )
    if wants_recompute(config, accelerator.device):
        enable_recompute(model)
    accelerator.wait_for_everyone()  # all have looked at the run folder before the first writes
    if accelerator.is_main_process:
        output_dir = checkpoints.claim_output_dir(config, resume)
        as_run = {
            "chatglm_path": base,
            "resume_from_checkpoint": None,
            "overwrite_output_dir": False,
        }
        write_recipe(config.model_copy(update=as_run), str(output_dir / RECIPE_FILE))
    try:
        return fit(config, accelerator, peft_model, rows, base_name(base), resume)
    except torch.OutOfMemoryError as error:
        raise UserError(
            "the GPU's memory is too small for this: halve per_device_train_batch_size "
            f"({config.per_device_train_batch_size}) and double gradient_accumulation_steps "
            f"({config.gradient_accumulation_steps}), or set gradient_checkpointing true"
        ) from error


def fit(
    config: TrainConfig,
    accelerator: Accelerator,
    model: PeftModel,
    rows: TokenRows,
    base: str,
    resume: Path | None = None,
) -> TrainResult:
    """The loop: step after step, with records, evaluations and checkpoints in between.

    Args:
        config: the settings; `output_dir` exists.
        accelerator: from `start_accelerator`.
        model: the base with an adapter attached, on the accelerator's device.
        rows: all rows, of which `eval_ratio` holds some out.
        base: what the adapter calls its base.
        resume: a whole checkpoint to go on from.

    Raises:
        UserError: the checkpoint is of another recipe, or the loss is no longer finite.
    """
    run = Run.of(config, accelerator, rows, model, base)
    state = build_state(run, model)
    torch.manual_seed(config.seed + accelerator.process_index)  # to each process its own dropout
    history: list[dict[str, Any]] = []
    if resume:
        history = checkpoints.load_checkpoint(resume, state, run.identity, accelerator)
    if accelerator.is_main_process:
        print_banner(run, state)

    interrupted = False
    with open_log(run, state, history) as log, StopRequest(accelerator) as stop:
        pace, since_start = Pace(state), Pace(state)
        if state.global_step >= run.max_steps:  # nothing to do but to leave a whole run folder
            save(run, state, log)
        while state.global_step < run.max_steps and not interrupted:
            learning_rate = state.optimizer.param_groups[0]["lr"]
            grad_norm = train_step(run, state)
            log.advance()
            step, is_last = state.global_step, state.global_step == run.max_steps
            interrupted = stop.is_agreed() and not is_last
            if step % config.logging_steps == 0 or step == 1 or is_last:
                record = {
                    "loss": take_loss(run, state),  # here the host waits for the device
                    "grad_norm": float(grad_norm),
                    "learning_rate": learning_rate,
                    "epoch": run.epoch(step),
                    "tokens_per_second": pace.tokens_per_second,
                    "memory_gib": memory_gib(accelerator.device),
                }
                log.log(step, record)
                pace = Pace(state)
            if len(run.eval_rows) and (step % run.eval_steps == 0 or is_last):
                log.log(step, {"eval_loss": evaluate(run, state), "epoch": run.epoch(step)})
                pace = Pace(state)
            if step % config.save_steps == 0 or is_last or interrupted:
                save(run, state, log)
                pace = Pace(state)
    if accelerator.is_main_process:
        print_summary(run, state, log.history, since_start, interrupted)
    return TrainResult(Path(config.output_dir), state.global_step, log.history, interrupted)


def train_step(run: Run, state: TrainingState) -> Tensor:
    """One optimiser step on one global batch, without waiting for the device.

    Returns:
        The norm of the gradient before clipping, on the device.
    """
    config, accelerator = run.config, run.accelerator
    row_ids = run.plan.global_batch(state.global_step)
    num_labels = int(run.rows.num_labels_R[row_ids].sum())
    batch_size, num_processes = config.per_device_train_batch_size, accelerator.num_processes
    passes = micro_batches(row_ids, batch_size, accelerator.process_index, num_processes)
    state.model.train()
    for number, rows_of_pass in enumerate(passes, start=1):
        batch = to_device(collate(run.rows, rows_of_pass, run.pad_token_id), accelerator.device)
        # The processes exchange gradients in the last pass only, and take the mean of them: the
        # factor makes it the sum that a loss over the global batch asks for.
        with nullcontext() if number == len(passes) else accelerator.no_sync(state.model):
            loss = state.model(**batch, num_items_in_batch=num_labels).loss
            accelerator.backward(loss * num_processes)
        state.loss_sum += loss.detach()
    grad_norm = accelerator.clip_grad_norm_(state.weights, config.max_grad_norm or math.inf)
    state.optimizer.step()
    if not accelerator.optimizer_step_was_skipped:  # float16: the scale was too large this time
        state.scheduler.step()
    state.optimizer.zero_grad()
    state.global_step += 1
    state.num_loss_steps += 1
    state.num_tokens += int(run.rows.lengths_R[row_ids].sum())
    return grad_norm


def take_loss(run: Run, state: TrainingState) -> float:
    """The mean loss of the steps since it was last taken, over all processes.

    Raises:
        UserError: it is not finite.
    """
    total = run.accelerator.reduce(state.loss_sum, reduction="sum").item()
    loss = total / state.num_loss_steps
    if not math.isfinite(loss):
        raise _diverged(run, state, f"the loss is {loss}")
    state.loss_sum.zero_()
    state.num_loss_steps = 0
    return loss


@torch.no_grad()
def evaluate(run: Run, state: TrainingState) -> float:
    """Mean loss per label token over the held-out rows, which the processes share."""
    accelerator = run.accelerator
    model = accelerator.unwrap_model(state.model).eval()
    # Rows of like length together, so that little is padded.
    by_length = run.eval_rows[np.argsort(run.rows.lengths_R[run.eval_rows], kind="stable")]
    batch_size, rank = run.config.per_device_eval_batch_size, accelerator.process_index
    total = torch.zeros((), dtype=torch.float64, device=accelerator.device)
    for start in range(rank * batch_size, len(by_length), accelerator.num_processes * batch_size):
        part = collate(run.rows, by_length[start : start + batch_size], run.pad_token_id)
        total += model(**to_device(part, accelerator.device), num_items_in_batch=1).loss
    num_labels = run.rows.num_labels_R[run.eval_rows].sum()
    return accelerator.reduce(total, reduction="sum").item() / int(num_labels)


def save(run: Run, state: TrainingState, log: RunLog) -> None:
    """Write a checkpoint, and at the root of the run folder its adapter, state and curve.

    Raises:
        UserError: the weights are not finite (nothing is written), or the folder cannot be.
    """
    config, accelerator, output_dir = run.config, run.accelerator, Path(run.config.output_dir)
    if not all(bool(weight.isfinite().all()) for weight in state.weights):
        raise _diverged(run, state, "the weights are no longer finite")
    trainer_state = checkpoints.describe(
        state,
        log.history,
        run.identity,
        epoch=run.epoch(state.global_step),
        max_steps=run.max_steps,
        num_train_epochs=math.ceil(run.epoch(run.max_steps)),
        train_batch_size=config.per_device_train_batch_size,
        logging_steps=config.logging_steps,
        eval_steps=run.eval_steps,
        save_steps=config.save_steps,
    )
    checkpoints.save_checkpoint(output_dir, state, trainer_state, accelerator, run.base_name)
    if accelerator.is_main_process:
        checkpoints.rotate_checkpoints(output_dir, config.save_total_limit, state.global_step)
        save_adapter(accelerator.unwrap_model(state.model), output_dir, run.base_name)
        checkpoints.write_json(trainer_state, output_dir / STATE_FILE)
        log.plot_loss(output_dir / PLOT_FILE)


def to_device(batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Move a batch without waiting: from pinned memory a copy goes on beside the work."""
    if device.type == "cuda":
        batch = {name: tensor.pin_memory() for name, tensor in batch.items()}
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


def open_log(run: Run, state: TrainingState, history: list[dict[str, Any]]) -> RunLog:
    """The run's log, going on after the records of earlier steps."""
    config = run.config
    return RunLog(
        config.output_dir,
        run.max_steps,
        report_to=config.report_to,
        disable_tqdm=config.disable_tqdm,
        first_step=state.global_step,
        history=history,
        enabled=run.accelerator.is_main_process,
    )


def _diverged(run: Run, state: TrainingState, what: str) -> UserError:
    return UserError(
        f"step {state.global_step}: {what}; lower learning_rate ({run.config.learning_rate}) or "
        "lengthen warmup_steps, and leave fp16 out; earlier checkpoints are as they were"
    )
