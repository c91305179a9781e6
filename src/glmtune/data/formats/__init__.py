"""Formats of conversations: each module reads the fields of a row, or raises what is wrong."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from glmtune.data.conversations import Example, check_turns
from glmtune.data.formats import messages, sharegpt
from glmtune.data.formats.draft import Draft


class Format(NamedTuple):
    """A way of writing conversations."""

    name: str
    is_one: Callable[[Mapping[str, object]], bool]
    """Whether the fields of a row are of this format, by their names."""
    read: Callable[[Mapping[str, object]], Draft]
    """The turns that the fields hold; raises Flaw where they hold none."""


FORMATS = {
    format.name: format
    for format in (
        Format("messages", messages.is_one, messages.read),
        Format("sharegpt", sharegpt.is_one, sharegpt.read),
    )
}


def recognise(fields: Mapping[str, object]) -> Format | None:
    """The format of a row; None where it is of none."""
    return next((format for format in FORMATS.values() if format.is_one(fields)), None)


def read_example(format: Format, fields: Mapping[str, object]) -> tuple[Example, tuple[str, ...]]:
    """The conversation of a row, and the names of the fields that nothing reads.

    Raises:
        Flaw: the fields hold none, or its turns cannot follow each other.
    """
    draft = format.read(fields)
    check_turns(draft.turns)
    return draft.example, draft.unused
