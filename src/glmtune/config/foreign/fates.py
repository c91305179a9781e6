"""How a foreign name is handled: the vocabulary for the tables of such names.

`training_arguments` lists the names of transformers, `other_trainers` those of other trainers and
of our own verbs; `names` looks them up. A fate depends on the value, too: only harmless values may
be accepted without effect.
"""

import ast
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from types import MappingProxyType
from typing import NamedTuple

TRAINING = ("train", "plan")
ANSWERING = ("infer", "compare", "chat", "check")
TRAIN_AND_ANSWER = (*TRAINING, *ANSWERING)
WITH_BASE = ("convert", "tokenize", "inspect", *TRAINING, *ANSWERING, "merge", "doctor", "replay")
MAKING_ROWS = ("validate", "convert", "tokenize", "inspect")
EVERYWHERE: tuple[str, ...] = ()
"""Verbs that a fate concerns; empty for all."""

SAME = "it means the same"
LAYOUT = "it says how the rows of a pass lie"
DEFAULT = None
"""A converted value that stands for the setting's default."""

Conversion = Mapping[str, str | None] | Callable[[str], str]
"""How a value is converted: by a table of spellings, or by a function that raises ValueError."""

_OFF = ("false", "0", "no", "[]", "{}")
_SO_HERE = "it is so in any case"
_TRUE = ("true", "1", "yes", "on", "t", "y")
_FALSE = ("false", "0", "no", "off", "f", "n")


class Becomes(NamedTuple):
    """The first of these settings that the verb has.

    `values` converts the value: a table, which leaves other values to the next fate, or a function,
    which raises ValueError with what is wrong; None keeps the value. With `beside`, a table applies
    only if other names are given with the values listed there.
    """

    settings: tuple[str, ...]
    word: str
    values: Conversion | None
    verbs: tuple[str, ...]
    beside: Mapping[str, str]


class Idle(NamedTuple):
    """Accepted without effect at these values (None: at any), which change nothing here."""

    values: tuple[str, ...] | None
    word: str
    verbs: tuple[str, ...]

    def takes(self, text: str) -> bool:
        """Whether this value changes nothing."""
        return self.values is None or not spellings(text).isdisjoint(self.values)


class Refused(NamedTuple):
    """Refused; `way` is what to do instead."""

    way: str
    verbs: tuple[str, ...]


Fate = Becomes | Idle | Refused


class Foreign(NamedTuple):
    """A name, the projects whose users know it, and its fates: the first that fits applies."""

    name: str
    source: str
    fates: tuple[Fate, ...]


def becomes(
    *settings: str,
    word: str = SAME,
    values: Conversion | None = None,
    verbs: tuple[str, ...] = EVERYWHERE,
    beside: Mapping[str, str] = MappingProxyType({}),
) -> Becomes:
    """Another name of a setting."""
    return Becomes(settings, word, values, verbs, beside)


def idle(*values: str, word: str, verbs: tuple[str, ...] = TRAINING) -> Idle:
    """Accepted without effect at these values."""
    return Idle(values, word, verbs)


def moot(word: str, verbs: tuple[str, ...] = TRAINING) -> Idle:
    """Accepted without effect at any value."""
    return Idle(None, word, verbs)


def refused(way: str, verbs: tuple[str, ...] = TRAINING) -> Refused:
    """Refused at the values that no earlier fate handles."""
    return Refused(way, verbs)


def unless(
    *values: str, word: str, way: str, verbs: tuple[str, ...] = TRAINING
) -> tuple[Idle, Refused]:
    """Accepted at the values that describe what happens here anyway, otherwise refused."""
    return idle(*values, word=word, verbs=verbs), Refused(way, verbs)


def rows(source: str, names: str, *fates: Fate) -> tuple[Foreign, ...]:
    """Several names of one project, with the same fates."""
    return tuple(Foreign(name, source, fates) for name in names.split())


def off_rows(
    source: str, names: str, way: str, verbs: tuple[str, ...] = EVERYWHERE
) -> tuple[Foreign, ...]:
    """Names of features that are off here, and what to do instead of turning them on."""
    return rows(source, names, *unless(*_OFF, word="it is off in any case", way=way, verbs=verbs))


def only_rows(
    source: str, names: str, values: str, way: str, verbs: tuple[str, ...] = EVERYWHERE
) -> tuple[Foreign, ...]:
    """Names of settings that have only these values here, and what to do instead of another."""
    return rows(source, names, *unless(*values.split(), word=_SO_HERE, way=way, verbs=verbs))


def moot_rows(
    source: str, names: str, word: str, verbs: tuple[str, ...] = EVERYWHERE
) -> tuple[Foreign, ...]:
    """Names of settings without effect here, whatever the value."""
    return rows(source, names, moot(word, verbs))


OWN_RANK = "the launcher's LOCAL_RANK"
"""A value: the rank that torch's launchers also put into the environment of a process."""


def spellings(text: str) -> set[str]:
    """The spellings of a value to look up in a table: as written, as a boolean, as a number."""
    plain = text.strip().strip("'\"").lower()
    found = {plain}
    if plain == os.environ.get("LOCAL_RANK"):
        found.add(OWN_RANK)
    for word, others in (("true", _TRUE), ("false", _FALSE)):
        if plain in others:
            found.add(word)
    with suppress(ValueError):
        found.add(f"{float(plain):g}")
    return found


# --- conversions ---


def share_of_rows(text: str) -> str:
    """A share below 1 is kept; 1 and more would count rows, which a share cannot express."""
    number = _number(text)
    if number < 1:
        return text
    raise ValueError(
        "counts rows, while --eval_ratio is a share of them, at most 0.5: for 500 of 10,000 rows "
        "--eval_ratio 0.05"
    )


def percentage_of_rows(text: str) -> str:
    """Per cent as a share."""
    number = _number(text)
    if 0 <= number <= 50:
        return f"{number / 100:g}"
    raise ValueError("should be a percentage from 0 to 50, of which 5 is --eval_ratio 0.05")


def share_of_steps(text: str) -> str:
    """Convert a warm-up ratio; 1 is refused, since as warmup_steps it would mean a single step."""
    if 0 <= _number(text) < 1:
        return text
    raise ValueError("should be a share of all steps, from 0 to below 1")


def names_of_linears(text: str) -> str:
    """Turn a list in Python, JSON or shell syntax into names with commas; all-linear is all."""
    if text.strip().lower() == "all-linear":
        return "all"
    try:
        parsed = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        parsed = None
    if isinstance(parsed, list | tuple) and all(isinstance(name, str) for name in parsed):
        return ",".join(parsed)
    return text.strip().strip("[]").replace("'", "").replace('"', "")


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError("should be a number") from None
