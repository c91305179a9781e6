"""The settings of the verb that uploads a tuned model."""

from typing import ClassVar, Literal

from pydantic import Field, field_validator

from glmtune.config.groups import NameText, PathText, Settings, conflict


class PushSettings(Settings):
    """Settings of `glmtune push`."""

    verb = "push"
    group: ClassVar[str] = "push"
    bare_words = ("folder",)
    folder: PathText = Field(
        description="run folder, checkpoint, adapter, or a folder that `glmtune export` or merge "
        "wrote"
    )
    repo_id: NameText = Field(description="name on the hub, owner/name")
    to: Literal["huggingface", "modelscope"] = Field(
        "huggingface",
        description="hub: huggingface.co (or HF_ENDPOINT), or ModelScope, which needs its client",
    )
    private: bool = Field(True, description="make the repository private")
    yes: bool = Field(False, description="upload; without it files, sizes and card are only shown")
    base: PathText | None = Field(
        None,
        description="folder or hub id of the base model, for the card (default: what the run or "
        "the adapter names)",
    )

    @field_validator("repo_id")
    @classmethod
    def has_owner(cls, value: str) -> str:
        """Accept owner/name."""
        owner, slash, name = value.partition("/")
        if not (owner and slash and name) or "/" in name:
            raise conflict(f"repo_id {value!r} is no owner/name", "repo_id")
        return value
