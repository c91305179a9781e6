"""Check whole files: from start to end, or long ones in spans, by several processes at a time."""

import multiprocessing
import os
import signal
from collections import deque
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from itertools import islice

from tqdm import tqdm

from glmtune.data.jsonfile import CutInsideRow, Span, cut_into_spans, read_batches, read_span
from glmtune.data.validation.check import CheckedFile, FileCheck
from glmtune.data.validation.duplicates import Fingerprints
from glmtune.data.validation.problems import Problem, Problems
from glmtune.errors import UserError

SPAN_BYTES = 1 << 24
NUM_PROCESSES = min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1)

_Part = tuple[CheckedFile, Fingerprints, list[Problem]]


def open_pool(paths: list[str]) -> AbstractContextManager[Executor | None]:
    """Return processes to check files with, or none where no file is long enough.

    Only where the system lets a process fork: to start anew costs them more than a long file.
    """
    can_fork = "fork" in multiprocessing.get_all_start_methods()
    if NUM_PROCESSES == 1 or not can_fork or not any(map(_is_long, paths)):
        return nullcontext()
    context = multiprocessing.get_context("fork")
    # Ctrl+C goes to all processes; it is for the first one to end the others.
    ignore_interrupt = (signal.SIGINT, signal.SIG_IGN)
    return ProcessPoolExecutor(NUM_PROCESSES, context, signal.signal, ignore_interrupt)


def check_file(
    path: str,
    problems: Problems,
    with_questions: bool,
    pool: Executor | None = None,
    encoding: str | None = None,
) -> tuple[CheckedFile, Fingerprints]:
    """Read a file to its end; what is wrong goes into `problems`, be it the file as a whole."""
    check = FileCheck(path, problems.add, with_questions)
    size = os.path.getsize(path) if os.path.isfile(path) else None
    with tqdm(total=size, desc=path, unit="B", unit_scale=True, delay=1) as progress:
        try:
            if pool and not encoding and _is_long(path):
                batches = read_span(_check_spans(check, problems, pool, progress))
            else:
                batches = read_batches(path, encoding)
            for batch in batches:
                check.take(batch)
                progress.update(batch.num_bytes)
        except UserError as error:
            problems.add(_problem_of_file(path, str(error)))
    return check.file, check.fingerprints


def _problem_of_file(path: str, text: str) -> Problem:
    """Take a UserError's "path:line: what; fix" apart, of which the line may be missing."""
    place, _, told = text[len(path) :].partition(": ")
    what, _, fix = told.rpartition("; ")
    line = int(place[1:]) if place else None
    return Problem("file", path, line, None, what, fix, unusable=True)


def _is_long(path: str) -> bool:
    return os.path.isfile(path) and os.path.getsize(path) >= 4 * SPAN_BYTES


def _check_spans(check: FileCheck, problems: Problems, pool: Executor, progress: tqdm) -> Span:
    """Check a file in spans, several at a time, and return what is left of it to be checked.

    That is its last span; or all from a span on in which a row goes on where it was cut.
    """
    spans = cut_into_spans(check.file.path, SPAN_BYTES)
    running: deque[tuple[Span, Future[_Part | None]]] = deque()
    with_questions = check.fingerprints.with_questions
    last = span = next(spans)
    part = _check_span(span, None, with_questions) if span.end else None
    while part:
        file, fingerprints, found = part
        for problem in found:
            row = problem.row and problem.row + check.file.num_rows
            problems.add(replace(problem, row=row))
        check.fingerprints.extend(fingerprints, check.file.num_rows)
        check.file.add(file)
        progress.update(file.num_bytes)
        # Spans are checked one by one until a row has told the format of all.
        num_ahead = 2 * NUM_PROCESSES if check.file.format else 1
        for last in islice(spans, num_ahead - len(running)):
            if last.end:
                task = pool.submit(_check_span, last, check.file.format, with_questions)
                running.append((last, task))
        if not running:
            return last
        span, task = running.popleft()
        part = task.result()
    for _, task in running:
        task.cancel()
    return replace(span, end=None)


def _check_span(span: Span, format: str | None, with_questions: bool) -> _Part | None:
    """Check a span, its rows counted from 1; None where it was cut inside of a row."""
    found: list[Problem] = []
    check = FileCheck(span.path, found.append, with_questions, format)
    try:
        for batch in read_span(span):
            check.take(batch)
    except CutInsideRow:
        return None
    return check.file, check.fingerprints, found
