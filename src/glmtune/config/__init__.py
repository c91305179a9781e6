"""Every setting of a run: typed, checked, read from a YAML recipe and from flags.

`settings` has one class per verb (`training` and `benchmarks` hold those of `train` and `bench`),
`groups` what verbs share, `names` knows what the settings were called before, `flags` splits a
command line and prints its help, `reading` turns recipe and flags into a checked config.
"""

from glmtune.config.reading import (
    change_setting,
    read_config,
    recipe_verbs,
    shared_setting,
    write_recipe,
)
from glmtune.config.settings import (
    SETTINGS,
    BenchDecodeSettings,
    BenchMemorySettings,
    BenchTrainSettings,
    ChatSettings,
    CheckSettings,
    CompareSettings,
    ConvertAdapterSettings,
    ConvertSettings,
    DemoSettings,
    DoctorSettings,
    InferSettings,
    MergeSettings,
    NewModelSettings,
    PlanSettings,
    ReplaySettings,
    TokenizeSettings,
    TrainSettings,
    ValidateSettings,
)

__all__ = [
    "SETTINGS",
    "BenchDecodeSettings",
    "BenchMemorySettings",
    "BenchTrainSettings",
    "ChatSettings",
    "CheckSettings",
    "CompareSettings",
    "ConvertAdapterSettings",
    "ConvertSettings",
    "DemoSettings",
    "DoctorSettings",
    "InferSettings",
    "MergeSettings",
    "NewModelSettings",
    "PlanSettings",
    "ReplaySettings",
    "TokenizeSettings",
    "TrainSettings",
    "ValidateSettings",
    "change_setting",
    "read_config",
    "recipe_verbs",
    "shared_setting",
    "write_recipe",
]
