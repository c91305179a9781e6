"""Names of other trainers, of our other verbs, and deprecated ones, and how each is handled."""

from glmtune.config.foreign.answers import ANSWERS
from glmtune.config.foreign.data import DATA
from glmtune.config.foreign.fates import Foreign
from glmtune.config.foreign.models import MODELS
from glmtune.config.foreign.training import TRAINING_NAMES
from glmtune.config.foreign.training_arguments import TRAINING_ARGUMENTS

TABLE: tuple[Foreign, ...] = (
    *MODELS,
    *DATA,
    *TRAINING_NAMES,
    *ANSWERS,
    *TRAINING_ARGUMENTS,
)
"""All foreign names, each once."""

FOREIGN: dict[str, Foreign] = {row.name: row for row in TABLE}
"""Name -> the projects that use it, and how it is handled."""
