"""The settings of each verb, with the names of transformers' TrainingArguments where those exist.

A verb's class inherits from groups (data, LoRA, optimiser, ...), each a class of its own, so that a
setting shared by verbs is described once and `--help` can print group by group. A field's
`description` is its help text; the error for a wrong value is made from its type and bounds.
Settings are frozen, so that a run uses the values that were checked.
"""

import os
from typing import ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from glmtune.config.after import DialSettings, DistilSettings, ExportSettings, LedgerSettings
from glmtune.config.benchmarks import (
    BenchDecodeSettings,
    BenchMemorySettings,
    BenchServeSettings,
    BenchStartupSettings,
    BenchTrainSettings,
    ReproduceSettings,
)
from glmtune.config.data_sets import MixSettings
from glmtune.config.engines import EngineSettings, SpreadSettings
from glmtune.config.groups import (
    ANY_ROWS,
    OF_THE_DRAW,
    AnsweringWeightSettings,
    AnswerSettings,
    BadRowSettings,
    BaseModelSettings,
    BatchSettings,
    DeviceSettings,
    FormatSettings,
    GenerationSettings,
    NameText,
    PathText,
    PlainText,
    Settings,
    SpecialSettings,
    conflict,
    spelled_truth,
    split_commas,
)
from glmtune.config.serving import ServeSettings
from glmtune.config.share import PushSettings
from glmtune.config.training import PlanSettings, TrainSettings, TuneSettings

# --- validate ---


class ValidateSettings(FormatSettings, SpreadSettings):
    """Settings of `glmtune validate`."""

    verb = "validate"
    group: ClassVar[str] = "data"
    bare_words = ("files",)
    files: tuple[PathText, ...] = Field(
        min_length=1,
        description=f"rows to check, {ANY_ROWS}",
    )
    held_out: PathText | None = Field(
        None, description="rows kept for testing: none of their questions may occur in the files"
    )
    json_path: PathText | None = Field(
        None, description="JSON file for the complete list of problems"
    )

    @field_validator("files", mode="before")
    @classmethod
    def wrap_one(cls, value: object) -> object:
        """Turn a single path into a list of one."""
        return (value,) if isinstance(value, str) else value

    @model_validator(mode="after")
    def keep_files(self) -> Self:
        """Refuse a report that would overwrite a file it is about."""
        read = {os.path.realpath(path) for path in (*self.files, self.held_out or "")}
        if self.json_path and os.path.realpath(self.json_path) in read:
            raise conflict(
                "json_path would overwrite a file that is read: name another", "json_path"
            )
        return self


# --- convert ---


class ConvertSettings(FormatSettings, BadRowSettings, BaseModelSettings):
    """Settings of `glmtune convert`."""

    verb = "convert"
    group: ClassVar[str] = "data"
    reads_and_writes = ("data_path", "save_path")
    data_path: PathText = Field(description=f"rows to read, {ANY_ROWS}")
    save_path: PathText = Field(
        description="JSONL file to write, a line per row: context and target of records, the "
        "messages of conversations, or the text"
    )


# --- tokenize ---


class RowSettings(FormatSettings, BadRowSettings, SpecialSettings, BaseModelSettings):
    """How the rows of a file become token rows."""

    group: ClassVar[str] = "data"
    bare_words = ("jsonl_path",)
    jsonl_path: PathText = Field(
        description=f"rows to read, {ANY_ROWS}, or what `glmtune convert` wrote; "
        "DIR/dataset_info.json#NAME is a data set of LLaMA-Factory's list"
    )
    learn: Literal["each", "last", "marked"] = Field(
        "each",
        description="answers of a conversation that are supervised: each, the last, or those "
        "marked with loss true; one marked with loss false never is",
    )
    max_seq_length: int = Field(
        200,
        ge=4,
        description="tokens kept of the context, and of the target; special ids count; of a "
        "conversation, the tokens of the whole row (default there: 2048)",
    )
    too_long: Literal["truncate", "drop", "split", "error"] | None = Field(
        None,
        description="what happens to longer conversations and texts: they lose their last turns or "
        "tokens, are dropped, become several rows, or end the command (default: truncate, texts "
        "split; drop with skip_overlength)",
    )
    thoughts: Literal["keep", "drop"] | None = Field(
        None,
        description="thoughts before the answers of a conversation (reasoning_content, <think> in "
        "an answer): keep or drop them all (default: as the base's chat template does, which keeps "
        "those behind the last question if it opens a thought, and else none)",
    )
    skip_overlength: bool = Field(
        False, description="drop rows longer than max_seq_length instead of cutting them"
    )
    keep_empty: bool = Field(False, description="keep rows whose target is empty")
    num_threads: int | None = Field(
        None, ge=1, description="threads that encode (default: one per core)"
    )

    @property
    def cuts_turns(self) -> bool:
        """Whether conversations that are too long lose turns."""
        return self.too_long == "truncate" or (self.too_long is None and not self.skip_overlength)

    @model_validator(mode="after")
    def one_way_to_drop(self) -> Self:
        """Refuse to drop long rows and not to."""
        if self.skip_overlength and self.too_long not in (None, "drop"):
            raise conflict(
                f"too_long is {self.too_long}, and skip_overlength drops long rows: set one",
                "too_long",
                "skip_overlength",
            )
        return self


class TokenizeSettings(MixSettings, RowSettings, SpreadSettings):
    """Settings of `glmtune tokenize`."""

    verb = "tokenize"
    group: ClassVar[str] = "data"
    reads_and_writes = ("jsonl_path", "save_path")
    save_path: PathText = Field(description="folder to write, for datasets.load_from_disk")
    resume: bool = Field(
        False, description="go on where a command that was killed or interrupted had got to"
    )

    @model_validator(mode="after")
    def threads_of_this_process(self) -> Self:
        """Refuse a number of threads where each worker of Ray has one."""
        if self.num_threads and self.engine == "ray":
            raise conflict(
                "num_threads has no effect with engine ray, whose workers encode with a thread "
                "each: leave it out",
                "num_threads",
                "engine",
            )
        return self


class InspectSettings(RowSettings):
    """Settings of `glmtune inspect`."""

    verb = "inspect"
    group: ClassVar[str] = "data"
    limit: int = Field(3, ge=1, description="show this many rows")
    stats: bool = Field(
        False,
        description="count all rows: lengths, languages, turns, what is supervised, how many teach "
        "an end, a thought or tools",
    )
    html_path: PathText | None = Field(None, description="HTML page of the rows and their figures")
    json_path: PathText | None = Field(None, description="JSON file of the same")

    @model_validator(mode="after")
    def keep_rows(self) -> Self:
        """Refuse to write over the rows, or two files under one name."""
        written = [os.path.realpath(path) for path in (self.html_path, self.json_path) if path]
        if os.path.realpath(self.jsonl_path) in written or len(set(written)) < len(written):
            raise conflict(
                "html_path and json_path have to differ from jsonl_path and from each other",
                "html_path",
                "json_path",
            )
        return self


# --- infer, compare ---


class RecordSettings(FormatSettings, BadRowSettings, SpecialSettings):
    """Which records are answered."""

    group: ClassVar[str] = "data"
    overwrite_output: bool = Field(
        False, description="start over instead of continuing an unfinished file of answers"
    )


class AnsweringSettings(
    RecordSettings,
    BatchSettings,
    GenerationSettings,
    AnsweringWeightSettings,
    BaseModelSettings,
    DeviceSettings,
):
    """The settings that the verbs that answer records share."""

    group: ClassVar[str] = "data"

    @model_validator(mode="after")
    def sampling_is_on(self) -> Self:
        """Refuse sampling settings without do_sample, which would have no effect."""
        for name in OF_THE_DRAW:
            value = getattr(self, name)
            if not self.do_sample and value is not None and (name, value) != ("temperature", 0):
                raise conflict(
                    f"{name} has no effect while do_sample is false: set do_sample true, "
                    f"or leave {name} out",
                    name,
                    "do_sample",
                )
        return self


class InferSettings(AnsweringSettings, EngineSettings):
    """Settings of `glmtune infer`."""

    verb = "infer"
    group: ClassVar[str] = "data"
    reads_and_writes = ("data_path", "output_path")
    data_path: PathText = Field(description="alpaca records to answer: .json (a list) or .jsonl")
    adapter: PathText | None = Field(
        None, description="run folder or adapter (default: the base model alone)"
    )
    output_path: PathText | None = Field(
        None,
        description="JSONL file of the answers (default: answers.jsonl beside the adapter)",
    )
    limit: int | None = Field(None, ge=1, description="answer this many records (default: all)")
    print_limit: int | None = Field(
        10, ge=0, description="print this many of them with their answers; none: all"
    )
    print_form: Literal["labels", "original"] = Field(
        "labels",
        description="print lines named Model and Expected, or the format of the script of 2023",
    )


class ReplayRowsSettings(AnsweringSettings):
    """Settings of `glmtune replay-rows`."""

    verb = "replay-rows"
    group: ClassVar[str] = "data"
    bare_words = ("save_path",)
    reads_and_writes = ("data_path", "save_path")
    save_path: PathText = Field(
        description="JSON lines file to write, for the setting replay of tokenize"
    )
    data_path: PathText | None = Field(
        None,
        description="questions of your own that the base answers (default: those of the base's "
        "folder, else 120 of ours, none of which is among the general questions that are scored)",
    )
    limit: int | None = Field(None, ge=1, description="answer this many (default: all)")


class JudgingSettings(AnsweringSettings):
    """The settings that the verbs that score answers share."""

    group: ClassVar[str] = "data"
    data_path: PathText | None = Field(
        None,
        description="rows of any format to answer (default: the rows that the adapter's run held "
        "out)",
    )
    limit: int | None = Field(200, ge=1, description="answer this many records; none: all")
    metric: tuple[str, ...] | None = Field(
        None,
        description="scores of your own beside ours, module:function each; the function takes "
        "(answer, reference, record) and returns a number, of which more is better",
    )

    _split_metrics = field_validator("metric", mode="before")(split_commas)


class CompareSettings(JudgingSettings):
    """Settings of `glmtune compare`."""

    verb = "compare"
    group: ClassVar[str] = "data"
    adapter: PathText = Field(description="run folder or adapter")
    output_dir: PathText | None = Field(
        None,
        description="folder for compare.md, .html, .json and .jsonl (default: compare beside the "
        "adapter)",
    )
    gate: NameText | None = Field(
        None,
        description="exit code 1 unless the verdict on all rows is better, or not_worse; with "
        ":METRIC behind it, unless that score alone says it, such as better:exact",
    )

    general_set: bool | PathText = Field(
        True,
        description="general questions that show what the tuning cost: true for those of the "
        "base's folder, else our own; a .jsonl file of yours in the same form; false for none",
    )

    without_replay: PathText | None = Field(
        None,
        description="a run of the same rows without replay, compared before: shows how much less "
        "was lost with it",
    )

    _spell_general_set = field_validator("general_set", mode="before")(spelled_truth)

    @model_validator(mode="after")
    def ask_general_set(self) -> Self:
        """Refuse a run beside this one where nothing is asked of either."""
        if self.without_replay and self.general_set is False:
            raise conflict(
                "without_replay compares general questions, and general_set is false: leave one "
                "of them out",
                "without_replay",
                "general_set",
            )
        return self

    @field_validator("gate")
    @classmethod
    def know_gate(cls, value: str | None) -> str | None:
        """Accept better and not_worse, with a metric's name or without."""
        word, colon, name = (value or "better").partition(":")
        if word not in ("better", "not_worse") or (colon and not name):
            raise conflict(
                f"gate is {value}: give better or not_worse, perhaps with a score behind it, such "
                "as not_worse:exact",
                "gate",
            )
        return value


class EvaluateSettings(JudgingSettings, EngineSettings):
    """Settings of `glmtune evaluate`."""

    verb = "evaluate"
    group: ClassVar[str] = "data"
    adapter: tuple[PathText, ...] | None = Field(
        None,
        min_length=1,
        description="run folders or adapters to score beside the base, with commas between "
        "(default: the base alone)",
    )
    output_dir: PathText | None = Field(
        None,
        description="folder for evaluate.md and .json and a file of answers for each side "
        "(default: evaluate beside the first adapter, or here)",
    )

    _split_adapters = field_validator("adapter", mode="before")(split_commas)

    @model_validator(mode="after")
    def has_rows(self) -> Self:
        """Refuse to score the base alone on rows that nothing names."""
        if not self.adapter and not self.data_path:
            raise conflict(
                "data_path has to name a file of rows where no adapter's run held rows out: "
                "--data_path FILE, or --adapter RUN",
                "data_path",
                "adapter",
            )
        return self


# --- chat ---


class ChatSettings(
    AnswerSettings, AnsweringWeightSettings, SpecialSettings, BaseModelSettings, DeviceSettings
):
    """Settings of `glmtune chat`; sampling defaults are those of the published code."""

    verb = "chat"
    group: ClassVar[str] = "chat"
    adapter: PathText | None = Field(
        None, description="run folder or adapter to talk to (default: the base model alone)"
    )
    max_new_tokens: int = Field(512, ge=1, description="longest answer, in tokens")
    do_sample: bool = Field(True, description="sample tokens instead of taking the likeliest")
    temperature: float | None = Field(
        0.95, ge=0, description="above 1 samples more evenly; 0 takes the likeliest tokens"
    )
    top_p: float | None = Field(
        0.7, gt=0, le=1, description="sample from the likeliest tokens of this total probability"
    )
    server: PlainText | None = Field(
        None,
        description="address of a server that answers, such as http://127.0.0.1:8000 of `glmtune "
        "serve`, instead of a model that is loaded here",
    )
    api_key: PlainText | None = Field(
        None, description="key that the server wants (default: the environment's GLMTUNE_API_KEY)"
    )

    @model_validator(mode="after")
    def is_of_one_side(self) -> Self:
        """Refuse settings of a model that is loaded here beside a server, and its key without."""
        here = set(ChatSettings.model_fields) - set(AnswerSettings.model_fields)
        fields = type(self).model_fields
        local = [
            name
            for name in sorted(here - {"server", "api_key"})
            if getattr(self, name) != fields[name].default
        ]
        if self.server and local:
            raise conflict(
                f"{local[0]} is for a model that is loaded here, and server {self.server} has its "
                "own: leave one of them out (/model in the chat chooses among the server's)",
                local[0],
                "server",
            )
        if self.api_key and not self.server:
            raise conflict("api_key is for a server: name it, or leave it out", "api_key", "server")
        return self


# --- replay, check ---


class ReplaySettings(BaseModelSettings):
    """Settings of `glmtune replay`."""

    verb = "replay"
    group: ClassVar[str] = "bundle"
    bare_words = ("bundle",)
    bundle: PathText = Field(description="crash-N folder that a run wrote")
    use_cpu: bool = Field(False, description="use the CPU even if there is a GPU")


class CheckSettings(
    FormatSettings, AnsweringWeightSettings, SpecialSettings, BaseModelSettings, DeviceSettings
):
    """Settings of `glmtune check`."""

    verb = "check"
    group: ClassVar[str] = "check-up"
    bare_words = ("adapter",)
    adapter: PathText | None = Field(None, description="run folder or adapter to check")
    url: NameText | None = Field(
        None,
        description="check an endpoint instead, by its address such as http://127.0.0.1:8000/v1: "
        "is it base, tuned or neither, does it stop, is its template right, is its context whole; "
        "its key is read from the environment's GLMTUNE_API_KEY or OPENAI_API_KEY",
    )
    model: NameText | None = Field(None, description="name of the model that is asked there")
    against: PathText | None = Field(
        None, description="run folder or adapter that the endpoint should serve"
    )
    data_path: PathText | None = Field(
        None,
        description="rows to ask, of any format (default: rows that the run held out, else a few "
        "built-in questions)",
    )
    limit: int = Field(16, ge=1, description="ask N at most, and 16 unrelated questions besides")
    max_new_tokens: int = Field(150, ge=1, description="longest answer, in tokens")
    json_path: PathText | None = Field(None, description="JSON file for all measured values")

    @model_validator(mode="after")
    def one_subject(self) -> Self:
        """Check an adapter, or an endpoint against one."""
        of_endpoint = {"url": self.url, "model": self.model, "against": self.against}
        if not self.url:
            if name := next((name for name, value in of_endpoint.items() if value), None):
                raise conflict(f"{name} is of an endpoint: name it with url, or leave {name} out",
                               name)  # fmt: skip
            if not self.adapter:
                raise conflict(
                    "adapter is needed: the run folder or adapter to check; or an endpoint with "
                    "url, model and against",
                    "adapter",
                )
        elif self.adapter:
            raise conflict(
                "url asks an endpoint, and against names the adapter: leave the other out",
                "url",
                "adapter",
            )
        elif missing := [name for name, value in of_endpoint.items() if not value]:
            raise conflict(f"url needs {' and '.join(missing)} as well", "url", *missing)
        return self

    @property
    def subject(self) -> str:
        """The adapter that is checked, or that an endpoint is checked against."""
        return self.adapter or self.against or ""

    @model_validator(mode="after")
    def special_tokens_of_records(self) -> Self:
        """Rows that a run held out are token rows already, in which no text is left to read."""
        if self.allow_special and self.data_path is None:
            raise conflict(
                "allow_special is for the records of data_path: name them, or leave it out",
                "allow_special",
                "data_path",
            )
        return self


# --- merge, adapters convert ---


class MergeSettings(BaseModelSettings):
    """Settings of `glmtune merge`."""

    verb = "merge"
    group: ClassVar[str] = "data"
    reads_and_writes = ("adapter", "save_path")
    adapter: PathText = Field(description="run folder or adapter to merge")
    save_path: PathText = Field(
        description="folder for the merged model, which loads without an adapter"
    )


class ConvertAdapterSettings(Settings):
    """Settings of `glmtune adapters convert`."""

    verb = "adapters convert"
    group: ClassVar[str] = "data"
    bare_words = ("old", "new")
    reads_and_writes = ("old", "new")
    old: PathText = Field(description="folder of an adapter, in any format and naming")
    new: PathText = Field(description="folder to write, in PEFT's form of today")
    to: Literal["peft", "chatglm"] = Field(
        "peft",
        description="names of the linears: peft for those of transformers' classes, chatglm for "
        "those of the published remote code of ChatGLM2-6B, ChatGLM3-6B and GLM-4-9B",
    )
    base: PathText | None = Field(
        None,
        description="folder or hub id of the base model, for adapters that do not say its sizes",
    )


# --- doctor ---


class DoctorSettings(BaseModelSettings, DeviceSettings):
    """Settings of `glmtune doctor`."""

    verb = "doctor"
    group: ClassVar[str] = "doctor"
    bare_words = ("recipe_path",)
    recipe_path: PathText | None = Field(
        None, description="recipe to check, with its base and data (default: only the machine)"
    )
    json_path: PathText | None = Field(None, description="JSON file for the findings")
    explain: PlainText | None = Field(
        None,
        description="explain this error message in Chinese and English instead: its text, a file "
        "that contains it, or - for stdin",
    )
    errors: bool = Field(False, description="list the errors that are known, as Markdown")


# --- demo, new-model ---


class DemoSettings(Settings):
    """Settings of `glmtune demo`."""

    verb = "demo"
    group: ClassVar[str] = "demo"
    bare_words = ()
    out: PathText = Field(
        "glmtune-demo", description="folder to write: a new one, or one that a demo wrote before"
    )
    seed: int = Field(42, ge=0, lt=2**32, description="seed of LoRA's weights and the rows' order")
    max_steps: int | None = Field(
        None, ge=1, description="training steps (default: as many as the demo needs)"
    )
    limit: int = Field(
        400, ge=2, le=400, description="held-out questions, half Chinese and half English"
    )
    use_cpu: bool = Field(False, description="use the CPU even if there is a GPU")


class NewModelSettings(Settings):
    """Settings of `glmtune new-model`; sizes that are None are those of the model in `like`."""

    verb = "new-model"
    group: ClassVar[str] = "new model"
    bare_words = ("folder",)
    folder: PathText = Field(description="folder to write, new or empty")
    like: Literal["chatglm-6b", "glm-tiny"] = Field(
        description="model to take the layout from, and all sizes that are not given"
    )
    vocab_file: PathText | None = Field(
        None,
        description="ice_text.model to copy beside the weights (default: for glm-tiny its own, "
        "for chatglm-6b none)",
    )
    hidden_size: int | None = Field(None, ge=4, description="width of the model")
    num_layers: int | None = Field(None, ge=1, description="number of layers")
    num_attention_heads: int | None = Field(None, ge=1, description="attention heads of a layer")
    inner_hidden_size: int | None = Field(
        None, ge=1, description="width inside the MLP (default: 4 x a given hidden_size)"
    )
    vocab_size: int | None = Field(
        None, ge=1024, description="rows of the embedding; at least as many as pieces"
    )
    max_sequence_length: int | None = Field(None, ge=8, description="largest number of positions")
    num_shards: int | None = Field(
        None, ge=1, le=1000, description="weight files (default: 8 for chatglm-6b, else 1)"
    )
    seed: int = Field(0, ge=0, lt=2**32, description="seed of the weights")


SETTINGS: dict[str, type[Settings]] = {
    settings.verb: settings
    for settings in (
        ValidateSettings,
        ConvertSettings,
        TokenizeSettings,
        InspectSettings,
        TrainSettings,
        PlanSettings,
        ReplaySettings,
        InferSettings,
        ReplayRowsSettings,
        CompareSettings,
        EvaluateSettings,
        ChatSettings,
        ServeSettings,
        CheckSettings,
        LedgerSettings,
        MergeSettings,
        ExportSettings,
        ConvertAdapterSettings,
        DialSettings,
        DistilSettings,
        PushSettings,
        NewModelSettings,
        DoctorSettings,
        DemoSettings,
        BenchTrainSettings,
        BenchDecodeSettings,
        BenchServeSettings,
        BenchMemorySettings,
        BenchStartupSettings,
        ReproduceSettings,
        TuneSettings,
    )
}
"""Verb -> its settings, in the order of the README's groups.

A recipe without sections belongs to the verb that knows most of its names; of several, the first.
"""
