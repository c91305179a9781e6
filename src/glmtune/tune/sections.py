"""The settings of each stage of `glmtune tune`, derived from those of the command."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from glmtune.config.groups import Settings
from glmtune.config.settings import (
    CheckSettings,
    CompareSettings,
    ConvertSettings,
    TokenizeSettings,
    TrainSettings,
    TuneSettings,
    ValidateSettings,
)
from glmtune.run_files import COMPARE_FOLDER, TUNE_RUN

VerbSettings = TypeVar("VerbSettings", bound=Settings)

ROWS_FILE = "rows.jsonl"
ROWS_FOLDER = "rows"
QUESTIONS_FILE = "questions.json"
CHECK_FILE = "check.json"
MERGED_FOLDER = "merged"
VERBS_FILE = "tune.yaml"
"""The recipe, with a section for each verb."""

# A run is logged a hundred times, and evaluated and saved twenty times; a long one more often.
NUM_LOGGED, MOST_LOGGING_STEPS = 100, 10
NUM_SAVED, MOST_SAVE_STEPS = 20, 1000
CHECKPOINTS_KEPT = 2

# The result of a stage does not depend on these; files that they name are known by content.
_WITHOUT_EFFECT = {
    "data_path", "base", "use_cpu", "eval_ratio", "eval_steps", "save_steps",
    "save_total_limit", "logging_steps", "report_to", "disable_tqdm", "max_hours", "eval_answers",
    "overwrite_output_dir", "resume_anyway",
}  # fmt: skip


@dataclass(frozen=True)
class Sections:
    """The settings of the verbs."""

    given: TuneSettings
    base: str
    """Folder or hub id of the base model."""

    def path(self, name: str) -> str:
        """The path of a file or folder in `out`."""
        return str(Path(self.given.out, name))

    def _settings(self, cls: type[VerbSettings], **own: Any) -> VerbSettings:
        """A verb's settings: those that the user gave, and `own`. The others stay unset."""
        names = self.given.model_fields_set & cls.model_fields.keys()
        return cls(**(self.given.model_dump(include=names) | own))

    def validate(self) -> ValidateSettings:
        """Settings of `validate`."""
        return self._settings(ValidateSettings, files=(self.given.data_path,))

    def convert(self) -> ConvertSettings:
        """Settings of `convert`."""
        return self._settings(ConvertSettings, save_path=self.path(ROWS_FILE))

    def tokenize(self, max_seq_length: int, are_texts: bool = False) -> TokenizeSettings:
        """Settings of `tokenize`, which reads what `convert` wrote, in UTF-8.

        Texts alone are split unless the user has said that long rows are dropped.
        """
        drops = self.given.skip_overlength
        if are_texts and "skip_overlength" not in self.given.model_fields_set:
            drops = False
        return TokenizeSettings(
            jsonl_path=self.path(ROWS_FILE),
            save_path=self.path(ROWS_FOLDER),
            base=self.base,
            max_seq_length=max_seq_length,
            skip_overlength=drops,
        )

    def eval_ratio(self, num_rows: int) -> float:
        """The share of rows that is held out; 0 for a single row."""
        return self.given.eval_ratio if num_rows > 1 else 0.0

    def train(self, num_rows: int) -> TrainSettings:
        """Settings of `train` on a data set of `num_rows` rows."""
        given = self.given
        batch = given.per_device_train_batch_size * given.passes_of_all(1)
        num_steps = given.max_steps
        if num_steps <= 0:  # packs have fewer
            num_steps = math.ceil(num_rows * given.num_train_epochs / batch)
        save_steps = max(1, min(MOST_SAVE_STEPS, num_steps // NUM_SAVED))
        logging_steps = max(1, min(MOST_LOGGING_STEPS, num_steps // NUM_LOGGED))
        return self._settings(
            TrainSettings,
            dataset_path=self.path(ROWS_FOLDER),
            output_dir=self.path(TUNE_RUN),
            base=self.base,
            eval_ratio=self.eval_ratio(num_rows),
            save_steps=given.save_steps or save_steps,
            logging_steps=given.logging_steps or logging_steps,
            save_total_limit=given.save_total_limit or CHECKPOINTS_KEPT,
            overwrite_output_dir=False,
        )

    def check(self, num_rows: int) -> CheckSettings:
        """Settings of `check`, which asks trained rows if none is held out."""
        return self._settings(
            CheckSettings,
            adapter=self.path(TUNE_RUN),
            base=self.base,
            data_path=None if self.eval_ratio(num_rows) else self.path(QUESTIONS_FILE),
            limit=CheckSettings.model_fields["limit"].default,
            json_path=self.path(CHECK_FILE),
        )

    def compare(self) -> CompareSettings:
        """Settings of `compare`."""
        return self._settings(
            CompareSettings,
            data_path=self.path(QUESTIONS_FILE),
            adapter=self.path(TUNE_RUN),
            base=self.base,
            output_dir=self.path(COMPARE_FOLDER),
            on_bad_row="skip",  # those that leave no room for an answer
            encoding=None,
            limit=self.given.limit,
            general_set=self.given.general_set == "auto" or self.given.general_set,
        )

    def in_effect(self, cls: type[Settings]) -> dict[str, Any]:
        """The values that a verb's result depends on, as JSON returns them."""
        names = (cls.model_fields.keys() & TuneSettings.model_fields.keys()) - _WITHOUT_EFFECT
        if cls is CheckSettings:
            names.discard("limit")  # which is that of `compare`
        if cls is TrainSettings:
            names.discard("general_set")  # which is looked at and not trained on
        return json.loads(json.dumps({name: getattr(self.given, name) for name in sorted(names)}))


def changed(settings: VerbSettings, changes: Mapping[str, Any]) -> VerbSettings:
    """Copy settings with changes; what was not set stays unset."""
    return type(settings)(**(settings.model_dump(exclude_unset=True) | dict(changes)))
