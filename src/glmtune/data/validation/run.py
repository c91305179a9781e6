"""`glmtune validate`: everything that is wrong with files of rows, in one pass over each."""

import os
import re
import sys
import time
from collections.abc import Callable, Collection
from contextlib import ExitStack
from dataclasses import dataclass

from tqdm import tqdm

from glmtune import __version__
from glmtune.config.settings import ValidateSettings
from glmtune.data.files import new_file
from glmtune.data.sources import find_source
from glmtune.data.validation.check import CheckedFile, FileCheck
from glmtune.data.validation.contradictions import Reread, find_contradictions
from glmtune.data.validation.duplicates import Fingerprints, find_repeats, find_shared_questions
from glmtune.data.validation.problems import Problem, Problems
from glmtune.errors import UserError, note, visible


@dataclass(frozen=True, slots=True)
class Validation:
    """Everything found in `files` (the last is the held-out one, if there is one)."""

    files: list[CheckedFile]
    problems: Problems
    seconds: float
    peak_bytes: int | None

    @property
    def num_rows(self) -> int:
        """Number of rows in all files."""
        return sum(file.num_rows for file in self.files)

    @property
    def num_unusable(self) -> int:
        """Number of rows that no verb can use."""
        return sum(file.num_unusable for file in self.files)

    @property
    def megabytes_per_second(self) -> float:
        """A line on how fast the files were read and compared."""
        return sum(file.num_bytes for file in self.files) / 1e6 / self.seconds

    def as_json(self) -> dict[str, object]:
        """The fields of the report beside the problems."""
        return {
            "counts": self.problems.counts,
            "files": [file.as_json() for file in self.files],
            "seconds": self.seconds,
            "megabytes_per_second": self.megabytes_per_second,
            "peak_memory_bytes": self.peak_bytes,
            "glmtune_version": __version__,
        }

    def __str__(self) -> str:
        lines = [str(file) for file in self.files]
        for title, unusable in [("not usable", True), ("usable, but look at", False)]:
            if told := list(self.problems.lines(unusable)):
                lines += [f"  {title}", *told]
        if not self.problems.counts:
            lines.append("  no problem found")
        memory = f", {self.peak_bytes / 1e6:,.0f} MB of memory" if self.peak_bytes else ""
        speed = f"{self.megabytes_per_second:,.0f} MB/s"
        lines.append(f"  checked in {self.seconds:,.1f} s, {speed}{memory}")
        return "\n".join(lines)


def validate(settings: ValidateSettings, special_names: Collection[str] = ()) -> Validation:
    """Check files of rows of any format, and print what was found.

    Args:
        settings: which files, and how they are written.
        special_names: names of special tokens, which rows may spell.

    Every problem is counted and its row named; `json_path` gets each one whole. Returns what was
    found if all rows are usable. Otherwise raises UserError, one line, after everything has been
    printed; also for a json_path that cannot be written.
    """
    start = time.perf_counter()
    held_out = [settings.held_out] if settings.held_out else []
    with ExitStack() as stack:
        report = stack.enter_context(new_file(settings.json_path)) if settings.json_path else None
        problems = Problems(report)
        if settings.engine == "ray":
            from glmtune.spread import running_ray

            stack.enter_context(running_ray(settings.ray_address))
        paths = [*settings.files, *held_out]
        checked = [_check_source(path, problems, settings, special_names) for path in paths]
        num_files = sum(map(len, checked[: len(settings.files)]))
        files = [file for parts in checked for file, _, _ in parts]
        prints = [fingerprints for parts in checked for _, fingerprints, _ in parts]
        _tell_of_empty(files, num_files, problems)
        _compare(prints[:num_files], prints[num_files:], problems)
        again = [reread for parts in checked for _, _, reread in parts]
        for problem in find_contradictions(prints[:num_files], again):
            problems.add(problem)
        seconds = time.perf_counter() - start
        validation = Validation(files, problems, seconds, _peak_bytes())
        problems.close(validation.as_json())
    print(visible(str(validation)))
    if num_unusable := validation.num_unusable:
        raise UserError(
            f"{num_unusable:,} of {validation.num_rows:,} rows cannot be used; fix them, "
            "or let convert and tokenize leave them out with --on_bad_row skip"
        )
    if any(tally.unusable for tally in problems.tallies.values()):
        raise UserError("not every file can be used; see above")
    return validation


def _check_source(
    path: str, problems: Problems, settings: ValidateSettings, special_names: Collection[str]
) -> list[tuple[CheckedFile, Fingerprints, Reread]]:
    """Read a path's files to their end; what is wrong, with a row or a file, is in `problems`."""
    if settings.engine == "ray":
        from glmtune.data.validation import spread_check

        checks, error = spread_check.check_source(
            path, settings.format, settings.encoding, special_names, problems.add
        )
    else:
        checks, error = _check_here(path, settings, special_names, problems.add)
    at = path
    if error:
        at = next((file for file in reversed([path, *checks]) if error.startswith(file)), path)
        problems.add(_problem_of_file(at, error))
    if error or not checks:
        checks.setdefault(at, FileCheck(at, problems.add, settings.format, special_names))
    return [
        (check.file, check.fingerprints, Reread(path, file, check.file.format, settings.encoding))
        for file, check in checks.items()
    ]


def _check_here(
    path: str,
    settings: ValidateSettings,
    special_names: Collection[str],
    tell: Callable[[Problem], None],
) -> tuple[dict[str, FileCheck], str | None]:
    """What each file of a source holds, and why the rest could not be read, if it could not."""
    checks: dict[str, FileCheck] = {}
    size = os.path.getsize(path) if os.path.isfile(path) else None
    with tqdm(total=size, desc=path, unit="B", unit_scale=True, delay=1) as progress:
        try:
            source = find_source(path)
            for file, batch in source.batches(settings.encoding):
                if file not in checks:
                    format = settings.format or source.format
                    checks[file] = FileCheck(file, tell, format, special_names)
                checks[file].take(batch)
                progress.update(batch.num_bytes)
        except UserError as error:
            return checks, str(error)
    return checks, None


def _problem_of_file(path: str, text: str) -> Problem:
    """Split a UserError's "path:line: what; fix", in which the line may be missing."""
    found = re.fullmatch(r"(?::(\d+))?: (.*)", text.removeprefix(path), re.DOTALL)
    line, told = found.groups() if found else (None, text)
    what, _, fix = told.rpartition("; ")
    return Problem("file", path, int(line) if line else None, None, what, fix, unusable=True)


def _tell_of_empty(files: list[CheckedFile], num_files: int, problems: Problems) -> None:
    """Report files without a row and without another problem; only note it of held-out ones."""
    told = {problem.file for tally in problems.tallies.values() for problem in tally.shown}
    for number, file in enumerate(files):
        if file.num_rows or file.path in told:
            continue
        if number >= num_files:
            note(f"{file.path}: holds no row, so nothing is compared with it")
            continue
        what, fix = "holds no row", "check that this is the right file"
        problems.add(Problem("file", file.path, None, None, what, fix, unusable=True))


def _compare(files: list[Fingerprints], held_out: list[Fingerprints], problems: Problems) -> None:
    """Report rows that occur twice among the files, and questions that are held out as well."""
    for place, first, is_exact in find_repeats(files):
        kind, like = ("duplicate", "the same as") if is_exact else ("near duplicate", "nearly")
        what = f"{like} {first}"
        problems.add(Problem(kind, place.path, place.line, place.row, what, "keep one of them"))
    for others in held_out:
        for place, other in find_shared_questions(files, others):
            what, fix = f"asks what the held-out {other} asks", "take one of them out"
            problems.add(Problem("leak", place.path, place.line, place.row, what, fix))


def _peak_bytes() -> int | None:
    """The peak memory of this process; None where the system does not report it."""
    try:
        import resource
    except ImportError:  # on Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
