"""The settings of the verbs that look at an adapter after its training, without answering."""

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from glmtune.config.engines import SpreadSettings
from glmtune.config.groups import (
    ANY_ROWS,
    BadRowSettings,
    BaseModelSettings,
    DeviceSettings,
    FormatSettings,
    Kind,
    PathText,
    QuantisingSettings,
    SpecialSettings,
    conflict,
    spelled_truth,
)
from glmtune.config.training import LoraSettings

VersionText = Annotated[str, Field(pattern=r"^\d+\.\d+"), Kind("VERSION", "a version such as 0.31")]

CheckpointText = Annotated[
    str, Field(pattern=r"^(best|(checkpoint-)?\d+)$"), Kind("STEP|best", "a step, or best")
]


class LedgerSettings(QuantisingSettings, BaseModelSettings, DeviceSettings, SpreadSettings):
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


class ExportSettings(BaseModelSettings):
    """Settings of `glmtune export`."""

    verb = "export"
    group: ClassVar[str] = "export"
    bare_words = ("adapter",)
    reads_and_writes = ("adapter", "out")
    adapter: PathText = Field(
        description="run folder, checkpoint, adapter, or whole model such as a merged folder"
    )
    to: Literal["hf", "chatglm", "gguf", "vllm-adapter", "peft-old"] = Field(
        description="hf: a merged folder that transformers opens without glmtune; chatglm: merged, "
        "in the publisher's layout; gguf: for llama.cpp and Ollama; vllm-adapter: the adapter in "
        "vLLM's names; peft-old: the adapter with settings that PEFT 0.10 reads",
    )
    out: PathText | None = Field(
        None, description="folder to write (default: beside the run, named for it and the target)"
    )
    checkpoint: CheckpointText | None = Field(
        None, description="a checkpoint of the run, by its step or as best (default: the last)"
    )
    quant: Literal["f16", "q8_0", "f32"] | None = Field(
        None, description="number type of a GGUF file's matrices (default: f16)"
    )
    adapter_alone: bool = Field(
        False, description="write the adapter alone as GGUF, for llama.cpp's --lora on the base"
    )
    vllm_version: VersionText | None = Field(
        None,
        description="version of vLLM that is to serve, such as 0.31: linears have other names in "
        "some (default: the one installed here, else the newest)",
    )
    overwrite_output: bool = Field(
        False, description="replace a folder that an earlier export wrote"
    )

    @model_validator(mode="after")
    def keep_to_gguf(self) -> Self:
        """Refuse settings of GGUF files for another target."""
        if self.to != "gguf":
            for name in ("quant", "adapter_alone"):
                if getattr(self, name):
                    raise conflict(
                        f"{name} has an effect with --to gguf alone, not with --to {self.to}: "
                        "leave it out",
                        name, "to",
                    )  # fmt: skip
        if self.vllm_version and self.to != "vllm-adapter":
            raise conflict(
                "vllm_version has an effect with --to vllm-adapter alone, not with --to "
                f"{self.to}: leave it out",
                "vllm_version", "to",
            )  # fmt: skip
        if self.adapter_alone and self.quant == "q8_0":
            raise conflict(
                "adapter_alone is written in f32 or f16, not in q8_0: leave quant out",
                "adapter_alone", "quant",
            )  # fmt: skip
        return self


class DistilSettings(
    LoraSettings,
    FormatSettings,
    BadRowSettings,
    SpecialSettings,
    QuantisingSettings,
    BaseModelSettings,
    DeviceSettings,
):
    """Settings of `glmtune adapters distil`."""

    verb = "adapters distil"
    group: ClassVar[str] = "distil"
    bare_words = ("adapter",)
    reads_and_writes = ("adapter", "output_dir")
    adapter: PathText = Field(description="folder of a P-Tuning v2 prefix, or its hub id")
    data_path: PathText = Field(
        description=f"prompts that the prefixed model answers, {ANY_ROWS}; their own answers are "
        "not read"
    )
    output_dir: PathText = Field(description="folder for the LoRA adapter, new or empty")
    limit: int | None = Field(None, ge=2, description="take this many of them (default: all)")
    max_new_tokens: int = Field(150, ge=1, description="longest answer, in tokens")
    eval_ratio: float = Field(
        0.1,
        ge=0,
        le=0.5,
        description="share of the prompts that only measure the result; with 0 the prompts that "
        "were trained on do",
    )
    lora_target: tuple[str, ...] | None = Field(
        None,
        min_length=1,
        description="linears that get an adapter, with commas between (default: every one of a "
        "layer)",
    )
    lora_rank: int | None = Field(None, ge=1, description="rank of the update (default: 8)")
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="dropout before the update")
    learning_rate: float = Field(1e-3, gt=0, description="learning rate, which falls to 0")
    num_train_epochs: float = Field(10.0, gt=0, description="times through the prompts")
    per_device_train_batch_size: int = Field(8, ge=1, description="prompts of a step")
    seed: int = Field(42, ge=0, lt=2**32, description="seed of LoRA's start and of the order")
