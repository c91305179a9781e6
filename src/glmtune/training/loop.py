"""Training: a set-up, then one flat loop over Accelerate.

The base model is frozen and stays in its compute type; the adapter's weights are float32 and the
only ones that train. A step works on one global batch, and its loss is the sum of the losses of its
tokens over the number of its label tokens, however the rows are dealt out to passes and processes.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from peft import PeftModel
from torch import Tensor, nn

from glmtune.adapters import save_adapter
from glmtune.config import TrainConfig, write_recipe
from glmtune.data.dataset import check_data_card, load_dataset
from glmtune.data.token_rows import TokenRows
from glmtune.errors import UserError
from glmtune.hardware import memory_gib
from glmtune.models.checkpoints import (
    base_name,
    check_pair,
    load_base_model,
    load_config,
    load_tokenizer,
    resolve_base,
)
from glmtune.runlog import PLOT_FILE, RunLog
from glmtune.training import checkpoints
from glmtune.training.advice import advise, check_fit, print_forecast
from glmtune.training.check import prove
from glmtune.training.checkpoints import RECIPE_FILE, STATE_FILE, TrainingState
from glmtune.training.console import Pace, print_banner, print_summary
from glmtune.training.forecast import foresee_on
from glmtune.training.interrupt import StopRequest
from glmtune.training.passes import Pass
from glmtune.training.run import (
    Run,
    adapt,
    build_pass,
    build_state,
    check_fp8,
    layout_as_run,
    start_accelerator,
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
    if config.base_dtype == "fp8":
        check_fp8(accelerator.device)
    resume = checkpoints.resume_point(config)
    base = resolve_base(config.chatglm_path, str(resume) if resume else None)
    tokenizer = load_tokenizer(base)
    dataset, card = load_dataset(config.dataset_path)
    check_data_card(card, tokenizer, config.dataset_path)
    rows = TokenRows.from_dataset(dataset)

    foresee = foresee_on(accelerator, load_config(base), dtype, rows)
    foreseen = foresee(config)
    if accelerator.is_main_process:
        print_forecast(foreseen, config, base_name(base))
    check_fit(foreseen, config, foresee)

    model = load_base_model(
        base,
        dtype=dtype,
        device=accelerator.device,
        bits=config.bits,
        quantize_head=config.quantize_head,
    )
    check_pair(model.config, tokenizer)
    rows.check(model.config, config.dataset_path)
    torch.manual_seed(config.seed)
    peft_model = adapt(model, config)
    accelerator.wait_for_everyone()  # all have looked at the run folder before the first writes
    if accelerator.is_main_process:
        output_dir = checkpoints.claim_output_dir(config, resume)
        as_run = {
            "chatglm_path": base,
            "resume_from_checkpoint": None,
            "overwrite_output_dir": False,
            **layout_as_run(foreseen),
        }
        write_recipe(config.model_copy(update=as_run), str(output_dir / RECIPE_FILE))
    try:
        return fit(config, accelerator, peft_model, rows, base_name(base), resume)
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"the device's memory is too small for this: {advise(config, foresee)}"
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
    step_pass = build_pass(run, model, state.weights)
    torch.manual_seed(config.seed + accelerator.process_index)  # to each process its own dropout
    history: list[dict[str, Any]] = []
    if resume:
        history = checkpoints.load_checkpoint(resume, state, run.identity, accelerator)
    if accelerator.is_main_process:
        print_banner(run, state)
    prove(run, state, step_pass)

    interrupted = False
    with open_log(run, state, history) as log, StopRequest(accelerator) as stop:
        pace, since_start = Pace(state), Pace(state)
        if state.global_step >= run.max_steps:  # nothing to do but to leave a whole run folder
            save(run, state, log)
        while state.global_step < run.max_steps and not interrupted:
            learning_rate = state.optimizer.param_groups[0]["lr"]
            grad_norm = train_step(run, state, step_pass)
            log.advance()
            step, is_last = state.global_step, state.global_step == run.max_steps
            interrupted = stop.is_agreed() and not is_last
            if step % config.logging_steps == 0 or step == 1 or is_last:
                record = {
                    "loss": take_loss(run, state),  # here the host waits for the device
                    "grad_norm": float(grad_norm),
                    "learning_rate": learning_rate,
                    "epoch": run.plan.epoch(step),
                    "tokens_per_second": pace.tokens_per_second,
                    "memory_gib": memory_gib(accelerator.device),
                }
                log.log(step, record)
                pace = Pace(state)
            if len(run.eval_rows) and (step % run.eval_steps == 0 or is_last):
                log.log(
                    step, {"eval_loss": evaluate(run, step_pass), "epoch": run.plan.epoch(step)}
                )
                pace = Pace(state)
            if step % config.save_steps == 0 or is_last or interrupted:
                save(run, state, log)
                pace = Pace(state)
    if accelerator.is_main_process:
        print_summary(run, state, log.history, since_start, interrupted)
    return TrainResult(Path(config.output_dir), state.global_step, log.history, interrupted)


def train_step(run: Run, state: TrainingState, step_pass: Pass) -> Tensor:
    """One optimiser step on one global batch, without waiting for the device.

    Returns:
        The norm of the gradient before clipping, on the device.
    """
    config, accelerator = run.config, run.accelerator
    parts = run.plan.parts(state.global_step, accelerator.num_processes)
    row_ids = np.concatenate(parts)
    num_labels = int(run.rows.num_labels_R[row_ids].sum())
    for number, part in enumerate(parts):
        if number % accelerator.num_processes == accelerator.process_index and len(part):
            seed = pass_seed(config.seed, state.global_step, number)
            state.loss_sum += step_pass.run(part, num_labels, seed)
    sum_gradients(state.weights, accelerator)
    grad_norm = accelerator.clip_grad_norm_(state.weights, config.max_grad_norm or math.inf)
    state.optimizer.step()
    if not accelerator.optimizer_step_was_skipped:  # float16: the scale was too large this time
        state.scheduler.step()
    state.optimizer.zero_grad()
    state.global_step += 1
    state.num_loss_steps += 1
    state.num_tokens += int(run.rows.lengths_R[row_ids].sum())
    return grad_norm


def pass_seed(seed: int, step: int, number: int) -> int:
    """What a pass draws its dropout from: the same in every run of these three numbers."""
    return int(np.random.SeedSequence([seed, step, number]).generate_state(1)[0])


def sum_gradients(weights: list[nn.Parameter], accelerator: Accelerator) -> None:
    """Give every process the sum of all processes' gradients, as a loss over all rows asks for."""
    if accelerator.num_processes == 1:
        return
    grads = [torch.zeros_like(w) if w.grad is None else w.grad for w in weights]
    flat = accelerator.reduce(torch.cat([grad.flatten() for grad in grads]), reduction="sum")
    for weight, grad in zip(weights, flat.split([w.numel() for w in weights]), strict=True):
        weight.grad = grad.view_as(weight)


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


def evaluate(run: Run, step_pass: Pass) -> float:
    """Mean loss per label token over the held-out rows, which the processes share."""
    accelerator = run.accelerator
    total = torch.zeros((), dtype=torch.float64, device=accelerator.device)
    for part in run.eval_parts()[accelerator.process_index :: accelerator.num_processes]:
        total += step_pass.loss(part)
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
        epoch=run.plan.epoch(state.global_step),
        max_steps=run.max_steps,
        num_train_epochs=math.ceil(run.plan.epoch(run.max_steps)),
        train_batch_size=config.per_device_train_batch_size,
        logging_steps=config.logging_steps,
        eval_steps=run.eval_steps,
        save_steps=config.save_steps,
    )
    checkpoints.save_checkpoint(output_dir, state, trainer_state, accelerator, run.base_name)
    if accelerator.is_main_process:
        checkpoints.rotate_checkpoints(output_dir, config.save_total_limit, state.global_step)
        save_adapter(state.model, output_dir, run.base_name)
        checkpoints.write_json(trainer_state, output_dir / STATE_FILE)
        log.plot_loss(output_dir / PLOT_FILE)


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
