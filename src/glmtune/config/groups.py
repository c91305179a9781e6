"""The building blocks of all verbs' settings, and the groups that several verbs share."""

import os
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError


class Kind(NamedTuple):
    """What a setting accepts: for the help's column, and as text for errors."""

    column: str
    words: str

    @property
    def is_switch(self) -> bool:
        """Whether the flag may be given without a value, meaning true."""
        return "true" in self.column.split("|")


_FILLED = StringConstraints(pattern=r"^[^\x00]+$")
PathText = Annotated[str, _FILLED, Kind("PATH", "a path")]
"""A path as text: not empty, and without NUL, which no file system accepts."""
NameText = Annotated[str, _FILLED, Kind("NAME", "a name")]
PlainText = Annotated[str, _FILLED, Kind("TEXT", "a text")]


def split_commas(value: object) -> object:
    """Accept "a,b" for ["a", "b"]."""
    return tuple(value.split(",")) if isinstance(value, str) else value


def spelled_truth(value: object) -> object:
    """Truth values of a setting that may also be a text: "true" and "false" in any case."""
    return (
        {"true": True, "false": False}.get(value.lower(), value)
        if isinstance(value, str)
        else value
    )


def conflict(text: str, *settings: str) -> PydanticCustomError:
    """An error about several settings; their names let the reader say where each is set."""
    return PydanticCustomError("conflict", "{text}", {"text": text, "settings": settings})


class Settings(BaseModel):
    """What all groups share.

    `verb` is the command whose settings a class holds, empty for a group, and `group` the heading
    of its fields in `--help`. `bare_words` names the positional settings of a command line,
    `reads_and_writes` the two path settings that must differ, and `reads_section_of` the verb whose
    section of a recipe is read as well. `of_section_alone` names settings that this verb takes from
    its own section of a recipe: beside the sections they are meant for other verbs.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, coerce_numbers_to_str=True
    )
    verb: ClassVar[str] = ""
    group: ClassVar[str] = ""
    bare_words: ClassVar[tuple[str, ...]] = ("recipe",)
    reads_and_writes: ClassVar[tuple[str, str] | None] = None
    reads_section_of: ClassVar[str | None] = None
    of_section_alone: ClassVar[tuple[str, ...]] = ()

    @model_validator(mode="after")
    def keep_source(self) -> Self:
        """Input and output paths must differ."""
        if self.reads_and_writes:
            source, target = self.reads_and_writes
            read, written = getattr(self, source), getattr(self, target)
            if read and written and os.path.realpath(read) == os.path.realpath(written):
                raise conflict(f"{target} would overwrite {source}: name another", source, target)
        return self


class BaseModelSettings(Settings):
    """Which base model."""

    group: ClassVar[str] = "model"
    base: PathText | None = Field(
        None,
        description="folder or hub id of ChatGLM-6B (default: the environment's GLMTUNE_MODEL, "
        "else what the run folder names, else the hub's, else glm-tiny, which is in the package)",
    )


class QuantisingSettings(Settings):
    """How many bits the base's weights have."""

    group: ClassVar[str] = "model"
    quantization_bit: Literal["8", "4"] | None = Field(
        None,
        description="quantise the base's linears while it loads, with bitsandbytes: 8 is LLM.int8, "
        "4 is NF4 with double quantisation",
    )
    quantize_head: bool = Field(
        False, description="keep embedding and head in 8 bits, which saves half a GiB"
    )

    @field_validator("quantization_bit", mode="before")
    @classmethod
    def spell_number(cls, value: object) -> object:
        """Accept 8 for "8"."""
        return str(value) if isinstance(value, int) else value

    @property
    def bits(self) -> int | None:
        """`quantization_bit` as a number."""
        return None if self.quantization_bit is None else int(self.quantization_bit)


class EncodingSettings(Settings):
    """The text encoding of a file of rows."""

    group: ClassVar[str] = "rows"
    encoding: str | None = Field(
        None, description="encoding of the file, such as gbk or utf-16 (default: UTF-8)"
    )

    @field_validator("encoding")
    @classmethod
    def find_encoding(cls, value: str | None) -> str | None:
        """Accept the name of a text encoding that Python knows."""
        try:
            if value is not None:
                "a".encode(value)
        except (LookupError, ValueError):
            raise conflict(
                f"encoding {value!r:.60} is not known; try gbk, gb18030, utf-16 or cp1252",
                "encoding",
            ) from None
        return value


ANY_ROWS = (
    "in JSON, JSON lines, CSV, TSV, Parquet or Arrow, packed or not: alpaca records, "
    "conversations, or texts"
)
"""The rows that every verb takes, for descriptions."""


class FormatSettings(EncodingSettings):
    """How a file's rows are written."""

    group: ClassVar[str] = "rows"
    format: Literal["messages", "sharegpt", "alpaca", "context/target", "text"] | None = Field(
        None, description="how the rows are written (default: by the names of the first row)"
    )


class SpecialSettings(Settings):
    """Whether texts may hold special tokens."""

    group: ClassVar[str] = "rows"
    allow_special: bool = Field(
        False,
        description="names of special tokens that stand in a text, such as [MASK], become these "
        "tokens; else they stay text",
    )


class BadRowSettings(EncodingSettings):
    """What happens at a row that cannot be used."""

    group: ClassVar[str] = "rows"
    on_bad_row: Literal["fail", "skip"] = Field(
        "fail", description="stop at the first unusable row, or skip such rows and list them"
    )


class DeviceSettings(Settings):
    """Where to compute, and in which number format."""

    group: ClassVar[str] = "device and precision"
    bf16: bool | None = Field(
        None, description="compute in bfloat16 (default: on a GPU that has it)"
    )
    fp16: bool = Field(False, description="compute in float16, which overflows sooner")
    use_cpu: bool = Field(False, description="use the CPU even if there is a GPU")

    @field_validator("bf16", mode="before")
    @classmethod
    def spell_auto(cls, value: object) -> object:
        """Accept "auto", which axolotl's recipes use, for the default."""
        return None if str(value).lower() == "auto" else value

    @model_validator(mode="after")
    def one_precision(self) -> Self:
        """float16 and bfloat16 exclude each other."""
        if self.fp16 and self.bf16:
            raise conflict("fp16 and bf16 are both true: choose one", "fp16", "bf16")
        return self


class DecodingSettings(Settings):
    """How the decoder reads the weights."""

    group: ClassVar[str] = "decoding"
    decode_bits: Literal["16", "8", "4"] = Field(
        "16",
        description="round the linears to 8 or 4 bits, so that less is read for each token",
    )
    decode_compile: bool = Field(
        False,
        description="compile the layers of batches instead of using kernels of our own, which "
        "takes a minute, needs a GPU and was slower on an H200",
    )

    @field_validator("decode_bits", mode="before")
    @classmethod
    def spell_decode_bits(cls, value: object) -> object:
        """Accept 8 for "8"."""
        return str(value) if isinstance(value, int) else value

    @property
    def decoder_bits(self) -> int:
        """`decode_bits` as a number."""
        return int(self.decode_bits)


class AnsweringWeightSettings(DecodingSettings, QuantisingSettings):
    """How the weights of a model that answers are held, and how they are read."""

    group: ClassVar[str] = "decoding"

    @model_validator(mode="after")
    def round_once(self) -> Self:
        """A base that is quantised already cannot be rounded again."""
        wish = "quantization_bit" if self.quantization_bit else "quantize_head"
        if self.decoder_bits != 16 and (self.quantization_bit or self.quantize_head):
            raise conflict(
                f"{wish} and decode_bits {self.decode_bits} would both round the weights: choose "
                "one",
                wish,
                "decode_bits",
            )
        return self


OF_THE_DRAW = ("temperature", "top_p", "top_k")
_SHAPING_ANSWERS = (
    "max_new_tokens", "num_beams", "do_sample", *OF_THE_DRAW, "repetition_penalty",
    "stop_strings", "seed", "decode_bits",
)  # fmt: skip


class AnswerSettings(Settings):
    """How an answer is generated."""

    group: ClassVar[str] = "answers"
    max_new_tokens: int = Field(150, ge=1, description="longest answer, in tokens")
    do_sample: bool = Field(False, description="sample tokens instead of taking the likeliest")
    temperature: float | None = Field(
        None, ge=0, description="above 1 samples more evenly; 0 takes the likeliest tokens"
    )
    top_p: float | None = Field(
        None, gt=0, le=1, description="sample from the likeliest tokens of this total probability"
    )
    top_k: int | None = Field(None, ge=1, description="sample from this many likeliest tokens")
    repetition_penalty: float | None = Field(
        None, gt=0, description="above 1 discourages tokens already used"
    )
    stop_strings: tuple[str, ...] | None = Field(
        None,
        description="an answer ends before the first of these texts; a \\n in one is a new line",
    )
    seed: int = Field(42, ge=0, lt=2**32, description="seed of sampling")

    @field_validator("stop_strings", mode="before")
    @classmethod
    def split_texts(cls, value: object) -> object:
        """Accept "a,b" for ["a", "b"]; a list may hold texts with commas."""
        if isinstance(value, str):
            return tuple(text.replace("\\n", "\n") for text in value.split(","))
        return value

    @property
    def draws(self) -> bool:
        """Whether tokens are drawn; at temperature 0, the limit, they are the likeliest ones."""
        return self.do_sample and self.temperature != 0


class GenerationSettings(AnswerSettings, DecodingSettings):
    """All settings of how records are answered; a setting that is None has no effect."""

    group: ClassVar[str] = "answers"
    num_beams: int = Field(1, ge=1, description="beams of beam search; 1 means none")

    @model_validator(mode="after")
    def search_alone(self) -> Self:
        """Beam search is done by transformers' generate, for the likeliest answer."""
        if self.num_beams > 1 and self.draws:
            raise conflict(
                f"num_beams {self.num_beams} searches for the likeliest answer, do_sample true "
                "draws one at random; choose one of them",
                "num_beams",
                "do_sample",
            )
        if self.num_beams > 1 and self.decoder_bits != 16:
            raise conflict(
                f"num_beams {self.num_beams} goes through transformers' generate, which cannot use "
                f"decode_bits {self.decode_bits}; leave one of them out",
                "num_beams",
                "decode_bits",
            )
        return self

    @classmethod
    def of(cls, settings: Settings) -> "GenerationSettings":
        """The settings of a verb that decide how answers are generated."""
        names = cls.model_fields.keys() & type(settings).model_fields.keys()
        return cls(**{name: getattr(settings, name) for name in names})

    def in_effect(self) -> dict[str, Any]:
        """The settings that shape the answers: those that are set, and of sampling if it is on.

        JSON writes and reads these values unchanged, so that the copy in a file can be compared.
        """
        values: dict[str, Any] = {name: getattr(self, name) for name in _SHAPING_ANSWERS}
        values |= {"do_sample": self.draws, "decode_bits": self.decoder_bits}
        if self.stop_strings is not None:
            values["stop_strings"] = list(self.stop_strings)
        unused = set() if self.draws else {"seed", *OF_THE_DRAW}
        if self.decoder_bits == 16:
            unused.add("decode_bits")
        return {n: value for n, value in values.items() if value is not None and n not in unused}


class BatchSettings(Settings):
    """How many answers are generated side by side."""

    group: ClassVar[str] = "answers"
    per_device_eval_batch_size: int = Field(8, ge=1, description="records answered at a time")
