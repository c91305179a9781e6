"""Problems with rows: counted by kind, named by row, and written out one by one if asked for."""

import json
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import TextIO

from glmtune.data.records import name_rows

NUM_SHOWN = 3


@dataclass(frozen=True, slots=True)
class Problem:
    """What is wrong at a place, and the fix.

    `row` and `field` are None where the problem is not about one. `unusable` rows, and files that
    are `unusable` beyond a row, are refused by the verbs that read them; other problems are
    warnings.
    """

    kind: str
    file: str
    line: int | None
    row: int | None
    what: str
    fix: str
    field: str | None = None
    unusable: bool = False

    def __str__(self) -> str:
        place = self.file + (f":{self.line}" if self.line else "")
        place += f" (row {self.row})" if self.row else ""
        return f"{place}: {self.what}; {self.fix}"


@dataclass(slots=True)
class Tally:
    """The problems of one kind: how many, the rows of each file, and the first few."""

    unusable: bool
    num: int = 0
    rows: dict[str, array] = field(default_factory=dict)
    shown: list[Problem] = field(default_factory=list)


class Problems:
    """Collects problems: a few of each kind in full, and the row numbers of all.

    `file`, if given, becomes one JSON object: "problems", one a line in the order of arrival, and
    then what `close` is given.
    """

    def __init__(self, file: TextIO | None) -> None:
        self.tallies: dict[str, Tally] = {}
        self._file = file
        self._separator = "\n"
        if file:
            file.write('{"problems": [')

    def add(self, problem: Problem) -> None:
        """Count a problem, remember its row, and write it to the report."""
        tally = self.tallies.setdefault(problem.kind, Tally(problem.unusable))
        tally.num += 1
        if len(tally.shown) < NUM_SHOWN:
            tally.shown.append(problem)
        elif problem.row:
            rows = tally.rows.setdefault(problem.file, array("Q"))
            if not rows or rows[-1] != problem.row:  # a row may have several of a kind
                rows.append(problem.row)
        if self._file:
            self._file.write(self._separator + _as_json(asdict(problem)))
            self._separator = ",\n"

    def close(self, rest: Mapping[str, object]) -> None:
        """End the report with its remaining fields."""
        if self._file:
            text = _as_json(rest, indent=1)
            self._file.write("\n],\n" + text.removeprefix("{\n") + "\n")

    @property
    def counts(self) -> dict[str, int]:
        """The number of problems by kind."""
        return {kind: tally.num for kind, tally in self.tallies.items()}

    def lines(self, unusable: bool) -> Iterator[str]:
        """Describe the problems, unusable ones or warnings, a few of each kind in full."""
        for kind, tally in self.tallies.items():
            if tally.unusable != unusable:
                continue
            yield f"    {tally.num:,} {kind}"
            for problem in tally.shown:
                yield f"      {problem}"
            for file, rows in tally.rows.items():
                yield f"      and in {file}: {name_rows(rows, limit=20)}"


def _as_json(value: object, indent: int | None = None) -> str:
    text = json.dumps(value, ensure_ascii=False, indent=indent)
    # Half a character, in the name of a field or of a file, can be written as an escape only.
    return text.encode("utf-8", "backslashreplace").decode()
