"""Questions that are asked twice, equally or nearly so, and answered differently.

Questions are found by the hashes and pieces that `Fingerprints` keeps. The files are then read once
more, as far as those rows, for the answers: to show them, and since answers that are near-equal as
well contradict nothing.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from glmtune.data.characters import survey
from glmtune.data.flaws import show
from glmtune.data.near import Pieces, first_of_each, group, hashes_of, near_pairs
from glmtune.data.records import fields_of, name_rows, read_row
from glmtune.data.row_texts import texts_of
from glmtune.data.sources import find_source
from glmtune.data.validation.duplicates import MOST_COMPARED, Fingerprints, Place
from glmtune.data.validation.problems import Problem
from glmtune.errors import note

MOST_ANSWERS = 50
"""Answers of a group that are read again and compared with its first one."""
_MOST_CHARACTERS = 1000


class Asked(NamedTuple):
    """A question: its place, and which of the row's answers is to it, from 0; -1 for the last."""

    file: int
    place: Place
    number: int
    question: int
    """Questions of the same number are equal; others of a group are nearly so."""


class Reread(NamedTuple):
    """A checked file as it is read again."""

    named: str
    """The path that was to be checked, which may be of several files."""
    path: str
    format: str | None
    encoding: str | None


def find_contradictions(
    files: Sequence[Fingerprints], sources: Sequence[Reread]
) -> Iterator[Problem]:
    """Yield a problem for each group of near-equal questions with different answers.

    Equal questions come first, and of these the ones with the shortest answers: two words that
    differ are a contradiction more surely than two poems.
    """
    num_questions = sum(len(file.last.asked) + len(file.earlier.asked) for file in files)
    if num_questions > MOST_COMPARED:
        note(
            f"{num_questions:,} questions are compared for equality alone: nearly equal ones are "
            f"looked for among {MOST_COMPARED:,} at most"
        )
    groups = list(_groups(files))
    wanted: dict[int, dict[int, set[int]]] = defaultdict(lambda: defaultdict(set))
    for members in groups:
        for asked in members[:MOST_ANSWERS]:
            wanted[asked.file][asked.place.row].add(asked.number)
    answers = {
        (file, *key): text
        for file, rows in wanted.items()
        for key, text in _read_answers(sources[file], rows).items()
    }
    told = []
    for members in groups:
        texts = [answers[m.file, m.place.row, m.number] for m in members[:MOST_ANSWERS]]
        if other := first_different(texts):
            is_near = members[0].question != members[other].question
            rank = is_near, len(texts[0]) + len(texts[other])
            told.append((rank, _problem(members, other, texts[0], texts[other])))
    yield from (problem for _, problem in sorted(told, key=lambda pair: pair[0]))


def _groups(files: Sequence[Fingerprints]) -> Iterator[list[Asked]]:
    """Near-equal questions with different answers, in the order of files and rows."""
    kept = [part for file in files for part in (file.last, file.earlier)]
    asked = np.concatenate([np.asarray(part.asked) for part in kept])
    answered = np.concatenate([np.asarray(part.answered) for part in kept])
    compared = np.arange(len(asked))
    is_small = len(asked) <= MOST_COMPARED
    if not is_small:
        ranked = np.sort(asked)
        compared = np.flatnonzero(np.isin(asked, ranked[1:][ranked[1:] == ranked[:-1]]))
        asked, answered = asked[compared], answered[compared]
    groups = questions = first_of_each(asked)
    if is_small:
        pieces = Pieces()
        for part in kept:
            pieces.extend(part.pieces)
        firsts = np.flatnonzero(questions == np.arange(len(questions)))
        groups = group(questions, near_pairs(pieces, firsts))
    order = np.lexsort((answered, groups))
    is_new = np.ones(len(order), bool)
    is_new[1:] = (np.diff(groups[order]) != 0) | (np.diff(answered[order]) != 0)
    counts = np.bincount(groups[order[is_new]], minlength=len(groups))
    contradict = np.flatnonzero((counts[groups] > 1) & (asked != hashes_of([b""])[0]))
    members: dict[int, list[Asked]] = {}
    starts = np.cumsum([0, *(len(part.asked) for part in kept)])
    for index in contradict.tolist():
        place = int(compared[index])
        which = int(np.searchsorted(starts, place, side="right")) - 1
        file, row, number = files[which // 2], place - int(starts[which]), -1
        if which % 2:
            row, number = file.earlier_row[row], file.earlier_number[row]
        one = Asked(which // 2, file.place(row), number, int(questions[index]))
        members.setdefault(int(groups[index]), []).append(one)
    for found in members.values():
        yield sorted(found, key=lambda one: (one.file, one.place.row, one.number < 0, one.number))


def _read_answers(source: Reread, rows: Mapping[int, set[int]]) -> dict[tuple[int, int], str]:
    """The beginnings of answers, by row and number of the answer."""
    found: dict[tuple[int, int], str] = {}
    last, row = max(rows), 0
    for path, batch in find_source(source.named).batches(source.encoding):
        if path != source.path:
            continue
        for line, value in zip(batch.lines, batch.values, strict=True):
            row += 1
            if row in rows:
                assert source.format is not None, "a row of it was usable"
                texts = texts_of(read_row(source.format, fields_of(value), source.path, row, line))
                for number in rows[row]:
                    text = texts.texts[texts.answers[number]].text
                    found[row, number] = text[:_MOST_CHARACTERS]
        if row >= last:
            break
    return found


def first_different(answers: Sequence[str]) -> int:
    """The place of the first answer that is not near-equal to the first one; 0 if all are."""
    bare = [survey(answer.encode("utf-8", "replace")).bare for answer in answers]
    for place, text in enumerate(bare):
        if text != bare[0]:
            pieces = Pieces()
            pieces.add([bare[0], text])
            if not len(near_pairs(pieces)):
                return place
    return 0


def _problem(members: Sequence[Asked], other: int, first_answer: str, answer: str) -> Problem:
    first, one = members[0], members[other]
    nearly = "" if first.question == one.question else "nearly "
    what = f"asks {nearly}what {first.place} asks, and answers {show(answer)}, not "
    what += show(first_answer)
    others = sorted(
        {(m.place.path, m.place.row) for m in members} - {first.place[:2], one.place[:2]}
    )
    by_file: dict[str, list[int]] = defaultdict(list)
    for path, row in others:
        by_file[path].append(row)
    listed = "; ".join(f"{path}: {name_rows(rows, limit=5)}" for path, rows in by_file.items())
    what += f" (so do {len(others):,} more, {listed})" if others else ""
    fix = "keep one of them, unless both answers are right"
    place = one.place
    return Problem("contradiction", place.path, place.line, place.row, what, fix)
