"""What is asked, how it is to be answered, and the answer."""

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from glmtune.errors import UserError

_OF_THE_DRAW = ("temperature", "top_p", "top_k")


class Prompt(NamedTuple):
    """A question as the model will see it."""

    text: str
    where: str = "prompt"
    """Where it comes from, for messages: "data.json:12 (row 3)"."""
    number: int = 0
    """Which stream of random numbers its answer is drawn with; a record's row, say."""


class EncodedPrompt(NamedTuple):
    """A prompt's ids, [gMASK] <sop> included, and the number of its random stream."""

    ids: list[int]
    number: int


class Answer(NamedTuple):
    """What the model said."""

    text: str
    num_tokens: int
    """Tokens of the answer, the stop token not counted."""
    stopped: bool
    """Whether the model stopped by itself or at a stop string, within max_new_tokens."""


@dataclass(frozen=True, kw_only=True)
class GenerationSettings:
    """How answers are generated, with transformers' names; what is None has no effect.

    A temperature of 0, where the draw would divide by it, is its limit: the likeliest tokens.

    Raises:
        UserError: a beam search that is to draw at random, or to use fewer bits.
    """

    max_new_tokens: int = 150
    num_beams: int = 1
    do_sample: bool = False
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None
    stop_strings: tuple[str, ...] | None = None
    """An answer ends before the first of these."""
    seed: int = 42
    decode_bits: int = 16
    """16, or 8 or 4 for rounded linears."""
    decode_compile: bool = False

    def __post_init__(self):
        if self.temperature == 0:
            for name, value in {"do_sample": False, **dict.fromkeys(_OF_THE_DRAW)}.items():
                object.__setattr__(self, name, value)
        if self.do_sample and self.num_beams > 1:
            raise UserError(
                f"num_beams {self.num_beams} searches for the likeliest answer, do_sample true "
                "draws one at random; choose one of them"
            )
        if self.decode_bits != 16 and self.num_beams > 1:
            raise UserError(
                f"num_beams {self.num_beams} goes through transformers' generate, which cannot use "
                f"decode_bits {self.decode_bits}; leave one of them out"
            )

    @classmethod
    def from_config(cls, config: Any) -> "GenerationSettings":
        """Those of a verb's settings that say how answers are generated."""
        names = [name for name in cls.__dataclass_fields__ if hasattr(config, name)]
        values = {name: getattr(config, name) for name in names}
        return cls(**values | {"decode_bits": int(config.decode_bits)})

    def in_effect(self) -> dict[str, Any]:
        """The settings that shape the answers: those that are set, and the seed where one draws."""
        unused = {"decode_compile"}
        if not self.do_sample:
            unused.add("seed")
        if self.decode_bits == 16:
            unused.add("decode_bits")
        return {
            name: value
            for name, value in asdict(self).items()
            if value is not None and name not in unused
        }
