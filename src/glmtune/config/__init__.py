"""Every setting of a run: typed, checked, read from a YAML recipe and from flags.

`settings` has one class per verb, `groups` what those are made of, `names` knows what the settings
were called before, `flags` splits a command line and prints its help, `reading` turns recipe and
flags into a checked config.
"""

from glmtune.config.reading import read_config, write_recipe
from glmtune.config.settings import (
    SETTINGS,
    BenchDecodeConfig,
    CompareConfig,
    ConvertAdapterConfig,
    ConvertConfig,
    DemoConfig,
    InferConfig,
    MergeConfig,
    NewModelConfig,
    TokenizeConfig,
    TrainConfig,
)

__all__ = [
    "SETTINGS",
    "BenchDecodeConfig",
    "CompareConfig",
    "ConvertAdapterConfig",
    "ConvertConfig",
    "DemoConfig",
    "InferConfig",
    "MergeConfig",
    "NewModelConfig",
    "TokenizeConfig",
    "TrainConfig",
    "read_config",
    "write_recipe",
]
