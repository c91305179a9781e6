"""Restore a checkpoint's optimiser, schedule and scaler, after checking what the files hold."""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from glmtune.errors import UserError
from glmtune.models.torch_files import read_torch_file


def restore(target: Any, path: Path) -> None:
    """Load a file's content into the optimiser, schedule or scaler whose state it should be.

    Raises:
        UserError: the file is damaged, or its content is not that state: values of other types.
    """
    fresh, content = target.state_dict(), read_torch_file(path)
    try:
        target.load_state_dict(content)
        if not _is_alike(fresh, target.state_dict()):
            raise ValueError("its values are of other kinds")
    except Exception as error:  # each kind of state raises its own errors
        raise foreign_state(path, error) from error


def _is_alike(ours: Any, theirs: Any) -> bool:
    """Whether nested values have the same keys as ours, and values of the same types."""
    if isinstance(ours, dict):
        return isinstance(theirs, dict) and all(
            key in theirs and _is_alike(value, theirs[key]) for key, value in ours.items()
        )
    if isinstance(ours, list | tuple):
        fits = type(ours) is type(theirs) and len(ours) == len(theirs)
        return fits and all(map(_is_alike, ours, theirs))
    if isinstance(ours, int | float) and not isinstance(ours, bool):
        return isinstance(theirs, int | float) and math.isfinite(theirs)
    return type(ours) is type(theirs)


def check_moments(optimizer: Optimizer, path: Path) -> None:
    """Make sure that each weight's moments have its shape, which torch notices only in a step.

    Raises:
        UserError: a shape differs; the message names `path` as the source.
    """
    for weight in optimizer.param_groups[0]["params"]:
        moments = optimizer.state.get(weight, {})
        shapes = {"step": torch.Size([]), "exp_avg": weight.shape, "exp_avg_sq": weight.shape}
        for name, shape in shapes.items() if moments else ():
            found = moments.get(name)
            if not (
                isinstance(found, Tensor) and found.shape == shape and found.dtype.is_floating_point
            ):
                raise foreign_state(path, f"{name} of a weight of shape {list(weight.shape)}")


def restore_optimizer(optimizer: Optimizer, path: Path) -> None:
    """Restore an optimiser's moments; its learning rates and the like stay as they are.

    Raises:
        UserError: see `restore` and `check_moments`.
    """
    groups = [dict(group) for group in optimizer.param_groups]
    restore(optimizer, path)
    check_moments(optimizer, path)
    for group, present in zip(optimizer.param_groups, groups, strict=True):
        group.update(present)


def restore_schedule(schedule: LambdaLR, path: Path) -> None:
    """Restore a schedule's step; the optimiser then has the present settings' rate at that step.

    Raises:
        UserError: see `restore`.
    """
    base_lrs = schedule.base_lrs
    restore(schedule, path)
    schedule.base_lrs = base_lrs
    for group, base, share in zip(
        schedule.optimizer.param_groups, base_lrs, schedule.lr_lambdas, strict=True
    ):
        group["lr"] = base * share(schedule.last_epoch)


def foreign_state(path: Path, why: object) -> UserError:
    """The error of a file that holds another run's state, or none at all."""
    reason = " ".join(str(why).split())[:200]
    return UserError(f"{path}: is not this run's state ({reason}); resume from another checkpoint")
