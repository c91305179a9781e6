"""A run's files while it trains: its log, its checkpoints, and the files beside them."""

import math
from pathlib import Path
from typing import Any

from glmtune.adapters import save_adapter, verify_saved
from glmtune.data.files import write_json
from glmtune.errors import UserError
from glmtune.run_files import PLOT_FILE, STATE_FILE
from glmtune.runlog import RunLog
from glmtune.training.processes import on_main
from glmtune.training.run import Run
from glmtune.training.saving import checkpoints
from glmtune.training.saving.best_link import mark_best
from glmtune.training.saving.run_folder import what_is_kept
from glmtune.training.state import TrainingState


def open_log(run: Run, state: TrainingState, history: list[dict[str, Any]]) -> RunLog:
    """The run's log, which continues after the records of earlier steps."""
    settings = run.settings
    if run.accelerator.is_main_process and (len(run.eval_rows) or run.general):
        state.evaluations.write(Path(settings.output_dir))
    if run.accelerator.is_main_process and run.samples:
        run.samples.begin(state.global_step)
    return RunLog(
        settings.output_dir,
        run.max_steps,
        report_to=settings.report_to,
        disable_tqdm=settings.disable_tqdm,
        first_step=state.global_step,
        history=history,
        enabled=run.accelerator.is_main_process,
    )


def save(run: Run, state: TrainingState, log: RunLog) -> None:
    """Write a checkpoint, and at the root of the run folder its adapter, state and curve.

    Raises:
        NotFiniteError: an earlier step was not applied; nothing is written.
        UserError: the weights are not finite (nothing is written), the folder cannot be written, or
            what was written is not what was trained; the message names the newest good checkpoint.
    """
    settings, accelerator, output_dir = run.settings, run.accelerator, Path(run.settings.output_dir)
    state.watch.sync()
    if not all(bool(weight.isfinite().all()) for weight in state.weights):
        raise UserError(
            f"step {state.global_step}: its update leaves weights that are not finite; lower "
            f"learning_rate ({settings.learning_rate}); {what_is_kept(run, state)}"
        )
    trainer_state = checkpoints.describe(
        state,
        log.history,
        run.identity,
        epoch=run.plan.epoch(state.global_step),
        max_steps=run.max_steps,
        num_train_epochs=math.ceil(run.plan.epoch(run.max_steps)),
        train_batch_size=settings.per_device_train_batch_size,
        logging_steps=settings.logging_steps,
        eval_steps=run.eval_steps,
        save_steps=run.save_steps,
    )

    def write_the_rest() -> None:
        state.best = best = mark_best(output_dir, state.evaluations.all())
        kept = best.step if best else None
        checkpoints.rotate_checkpoints(
            output_dir, settings.save_total_limit, state.global_step, kept
        )
        save_adapter(state.model, output_dir, run.base_name)
        verify_saved(state.model, output_dir)
        write_json(trainer_state, output_dir / STATE_FILE)
        log.plot_loss(output_dir / PLOT_FILE)

    try:
        checkpoints.save_checkpoint(
            output_dir, state, trainer_state, run.identity, accelerator, run.base_name
        )
        on_main(accelerator, write_the_rest)
    except UserError as error:
        raise UserError(f"{error}; {what_is_kept(run, state)}") from error
