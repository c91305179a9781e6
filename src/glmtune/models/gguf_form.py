"""A model as llama.cpp has it: what a family says of its architecture, vocabulary and chat.

Source of names and meanings: llama.cpp's model loaders and vocabulary code, and the gguf package's
constants.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""Kinds of tokens, as numbers in the file."""


class GgufVocabulary(NamedTuple):
    """A vocabulary: a token, a kind and perhaps a score for each row of the embedding."""

    model: str
    """"llama" for sentencepiece's byte pairs by score, "gpt2" for byte-level merges."""
    pre: str
    """llama.cpp's name for how a text is split before."""
    tokens: Sequence[str]
    kinds: Sequence[int]
    scores: Sequence[float] | None = None
    merges: Sequence[str] | None = None
    adds_blank: bool = False
    """Whether a blank is put before each text."""


class GgufForm(NamedTuple):
    """What a GGUF file says of a model, besides its sizes and weights."""

    arch: str
    """llama.cpp's name of the architecture."""
    name_of: Callable[[str], str]
    """A module of the model class to its name there, without ``.weight`` or ``.bias``."""
    rotary_dims: int
    """Numbers of a head that are rotated."""
    rope_base: float
    rope_scaling: Mapping[str, str | float | int]
    """The scaling of positions by the names of llama.cpp: type, factor, original context; empty
    without."""
    vocabulary: GgufVocabulary
    special: Mapping[str, int]
    """eos, eot, eom, pad, unk and bos, as far as there are any: the first three end an answer."""
    chat_template: str
    """A jinja template, which writes the tokens' names there."""
    ollama_template: str
    """The same in Go's templates, for a Modelfile."""
    stops: Sequence[str]
    """The texts of the tokens that end an answer."""
