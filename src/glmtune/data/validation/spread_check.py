"""`validate` with `engine ray`: a source checked part by part, by many workers.

The parts are checked by what the local engine calls. Where a list is broken, what its rows are
depends on all that stands before: then the file is checked once more, by one worker as a whole.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from glmtune.data.parts import Part, PartReader, cut, in_order
from glmtune.data.sources import find_source
from glmtune.data.validation.check import FileCheck
from glmtune.data.validation.problems import Problem
from glmtune.errors import UserError
from glmtune.spread import over


@dataclass(slots=True)
class Checked:
    """What checking a part has found; see `parts.PartRead`."""

    files: dict[str, FileCheck]
    """A check of each file that has rows in it; rows and lines are numbered from 1."""
    problems: list[Problem]
    """What is wrong with its rows, in their order."""
    ended_at: int | None
    num_lines: int
    error: str | None

    @property
    def num_rows(self) -> int:
        """Its rows."""
        return sum(check.file.num_rows for check in self.files.values())

    @property
    def is_broken(self) -> bool:
        """Whether the rows behind it may be read as part of it."""
        return self.error is not None or any(check.is_broken for check in self.files.values())


def check_source(
    path: str,
    format: str | None,
    encoding: str | None,
    special_names: Collection[str],
    tell: Callable[[Problem], None],
) -> tuple[dict[str, FileCheck], str | None]:
    """Check a source by the workers of a Ray that runs.

    Args:
        path: the source.
        format: of its rows; None for what the first row of each file is.
        encoding: that of its text, where it is not UTF-8.
        special_names: see `FileCheck`.
        tell: is called with each problem of a row, in the order of the rows.

    Returns:
        What each file holds, and why the rest could not be read, if it could not.
    """
    checks: dict[str, FileCheck] = {}
    try:
        parts = cut(path, encoding)
        formats = _formats(path, parts, format, encoding)
    except UserError as error:
        return checks, str(error)
    check = partial(_check, formats=formats, encoding=encoding, names=tuple(special_names))
    done: int | None = -1
    num_told = 0
    for part, found, _, line in in_order(parts, over(check, parts)):
        if part.start == 0:
            num_told = 0
        elif part.file == done:
            continue
        is_inside = part.start > 0 or bool(part.ends)
        if is_inside and (found.is_broken or _is_alone(part, found)):
            done, line = part.file, 0
            (found,) = over(check, [Part(path, part.file)])
            del found.problems[:num_told]
            for name in found.files:
                checks.pop(name, None)
        for problem in found.problems:
            file = checks.get(problem.file)
            tell(_moved(problem, file.file.num_rows if file else 0, line))
        num_told += len(found.problems)
        for name, of_part in found.files.items():
            if name not in checks:
                checks[name] = FileCheck(name, tell, of_part.file.format, special_names)
            checks[name].add(of_part, line)
        if found.error:
            return checks, found.error
    return checks, None


def _formats(
    path: str, parts: Sequence[Part], format: str | None, encoding: str | None
) -> dict[int | None, str | None]:
    """The format of each file, by its number; None where whoever reads its first row sees it."""
    source = find_source(path)
    found: dict[int | None, str | None] = {part.file: format or source.format for part in parts}
    for part in parts:
        if part.start == 0 and part.ends and found[part.file] is None:
            first = FileCheck(path, lambda problem: None)
            for _, batch in PartReader(part, encoding):
                first.take(batch)
                if first.file.format:
                    break
            found[part.file] = first.file.format
    return found


def _check(
    part: Part,
    *,
    formats: Mapping[int | None, str | None],
    encoding: str | None,
    names: Collection[str],
) -> Iterator[Checked]:
    """Check a part, as if nothing stood before it."""
    files: dict[str, FileCheck] = {}
    problems: list[Problem] = []
    reader, error = PartReader(part, encoding), None
    try:
        for file, batch in reader:
            if file not in files:
                files[file] = FileCheck(file, problems.append, formats[part.file], names)
            files[file].take(batch)
    except UserError as mistake:
        error = str(mistake)
    yield Checked(files, problems, reader.ended_at, reader.num_lines, error)


def _is_alone(part: Part, found: Checked) -> bool:
    """Whether a part is all of its file, with one row: that may be no list of rows."""
    return part.start == 0 and found.ended_at is None and found.num_rows <= 1


def _moved(problem: Problem, row: int, line: int) -> Problem:
    """A problem with its row and line as they are in the file."""
    return replace(
        problem,
        row=problem.row + row if problem.row else problem.row,
        line=problem.line + line if problem.line else problem.line,
    )
