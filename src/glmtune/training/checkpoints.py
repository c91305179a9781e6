"""The run folder's checkpoints: write one whole or not at all, find the newest, read it, keep few.

`checkpoint-N/` is a complete PEFT adapter (`adapter_config.json`, `adapter_model.safetensors`) with
what it takes to go on from step N as if nothing had happened: `optimizer.pt`, `scheduler.pt`,
`rng_state_<rank>.pth` and `trainer_state.json`, whose shape is that of transformers'. Every torch
file holds plain data and is read with weights_only.
"""

import json
import re
import shutil
import sys
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from glmtune.adapters import restore_adapter, save_adapter
from glmtune.adapters.formats import CONFIG_FILE, WEIGHTS_FILE
from glmtune.config import TrainConfig
from glmtune.data.files import new_file, new_folder, read_json_object
from glmtune.errors import UserError
from glmtune.models.torch_files import read_torch_file
from glmtune.runlog import METRICS_FILE, PLOT_FILE, TENSORBOARD_FOLDER
from glmtune.training.restore import check_moments, foreign_state, restore

STATE_FILE = "trainer_state.json"
RECIPE_FILE = "recipe.yaml"
_TORCH_FILES = ("optimizer.pt", "scheduler.pt")
_SCALER_FILE = "scaler.pt"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
# Files of a run at the root of its folder.
_RUN_FILES = (RECIPE_FILE, METRICS_FILE, STATE_FILE, WEIGHTS_FILE, CONFIG_FILE, PLOT_FILE)
# The part of trainer_state.json that is ours: transformers keeps a place for others' state.
_OURS = ("stateful_callbacks", "glmtune")


@dataclass
class TrainingState:
    """What moves while a model trains, and must come back for a resumed run to be the same run."""

    model: PeftModel
    """The model with its adapter."""
    optimizer: Optimizer
    scheduler: LRScheduler
    loss_sum: Tensor
    """This process's share of the losses since the last record, summed over steps."""
    scaler: Any = None
    """The gradient scaler of float16, or None."""
    global_step: int = 0
    num_loss_steps: int = 0
    """Steps in `loss_sum`."""
    num_tokens: int = 0
    """Real tokens seen by all processes, padding not counted."""

    @property
    def weights(self) -> list[nn.Parameter]:
        """What trains: the adapter's weights."""
        return self.optimizer.param_groups[0]["params"]


def save_checkpoint(
    output_dir: Path,
    state: TrainingState,
    trainer_state: Mapping[str, Any],
    accelerator: Accelerator,
    base_name: str,
) -> Path:
    """Write `checkpoint-N`, which appears under its name only when whole. Called by all processes.

    Args:
        output_dir: the run folder.
        state: what to save; N is its step.
        trainer_state: content of `trainer_state.json`, as `describe` makes it.
        accelerator: brings each process's random state to the first, which writes.
        base_name: what the adapter calls its base.

    Raises:
        UserError: the folder cannot be written.
    """
    folder = output_dir / f"checkpoint-{state.global_step}"
    per_process = gather_object([_own_state(state)])
    if accelerator.is_main_process:
        with new_folder(str(folder)) as draft:
            save_adapter(state.model, draft, base_name)
            torch.save(state.optimizer.state_dict(), draft / "optimizer.pt")
            torch.save(state.scheduler.state_dict(), draft / "scheduler.pt")
            if state.scaler is not None:
                torch.save(state.scaler.state_dict(), draft / _SCALER_FILE)
            for rank, own_state in enumerate(per_process):
                torch.save(own_state, draft / f"rng_state_{rank}.pth")
            write_json(trainer_state, draft / STATE_FILE)
    accelerator.wait_for_everyone()
    return folder


def _own_state(state: TrainingState) -> dict[str, Any]:
    """What each process has for itself: its random numbers and its share of the running loss.

    Dropout draws from torch's generators; nothing that trains uses those of Python or numpy.
    """
    device = state.loss_sum.device
    on_gpu = device.type == "cuda"
    return {
        "cpu": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if on_gpu else None,
        "loss_sum": state.loss_sum.cpu(),
        "num_loss_steps": state.num_loss_steps,
    }


def _restore_own_state(own_state: Mapping[str, Any], state: TrainingState) -> None:
    device = state.loss_sum.device
    torch.set_rng_state(own_state["cpu"])
    if own_state["cuda"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(own_state["cuda"], device)
    state.loss_sum.copy_(own_state["loss_sum"])
    state.num_loss_steps = own_state["num_loss_steps"]


def load_checkpoint(
    folder: Path, state: TrainingState, identity: Mapping[str, Any], accelerator: Accelerator
) -> list[dict[str, Any]]:
    """Put a checkpoint's content into a freshly built state. Called by all processes.

    A process that the earlier run did not have keeps its fresh random numbers.

    Args:
        folder: a whole checkpoint.
        state: is filled.
        identity: every setting and fact that changes the numbers of the run that would go on.
        accelerator: tells which process this is.

    Returns:
        The records up to the checkpoint.

    Raises:
        UserError: it belongs to another recipe, or a file is damaged.
    """
    trainer_state = read_trainer_state(folder)
    _check_trainer_state(trainer_state, folder / STATE_FILE)
    _check_identity(folder, trainer_state, identity)
    restore_adapter(state.model, folder)
    restore(state.optimizer, folder / "optimizer.pt")
    check_moments(state.optimizer, folder / "optimizer.pt")
    restore(state.scheduler, folder / "scheduler.pt")
    if state.scaler is not None and (folder / _SCALER_FILE).is_file():
        restore(state.scaler, folder / _SCALER_FILE)
    state.global_step = trainer_state["global_step"]
    state.num_tokens = trainer_state["num_input_tokens_seen"]
    rank = accelerator.process_index
    file = folder / f"rng_state_{rank}.pth"
    if file.is_file():
        try:
            _restore_own_state(read_torch_file(file), state)
        except (KeyError, TypeError, RuntimeError) as error:
            raise foreign_state(file, error) from error
    else:
        print(f"note: {file} is not there: process {rank} draws its dropout anew", file=sys.stderr)
    return trainer_state["log_history"]


def describe(
    state: TrainingState, history: list[dict[str, Any]], identity: Mapping[str, Any], **numbers: Any
) -> dict[str, Any]:
    """The content of `trainer_state.json`, which transformers' TrainerState reads, too.

    Args:
        state: gives the step and the tokens.
        history: all records so far.
        identity: what a checkpoint is known by when it is resumed from; see `load_checkpoint`.
        numbers: further fields of TrainerState, e.g. epoch and max_steps.
    """
    place, name = _OURS
    return {
        "global_step": state.global_step,
        "num_input_tokens_seen": state.num_tokens,
        **numbers,
        "log_history": history,
        place: {name: dict(identity)},
    }


def write_json(content: Mapping[str, Any], path: Path) -> None:
    """Write a JSON file that appears whole."""
    with new_file(str(path)) as file:
        json.dump(content, file, indent=2, ensure_ascii=False)
        file.write("\n")


def read_trainer_state(folder: Path) -> dict[str, Any]:
    """The content of a checkpoint's `trainer_state.json`; UserError where it is no JSON."""
    return read_json_object(folder / STATE_FILE)


def _check_trainer_state(content: Mapping[str, Any], path: Path) -> None:
    place, name = _OURS
    ours, history = content.get(place), content.get("log_history")
    numbers = [content.get("global_step"), content.get("num_input_tokens_seen")]
    records = history if isinstance(history, list) else [None]
    if (
        not all(type(number) is int and number >= 0 for number in numbers)
        or not (isinstance(ours, dict) and isinstance(ours.get(name), dict))
        or not all(
            isinstance(record, dict) and type(record.get("step")) is int for record in records
        )
    ):
        raise UserError(
            f"{path}: is damaged, or of another program; resume from another checkpoint"
        )


def _check_identity(
    checkpoint: Path, trainer_state: Mapping[str, Any], identity: Mapping[str, Any]
) -> None:
    place, name = _OURS
    theirs = trainer_state[place][name]
    ours = json.loads(json.dumps(identity))  # a tuple comes back from a file as a list
    differences = [
        f"{key} {theirs.get(key)} (now {ours.get(key)})"
        for key in dict.fromkeys([*ours, *theirs])
        if theirs.get(key) != ours.get(key)
    ]
    if differences:
        raise UserError(
            f"{checkpoint}: belongs to another recipe: {', '.join(differences)}; resume with the "
            f"settings of {checkpoint.parent / RECIPE_FILE}, or start anew in another output_dir"
        )


def resume_point(config: TrainConfig) -> Path | None:
    """The checkpoint that the settings resume from, or None for a new run. Nothing is written.

    Raises:
        UserError: `resume_from_checkpoint` leads to no whole checkpoint, or `output_dir` holds
            another run and is not to be overwritten.
    """
    output_dir, wanted = Path(config.output_dir), config.resume_from_checkpoint
    if output_dir.exists() and not output_dir.is_dir():
        raise UserError(f"output_dir: {output_dir} is a file; name a folder")
    checkpoint = None
    if wanted is not None:
        checkpoint = find_checkpoint(output_dir if wanted == "true" else Path(wanted))
    found = _find_run(output_dir)
    if found and not config.overwrite_output_dir and not _is_inside(checkpoint, output_dir):
        raise UserError(
            f"output_dir: {output_dir} holds a run already ({found[0].name}); go on with it "
            "(--resume_from_checkpoint true), start anew over it (--overwrite_output_dir true), or "
            "name another folder"
        )
    return checkpoint


def claim_output_dir(config: TrainConfig, checkpoint: Path | None) -> Path:
    """Make the run folder; what another run left in it goes, and nothing else there.

    Raises:
        UserError: it cannot be written.
    """
    output_dir = Path(config.output_dir)
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        stale = [] if _is_inside(checkpoint, output_dir) else _find_run(output_dir)
        for entry in [*stale, *output_dir.glob(".checkpoint-*")]:  # hidden: drafts cut short
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    except OSError as error:
        raise UserError(
            f"output_dir: {output_dir} cannot be written ({error.strerror}); name another folder"
        ) from error
    return output_dir


def _is_inside(checkpoint: Path | None, output_dir: Path) -> bool:
    return checkpoint is not None and checkpoint.resolve().parent == output_dir.resolve()


def _find_run(output_dir: Path) -> list[Path]:
    """What a run left at the root of its folder."""
    if not output_dir.is_dir():
        return []
    checkpoints = [output_dir / f"checkpoint-{step}" for step in sorted(_steps(output_dir))]
    files = [output_dir / name for name in _RUN_FILES]
    events = output_dir.glob(f"{TENSORBOARD_FOLDER}/events.out.tfevents.*")
    return [entry for entry in (*checkpoints, *files, *events) if entry.exists()]


def find_checkpoint(path: Path) -> Path:
    """The checkpoint to resume from: `path` itself, or the newest whole one in that run folder.

    Raises:
        UserError: nothing there to resume from, or the checkpoint named is not whole.
    """
    if not path.is_dir():
        raise UserError(
            f"resume_from_checkpoint: {path} is no folder; name a checkpoint-N or a run"
        )
    if _CHECKPOINT.fullmatch(path.name) or (path / "optimizer.pt").is_file():
        if fault := find_fault(path):
            raise UserError(f"{path}: {fault}; resume from another checkpoint")
        return path
    faults: list[str] = []
    for step in sorted(_steps(path), reverse=True):
        folder = path / f"checkpoint-{step}"
        if not (fault := find_fault(folder)):
            for line in faults:
                print(f"note: passed over {line}", file=sys.stderr)
            return folder
        faults.append(f"{folder}: {fault}")
    found = "; ".join(faults) or "there is no checkpoint-N"
    raise UserError(f"{path}: nothing to resume from: {found}; leave resume_from_checkpoint out")


def find_fault(checkpoint: Path) -> str | None:
    """Say what keeps a checkpoint from being resumed from, or None when it is whole."""
    for name in (WEIGHTS_FILE, CONFIG_FILE, *_TORCH_FILES, STATE_FILE):
        if not (checkpoint / name).is_file():
            kind = "without weights, " if name == WEIGHTS_FILE else ""
            return f"{kind}{name} is missing"
    try:
        with safe_open(checkpoint / WEIGHTS_FILE, framework="pt"):
            pass
    except (SafetensorError, OSError):
        return f"{WEIGHTS_FILE} is damaged"
    for name in _TORCH_FILES:
        if not zipfile.is_zipfile(checkpoint / name):  # its directory stands at the end
            return f"{name} is damaged"
    try:
        trainer_state = read_trainer_state(checkpoint)
        place, name = _OURS
        is_ours = isinstance(trainer_state["global_step"], int) and name in trainer_state[place]
    except (ValueError, KeyError, TypeError):
        is_ours = False
    return None if is_ours else f"{STATE_FILE} is damaged, or of another program"


def rotate_checkpoints(output_dir: Path, limit: int | None, step: int) -> None:
    """Delete all but the newest `limit` checkpoints; the one of `step`, just saved, is the newest.

    Those beyond it are from before the run was resumed at an earlier step: they go first.
    """
    by_age = sorted(_steps(output_dir), key=lambda saved: (saved <= step, saved))
    for old in by_age[: -limit if limit else 0]:
        shutil.rmtree(output_dir / f"checkpoint-{old}")


def _steps(folder: Path) -> list[int]:
    names = (_CHECKPOINT.fullmatch(entry.name) for entry in folder.iterdir() if entry.is_dir())
    return [int(name[1]) for name in names if name]
