"""Rows in which somebody typed the name of a special token, such as ``[MASK]``."""

import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType

from glmtune.data.conversations import Example


def pattern_of(names: Iterable[str]) -> re.Pattern:
    """What finds any of some names, the longest that fits; nothing where there are none."""
    ordered = sorted(names, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, ordered)) or "(?!)")


class Spelled:
    """Counts the rows that spell names of special tokens, name by name.

    Args:
        names: the names to look for.
    """

    def __init__(self, names: Collection[str] = ()) -> None:
        self._pattern = pattern_of(names)
        self._first = {name[0] for name in names}
        self.num_rows = 0
        self.names: Counter[str] = Counter()
        """Rows by the name that they spell."""

    def find(self, texts: Iterable[str]) -> list[str]:
        """The names that texts spell, each once, in the order in which they stand there."""
        text = "\0".join(texts)
        if not any(first in text for first in self._first):
            return []
        return list(dict.fromkeys(self._pattern.findall(text)))

    def count(self, texts: Iterable[str]) -> list[str]:
        """Count the row that these are the texts of; what `find` finds in it."""
        if found := self.find(texts):
            self.num_rows += 1
            self.names.update(found)
        return found

    def extend(self, others: "Spelled") -> None:
        """Count the rows that others have counted."""
        self.num_rows += others.num_rows
        self.names.update(others.names)

    def describe(self, meant: Mapping[str, Sequence[int]] = MappingProxyType({})) -> str:
        """Say in one line what was counted.

        Args:
            meant: the ids that names become, where they do not stay text.
        """
        as_text = {name: num for name, num in self.names.most_common() if not meant.get(name)}
        as_ids = {name: num for name, num in self.names.most_common() if meant.get(name)}
        parts = []
        if as_ids:
            parts.append(f"special tokens, which become their ids (allow_special): {_list(as_ids)}")
        if as_text:
            parts.append(f"special tokens as text: {_list(as_text)}")
        verb = "row spells" if self.num_rows == 1 else "rows spell"
        return f"{self.num_rows:,} {verb} {'; '.join(parts)}"


def _list(rows_of: dict[str, int]) -> str:
    return ", ".join(f"{name} {num:,}" for name, num in rows_of.items())


def texts_of(example: Example) -> Iterator[str]:
    """All that a conversation says: its turns, the tools that it calls and describes."""
    for turn in example.turns:
        yield turn.text
        if turn.metadata:
            yield turn.metadata
        if turn.thought:
            yield turn.thought
    for tool in example.tools:
        yield from _strings(tool)


def _strings(value: object) -> Iterator[str]:
    """The strings within what JSON made, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, part in value.items():
            yield key
            yield from _strings(part)
    elif isinstance(value, list):
        for part in value:
            yield from _strings(part)
