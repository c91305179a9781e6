"""The settings of the benchmarks."""

from typing import ClassVar, Literal

from pydantic import Field, field_validator

from glmtune.config.groups import (
    DecodingSettings,
    DeviceSettings,
    PathText,
    PlainText,
    Settings,
)
from glmtune.config.training import LayoutSettings, LoraSettings, TrainingDeviceSettings


class BenchSettings(Settings):
    """What the benchmarks share."""

    group: ClassVar[str] = "benchmark"
    bare_words = ()
    shape: Literal[
        "6b", "wide", "small", "chatglm3-6b", "glm-4-9b", "glm-4-9b-0414", "glm-edge-1.5b",
        "glm-small",
    ] = Field(
        "6b",
        description="sizes of the model, whose weights are random: nothing is downloaded; 6b is "
        "ChatGLM-6B, wide 2 of its layers of width 1,024 with the whole vocabulary, small 4 of "
        "width 256 with 4,096 ids; glm-small is as small, with GLM-4-0414's layers",
    )  # fmt: skip
    json_path: PathText | None = Field(None, description="JSON lines file to add the record to")


class BenchTrainSettings(BenchSettings, LayoutSettings, LoraSettings, TrainingDeviceSettings):
    """Settings of `glmtune bench train`."""

    verb = "bench train"
    group: ClassVar[str] = "benchmark"
    dataset_path: PathText | None = Field(
        None,
        description="tokenised rows (default: random ones, as long as Chinese alpaca rows are)",
    )
    steps: int = Field(10, ge=1, description="steps to time")
    warmup: int = Field(3, ge=0, description="steps before them, after the first")
    limits: bool = Field(True, description="time the matrix products alone, too")
    plain: bool = Field(True, description="time the reference path at six padded rows a step, too")
    compare: bool = Field(
        False, description="time transformers' model with PEFT, too (ChatGLM3-6B beside 6b)"
    )
    kernel_table: PathText | None = Field(None, description="file for a table of a step's kernels")


class BenchDecodeSettings(BenchSettings, DecodingSettings, DeviceSettings):
    """Settings of `glmtune bench decode`."""

    verb = "bench decode"
    group: ClassVar[str] = "benchmark"
    prompt_length: int = Field(64, ge=3, description="tokens of each prompt")
    max_new_tokens: int = Field(256, ge=2, description="tokens of each answer")
    batch_size: int = Field(1, ge=1, description="prompts answered at a time")
    compare: bool = Field(False, description="time transformers' generate, too")


class BenchServeSettings(BenchSettings, DecodingSettings, DeviceSettings):
    """Settings of `glmtune bench serve`."""

    verb = "bench serve"
    group: ClassVar[str] = "benchmark"
    base: PathText | None = Field(
        None, description="folder or hub id of a model to serve instead of a random one"
    )
    clients: int = Field(64, ge=1, description="clients that ask, each one request after another")
    seconds: float = Field(20, gt=0, description="time to measure, after a first request of each")
    pause: float = Field(
        0,
        ge=0,
        le=600,
        description="mean seconds that a client waits before each request, drawn at random; 0: all "
        "ask together",
    )
    prompt_length: int = Field(64, ge=3, description="tokens of each prompt")
    max_new_tokens: int = Field(256, ge=2, description="tokens of each answer")
    prompts: int = Field(
        16,
        ge=1,
        description="different prompts; each is also asked alone, and the answers compared",
    )
    adapters: int = Field(
        0, ge=0, description="random adapters; serve them mixed in a second server, too"
    )
    slots: int | None = Field(
        None, ge=1, le=1024, description="answers generated at a time (default: as many as clients)"
    )


class BenchMemorySettings(BenchSettings, LoraSettings, DeviceSettings):
    """Settings of `glmtune bench memory`."""

    verb = "bench memory"
    group: ClassVar[str] = "benchmark"
    steps: int = Field(10, ge=1, description="steps to take and time in each setting")
    warmup: int = Field(3, ge=0, description="steps before them")
    only: tuple[str, ...] | None = Field(
        None, description="settings to measure, of 4bit,8bit,recompute,packed (default: all)"
    )

    @field_validator("only", mode="before")
    @classmethod
    def split_settings(cls, value: object) -> object:
        """Accept "a,b" for ["a", "b"]."""
        return tuple(value.split(",")) if isinstance(value, str) else value


class BenchStartupSettings(Settings):
    """Settings of `glmtune bench startup`."""

    verb = "bench startup"
    group: ClassVar[str] = "benchmark"
    bare_words = ()
    repeats: int = Field(5, ge=1, description="rounds; the medians are reported")
    json_path: PathText | None = Field(None, description="JSON lines file to add the record to")


class ReproduceSettings(Settings):
    """Settings of `glmtune reproduce`."""

    verb = "reproduce"
    group: ClassVar[str] = "published work"
    bare_words = ("name",)
    name: PlainText | None = Field(None, description="one of the works (default: list them)")
