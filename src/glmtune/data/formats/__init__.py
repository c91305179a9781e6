"""Formats of conversations: each module reads the fields of a row, or raises what is wrong."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from glmtune.data.conversations import Example, check_turns
from glmtune.data.formats import messages, sharegpt
from glmtune.data.formats.draft import Draft
from glmtune.data.thoughts import check_thoughts


class Format(NamedTuple):
    """A way of writing conversations."""

    name: str
    is_one: Callable[[Mapping[str, object]], bool]
    """Whether the fields of a row are of this format, by their names."""
    read: Callable[[Mapping[str, object]], Draft]
    """The turns that the fields hold; raises Flaw where they hold none."""
    role_field: str
    """The field of a turn that has its role."""
    roles: Mapping[str, str]
    """Every name of a role -> the role."""
    plain_turn: Mapping[str, str]
    """A turn that nothing is wrong with."""


FORMATS = {
    format.name: format
    for format in (
        Format(
            "messages",
            messages.is_one,
            messages.read,
            "role",
            messages.ROLES,
            {"role": "user", "content": "-"},
        ),
        Format(
            "sharegpt",
            sharegpt.is_one,
            sharegpt.read,
            "from",
            sharegpt.ROLES,
            {"from": "human", "value": "-"},
        ),
    )
}


def recognise(fields: Mapping[str, object]) -> Format | None:
    """The format of a row; None where it is of none."""
    return next((format for format in FORMATS.values() if format.is_one(fields)), None)


def read_example(
    format: Format, fields: Mapping[str, object], needs_answer: bool = True
) -> tuple[Example, tuple[str, ...]]:
    """The conversation of a row, and the names of the fields that nothing reads.

    Where it needs no answer, an empty one at its end is one that is still to be given.

    Raises:
        Flaw: the fields hold none, or its turns cannot follow each other.
    """
    draft = format.read(fields)
    last = draft.turns[-1][1] if draft.turns else None
    if not needs_answer and last and last.is_answer and not (last.text.strip() or last.metadata):
        draft.turns.pop()
    check_turns(draft.turns, needs_answer)
    check_thoughts(draft.turns)
    return draft.example, draft.unused
