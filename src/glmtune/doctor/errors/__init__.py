"""Known error messages, with the fix of each; docs/errors.md is generated from them."""

from glmtune.doctor.errors.first_twenty import FIRST_TWENTY
from glmtune.doctor.errors.loading import LOADING
from glmtune.doctor.errors.machine import MACHINE
from glmtune.doctor.errors.rows import ROWS
from glmtune.doctor.errors.table import KnownError
from glmtune.doctor.errors.training import TRAINING

__all__ = ["KNOWN_ERRORS", "KnownError"]

KNOWN_ERRORS: tuple[KnownError, ...] = (*FIRST_TWENTY, *LOADING, *ROWS, *TRAINING, *MACHINE)
"""All known errors, in the order of docs/errors.md."""
