"""Free space on disk, checked before anything is written."""

import shutil
from pathlib import Path

from glmtune.errors import UserError

MEGABYTE = 10**6


def free_bytes(folder: Path) -> int:
    """Free bytes on the disk of a folder that exists, or of its nearest existing parent."""
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    return shutil.disk_usage(there).free


def check_room(folder: Path, needed: int, what: str, fix: str) -> None:
    """Make sure that a folder's disk has space for something.

    Args:
        folder: where it will be written; it, or a folder above it, exists.
        needed: bytes needed.
        what: what needs them, as the start of a sentence that ends in a verb.
        fix: what to do about it.

    Raises:
        UserError: fewer bytes are free.
    """
    free = free_bytes(folder)
    if free < needed:
        raise UserError(
            f"{folder}: {free / MEGABYTE:,.0f} MB are free, but {what} {needed / MEGABYTE:,.0f} "
            f"MB; {fix}"
        )
