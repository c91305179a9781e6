"""All that is wrong with files of rows, in one pass: `validate`."""

from glmtune.data.validation.run import Validation, validate

__all__ = ["Validation", "validate"]
