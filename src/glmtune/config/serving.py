"""The settings of the server."""

import os
import re
from typing import ClassVar, Self

from pydantic import Field, field_validator, model_validator

from glmtune.config.groups import (
    AnsweringWeightSettings,
    BaseModelSettings,
    DeviceSettings,
    NameText,
    PathText,
    PlainText,
    Settings,
    conflict,
    split_commas,
)

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
RESERVED = ("base", "both")
LOOPBACK = ("127.0.0.1", "localhost", "::1")
KEY_VARIABLE = "GLMTUNE_API_KEY"


class AddressSettings(Settings):
    """Where the server listens, and to whom."""

    group: ClassVar[str] = "address and safety"
    host: NameText = Field(
        "127.0.0.1",
        description="address to listen at; one that other machines reach needs an api_key, or "
        "insecure true",
    )
    port: int = Field(8000, ge=0, le=65535, description="port to listen at; 0 takes a free one")
    api_key: PlainText | None = Field(
        None,
        description="what clients have to send as their key (default: the environment's "
        f"{KEY_VARIABLE}, which unlike a flag stays out of the shell's history and of ps)",
    )
    insecure: bool = Field(
        False, description="listen at an address that others reach without an api_key"
    )
    allow_origin: tuple[str, ...] | None = Field(
        None,
        description="origins of other web pages that may ask, such as https://a.example, with "
        "commas between (default: none but the server's own page)",
    )

    _split_origins = field_validator("allow_origin", mode="before")(split_commas)


class LimitSettings(Settings):
    """What a request may cost."""

    group: ClassVar[str] = "limits"
    slots: int | None = Field(
        None,
        ge=1,
        le=1024,
        description="answers generated at a time (default: 64 on a GPU, 32 on a CPU)",
    )
    max_waiting: int = Field(
        512, ge=0, description="answers that may wait for a slot; further requests are refused"
    )
    max_prompt_tokens: int | None = Field(
        None, ge=1, description="longest prompt, in tokens (default: the model's positions)"
    )
    max_body_bytes: int = Field(1 << 20, ge=1024, description="longest body of a request, in bytes")
    max_seconds: float = Field(600, gt=0, description="longest time from a request to its end")
    grace: float = Field(
        30, ge=0, description="seconds that open answers get to end after SIGTERM or Ctrl+C"
    )


class ServeSettings(
    AddressSettings,
    LimitSettings,
    AnsweringWeightSettings,
    BaseModelSettings,
    DeviceSettings,
):
    """Settings of `glmtune serve`; defaults of sampling are those of `chat`."""

    verb = "serve"
    group: ClassVar[str] = "server"
    adapter: tuple[str, ...] | None = Field(
        None,
        min_length=1,
        description="adapters to serve beside the base: NAME=FOLDER each, or a folder alone, whose "
        "name it then has; several with commas between or as several flags",
    )
    run: PathText | None = Field(
        None,
        description="run to show at /run, live while it trains: its output_dir, a checkpoint, or "
        "the out of tune; without base and adapter no model is loaded (default: the run that an "
        "adapter lies in)",
    )
    max_new_tokens: int = Field(
        512, ge=1, description="longest answer of a request that does not say, in tokens"
    )
    temperature: float = Field(
        0.95, ge=0, le=2, description="temperature of a request that does not say"
    )
    top_p: float = Field(0.7, gt=0, le=1, description="top_p of a request that does not say")

    _split_adapters = field_validator("adapter", mode="before")(split_commas)

    @field_validator("adapter")
    @classmethod
    def know_names(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        """Accept NAME=FOLDER, each name once."""
        names = []
        for word in value or ():
            name, folder = _named(word)
            if not folder or not _NAME.fullmatch(name):
                raise conflict(
                    f"adapter {word!r:.80} should be NAME=FOLDER, such as mine=runs/mine, the name "
                    "of letters, digits, dots, dashes and _",
                    "adapter",
                )
            if name in RESERVED:
                raise conflict(f"adapter {word!r:.80}: {name} is taken; choose a name", "adapter")
            names.append(name)
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise conflict(f"two adapters are named {twice}; rename one", "adapter")
        return value

    @model_validator(mode="after")
    def is_safe(self) -> Self:
        """Refuse to listen to other machines without a key."""
        if self.decode_compile and self.adapter:
            raise conflict(
                "decode_compile does not go with adapters, each row of a batch has its own; leave "
                "one of them out",
                "decode_compile",
                "adapter",
            )
        return self

    @property
    def shows_run_alone(self) -> bool:
        """Whether no model is served, just a run."""
        return self.run is not None and self.base is None and not self.adapter

    @property
    def adapters(self) -> dict[str, str]:
        """Name -> folder."""
        return dict(map(_named, self.adapter or ()))


def _named(word: str) -> tuple[str, str]:
    """Name and folder of an adapter, which without a name has its folder's."""
    name, equals, folder = word.partition("=")
    return (name, folder) if equals else (os.path.basename(os.path.normpath(word)), word)
