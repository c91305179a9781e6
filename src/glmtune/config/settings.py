"""The settings of each verb, with the names of transformers' TrainingArguments where those exist.

A verb's class is put together from groups (data, LoRA, optimiser, ...), each a class of its own,
so that a setting shared by verbs is described once and `--help` can print group by group. A field's
`description` is its help text; its type and bounds also word the error that a wrong value gets.
Configs are frozen: what was checked is what runs.
"""

import os
from typing import Annotated, ClassVar, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

ALL_LINEARS = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")
"""Every linear inside a ChatGLM-6B layer: what `lora_target: all` stands for."""

PathText = Annotated[str, StringConstraints(pattern=r"^[^\x00]+$")]
"""A path as text: not empty, and without NUL, which no file system takes."""


def conflict(text: str, *settings: str) -> PydanticCustomError:
    """An error about several settings at once; their names let the reader say where each stands."""
    return PydanticCustomError("conflict", "{text}", {"text": text, "settings": settings})


class Settings(BaseModel):
    """What all groups share.

    `group` is the heading of a class's fields in `--help`, `bare_words` names what a command line
    may give without a flag, `reads_and_writes` the two path settings that must differ.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, coerce_numbers_to_str=True
    )
    group: ClassVar[str] = ""
    bare_words: ClassVar[tuple[str, ...]] = ("recipe",)
    reads_and_writes: ClassVar[tuple[str, str] | None] = None

    @model_validator(mode="after")
    def keep_source(self) -> Self:
        """What a verb reads it does not overwrite."""
        if self.reads_and_writes:
            source, target = self.reads_and_writes
            read, written = getattr(self, source), getattr(self, target)
            if read and written and os.path.realpath(read) == os.path.realpath(written):
                raise conflict(f"{target} would overwrite {source}: name another", source, target)
        return self


# --- groups that several verbs share ---


class BaseModelSettings(Settings):
    """Which base model."""

    group: ClassVar[str] = "model"
    chatglm_path: PathText | None = Field(
        None,
        description="folder or hub id of ChatGLM-6B (default: the environment's GLMTUNE_MODEL, "
        "else what the run folder names, else the hub's)",
    )


class BadRowSettings(Settings):
    """What a row that cannot be used does."""

    group: ClassVar[str] = "rows"
    on_bad_row: Literal["fail", "skip"] = Field(
        "fail", description="stop at the first unusable row, or leave such rows out and list them"
    )


class DeviceSettings(Settings):
    """Where to compute, and in which number format."""

    group: ClassVar[str] = "device and precision"
    bf16: bool | None = Field(
        None, description="compute in bfloat16 (default: on a GPU that has it)"
    )
    fp16: bool = Field(False, description="compute in float16, which overflows sooner")
    use_cpu: bool = Field(False, description="leave the GPU alone")

    @model_validator(mode="after")
    def one_precision(self) -> Self:
        """float16 and bfloat16 exclude each other."""
        if self.fp16 and self.bf16:
            raise conflict("fp16 and bf16 are both true: choose one", "fp16", "bf16")
        return self


class AnswerSettings(Settings):
    """How answers are generated."""

    group: ClassVar[str] = "answers"
    per_device_eval_batch_size: int = Field(8, ge=1, description="records answered at a time")
    max_new_tokens: int = Field(150, ge=1, description="longest answer, in tokens")
    num_beams: int = Field(1, ge=1, description="beams of the search; 1 searches none")
    do_sample: bool = Field(False, description="draw tokens at random instead of the likeliest")
    temperature: float | None = Field(None, gt=0, description="above 1 flattens the draw")
    top_p: float | None = Field(
        None, gt=0, le=1, description="draw from the likeliest tokens that hold this probability"
    )
    top_k: int | None = Field(None, ge=1, description="draw from this many likeliest tokens")
    repetition_penalty: float | None = Field(
        None, gt=0, description="above 1 discourages tokens already used"
    )
    seed: int = Field(42, ge=0, lt=2**32, description="seed of the draw")

    @model_validator(mode="after")
    def sampling_is_on(self) -> Self:
        """Settings of the draw without a draw would be ignored in silence."""
        for name in ("temperature", "top_p", "top_k"):
            if not self.do_sample and getattr(self, name) is not None:
                raise conflict(
                    f"{name} has no effect while do_sample is false: set do_sample true, "
                    f"or leave {name} out",
                    name,
                    "do_sample",
                )
        return self


# --- convert ---


class ConvertConfig(BadRowSettings, BaseModelSettings):
    """Settings of `glmtune convert`."""

    group: ClassVar[str] = "data"
    reads_and_writes = ("data_path", "save_path")
    data_path: PathText = Field(description="alpaca records to read: .json (a list) or .jsonl")
    save_path: PathText = Field(
        description="JSONL file to write, a line of context and target per row"
    )


# --- tokenize ---


class TokenizeConfig(BadRowSettings, BaseModelSettings):
    """Settings of `glmtune tokenize`."""

    group: ClassVar[str] = "data"
    reads_and_writes = ("jsonl_path", "save_path")
    jsonl_path: PathText = Field(description="rows to read, as `glmtune convert` wrote them")
    save_path: PathText = Field(description="folder to write, for datasets.load_from_disk")
    max_seq_length: int = Field(
        200, ge=4, description="tokens kept of the context, and of the target; [gMASK] <sop> count"
    )
    skip_overlength: bool = Field(
        False, description="drop rows longer than max_seq_length instead of cutting them"
    )
    keep_empty: bool = Field(False, description="keep rows whose target is empty")
    num_threads: int | None = Field(
        None, ge=1, description="threads that encode (default: one per core)"
    )


# --- train ---


class TrainingDataSettings(Settings):
    """What is trained on, and how much of it."""

    group: ClassVar[str] = "data"
    dataset_path: PathText = Field(
        description="tokenised rows: the folder that `glmtune tokenize` wrote"
    )
    per_device_train_batch_size: int = Field(6, ge=1, description="rows per device and pass")
    gradient_accumulation_steps: int = Field(1, ge=1, description="passes per optimiser step")
    max_steps: int = Field(
        -1, ge=-1, description="optimiser steps; when above 0, num_train_epochs does not count"
    )
    num_train_epochs: float = Field(3.0, gt=0, description="times through the rows")
    train_sampling_strategy: Literal["random", "sequential"] = Field(
        "random", description="order of the rows"
    )
    eval_ratio: float = Field(
        0.0, ge=0, le=0.5, description="share of the rows held out for evaluation"
    )
    eval_steps: int | None = Field(
        None, ge=1, description="steps between evaluations (default: save_steps)"
    )
    per_device_eval_batch_size: int = Field(8, ge=1, description="rows per evaluation pass")
    seed: int = Field(42, ge=0, lt=2**32, description="seed of LoRA's start, dropout and the split")
    data_seed: int | None = Field(
        None, ge=0, lt=2**32, description="seed of the rows' order (default: seed)"
    )
    remove_unused_columns: bool = Field(
        False, description="accepted as the original command has it; no effect here"
    )


class LoraSettings(Settings):
    """The adapter."""

    group: ClassVar[str] = "LoRA"
    lora_rank: int = Field(8, ge=1, description="rank of the update")
    lora_alpha: int = Field(32, ge=1, description="the update is scaled by lora_alpha / lora_rank")
    lora_dropout: float = Field(0.1, ge=0, lt=1, description="dropout before the update")
    lora_target: tuple[str, ...] = Field(
        ("query_key_value",),
        min_length=1,
        description="linears that get an adapter, with commas between; all: "
        + ",".join(ALL_LINEARS),
    )

    @field_validator("lora_target", mode="before")
    @classmethod
    def split_names(cls, value: object) -> object:
        """Accept "a,b" for ["a", "b"], and "all"."""
        names = value.split(",") if isinstance(value, str) else value
        if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
            return value  # for pydantic to refuse
        stripped = tuple(name.strip() for name in names if name.strip())
        return ALL_LINEARS if stripped == ("all",) else stripped


class OptimiserSettings(Settings):
    """AdamW and its schedule."""

    group: ClassVar[str] = "optimiser"
    learning_rate: float = Field(1e-4, gt=0, description="highest learning rate")
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = Field(
        "linear", description="course of the learning rate after warm-up"
    )
    warmup_steps: float = Field(
        0, ge=0, description="steps of rising learning rate; below 1, that share of all steps"
    )
    weight_decay: float = Field(0.0, ge=0, description="AdamW's decay")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="memory of the mean")
    adam_beta2: float = Field(0.999, ge=0, lt=1, description="memory of the square")
    adam_epsilon: float = Field(1e-8, gt=0, description="keeps the division finite")
    max_grad_norm: float = Field(1.0, ge=0, description="gradients are clipped to it; 0: never")

    @model_validator(mode="after")
    def whole_steps(self) -> Self:
        """1.5 is neither a number of steps nor a share of them."""
        if self.warmup_steps > 1 and self.warmup_steps != int(self.warmup_steps):
            raise conflict(
                f"warmup_steps is {self.warmup_steps}: give whole steps, or a share below 1",
                "warmup_steps",
            )
        return self


class RunFolderSettings(Settings):
    """What the run leaves behind, and how it goes on."""

    group: ClassVar[str] = "run folder"
    output_dir: PathText = Field(
        description="folder for checkpoints, metrics and the recipe as run"
    )
    overwrite_output_dir: bool = Field(
        False, description="start anew in a folder that holds another run"
    )
    resume_from_checkpoint: Literal["true"] | PathText | None = Field(
        None,
        description="go on from this checkpoint; true: from the newest in output_dir",
    )
    save_steps: int = Field(1000, ge=1, description="steps between checkpoints")
    save_total_limit: int | None = Field(
        None, ge=1, description="checkpoints kept, the newest ones (default: all)"
    )
    logging_steps: int = Field(50, ge=1, description="steps between logged lines")
    report_to: Literal["tensorboard", "none", "all"] = Field(
        "tensorboard", description="where metrics go, beside metrics.jsonl"
    )
    disable_tqdm: bool = Field(False, description="plain lines instead of a progress bar")

    @field_validator("resume_from_checkpoint", mode="before")
    @classmethod
    def spell_bool(cls, value: object) -> object:
        """`true` is a word here, and `false` is to leave it out."""
        word = str(value).lower()
        return {"true": "true", "false": None}.get(word, value)


class TrainingDeviceSettings(DeviceSettings):
    """Where to compute, and how to fit there."""

    gradient_checkpointing: Literal["auto"] | bool = Field(
        "auto", description="recompute activations to save memory; auto: when memory asks for it"
    )


class TrainConfig(
    TrainingDataSettings,
    LoraSettings,
    OptimiserSettings,
    RunFolderSettings,
    BaseModelSettings,
    TrainingDeviceSettings,
):
    """Settings of `glmtune train`."""

    reads_and_writes = ("dataset_path", "output_dir")


# --- infer, compare ---


class RecordSettings(BadRowSettings):
    """Which records are answered."""

    group: ClassVar[str] = "data"
    data_path: PathText = Field(description="alpaca records to answer: .json (a list) or .jsonl")
    overwrite_output: bool = Field(
        False, description="answer anew what a half-done file already answers"
    )


class InferConfig(RecordSettings, AnswerSettings, BaseModelSettings, DeviceSettings):
    """Settings of `glmtune infer`."""

    group: ClassVar[str] = "data"
    reads_and_writes = ("data_path", "output_path")
    model_path: PathText | None = Field(
        None, description="run folder or adapter (default: the base model alone)"
    )
    output_path: PathText | None = Field(
        None,
        description="JSONL file of the answers (default: answers.jsonl in model_path)",
    )
    limit: int | None = Field(None, ge=1, description="answer this many records (default: all)")


class CompareConfig(RecordSettings, AnswerSettings, BaseModelSettings, DeviceSettings):
    """Settings of `glmtune compare`."""

    group: ClassVar[str] = "data"
    model_path: PathText = Field(description="run folder or adapter")
    output_dir: PathText | None = Field(
        None,
        description="folder for compare.md, .html and .jsonl (default: compare in model_path)",
    )
    limit: int | None = Field(20, ge=1, description="answer this many records; none: all")


# --- merge, adapters convert ---


class MergeConfig(BaseModelSettings):
    """Settings of `glmtune merge`."""

    group: ClassVar[str] = "data"
    reads_and_writes = ("model_path", "save_path")
    model_path: PathText = Field(description="run folder or adapter to merge")
    save_path: PathText = Field(
        description="folder for the merged model, which loads as a plain one"
    )


class ConvertAdapterConfig(Settings):
    """Settings of `glmtune adapters convert`."""

    group: ClassVar[str] = "data"
    bare_words = ("old", "new")
    reads_and_writes = ("old", "new")
    old: PathText = Field(description="folder of an adapter of 2023")
    new: PathText = Field(description="folder to write, in PEFT's form of today")


SETTINGS: dict[str, type[Settings]] = {
    "convert": ConvertConfig,
    "tokenize": TokenizeConfig,
    "train": TrainConfig,
    "infer": InferConfig,
    "compare": CompareConfig,
    "merge": MergeConfig,
    "adapters convert": ConvertAdapterConfig,
}
"""Verb -> its settings."""
