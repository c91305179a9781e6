"""The run folder's checkpoints: write one whole or not at all, read it back, delete old ones.

`checkpoint-N/` is a complete PEFT adapter (`adapter_config.json`, `adapter_model.safetensors`) with
what is needed to resume from step N as if nothing had happened: `optimizer.pt`, `scheduler.pt`,
`rng_state_<rank>.pth` and `trainer_state.json` in transformers' format; and with a `manifest.json`
to verify all of them. Every torch file holds plain data and is read with weights_only.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from glmtune.adapters import restore_adapter, save_adapter, verify_saved
from glmtune.data.files import new_folder, write_json
from glmtune.disk import check_room
from glmtune.drafts import remove_folder, write_errors
from glmtune.errors import UserError, note, value_words
from glmtune.models.torch_files import read_torch_file, write_torch_file
from glmtune.run_files import (
    OPTIMIZER_FILE,
    RECIPE_FILE,
    SCALER_FILE,
    SCHEDULER_FILE,
    STATE_FILE,
    checkpoint_name,
    num_random_files,
    random_file,
    saved_steps,
)
from glmtune.training.processes import on_main
from glmtune.training.saving.checkpoint_size import checkpoint_bytes
from glmtune.training.saving.manifest import (
    BEGINNING,
    find_fault,
    has_manifest,
    our_part,
    read_identity,
    read_trainer_state,
    write_manifest,
)
from glmtune.training.saving.restore import (
    foreign_state,
    restore,
    restore_optimizer,
    restore_schedule,
)
from glmtune.training.state import TrainingState, own_state
from glmtune.training.watch import RandomState


def save_checkpoint(
    output_dir: Path,
    state: TrainingState,
    trainer_state: Mapping[str, Any],
    identity: Mapping[str, Any],
    accelerator: Accelerator,
    base_name: str,
) -> Path:
    """Write `checkpoint-N`, which appears under its name only when whole. Called by all processes.

    If the run has written it already, or was resumed from it, nothing is done.

    Args:
        output_dir: the run folder.
        state: what to save; N is its step.
        trainer_state: content of `trainer_state.json`, as `describe` makes it.
        identity: every setting and fact that changes the run's numbers.
        accelerator: gathers each process's random state in the first process, which writes.
        base_name: name of the base in the adapter's configuration.

    Raises:
        UserError: the folder cannot be written, is no longer there, or has too little space, or
            what was written is not what was trained.
    """
    folder = output_dir / checkpoint_name(state.global_step)
    if state.last_good and state.last_good.resolve() == folder.resolve():
        return folder
    per_process = gather_object([own_state(state)])

    def write() -> None:
        if not output_dir.is_dir():
            raise UserError(f"{output_dir}: this run's folder is no longer there; put it back")
        num_weights = sum(weight.numel() for weight in state.weights)
        num_records = len(trainer_state["log_history"])
        needed = checkpoint_bytes(num_weights, len(state.weights), len(per_process), num_records)
        check_room(folder, needed, "the checkpoint takes", "free some space there")
        with new_folder(str(folder)) as draft:
            save_adapter(state.model, draft, base_name)
            verify_saved(state.model, draft)
            write_torch_file(state.optimizer.state_dict(), draft / OPTIMIZER_FILE)
            write_torch_file(state.scheduler.state_dict(), draft / SCHEDULER_FILE)
            if state.scaler is not None:
                write_torch_file(state.scaler.state_dict(), draft / SCALER_FILE)
            for rank, own in enumerate(per_process):
                own |= {"loss_sum": own["loss_sum"].cpu()}
                write_torch_file(own, draft / random_file(rank))
            write_json(trainer_state, draft / STATE_FILE)
            write_manifest(draft, state.global_step, identity)

    on_main(accelerator, write)
    state.last_good = folder
    return folder


def check_same_run(
    checkpoint: Path, identity: Mapping[str, Any], resume_anyway: bool = False
) -> list[str]:
    """Make sure that a run resumes with the settings it began with; nothing is written.

    Args:
        checkpoint: a whole one.
        identity: every setting and fact that changes the numbers of the run to be resumed.
        resume_anyway: resume in spite of differences.

    Returns:
        Notes for the user, a line each.

    Raises:
        UserError: the checkpoint belongs to a run that differs; the message names the differences.
    """
    # A checkpoint that does not name an adapter to continue began with a new one.
    theirs = {BEGINNING: None} | read_identity(checkpoint)
    ours = {BEGINNING: None} | json.loads(json.dumps(identity))  # a tuple is read back as a list
    notes = []
    if not has_manifest(checkpoint):
        notes.append(
            f"{checkpoint} is of an earlier version, without a manifest: its files cannot be "
            "verified"
        )
    if unknown := [key for key in ours if key not in theirs]:
        notes.append(f"{checkpoint} does not say its {', '.join(unknown)}: taken to be the same")
    differences = [
        f"{key} {value_words(theirs[key])} (now {value_words(ours.get(key))})"
        for key in theirs
        if theirs[key] != ours.get(key)
    ]
    if differences and not resume_anyway:
        raise UserError(
            f"{checkpoint}: belongs to another recipe: {', '.join(differences)}; resume with what "
            f"{checkpoint.parent / RECIPE_FILE} says, start anew in another output_dir, or, if you "
            "mean it, add --resume_anyway true"
        )
    if differences:
        notes.append(f"{checkpoint} is resumed although it differs: {', '.join(differences)}")
    return notes


def load_checkpoint(
    folder: Path, state: TrainingState, accelerator: Accelerator
) -> list[dict[str, Any]]:
    """Load a checkpoint into a freshly built state. Called by all processes.

    What changes during training is restored; learning rates and the like follow the present
    settings. A process that the earlier run did not have keeps its fresh random numbers.

    Args:
        folder: a whole checkpoint of the same run, see `find_checkpoint` and `check_same_run`.
        state: the state to fill.
        accelerator: knows which process this is.

    Returns:
        The records up to the checkpoint.

    Raises:
        UserError: a file is damaged, or belongs to another adapter.
    """
    trainer_state = read_trainer_state(folder)
    restore_adapter(state.model, folder)
    restore_optimizer(state.optimizer, folder / OPTIMIZER_FILE)
    restore_schedule(state.scheduler, folder / SCHEDULER_FILE)
    if state.scaler is not None and (folder / SCALER_FILE).is_file():
        restore(state.scaler, folder / SCALER_FILE)
    state.global_step = trainer_state["global_step"]
    state.num_tokens = trainer_state["num_input_tokens_seen"]
    _restore_own(folder, state, accelerator)
    state.last_good = folder
    return trainer_state["log_history"]


def _restore_own(folder: Path, state: TrainingState, accelerator: Accelerator) -> None:
    """Restore what each process has of its own, whether they were as many before or not."""
    rank, num_now = accelerator.process_index, accelerator.num_processes
    num_before = num_random_files(folder)
    if not num_before:
        note(f"{folder} has no random states: torch's generators start anew")
        return
    # Dropout has a seed for each pass; the generators' states serve whatever else may draw.
    loss_sum = torch.zeros_like(state.loss_sum)
    for number in [rank, *range(rank + num_now, num_before, num_now)]:
        own = folder / random_file(number if number < num_before else 0)
        content = read_torch_file(own)
        try:
            if number < num_before:
                loss_sum += content["loss_sum"].to(loss_sum.device)
            if number == rank < num_before:
                RandomState(content["cpu"], content["cuda"]).restore(loss_sum.device)
            state.num_loss_steps = content["num_loss_steps"]
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise foreign_state(own, error) from error
    state.loss_sum.copy_(loss_sum)


def describe(
    state: TrainingState, history: list[dict[str, Any]], identity: Mapping[str, Any], **numbers: Any
) -> dict[str, Any]:
    """The content of `trainer_state.json`, which transformers' TrainerState can read, too.

    Args:
        state: the state, for its step and tokens.
        history: all records so far.
        identity: what `check_same_run` compares when the run is resumed.
        numbers: further fields of TrainerState, e.g. epoch and max_steps.
    """
    return {
        "global_step": state.global_step,
        "num_input_tokens_seen": state.num_tokens,
        **numbers,
        "log_history": history,
        **our_part(identity),
    }


def rotate_checkpoints(
    output_dir: Path, limit: int | None, step: int, best: int | None = None
) -> None:
    """Delete all but the newest `limit` checkpoints, and that of step `best`.

    The one of `step`, just saved, is the newest.

    Those of later steps are left over from before the run was resumed at an earlier step: they are
    deleted first. None is deleted before the newest has been read back from disk and found whole.

    Raises:
        UserError: it is not whole, or a folder cannot be deleted.
    """
    by_age = sorted(saved_steps(output_dir), key=lambda saved: (saved <= step, saved))
    too_many = by_age[: max(0, len(by_age) - limit)] if limit else []
    too_many = [old for old in too_many if old != best]
    newest = output_dir / checkpoint_name(step)
    if too_many and (fault := find_fault(newest)):
        raise UserError(
            f"{newest}: was written, but read back {fault}; earlier checkpoints are kept: check "
            "the disk"
        )
    for old in too_many:
        with write_errors(output_dir):
            remove_folder(output_dir / checkpoint_name(old))
