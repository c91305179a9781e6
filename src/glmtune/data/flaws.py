"""What can be wrong with a row, as a message with the fix; and values shown on one line."""

import json
import re

from glmtune.data.files import explain_bytes
from glmtune.errors import visible

_UNDECODED = re.compile("[\udc80-\udcff]")  # bytes that are not UTF-8, under surrogateescape


class Flaw(Exception):
    """What is wrong with a row, or between two rows, and the fix.

    `kind` names the sort of flaw and `field` the field it is in. `breaks_list`: the list is not
    valid JSON there, so that from there on the bounds of its rows are a guess.
    """

    def __init__(
        self, kind: str, what: str, fix: str, field: str | None = None, breaks_list: bool = False
    ):
        super().__init__(f"{what}; {fix}")
        self.kind, self.what, self.fix = kind, what, fix
        self.field, self.breaks_list = field, breaks_list

    @property
    def is_missing(self) -> bool:
        """Whether the row has no field of the name, unlike a turn in it that lacks one."""
        return self.kind == "missing field" and self.what.startswith("field ")


def no_json(
    error: json.JSONDecodeError | RecursionError, place: str, breaks_list: bool = False
) -> Flaw:
    """The flaw of a row that json refused at `place`."""
    kind, reason, fix = "nesting", "nested too deeply", "flatten it"
    if isinstance(error, json.JSONDecodeError):
        kind, fix = "syntax", "fix it"
        found = error.doc[error.pos : error.pos + 1]
        reason = f"{error.msg} at {place}"
        if found and not found.isprintable():
            kind, reason = "control character", f"U+{ord(found):04X}, as it stands, at {place}"
            fix = "remove it, or write it as an escape"
    return Flaw(kind, f"not JSON ({reason})", fix, breaks_list=breaks_list)


def long_number() -> Flaw:
    """The flaw of a row with an integer of more digits than Python accepts."""
    return Flaw("syntax", "not JSON (a number too long)", "fix it")


def broken_list(what: str) -> Flaw:
    """A flaw between the rows of a list."""
    return Flaw("list", f"not JSON ({what})", "fix that place", breaks_list=True)


def cut_off() -> Flaw:
    """The flaw of a truncated list, or of the row in which it breaks off."""
    what = "the list ends early, the file is cut off"
    return Flaw("cut off", what, "download or copy it again", breaks_list=True)


def too_long(limit: int, breaks_list: bool = False) -> Flaw:
    """The flaw of a row of more than `limit` bytes."""
    what, fix = f"a row of more than {limit >> 20} MiB", "split it, or see if its end is missing"
    return Flaw("too long", what, fix, breaks_list=breaks_list)


def not_utf8(text: str, breaks_list: bool = False) -> Flaw | None:
    """The flaw of a row that is not UTF-8; `text` is the row, decoded with surrogateescape."""
    undecoded = _UNDECODED.search(text)
    if undecoded is None:
        return None
    place = len(text[: undecoded.start()].encode("utf-8", "surrogateescape"))
    cause, fix = explain_bytes(text.encode("utf-8", "surrogateescape"))
    what = f"not UTF-8 at byte {place} of the row, {cause}"
    return Flaw("encoding", what, fix, breaks_list=breaks_list)


def show(value: object) -> str:
    """Show a value on one line, shortened, and printable whatever it holds."""
    text = visible(json.dumps(value, ensure_ascii=False).encode("utf-8", "replace").decode())
    return text if len(text) <= 60 else text[:57] + "..."


def kind_of(value: object) -> str:
    """Name what sort of JSON value this is."""
    kinds = {bool: "a truth value", list: "a list", dict: "an object", str: "a string"}
    return "null" if value is None else kinds.get(type(value), "a number")
