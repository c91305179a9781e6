"""The run folder before a run: is it free, which checkpoint to resume from, what to delete."""

import filecmp
import math
import shlex
from pathlib import Path
from typing import Any

from glmtune.config.reading import write_recipe
from glmtune.config.settings import TrainSettings
from glmtune.config.training import divisors
from glmtune.disk import MEGABYTE, check_room
from glmtune.drafts import clear_drafts, remove_folder
from glmtune.errors import UserError, note
from glmtune.launched import num_restarts
from glmtune.models.torch_files import read_torch_file
from glmtune.run_files import (
    ADAPTER_CONFIG_FILE,
    FILES_BESIDE,
    OPTIMIZER_FILE,
    RANDOM_FILES,
    RECIPE_FILE,
    TENSORBOARD_FOLDER,
    WEIGHTS_FILE,
    checkpoint_name,
    num_random_files,
    run_folder_of,
    saved_steps,
    step_in,
)
from glmtune.training.best import Evaluations
from glmtune.training.held_out import is_evaluation_due
from glmtune.training.plan import Plan, count_saves
from glmtune.training.planning.memory import Setup
from glmtune.training.run import Run
from glmtune.training.saving.checkpoint_size import last_checkpoint_bytes, most_new_checkpoints
from glmtune.training.saving.manifest import (
    TORCH_FILES,
    find_fault,
    read_identity,
    read_trainer_state,
)
from glmtune.training.state import TrainingState


def resume_point(settings: TrainSettings) -> tuple[Path | None, list[str]]:
    """The checkpoint that the settings resume from, or None for a new run. Nothing is written.

    Returns:
        The checkpoint, and notes on those that were skipped, a line each.

    Raises:
        UserError: `resume_from_checkpoint` leads to no whole checkpoint, or `output_dir` holds
            another run and is not to be overwritten.
    """
    output_dir, wanted = Path(settings.output_dir), settings.resume_from_checkpoint
    if output_dir.exists() and not output_dir.is_dir():
        raise UserError(f"output_dir: {output_dir} is a file; name a folder")
    checkpoint, notes = None, list[str]()
    found = _find_run(output_dir)
    if _is_by_itself(settings):
        names = [entry.name for entry in found]
        wanted = "true" if any(step_in(name) is not None for name in names) else None
        if wanted is None and WEIGHTS_FILE not in names:
            found = []  # of a run that had saved nothing yet
        if num_restarts() or wanted:
            outcome = "resumed" if wanted else "nothing was saved, begun anew"
            notes.append(f"{output_dir}: {outcome}")
    if wanted is not None:
        checkpoint, passed_over = find_checkpoint(output_dir if wanted == "true" else Path(wanted))
        notes += passed_over
    if found and not settings.overwrite_output_dir and not _is_inside(checkpoint, output_dir):
        raise UserError(
            f"output_dir: {output_dir} holds a run already ({found[0].name}); resume it "
            "(--resume_from_checkpoint true), start anew over it (--overwrite_output_dir true), or "
            "name another folder"
        )
    return checkpoint, notes


def _is_by_itself(settings: TrainSettings) -> bool:
    """Whether whatever starts the command again leaves to it where to begin."""
    wanted = settings.resume_from_checkpoint
    return wanted == "auto" or (wanted is None and num_restarts() > 0)


def same_step(settings: TrainSettings, num_processes: int, checkpoint: Path) -> TrainSettings:
    """Settings with which a run that other numbers of processes began has the same steps.

    Args:
        settings: the run's settings.
        num_processes: processes that share a step now.
        checkpoint: the one to resume from.

    Raises:
        UserError: the processes cannot have equal parts of its steps.
    """
    identity = read_identity(checkpoint)
    num_before = num_random_files(checkpoint)
    if num_before in (0, num_processes) or settings.passes_per_step:
        return settings
    size, pass_size = identity.get("rows per step"), settings.per_device_train_batch_size
    if size is None:
        size, pass_size = identity["tokens per step"], identity["pack length"]
    passes, rest = divmod(size, pass_size)
    if rest:
        return settings  # another recipe, as `check_same_run` says
    if passes % num_processes:
        raise UserError(
            f"{checkpoint}: a step of this run is {passes} passes, of which {num_processes} "
            f"processes cannot have equal parts: start {divisors(passes)} of them"
        )
    note(
        f"{checkpoint} is of {num_before} process(es): each of {num_processes} now has "
        f"{passes // num_processes} pass(es) of a step, which stays the same"
    )
    return settings.model_copy(update={"gradient_accumulation_steps": passes // num_processes})


def check_unfinished(run: Run, checkpoint: Path) -> list[str]:
    """Make sure that a resumed run has something left to do.

    That may be an evaluation, or files beside the checkpoint that are missing because the earlier
    run was killed. With `auto` a run may be at its end: a queue starts a job again that has ended.

    Returns:
        Notes for the user, a line each.

    Raises:
        UserError: nothing is left to do (the message says what to raise), or a file of the
            checkpoint cannot be read.
    """
    output_dir, state = Path(run.settings.output_dir), read_trainer_state(checkpoint)
    step = int(state["global_step"])
    early = evaluations_at(run, checkpoint, step).why_no_better(run.settings.early_stopping)
    beside = _state_beside(checkpoint) if _is_inside(checkpoint, output_dir) else None
    history = (beside or state)["log_history"]
    if (step < run.max_steps and not early) or is_evaluation_due(run, step, history):
        return []
    if _is_inside(checkpoint, output_dir) and beside is None:
        return [f"{checkpoint} is the last: nothing is trained, {output_dir} is made whole from it"]
    for file in (*TORCH_FILES, *(path.name for path in checkpoint.glob(RANDOM_FILES))):
        read_torch_file(checkpoint / file)  # report an unreadable checkpoint as such
    settings = run.settings
    if _is_by_itself(settings):
        return [
            f"{checkpoint}: nothing is left to train ({early or f'all {step:,} steps are done'})"
        ]
    go_on = f"for new rows or a new schedule, --adapter {checkpoint} --output_dir NEW"
    if early:
        raise UserError(
            f"{checkpoint}: nothing is left to train: {early}; {go_on}; to train on all the same: "
            "--early_stopping none"
        )
    asked, more = "max_steps", 2 * step
    if settings.max_steps <= 0:
        asked, more = "num_train_epochs", math.ceil(run.plan.epoch(step)) + 1
    # A longer run would have other learning rates, which is another recipe.
    anyway = " --resume_anyway true" if run.has_end or 0 < settings.warmup_steps < 1 else ""
    raise UserError(
        f"{checkpoint}: nothing is left to train: it has {step:,} steps, and {asked} "
        f"({getattr(settings, asked):g}) asks for {run.max_steps:,}; {go_on}; to train on, "
        f"raise that: --{asked} {more}{anyway}"
    )


def evaluations_at(run: Run, checkpoint: Path | None, step: int) -> Evaluations:
    """The evaluations that a run had made when it saved a checkpoint; none without one."""
    general_set = run.general.general.digest if run.general else None
    if checkpoint is None:
        return Evaluations(general_set)
    folder = run_folder_of(checkpoint)
    return Evaluations.read(folder, step, len(run.eval_rows), general_set)


def _state_beside(checkpoint: Path) -> dict[str, Any] | None:
    """The state that a run leaves beside its last checkpoint; None where not all is there."""
    folder = run_folder_of(checkpoint)
    try:
        is_same = filecmp.cmp(folder / WEIGHTS_FILE, checkpoint / WEIGHTS_FILE, shallow=False)
        state = read_trainer_state(folder)
    except (OSError, UserError):
        return None
    is_last = checkpoint.name == checkpoint_name(state["global_step"])
    return state if is_same and is_last and (folder / ADAPTER_CONFIG_FILE).is_file() else None


def claim_output_dir(settings: TrainSettings, checkpoint: Path | None) -> Path:
    """Make the run folder and write the recipe; delete what another run left, and nothing else.

    Drafts of a run that was killed are deleted, too.

    Args:
        settings: the settings as run.
        checkpoint: the checkpoint to resume from, if any.

    Raises:
        UserError: the folder cannot be written.
    """
    output_dir = Path(settings.output_dir)
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        clear_drafts(output_dir, lambda name: name in FILES_BESIDE or step_in(name) is not None)
        stale = [] if _is_inside(checkpoint, output_dir) else _find_run(output_dir)
        for entry in stale:
            is_link = entry.is_symlink()
            remove_folder(entry) if entry.is_dir() and not is_link else entry.unlink()
    except OSError as error:
        raise UserError(
            f"output_dir: {output_dir} cannot be written ({error.strerror}); name another folder"
        ) from error
    write_recipe(settings, str(output_dir / RECIPE_FILE))
    return output_dir


def check_disk(
    settings: TrainSettings,
    setup: Setup,
    plan: Plan,
    max_steps: int,
    num_processes: int = 1,
    checkpoint: Path | None = None,
) -> None:
    """Make sure, before anything is written, that there is space for all checkpoints to come.

    Args:
        settings: the run's settings: how many checkpoints there will be, and where.
        setup: the training setup, which gives their size.
        plan: the run's steps.
        max_steps: steps of the whole run.
        num_processes: processes that share a step.
        checkpoint: the checkpoint to resume from, if any.

    Raises:
        UserError: there is too little space.
    """
    output_dir = Path(settings.output_dir)
    first_step, num_there, freed = 0, 0, 0
    if checkpoint:
        first_step = int(read_trainer_state(checkpoint)["global_step"])
    if _is_inside(checkpoint, output_dir):
        num_there = len(saved_steps(output_dir))
    else:
        freed = sum(_size(entry) for entry in _find_run(output_dir))
    num_saves = count_saves(settings, plan, first_step, max_steps)
    limit = settings.save_total_limit
    if limit and (settings.eval_ratio or settings.eval_dataset_path):
        limit += 1  # the best is kept besides
    count = most_new_checkpoints(num_saves, num_there, limit)
    size = last_checkpoint_bytes(settings, setup, max_steps, num_processes)
    check_room(
        output_dir,
        (count + 1) * size - freed,  # and the files beside them
        f"{count:,} checkpoint(s) of {size / MEGABYTE:,.1f} MB and the adapter take",
        f"set save_total_limit (now {settings.save_total_limit or 'all are kept'}) or a larger "
        f"save_steps (now {_pace(settings)}), free some space, or name another output_dir",
    )


def _pace(settings: TrainSettings) -> str:
    by_epoch = settings.save_strategy == "epoch"
    return "after each epoch" if by_epoch else str(settings.save_steps)


def _size(path: Path) -> int:
    if path.is_symlink():
        return 0
    files = [path] if path.is_file() else path.rglob("*")
    return sum(file.stat().st_size for file in files if file.is_file())


def _is_inside(checkpoint: Path | None, output_dir: Path) -> bool:
    return checkpoint is not None and run_folder_of(checkpoint) == output_dir.resolve()


def _find_run(output_dir: Path) -> list[Path]:
    """What a run left at the root of its folder."""
    if not output_dir.is_dir():
        return []
    checkpoints = [output_dir / checkpoint_name(step) for step in saved_steps(output_dir)]
    files = [output_dir / name for name in FILES_BESIDE]
    events = output_dir.glob(f"{TENSORBOARD_FOLDER}/events.out.tfevents.*")
    crashes = sorted(output_dir.glob("crash-*"))
    found = (*checkpoints, *files, *events, *crashes)
    return [entry for entry in found if entry.exists() or entry.is_symlink()]


def find_checkpoint(path: Path) -> tuple[Path, list[str]]:
    """The checkpoint to resume from: `path` itself, or the newest whole one in that run folder.

    If the named checkpoint is damaged, the newest whole one before it is taken: from there the run
    repeats the same steps.

    Returns:
        The checkpoint, and what is wrong with each that was skipped, a line each.

    Raises:
        UserError: there is nothing to resume from.
    """
    if not path.is_dir():
        raise UserError(
            f"resume_from_checkpoint: {path} is no folder; name a checkpoint-N or a run"
        )
    if (named := step_in(path.name)) is not None:
        earlier = [step for step in saved_steps(path.parent) if step < named]
        candidates = [path, *_newest_first(path.parent, earlier)]
    elif (path / OPTIMIZER_FILE).is_file():
        candidates = [path]
    else:
        candidates = _newest_first(path, saved_steps(path))
    notes: list[str] = []
    for folder in candidates:
        if not (fault := find_fault(folder)):
            return folder, notes
        notes.append(f"passed over {folder}: {fault}")
    found = "; ".join(notes).replace("passed over ", "") or "there is no checkpoint-N"
    raise UserError(
        f"{path}: nothing to resume from: {found}; name another run, or leave "
        "resume_from_checkpoint out"
    )


def _newest_first(folder: Path, steps: list[int]) -> list[Path]:
    return [folder / checkpoint_name(step) for step in reversed(steps)]


def resume_command(run: Run, checkpoint: Path, glmtune: str = "glmtune") -> str:
    """The command that resumes from a checkpoint, beginning with the way glmtune was started."""
    recipe = shlex.quote(f"{run.settings.output_dir}/{RECIPE_FILE}")
    num_processes = run.accelerator.num_processes
    # On CPUs `accelerate launch` starts one process, whatever number is requested.
    if num_processes > 1:
        glmtune = f"torchrun --nproc_per_node {num_processes} -m glmtune"
    where = shlex.quote(str(checkpoint))
    return f"{glmtune} train {recipe} --resume_from_checkpoint {where}"


def what_is_kept(run: Run, state: TrainingState) -> str:
    """Say what a run that ends with an error has saved, and how to resume it."""
    kept = state.last_good
    if kept is None or not kept.is_dir():
        return "there is no checkpoint of this run to resume from"
    return f"{kept.name} is whole: resume with `{resume_command(run, kept)}`"
