"""The settings of each verb, with the names of transformers' TrainingArguments where those exist.

A verb's class is put together from groups (data, LoRA, optimiser, ...), each a class of its own,
so that a setting shared by verbs is described once and `--help` can print group by group. A field's
`description` is its help text; its type and bounds also word the error that a wrong value gets.
Configs are frozen: what was checked is what runs.
"""

from typing import ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from glmtune.config.groups import (
    AnswerSettings,
    BadRowSettings,
    BaseModelSettings,
    DeviceSettings,
    PathText,
    Settings,
    conflict,
)

ALL_LINEARS = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")
"""Every linear inside a ChatGLM-6B layer: what `lora_target: all` stands for."""

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
    packing: bool | None = Field(
        None,
        description="lay rows end to end in packs of tokens_per_step tokens, many rows a step "
        "(default: on a GPU)",
    )
    tokens_per_step: int | None = Field(
        None,
        ge=64,
        multiple_of=64,
        description="tokens of a pack, which is a pass of one device (default: what its memory "
        "holds, at most 8192)",
    )
    exact_batch: bool | None = Field(
        None,
        description="per_device_train_batch_size rows a pass as the recipe says, laid end to end "
        "without padding (default: on a GPU, where packing is false)",
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

    @model_validator(mode="after")
    def one_layout(self) -> Self:
        """Packs and batches of so many rows exclude each other."""
        if self.packing and self.exact_batch:
            raise conflict(
                "packing and exact_batch are both true: packing puts as many rows into a step as "
                "fit, exact_batch as many as the recipe says; choose one",
                "packing",
                "exact_batch",
            )
        if self.tokens_per_step and (self.packing is False or self.exact_batch):
            raise conflict(
                "tokens_per_step is the length of packs, but packing is off: leave one of them out",
                "tokens_per_step",
                "packing" if self.packing is False else "exact_batch",
            )
        return self


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

    base_dtype: Literal["auto", "fp8"] = Field(
        "auto",
        description="fp8: the frozen linears in float8, on Hopper and newer GPUs, a third faster; "
        "auto: in the compute type",
    )
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


# --- demo, new-model ---


class DemoConfig(Settings):
    """Settings of `glmtune demo`."""

    group: ClassVar[str] = "demo"
    bare_words = ()
    out: PathText = Field(
        "glmtune-demo", description="folder to write: a new one, or one that a demo wrote before"
    )
    seed: int = Field(42, ge=0, lt=2**32, description="seed of LoRA's start and the rows' order")
    max_steps: int | None = Field(
        None, ge=1, description="training steps (default: as many as the demo needs)"
    )
    limit: int = Field(
        400, ge=2, le=400, description="held-out questions, half Chinese and half English"
    )
    use_cpu: bool = Field(False, description="leave the GPU alone")


class NewModelConfig(Settings):
    """Settings of `glmtune new-model`; a size that is None is that of the model in `like`."""

    group: ClassVar[str] = "new model"
    bare_words = ("folder",)
    folder: PathText = Field(description="folder to write, new or empty")
    like: Literal["chatglm-6b", "glm-tiny"] = Field(
        description="model whose sizes and layout it has, where no other size is given"
    )
    vocab_file: PathText | None = Field(
        None,
        description="ice_text.model to copy beside the weights (default: for glm-tiny its own, "
        "for chatglm-6b none)",
    )
    hidden_size: int | None = Field(None, ge=4, description="width of the model")
    num_layers: int | None = Field(None, ge=1, description="number of layers")
    num_attention_heads: int | None = Field(None, ge=1, description="heads of a layer")
    inner_hidden_size: int | None = Field(
        None, ge=1, description="width inside the MLP (default: 4 x a given hidden_size)"
    )
    vocab_size: int | None = Field(
        None, ge=1024, description="rows of the embedding; at least what the vocabulary file has"
    )
    max_sequence_length: int | None = Field(None, ge=8, description="most positions")
    num_shards: int | None = Field(
        None, ge=1, le=1000, description="weight files (default: 8 for chatglm-6b, else 1)"
    )
    seed: int = Field(0, ge=0, lt=2**32, description="seed of the weights")


# --- bench ---


class BenchSettings(Settings):
    """What the benchmarks share."""

    group: ClassVar[str] = "benchmark"
    bare_words = ()
    shape: Literal["6b", "small"] = Field(
        "6b", description="sizes of the model, whose weights are random: nothing is downloaded"
    )
    json_path: PathText | None = Field(None, description="JSON lines file to add the record to")


class BenchTrainConfig(BenchSettings, LoraSettings, TrainingDeviceSettings):
    """Settings of `glmtune bench train`."""

    group: ClassVar[str] = "benchmark"
    dataset_path: PathText | None = Field(
        None,
        description="tokenised rows (default: random ones, as long as Chinese alpaca rows are)",
    )
    packing: bool | None = Field(None, description="as in train")
    tokens_per_step: int | None = Field(None, ge=64, multiple_of=64, description="as in train")
    exact_batch: bool | None = Field(None, description="as in train")
    per_device_train_batch_size: int = Field(6, ge=1, description="as in train")
    steps: int = Field(10, ge=1, description="steps to time")
    warmup: int = Field(3, ge=0, description="steps before them, after the first")
    limits: bool = Field(True, description="time the matrix products alone, too")
    plain: bool = Field(True, description="time the plain way at six padded rows a step, too")
    compare: bool = Field(False, description="time transformers' Glm with PEFT, too")
    kernel_table: PathText | None = Field(None, description="file for a table of a step's kernels")


SETTINGS: dict[str, type[Settings]] = {
    "convert": ConvertConfig,
    "tokenize": TokenizeConfig,
    "train": TrainConfig,
    "infer": InferConfig,
    "compare": CompareConfig,
    "merge": MergeConfig,
    "adapters convert": ConvertAdapterConfig,
    "demo": DemoConfig,
    "new-model": NewModelConfig,
    "bench train": BenchTrainConfig,
}
"""Verb -> its settings."""
