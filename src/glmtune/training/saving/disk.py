"""Room on the disk: what checkpoints take is known before the first of them is written."""

import shutil
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

from glmtune.errors import UserError

MEGABYTE = 10**6
# AdamW keeps two numbers beside each weight, all of them float32.
BYTES_PER_WEIGHT = 3 * 4
_BYTES_PER_TENSOR = 3 * 700  # names and headers, in each of the three places
_BYTES_PER_PROCESS = 8_000  # its random state
_BYTES_PER_RECORD = 400  # a record of trainer_state.json, with all its numbers
_BYTES_BESIDE = 20_000


def checkpoint_bytes(weights: Iterable[Tensor], num_processes: int, num_records: int) -> int:
    """What a checkpoint takes at most: adapter, optimiser, random states, records.

    Args:
        weights: what trains.
        num_processes: how many random states there are.
        num_records: records that `trainer_state.json` holds.
    """
    sizes = [weight.numel() for weight in weights]
    return (
        BYTES_PER_WEIGHT * sum(sizes)
        + _BYTES_PER_TENSOR * len(sizes)
        + _BYTES_PER_PROCESS * num_processes
        + _BYTES_PER_RECORD * num_records
        + _BYTES_BESIDE
    )


def most_new_checkpoints(num_saves: int, num_there: int, limit: int | None) -> int:
    """How many more checkpoints than now there are at most at the same time.

    With a limit there is one more for a moment, since the oldest goes when the newest is whole.

    Args:
        num_saves: saves to come.
        num_there: checkpoints in the folder already.
        limit: how many are kept; None for all.
    """
    if limit is None or not num_saves:
        return num_saves
    return max(1, min(num_saves, limit + 1 - num_there))


def check_room(folder: Path, needed: int, what: str, fix: str) -> None:
    """Raise UserError where a folder's disk has fewer bytes free than are needed for something.

    Args:
        folder: where it is to lie; it, or a folder above it, exists.
        needed: bytes.
        what: names what takes them.
        fix: what to do about it.
    """
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    free = shutil.disk_usage(there).free
    if free < needed:
        raise UserError(
            f"{folder}: {free / MEGABYTE:,.0f} MB are free, but {what} {needed / MEGABYTE:,.0f} "
            f"MB; {fix}"
        )
