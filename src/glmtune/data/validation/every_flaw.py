"""All that is wrong with a row, where reading it stops at the first flaw.

Of turns, each is read by itself, among turns that nothing is wrong with; then their order is looked
at, a turn that cannot stand where it does being left out of what follows. Of other rows, the field
with the flaw is filled and the row read again.
"""

from collections.abc import Iterator, Mapping

from glmtune.data.conversations import ASSISTANT, SYSTEM, USER, Turn, check_turns
from glmtune.data.fields import CONVERSATIONS
from glmtune.data.flaws import Flaw
from glmtune.data.formats import FORMATS, Format
from glmtune.data.records import read_row

MOST_FLAWS = 20
"""Flaws of one row that are named: of more, something else is wrong with it."""


def every_flaw(format: str, fields: dict[str, object], first: Flaw) -> list[Flaw]:
    """The flaws of a row that cannot be used.

    Args:
        format: the name of its format, see `records.read_row`.
        fields: of the row.
        first: where reading it stopped.
    """
    if format in FORMATS:
        return _flaws_of_turns(FORMATS[format], fields, first)[:MOST_FLAWS]
    found, filled = [first], _Filled(fields)
    while found[-1].field and len(found) < MOST_FLAWS:
        filled[found[-1].field] = "-"
        try:
            read_row(format, filled, path="", row=0, line=0)
            break
        except Flaw as flaw:
            if flaw.field in (known.field for known in found):
                break  # a text cannot stand there: what is wrong with it is known
            found.append(flaw)
    return found


class _Filled(dict):
    """A row of which fields are filled, that still names its own fields alone."""

    def __init__(self, fields: Mapping[str, object]) -> None:
        super().__init__(fields)
        self._own = list(fields)

    def __iter__(self) -> Iterator[str]:
        return iter(self._own)


def _flaws_of_turns(format: Format, fields: Mapping[str, object], first: Flaw) -> list[Flaw]:
    """The flaws of a row of turns, those of the row before those of its turns."""
    key = next((name for name in CONVERSATIONS if isinstance(fields.get(name), list)), None)
    turns = fields[key] if key else None
    if not isinstance(turns, list) or not turns or key is None:
        return [first]
    found = []
    try:
        format.read({**fields, key: [format.plain_turn]})
    except Flaw as flaw:
        found.append(flaw)
    placed: list[tuple[str, Turn]] = []
    for number, turn in enumerate(turns):
        before = [format.plain_turn] * number
        try:
            placed += format.read({key: [*before, turn]}).turns[number:]
        except Flaw as flaw:
            found.append(flaw)
            role = _role_of(format, turn) or _fitting(format, placed, turns[number + 1 :])
            placed.append((f'turn {number + 1} of "{key}"', Turn(role, "-")))
    found += _flaws_of_order(placed, needs_answer=not found)
    if str(first) not in map(str, found):
        found.insert(0, first)
    return found


def _flaws_of_order(placed: list[tuple[str, Turn]], needs_answer: bool) -> list[Flaw]:
    found: list[Flaw] = []
    while placed:
        try:
            check_turns(placed, needs_answer)
            break
        except Flaw as flaw:
            wrong = next((i for i, (where, _) in enumerate(placed) if where in flaw.what), None)
            if wrong is None:  # of all turns together, so it is no surprise after another flaw
                return found or ([flaw] if needs_answer else [])
            found.append(flaw)
            placed = placed[:wrong] + placed[wrong + 1 :]
    return found


def _role_of(format: Format, turn: object) -> str | None:
    """The role that a turn names; None where it names none that is known."""
    if not isinstance(turn, Mapping):
        return None
    said = turn.get(format.role_field)
    return format.roles.get(said.lower()) if isinstance(said, str) else None


def _fitting(format: Format, placed: list[tuple[str, Turn]], following: list[object]) -> str:
    """A role in whose place nothing is wrong with the order, for a turn of no known role."""
    before = placed[-1][1].role if placed else None
    after = _role_of(format, following[0]) if following else None
    if before == after == USER:
        return ASSISTANT
    return USER if after == ASSISTANT and before in (None, ASSISTANT) else SYSTEM
