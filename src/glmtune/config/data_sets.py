"""The settings of several files of rows in one data set."""

import os
from typing import Annotated, Any, Self

from pydantic import Field, PrivateAttr, field_validator, model_validator

from glmtune.config.groups import FormatSettings, Kind, PathText, Settings, conflict


class DataSet(FormatSettings):
    """A file of rows, and how much of it is used."""

    path: PathText = Field(description="the file, or FILE#500 for 500 of its rows")
    weight: float = Field(
        1, gt=0, le=1000, description="how often each row is used: 2 is twice, 0.5 every other one"
    )

    @property
    def file(self) -> str:
        """The path without the number of rows."""
        return self._parts[0]

    @property
    def num(self) -> int | None:
        """The number of rows to take; None for all."""
        return self._parts[1]

    @property
    def _parts(self) -> tuple[str, int | None]:
        file, mark, num = self.path.rpartition("#")
        if mark and file and num.isdecimal() and not os.path.exists(self.path):
            return file, int(num)
        return self.path, None

    @field_validator("path")
    @classmethod
    def takes_rows(cls, value: str) -> str:
        """Refuse FILE#0."""
        if value.rpartition("#")[2].strip("0") == "" and "#" in value and value[-1] == "0":
            raise conflict(f"{value} takes no row: write FILE#500 for 500 rows, or leave it out")
        return value


DataSets = Annotated[
    tuple[DataSet, ...],
    Kind("PATH,PATH", "paths, each of them FILE, FILE#500 or {path, weight, format, encoding}"),
]


class MixSettings(Settings):
    """Which rows of several files make up a data set."""

    group = "several files"
    datasets: DataSets = Field(
        (),
        description="files of rows instead of jsonl_path, with commas between, each as FILE or "
        "FILE#500 for 500 of its rows; in a recipe also as {path, weight, format, encoding}, where "
        "weight says how often each row is used",
    )
    replay: Annotated[PathText, Kind("SHARE|PATH", "a share, such as 0.05, or a file")] | None = (
        Field(
            None,
            description="share of the rows that the base's own answers to general questions make "
            "up, so that less is forgotten: the base answers once, and the answers are kept for "
            "other data sets; or a file of general rows",
        )
    )
    replay_share: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="share of the rows that a file of general rows makes up (default: 0.05)",
    )
    zh_share: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="share of Chinese among the rows that are Chinese or English; rows of the "
        "other language are left out to reach it (default: all rows)",
    )
    seed: int = Field(42, ge=0, lt=2**32, description="seed of the rows that are taken")
    _has_own_rows: bool = PrivateAttr(False)

    @field_validator("replay", mode="before")
    @classmethod
    def spell_share(cls, value: Any) -> Any:
        """Take a share as a number, as recipes have it."""
        return str(value) if isinstance(value, int | float) else value

    @property
    def own_share(self) -> float | None:
        """The share that the base's own answers make up; None where replay is a file."""
        try:
            return float(self.replay or "")
        except ValueError:
            return None

    @property
    def has_own_rows(self) -> bool:
        """Whether replay is a file of the base's own answers: of a format of its own, and used more
        than once where the share asks for more rows than there are."""
        return self._has_own_rows

    def with_own_rows(self, path: str) -> Self:
        """Settings whose general rows are a file of the base's own answers.

        Args:
            path: the file.
        """
        settings = self.model_copy(update={"replay": path, "replay_share": self.own_share})
        settings._has_own_rows = True
        return settings

    @model_validator(mode="before")
    @classmethod
    def name_first(cls, values: Any) -> Any:
        """Let jsonl_path be the first of the datasets, and refuse both."""
        if not isinstance(values, dict) or not (sets := values.get("datasets")):
            return values
        sets = sets.split(",") if isinstance(sets, str) else sets
        if isinstance(sets, list | tuple):
            sets = [{"path": one} if isinstance(one, str) else one for one in sets]
            first = sets[0].get("path") if isinstance(sets[0], dict) else sets[0].path
            values = {"jsonl_path": str(first)} | values  # a missing path is reported later
            if values["jsonl_path"] != str(first):
                raise conflict(
                    "jsonl_path and datasets both name the rows: set one", "jsonl_path", "datasets"
                )
        return values | {"datasets": sets}

    @model_validator(mode="after")
    def each_file_once(self) -> Self:
        """Refuse a file that is named twice, and settings without effect."""
        seen: dict[str, str] = {}
        for name, one in self.named_sets:
            real = os.path.realpath(one.file)
            if real in seen:
                raise conflict(
                    f"{one.file} is named twice ({seen[real]}, {name}): name it once, with a "
                    "weight, as in datasets: [{path: rows.json, weight: 2}]",
                    "datasets",
                    "replay",
                    "jsonl_path",
                )
            seen[real] = name
            if real == os.path.realpath(getattr(self, "save_path", "")):
                raise conflict(
                    f"save_path would overwrite {one.file}: name another", name, "save_path"
                )
        if self.replay_share is not None and not self.replay:
            raise conflict(
                f"replay_share has no effect without a file: set replay {self.replay_share:g}, for "
                "the base's own answers, or replay FILE",
                "replay_share",
            )
        if (share := self.own_share) is not None and self.replay_share is not None:
            raise conflict(
                f"replay {self.replay} and replay_share {self.replay_share:g} are both shares: "
                "set replay alone",
                "replay",
                "replay_share",
            )
        named = self.replay or ""
        is_percent = named.endswith("%") and not os.path.exists(named)
        if is_percent or (share is not None and not 0 < share < 1):
            raise conflict(
                f"replay {self.replay} is no share of the rows: set one between 0 and 1, such as "
                "0.05, or a file",
                "replay",
            )
        return self

    @property
    def named_sets(self) -> list[tuple[str, DataSet]]:
        """Every file, with the setting that names it; the one of general rows last."""
        main = self.datasets or (DataSet(path=getattr(self, "jsonl_path")),)  # noqa: B009
        name = "datasets" if self.datasets else "jsonl_path"
        is_file = self.replay is not None and self.own_share is None
        replay = [("replay", DataSet(path=self.replay))] if is_file else []
        return [*((name, one) for one in main), *replay]
