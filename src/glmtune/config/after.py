"""The settings of the verbs that look at an adapter after its training, without answering."""

from typing import ClassVar

from pydantic import Field, field_validator

from glmtune.config.groups import (
    ANY_ROWS,
    BaseModelSettings,
    DeviceSettings,
    FormatSettings,
    PathText,
    QuantisingSettings,
    spelled_truth,
)


class LedgerSettings(QuantisingSettings, BaseModelSettings, DeviceSettings):
    """Settings of `glmtune ledger`."""

    verb = "ledger"
    group: ClassVar[str] = "ledger"
    bare_words = ("adapter",)
    adapter: PathText = Field(description="run folder or checkpoint whose training rows to list")
    limit: int = Field(10, ge=0, description="print this many rows of each kind")
    json_path: PathText | None = Field(
        None, description="JSON file of the rows (default: ledger.json beside the adapter)"
    )


class DialSettings(FormatSettings, QuantisingSettings, BaseModelSettings, DeviceSettings):
    """Settings of `glmtune adapters dial`."""

    verb = "adapters dial"
    group: ClassVar[str] = "dial"
    bare_words = ("adapter",)
    adapter: PathText = Field(description="run folder or adapter whose update is scaled")
    data_path: PathText | None = Field(
        None,
        description=f"rows to gain on, {ANY_ROWS} (default: those that the adapter's run held out)",
    )
    limit: int | None = Field(200, ge=1, description="take this many of them; none: all")
    answers: bool = Field(
        False, description="answer them at each scale as well, and choose by chrF of the answers"
    )
    max_new_tokens: int = Field(150, ge=1, description="longest answer, in tokens")
    general_set: bool | PathText = Field(
        True,
        description="general questions that show the price: true for those of the base's folder, "
        "else our own; a .jsonl file of yours in the same form; false for none",
    )
    output_dir: PathText | None = Field(
        None, description="folder for dial.json and dial.png (default: beside the adapter)"
    )
    write: PathText | None = Field(
        None, description="folder for a copy of the adapter at the recommended scale"
    )

    _spell_general_set = field_validator("general_set", mode="before")(spelled_truth)
