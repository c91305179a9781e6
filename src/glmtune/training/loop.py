"""Training: a set-up, then one flat loop over Accelerate.

The base model is frozen and stays in its compute type; the adapter's weights are float32 and the
only ones that train. A step works on one global batch, and its loss is the sum of the losses of its
tokens over the number of its label tokens, however the rows are dealt out to passes and processes.
"""

import math
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from peft import PeftModel
from torch import Tensor, nn

from glmtune.adapters import save_adapter, verify_saved
from glmtune.config import TrainConfig, write_recipe
from glmtune.data.dataset import check_data_card, load_dataset
from glmtune.data.token_rows import TokenRows
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
from glmtune.training.check import check_agreement
from glmtune.training.checkpoints import RECIPE_FILE, STATE_FILE, TrainingState
from glmtune.training.console import Pace, print_banner, print_summary
from glmtune.training.crash import bundle_on_fault
from glmtune.training.interrupt import StopRequest
from glmtune.training.passes import PaddedPass, Pass
from glmtune.training.plan import pass_seed, split_rows
from glmtune.training.run import (
    Run,
    adapt,
    build_pass,
    build_state,
    check_fp8,
    choose_layout,
    layout_as_run,
    start_accelerator,
)
from glmtune.training.watch import judge_course


@dataclass(frozen=True)
class TrainResult:
    """What a run came to."""

    output_dir: Path
    global_step: int
    log_history: list[dict[str, Any]]
    interrupted: bool
    """Stopped by Ctrl+C or SIGTERM before the last step; `checkpoint-N` of that step goes on."""


AtEnd = Callable[[PeftModel, Any, TokenRows, np.ndarray], object]
"""Takes the trained model, its tokenizer, the rows, and which of them were held out."""


def train(config: TrainConfig, at_end: AtEnd | None = None) -> TrainResult:
    """Train a LoRA adapter on tokenised rows, as the settings say, into a run folder.

    Args:
        config: the settings.
        at_end: is called by the first process when all steps are done and saved.

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
    if (lost := card.describe_loss()) and accelerator.is_main_process:
        print(f"note: {config.dataset_path}: {lost}")
    rows = TokenRows.from_dataset(dataset)

    model = load_base_model(base, dtype=dtype, device=accelerator.device)
    check_pair(model, tokenizer)
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
            **layout_as_run(config, peft_model, accelerator.device, rows),
        }
        write_recipe(config.model_copy(update=as_run), str(output_dir / RECIPE_FILE))
    try:
        result = fit(config, accelerator, peft_model, rows, base_name(base), resume)
    except torch.OutOfMemoryError as error:
        raise UserError(
            "the GPU's memory is too small for this: halve "
            f"{_size_setting(config, accelerator.device)} and double "
            f"gradient_accumulation_steps ({config.gradient_accumulation_steps}), or set "
            "gradient_checkpointing true"
        ) from error
    if at_end is not None and accelerator.is_main_process and not result.interrupted:
        _, held_out = split_rows(len(rows), config.eval_ratio, config.seed)
        at_end(peft_model, tokenizer, rows, held_out)
    return result


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
    plain = PaddedPass(accelerator, model, rows)
    torch.manual_seed(config.seed + accelerator.process_index)  # to each process its own dropout
    history: list[dict[str, Any]] = []
    if resume:
        history = checkpoints.load_checkpoint(resume, state, run.identity, accelerator)
    if accelerator.is_main_process:
        print_banner(run, state)
    if run.layout != "padded":
        first = run.plan.parts(state.global_step, accelerator.num_processes)[0]
        off = check_agreement(step_pass, plain, first, state.weights, run.dtype)
        if accelerator.is_main_process and math.isfinite(off[0]):
            print(f"checked: a pass over {len(first)} rows, {run.layout} and row by row: loss and "
                  f"gradient differ by {off[0]:.1e} and {off[1]:.1e}", flush=True)  # fmt: skip

    interrupted = False
    on_fault = bundle_on_fault(run, state, plain)
    with on_fault, open_log(run, state, history) as log, StopRequest(accelerator) as stop:
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
                check_course(run, state, log)
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

    Raises:
        NotFiniteError: the step, or one shortly before it, was not made; see `watch`.
    """
    largest_weight = state.watch.begin(state.global_step)
    config, accelerator = run.config, run.accelerator
    parts = run.plan.parts(state.global_step, accelerator.num_processes)
    row_ids = np.concatenate(parts)
    num_labels = int(run.rows.num_labels_R[row_ids].sum())
    loss = torch.zeros_like(state.loss_sum)
    for number, part in enumerate(parts):
        if number % accelerator.num_processes == accelerator.process_index and len(part):
            seed = pass_seed(config.seed, state.global_step, number)
            loss += step_pass.run(part, num_labels, seed)
    state.loss_sum += loss
    sums = sum_gradients(state.weights, torch.stack([loss, largest_weight]), accelerator)
    state.watch.see_loss(*sums)
    grad_norm = accelerator.clip_grad_norm_(state.weights, config.max_grad_norm or math.inf)
    state.watch.see_gradient(grad_norm)
    state.optimizer.step()
    if not accelerator.optimizer_step_was_skipped:  # float16: the scale was too large this time
        state.scheduler.step()
    state.optimizer.zero_grad()
    state.global_step += 1
    state.num_loss_steps += 1
    state.num_tokens += int(run.rows.lengths_R[row_ids].sum())
    return grad_norm


def sum_gradients(weights: list[nn.Parameter], numbers: Tensor, accelerator: Accelerator) -> Tensor:
    """Give every process the sum of all processes' gradients, as a loss over all rows asks for.

    Returns:
        The sums of some more numbers, which go along.
    """
    if accelerator.num_processes == 1:
        return numbers
    grads = [torch.zeros_like(w) if w.grad is None else w.grad for w in weights]
    parts = [*(grad.flatten() for grad in grads), numbers]
    flat = accelerator.reduce(torch.cat(parts), reduction="sum")
    *summed, numbers = flat.split([part.numel() for part in parts])
    for weight, grad in zip(weights, summed, strict=True):
        weight.grad = grad.view_as(weight)
    return numbers


def take_loss(run: Run, state: TrainingState) -> float:
    """The mean loss of the steps since it was last taken, over all processes.

    Raises:
        NotFiniteError: one of these steps was not made.
    """
    state.watch.settle()
    total = run.accelerator.reduce(state.loss_sum, reduction="sum").item()
    loss = total / state.num_loss_steps
    state.loss_sum.zero_()
    state.num_loss_steps = 0
    return loss


def check_course(run: Run, state: TrainingState, log: RunLog) -> None:
    """After a reading of the loss: say what has gone wrong, and stop where it does not pass.

    Raises:
        UserError: the loss explodes or stands at 0, or nothing that trains had a gradient.
    """
    step, is_main = state.global_step, run.accelerator.is_main_process
    if unmoved := state.watch.unmoved():
        names = [name for name, weight in state.model.named_parameters() if weight.requires_grad]
        words = (
            f"step {step}: the gradient was exactly 0 in all of the first steps for {len(unmoved)} "
            f"of {len(names)} weights, first {names[unmoved[0]]}: they learn nothing"
        )
        if len(unmoved) == len(names):
            raise UserError(f"{words}; look at the rows' answers and, in float16, set bf16 true")
        if is_main:
            print(f"warning: {words}; leave their linears out of lora_target", file=sys.stderr)
    losses = [record["loss"] for record in log.history if record.get("loss") is not None]
    if (course := judge_course(losses)) is None:
        return
    if course.stops:
        kept = "earlier checkpoints are as they were"
        if not course.is_spoilt:
            save(run, state, log)
            kept = f"checkpoint-{step} has what was learned"
        raise UserError(f"step {step}: {course.words}; {kept}")
    if is_main:
        print(f"warning: step {step}: {course.words}", file=sys.stderr)


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
        NotFiniteError: a step before was not made; nothing is written.
        UserError: the weights are not finite (nothing is written), or the folder cannot be.
    """
    config, accelerator, output_dir = run.config, run.accelerator, Path(run.config.output_dir)
    state.watch.settle()
    if not all(bool(weight.isfinite().all()) for weight in state.weights):
        raise UserError(
            f"step {state.global_step}: its update leaves weights that are not finite; lower "
            f"learning_rate ({config.learning_rate}); earlier checkpoints are as they were"
        )
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
    saved = checkpoints.save_checkpoint(
        output_dir, state, trainer_state, accelerator, run.base_name
    )
    if accelerator.is_main_process:
        keep_if_sound(state, saved)
        checkpoints.rotate_checkpoints(output_dir, config.save_total_limit, state.global_step)
        save_adapter(state.model, output_dir, run.base_name)
        verify_saved(state.model, output_dir)
        checkpoints.write_json(trainer_state, output_dir / STATE_FILE)
        log.plot_loss(output_dir / PLOT_FILE)


def keep_if_sound(state: TrainingState, checkpoint: Path) -> None:
    """Take a checkpoint away again whose adapter is not the one in training.

    Raises:
        UserError: it was; earlier checkpoints are still there.
    """
    try:
        verify_saved(state.model, checkpoint)
    except UserError:
        shutil.rmtree(checkpoint)
        raise


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


def _size_setting(config: TrainConfig, device: torch.device) -> str:
    if choose_layout(config, device) == "packed":
        return f"tokens_per_step ({config.tokens_per_step or 'now chosen by the card'})"
    return f"per_device_train_batch_size ({config.per_device_train_batch_size})"
