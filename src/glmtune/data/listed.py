"""A data set of LLaMA-Factory's dataset_info.json: how its columns and turns are named.

Source of the keys and of what is assumed without them: data/README.md of LLaMA-Factory.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from typing import Any

from glmtune.data.flaws import Flaw, show
from glmtune.data.windows import Batch
from glmtune.errors import UserError, note

LIST_NAME = "dataset_info.json"
DEFAULT_SPLIT = "train"

_ALPACA = {"prompt": "instruction", "query": "input", "response": "output"}
_COLUMNS = {
    "alpaca": _ALPACA,
    "sharegpt": {"messages": "conversations"},
    "openai": {"messages": "messages"},
}
"""The columns that each way of writing rows has unless the list names some."""
_NEEDED = {"alpaca": ("prompt", "response"), "sharegpt": ("messages",), "openai": ("messages",)}
_MORE_COLUMNS = {
    "alpaca": ("history", "system"),
    "sharegpt": ("system", "tools"),
    "openai": ("system", "tools"),
}
_ROLES = {
    "user_tag": "human", "assistant_tag": "gpt", "observation_tag": "observation",
    "function_tag": "function_call", "system_tag": "system",
}  # fmt: skip
_TAGS = {"role_tag": "from", "content_tag": "value", **_ROLES}
_OPENAI_TAGS = {
    "role_tag": "role", "content_tag": "content", "user_tag": "user",
    "assistant_tag": "assistant", "observation_tag": "tool", "system_tag": "system",
}  # fmt: skip
_FORMATS = {"alpaca": "alpaca", "sharegpt": "sharegpt", "openai": "messages"}
_KEYS = (
    "file_name", "formatting", "columns", "tags", "num_samples", "split", "subset", "ranking",
    "folder",
)  # fmt: skip
_ELSEWHERE = ("hf_hub_url", "ms_hub_url", "om_hub_url", "script_url", "cloud_file_name")
note_once = cache(note)  # rows are read twice
_NOT_TAUGHT = ("images", "videos", "audios", "kto_tag", "chosen", "rejected")


@dataclass(frozen=True, slots=True)
class Entry:
    """A data set of the list."""

    file_name: str
    formatting: str = "alpaca"
    columns: Mapping[str, str] = field(default_factory=dict)
    """Each column that is used: the list's word for it -> its name in the files."""
    named: bool = False
    """Whether the list itself names the columns, so that they have to be there."""
    tags: Mapping[str, str] = field(default_factory=dict)
    num_samples: int | None = None
    split: str = DEFAULT_SPLIT

    @property
    def format(self) -> str:
        """The name of its format among ours."""
        return _FORMATS[self.formatting]

    def as_json(self) -> dict[str, object]:
        """What the rows depend on, as plain data."""
        return asdict(self)

    def start(self, path: str) -> "Renaming":
        """Begin to read its rows; `path` is what messages call it."""
        return Renaming(path, self)


def read_entry(where: str, given: object) -> Entry:
    """Read an entry of the list.

    Args:
        where: the list and the entry's name, for messages.
        given: the entry.

    Raises:
        UserError: it is none, or asks for something that is not supported.
    """
    if not isinstance(given, dict):
        raise UserError(f"{where} is {show(given)}, not an object; correct the list")
    for key in _ELSEWHERE:
        if given.get(key) and not (given.get("file_name") and key != "cloud_file_name"):
            raise UserError(
                f"{where} has {key}, and rows are read from files: download them and name the file "
                "in file_name"
            )
    if given.get("ranking"):
        raise UserError(
            f"{where} has ranking: pairs of a better and a worse answer are not trained on; name "
            "another data set"
        )
    if unknown := [key for key in given if key not in (*_KEYS, *_ELSEWHERE)]:
        raise UserError(f"{where} has {unknown[0]}, which is not known; take it out of the list")
    file_name = _text(where, given, "file_name", None)
    formatting = _text(where, given, "formatting", "alpaca")
    if formatting not in _COLUMNS:
        raise UserError(f"{where}: formatting is {formatting}; only {', '.join(_COLUMNS)} are read")
    for key in ("subset", "folder"):
        if given.get(key):
            note_once(
                f"{where}: {key} names a part of a data set on a hub, and has no effect on files"
            )
    columns = _texts(where, given, "columns")
    taught = (*_COLUMNS[formatting], *_MORE_COLUMNS[formatting])
    for key in columns:
        if key not in taught:
            what = "not taught" if key in _NOT_TAUGHT else f"no column of {formatting} rows"
            raise UserError(
                f"{where}: columns has {key}, which is {what}; take it out, or name another set"
            )
    columns = columns or dict(_COLUMNS[formatting])
    for key in _NEEDED[formatting]:
        if key not in columns:
            raise UserError(f'{where}: columns has no "{key}"; add the name of that column')
    tags = _OPENAI_TAGS if formatting == "openai" else _TAGS
    own_tags = _texts(where, given, "tags")
    for key in own_tags:
        if key not in tags or formatting == "alpaca":
            raise UserError(f"{where}: tags has {key}, which {formatting} rows do not have")
    number = given.get("num_samples")
    if number is not None and (type(number) is not int or number < 1):
        raise UserError(
            f"{where}: num_samples is {show(number)}; write a number of rows, 1 or more"
        )
    return Entry(
        file_name,
        formatting,
        columns,
        bool(given.get("columns")),
        {**tags, **own_tags},
        number,
        _text(where, given, "split", DEFAULT_SPLIT),
    )


def _text(where: str, given: Mapping[str, Any], key: str, default: str | None) -> str:
    value = given.get(key)
    if value is None and default is not None:
        return default
    if not isinstance(value, str) or not value:
        raise UserError(f"{where}: {key} is {show(value)}, not a name; correct the list")
    return value


def _texts(where: str, given: Mapping[str, Any], key: str) -> dict[str, str]:
    """An object of names; those that are null are left out."""
    value = given.get(key) or {}
    if not isinstance(value, dict):
        raise UserError(f"{where}: {key} is {show(value)}, not an object; correct the list")
    return {name: _text(f"{where}: {key}", value, name, None) for name in value if value[name]}


class Renaming:
    """Gives rows of an entry the names that our formats read, in one pass over them."""

    def __init__(self, path: str, entry: Entry) -> None:
        self._path, self._entry = path, entry
        self._left = entry.num_samples
        self._seen: set[str] = set()
        self._left_out: set[str] = set()
        ours = _OPENAI_TAGS if entry.formatting == "openai" else _TAGS
        self._role, self._text = ours["role_tag"], ours["content_tag"]
        self._roles = {entry.tags[tag]: ours[tag] for tag in _ROLES if tag in ours}

    @property
    def is_full(self) -> bool:
        """Whether there have been as many rows as are to be read."""
        return self._left == 0

    def rename(self, file: str, batch: Batch) -> None:
        """Give the rows of the next batch other names.

        Raises:
            UserError: a table has no such column.
        """
        if self._left is not None:
            batch.lines, batch.values = batch.lines[: self._left], batch.values[: self._left]
            self._left -= len(batch.values)
        if batch.columns is not None:
            self._check(file, batch.columns, show(list(batch.columns)))
        batch.values = [v if isinstance(v, Flaw) else self._row(v) for v in batch.values]
        batch.columns = None  # the rows have other names now

    def check_used(self) -> None:
        """Make sure, after the last row, that the list is right.

        Raises:
            UserError: a column that it names was in no row.
        """
        if self._left:
            note_once(
                f"{self._path}: num_samples is {self._entry.num_samples}, and there are "
                f"{self._left:,} rows fewer"
            )
        if self._left_out:
            told = show(sorted(self._left_out))
            note_once(f"{self._path}: columns that {LIST_NAME} does not name are left out: {told}")
        self._check(self._path, self._seen, show(sorted(self._seen | self._left_out)))

    def _check(self, where: str, present: Any, told: str) -> None:
        for key, name in self._entry.columns.items():
            if self._entry.named and name not in present:
                raise UserError(
                    f'{where}: no column is named "{name}", as columns.{key} in {LIST_NAME} says, '
                    f"there are {told}; correct the list"
                )

    def _row(self, row: object) -> object:
        if not isinstance(row, dict):
            return row
        columns = self._entry.columns
        self._seen.update(columns.values() & row.keys() if columns else ())
        self._left_out.update(row.keys() - columns.values())
        for key in _NEEDED[self._entry.formatting]:
            if columns[key] not in row:
                what = f'field "{columns[key]}" is missing, the row has {show(list(row))}'
                return Flaw("missing field", what, f"add it, or correct {LIST_NAME}", columns[key])
        fields = {key: row[name] for key, name in columns.items() if name in row}
        if self._entry.formatting == "alpaca":
            return {_ALPACA.get(key, key): value for key, value in fields.items()}
        turns = fields.pop("messages")
        try:
            named = [self._turn(*turn) for turn in enumerate(turns, start=1)]
        except Flaw as flaw:
            return flaw
        except TypeError:  # no list, which the format complains of
            named = turns
        return {_COLUMNS[self._entry.formatting]["messages"]: named, **fields}

    def _turn(self, number: int, turn: object) -> object:
        """A turn with the names of the format in place of the list's tags."""
        if not isinstance(turn, dict):
            return turn
        role, text = self._entry.tags["role_tag"], self._entry.tags["content_tag"]
        if role not in turn:
            column = self._entry.columns["messages"]
            what = f'turn {number} of "{column}" has no "{role}", it has {show(list(turn))}'
            raise Flaw("missing field", what, f"add it, or correct the tags in {LIST_NAME}", role)
        names = {role: self._role, text: self._text}
        renamed = {names.get(key, key): value for key, value in turn.items()}
        said = renamed[self._role]
        if isinstance(said, str):
            renamed[self._role] = self._roles.get(said, said)
        return renamed
