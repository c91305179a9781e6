"""The settings of `glmtune train`, group by group."""

import os
from typing import ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from glmtune.config.groups import (
    ANY_ROWS,
    BadRowSettings,
    BaseModelSettings,
    DeviceSettings,
    FormatSettings,
    NameText,
    PathText,
    QuantisingSettings,
    Settings,
    conflict,
    spelled_truth,
    split_commas,
)
from glmtune.errors import UserError


class LayoutSettings(Settings):
    """How many rows a pass takes, and how they are laid out."""

    group: ClassVar[str] = "rows of a step"
    per_device_train_batch_size: int = Field(6, ge=1, description="rows per device and pass")
    layout: Literal["auto", "packed", "exact", "padded"] = Field(
        "auto",
        description="packed: rows end to end, as many as fit into tokens_per_step tokens; exact: "
        "per_device_train_batch_size rows end to end; padded: as many, filled up to the longest; "
        "auto: on a GPU packed, or exact where per_device_train_batch_size and max_steps are both "
        "given; on a CPU padded",
    )
    tokens_per_step: int | None = Field(
        None,
        ge=64,
        multiple_of=64,
        description="tokens of a pack, which is a pass of one device (default: what its memory "
        "holds, at most 8192)",
    )

    @model_validator(mode="after")
    def packs_have_a_length(self) -> Self:
        """Only packs have a length in tokens; other layouts take rows by their number."""
        if self.tokens_per_step and self.layout in ("exact", "padded"):
            raise conflict(
                f"tokens_per_step is the length of packs, but layout is {self.layout}: leave one "
                "of them out",
                "tokens_per_step",
                "layout",
            )
        return self


class StepSettings(Settings):
    """How much is trained on, in which order, and what is held out of it."""

    group: ClassVar[str] = "data"
    gradient_accumulation_steps: int = Field(
        1, ge=1, description="passes per optimiser step, of each process"
    )
    passes_per_step: int | None = Field(
        None,
        ge=1,
        description="passes per optimiser step of all processes together, which take equal parts: "
        "with it a run has the same steps on any number of GPUs (default: what "
        "gradient_accumulation_steps gives each)",
    )
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
        None, ge=1, description="steps between evaluations (default: with each checkpoint)"
    )
    general_set: Literal["auto"] | bool | PathText = Field(
        "auto",
        description="general questions scored before the first step and at every evaluation, which "
        "show what the tuning costs: true for those of the base's folder, else our own; a .jsonl "
        "file of yours in the same form; false for none; auto: where rows are held out and the "
        "run is long enough to make them cheap",
    )
    per_device_eval_batch_size: int = Field(8, ge=1, description="rows per evaluation pass")
    seed: int = Field(42, ge=0, lt=2**32, description="seed of LoRA's start, dropout and the split")
    data_seed: int | None = Field(
        None, ge=0, lt=2**32, description="seed of the rows' order (default: seed)"
    )

    _spell_general_set = field_validator("general_set", mode="before")(spelled_truth)

    @model_validator(mode="after")
    def passes_are_counted_once(self) -> Self:
        """Passes are given for each process or for all."""
        if self.passes_per_step and self.gradient_accumulation_steps > 1:
            raise conflict(
                "passes_per_step counts the passes of all processes, gradient_accumulation_steps "
                "those of each: leave one of them out",
                "passes_per_step",
                "gradient_accumulation_steps",
            )
        return self

    def passes_of_all(self, num_processes: int) -> int:
        """Passes of an optimiser step, of a number of processes together.

        Raises:
            UserError: they cannot have equal parts of `passes_per_step`.
        """
        passes = self.passes_per_step
        if passes is None:
            return num_processes * self.gradient_accumulation_steps
        if passes % num_processes:
            raise UserError(
                f"passes_per_step: {num_processes} processes cannot have equal parts of {passes} "
                f"passes: start {divisors(passes)} of them"
            )
        return passes


def divisors(number: int) -> str:
    """The numbers that divide a number, as text: `1, 2 or 4`."""
    *most, last = [str(n) for n in range(1, number + 1) if number % n == 0]
    return f"{', '.join(most)} or {last}" if most else last


class TrainingDataSettings(StepSettings):
    """The rows to train on, and for how long."""

    group: ClassVar[str] = "data"
    dataset_path: PathText = Field(
        description="tokenised rows: the folder that `glmtune tokenize` wrote"
    )
    eval_dataset_path: tuple[PathText, ...] | None = Field(
        None,
        min_length=1,
        description="folders of rows that are only evaluated on, with commas between, each perhaps "
        "with a name, NAME=FOLDER, under which its loss is logged (default: none)",
    )

    _split_folders = field_validator("eval_dataset_path", mode="before")(split_commas)


class LoraSettings(Settings):
    """The adapter."""

    group: ClassVar[str] = "LoRA"
    lora_rank: int | None = Field(
        None,
        ge=1,
        description="rank of the update (default: the model family's own, as `glmtune plan` shows)",
    )
    lora_alpha: float = Field(
        32, gt=0, description="the update is scaled by lora_alpha / lora_rank"
    )
    lora_dropout: float = Field(0.1, ge=0, lt=1, description="dropout before the update")
    lora_target: tuple[str, ...] | None = Field(
        None,
        min_length=1,
        description="linears that get an adapter, with commas between, or all for every one of a "
        "layer (default: the model family's own, as `glmtune plan` shows)",
    )

    @field_validator("lora_alpha")
    @classmethod
    def keep_whole(cls, value: float) -> float:
        """A whole number is kept as one, as PEFT writes it."""
        return int(value) if value == int(value) else value

    @field_validator("lora_target", mode="before")
    @classmethod
    def split_names(cls, value: object) -> object:
        """Accept "a,b", or a list as text, for ["a", "b"]; and "all"."""
        names = value.split(",") if isinstance(value, str) else value
        if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
            return value  # pydantic refuses it
        stripped = tuple(dict.fromkeys(filter(None, (name.strip(" []\"'") for name in names))))
        return ("all",) if stripped == ("all-linear",) else stripped


class BeginningSettings(Settings):
    """The adapter that a run begins with."""

    group: ClassVar[str] = "LoRA"
    adapter: PathText | None = Field(
        None,
        description="run folder or adapter to continue training, with its rank, alpha and linears: "
        "its weights alone, with a new optimiser and schedule (default: a new adapter)",
    )


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


class RunRecordSettings(Settings):
    """How long a run is, and what it logs and saves."""

    group: ClassVar[str] = "run folder"
    overwrite_output_dir: bool = Field(
        False, description="start anew in a folder that holds another run"
    )
    resume_anyway: bool = Field(
        False,
        description="resume even where model, tokenizer, data or recipe are not those of the "
        "checkpoint",
    )
    max_hours: float | None = Field(
        None, gt=0, description="stop after N hours, loading included, with a checkpoint"
    )
    save_total_limit: int | None = Field(
        None, ge=1, description="checkpoints kept, the newest ones and the best (default: all)"
    )
    eval_answers: int = Field(
        4,
        ge=0,
        description="held-out questions that are answered at each evaluation, into samples.jsonl, "
        "which `glmtune serve --run` shows; 0 for none",
    )
    report_to: Literal["tensorboard", "none", "all"] = Field(
        "tensorboard", description="where metrics go, beside metrics.jsonl"
    )
    disable_tqdm: bool = Field(False, description="plain lines instead of a progress bar")


class RunFolderSettings(RunRecordSettings):
    """What the run writes, and how it is resumed."""

    group: ClassVar[str] = "run folder"
    output_dir: PathText = Field(
        description="folder for checkpoints, metrics and the recipe as run"
    )
    resume_from_checkpoint: Literal["true", "auto"] | PathText | None = Field(
        None,
        description="resume from this checkpoint; true: from the newest in output_dir; auto: the "
        "same where there is one, else start, for jobs that are started again",
    )
    save_strategy: Literal["steps", "epoch"] = Field(
        "steps",
        description="when checkpoints come, beside that of the last step: every save_steps, or "
        "after each epoch",
    )
    save_steps: int = Field(1000, ge=1, description="steps between checkpoints")
    logging_steps: int = Field(50, ge=1, description="steps between logged lines")
    early_stopping: int | None = Field(
        None,
        ge=1,
        description="end the run when N evaluations have followed the best one, as output_dir/best "
        "chooses it (default: never)",
    )

    @field_validator("resume_from_checkpoint", mode="before")
    @classmethod
    def spell_bool(cls, value: object) -> object:
        """`true` and `auto` are kept as keywords, and `false` means unset."""
        word = str(value).lower()
        return {"true": "true", "auto": "auto", "false": None}.get(word, value)


class TrainingDeviceSettings(DeviceSettings, QuantisingSettings):
    """Where to compute, and how to fit into memory."""

    base_dtype: Literal["auto", "fp8"] = Field(
        "auto",
        description="fp8: the frozen linears in float8, on Hopper and newer GPUs, a third faster; "
        "auto: in the compute type",
    )
    gradient_checkpointing: Literal["auto"] | bool = Field(
        "auto",
        description="recompute activations to save memory; auto: of as few layers as memory asks "
        "for",
    )

    @model_validator(mode="after")
    def round_once(self) -> Self:
        """float8 and bitsandbytes' bits exclude each other."""
        if self.base_dtype == "fp8" and self.quantization_bit:
            raise conflict(
                f"base_dtype fp8 and quantization_bit {self.quantization_bit} are two ways of "
                "holding the same weights: choose one",
                "base_dtype",
                "quantization_bit",
            )
        return self


class ProcessSettings(TrainingDeviceSettings):
    """What each of several processes holds."""

    shard_base: bool = Field(
        False,
        description="of several processes, each holds a share of the base's weights, and a layer "
        "is gathered when it is computed (FSDP2): for a base that does not fit on one GPU",
    )

    @model_validator(mode="after")
    def shard_what_can_be_gathered(self) -> Self:
        """Weights in float8 and in 8 bits, and tables in 8, are no parameters that can be cut."""
        others = {
            "base_dtype fp8": self.base_dtype == "fp8",
            "quantization_bit 8": self.bits == 8,
            "quantize_head true": self.quantize_head,
        }
        if self.shard_base and (found := [name for name, is_set in others.items() if is_set]):
            raise conflict(
                f"shard_base shares out a base in 16 or 32 bits, or with quantization_bit 4, and "
                f"not with {found[0]}: leave one of them out",
                "shard_base",
                found[0].split()[0],
            )
        return self


class TrainSettings(
    TrainingDataSettings,
    LayoutSettings,
    LoraSettings,
    BeginningSettings,
    OptimiserSettings,
    RunFolderSettings,
    BaseModelSettings,
    ProcessSettings,
):
    """Settings of `glmtune train`."""

    verb = "train"
    reads_and_writes = ("dataset_path", "output_dir")
    of_section_alone = ("adapter",)

    @model_validator(mode="after")
    def keep_adapter(self) -> Self:
        """The adapter that a run continues must outlive the run's folder."""
        if self.adapter:
            source, target = map(os.path.realpath, (self.adapter, self.output_dir))
            if source == target or source.startswith(target + os.sep):
                raise conflict(
                    "output_dir is where the adapter lies, and would be overwritten: name another",
                    "output_dir",
                    "adapter",
                )
        return self


class PlanSettings(TrainSettings):
    """Settings of `glmtune plan`: those of the run, and for which card."""

    verb = "plan"
    group: ClassVar[str] = "plan"
    reads_section_of: ClassVar[str | None] = "train"
    memory_gib: float | None = Field(
        None, gt=0, description="plan for a card with this memory instead of this machine's"
    )
    card: NameText | None = Field(
        None, description="plan for a card by its name, such as T4, A10, 4090 or H100"
    )
    row_length: int = Field(
        200, ge=4, description="tokens of every row, as long as dataset_path is not there yet"
    )
    num_rows: int = Field(20_000, ge=1, description="number of those rows")
    gpus: int = Field(
        1, ge=1, le=1024, description="cards of a node, or processes where there is no GPU"
    )
    nodes: int = Field(1, ge=1, le=10_000, description="machines with as many cards each")
    link_gbit: float | None = Field(
        None,
        gt=0,
        description="Gbit/s between the cards of a node, in each direction (default: of NVLink or "
        "PCIe, by the card)",
    )
    network_gbit: float = Field(
        25, gt=0, description="Gbit/s of a node's network to the other nodes, in each direction"
    )
    tokens_per_second: float | None = Field(
        None,
        gt=0,
        description="speed of one card as measured in a run of these settings, which its log has "
        "under this name (default: computed, see docs/cards.md)",
    )
    price_per_hour: float | None = Field(
        None,
        gt=0,
        description="price of one card for an hour, in any currency, for what a run costs",
    )
    json_path: PathText | None = Field(None, description="JSON lines file to add the plan to")
    dataset_path: PathText = Field(
        default_factory=lambda: "no rows yet",
        description="tokenised rows, of which the lengths are read (default: num_rows rows of "
        "row_length tokens)",
    )
    output_dir: PathText = Field(
        default_factory=lambda: "nowhere",
        description="accepted as a recipe has it; nothing is written there",
    )

    @model_validator(mode="after")
    def one_card(self) -> Self:
        """A named card cannot be given another memory size."""
        if self.memory_gib and self.card:
            raise conflict("memory_gib and card both name a card: choose one", "memory_gib", "card")
        return self


class TuneSettings(
    FormatSettings,
    BadRowSettings,
    StepSettings,
    LayoutSettings,
    LoraSettings,
    OptimiserSettings,
    RunRecordSettings,
    BaseModelSettings,
    TrainingDeviceSettings,
):
    """Settings of `glmtune tune`: what may be said of its stages, most of it of the training."""

    verb = "tune"
    group: ClassVar[str] = "tune"
    bare_words = ("data_path",)
    reads_and_writes = ("data_path", "out")
    data_path: PathText = Field(description=f"rows to learn, {ANY_ROWS}")
    out: PathText = Field(
        description="folder to write: a new one, or one of the same command, which then resumes"
    )
    max_seq_length: int | None = Field(
        None, ge=4, description="tokens of a row (default: as many as keep 95 % of the rows)"
    )
    skip_overlength: bool = Field(
        True,
        description="drop rows longer than max_seq_length instead of cutting them (default: true, "
        "but texts are split)",
    )
    eval_ratio: float = Field(
        0.05, ge=0, le=0.5, description="share of the rows held out, to judge the adapter by"
    )
    save_steps: int | None = Field(
        None, ge=1, description="steps between checkpoints (default: a twentieth of the run)"
    )
    logging_steps: int | None = Field(
        None, ge=1, description="steps between logged lines (default: from the number of steps)"
    )
    overwrite_output_dir: bool = Field(
        False,
        description="train anew where the folder holds a run of other rows or other settings",
    )
    limit: int | None = Field(
        200, ge=1, description="held-out questions that base and tuned weights answer; none: all"
    )
    max_new_tokens: int = Field(150, ge=1, description="longest answer, in tokens")
    open_page: bool | None = Field(
        None,
        description="open the page in a browser at the end (default: in a terminal with a desktop)",
    )
