"""`glmtune ledger`: the loss of every training row before and after, and which rows stand out."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from peft import PeftModel

from glmtune.adapters.find import find_adapter
from glmtune.config.settings import LedgerSettings
from glmtune.data.characters import survey
from glmtune.data.files import write_json
from glmtune.data.flaws import show
from glmtune.data.near import Pieces, first_of_each, group, near_pairs
from glmtune.data.split import MOST_COMPARED
from glmtune.data.token_rows import TokenRows
from glmtune.data.validation.contradictions import first_different
from glmtune.errors import UserError, note
from glmtune.evaluation.answers import ModelChoice
from glmtune.evaluation.collapse import question_of
from glmtune.evaluation.source_run import RunRows, read_rows
from glmtune.models.families import family_of
from glmtune.models.likelihood import packed_layers, packed_sums, padded_sums
from glmtune.models.loading import load_config
from glmtune.models.packed import base_of
from glmtune.models.resolve import base_name
from glmtune.run_files import LEDGER_FILE, RECIPE_FILE
from glmtune.runlog import Progress, print_pairs

WORSE = 0.1
"""Nats a token by which a row has to become less likely to count as made worse."""
KEPT_SHARE = 0.5
"""A row stayed hard where more than this share of its loss is left ..."""
HARD = 0.9
"""... and it is harder than this share of the held-out rows."""
EASY, MEMORISED_SHARE = 0.05, 0.5
"""A row is memorised where its loss is below half of what 95 % of the held-out rows have."""
LEAST_HELD_OUT = 8
"""With fewer held-out rows none is said to be memorised."""
KINDS = ("not_learnt", "memorised", "worse", "contradiction")
MOST_LISTED = 1000
"""Rows of a kind in the file; the counts are of all."""
_MOST_CHARACTERS = 1000
_ROWS_AT_A_TIME = 2048


class Losses(NamedTuple):
    """The mean loss of each row's supervised tokens, in nats; NaN where a row cannot be scored."""

    before_R: np.ndarray
    after_R: np.ndarray


@dataclass(frozen=True)
class Levels:
    """What rows that were not trained on have, with which those that were are compared."""

    hard: float
    """A loss after training that 9 of 10 rows stay below."""
    easy: float | None
    """A loss that 19 of 20 stay above; None with too few held-out rows."""

    @classmethod
    def of(cls, losses: Losses, run: RunRows) -> "Levels":
        """Read them off the held-out rows; with too few of those, what is hard off all rows."""
        held_out = losses.after_R[run.held_out]
        held_out = held_out[np.isfinite(held_out)]
        if len(held_out) < LEAST_HELD_OUT:
            every = losses.after_R[np.isfinite(losses.after_R)]
            return cls(float(np.quantile(every, HARD)), None)
        return cls(float(np.quantile(held_out, HARD)), float(np.quantile(held_out, EASY)))


def ledger(settings: LedgerSettings) -> dict[str, Any]:
    """Score every row of an adapter's run with the adapter off and on, and list what stands out.

    Returns:
        The content of ledger.json.

    Raises:
        UserError: there is no such adapter or no run of it, its rows are missing or have changed,
            or the file cannot be written.
    """
    subject = ModelChoice.to_score(settings)
    assert subject.adapter is not None, "LedgerSettings requires one"
    spreads = settings.engine == "ray"
    tokenizer = subject.tokenizer
    model: Any = None if spreads else subject.load(computes=True)[0]
    run = read_rows(subject.adapter, tokenizer)
    if run is None:
        raise UserError(
            f"{subject.adapter}: no {RECIPE_FILE} says which rows it was trained on; name a run "
            "folder, or one of its checkpoints"
        )
    if spreads:
        from glmtune.evaluation.spread_answers import losses_of

        parts = scorable(run.rows, load_config(subject.base).max_position_embeddings)
        found = losses_of(subject, run.rows, parts, settings.ray_address, score_part)
        losses = joined(run.rows, parts, found)
    else:
        rule = family_of(base_of(model).config).row_rule(model.config)
        run = run._replace(rows=replace(run.rows, rule=rule))
        losses = score_rows(model, run.rows)
    levels = Levels.of(losses, run)
    texts = Texts(run.rows, tokenizer)
    places = dict(find_rows_of(losses, levels, run.trained_on, texts))
    numbers_R = None if run.card is None else run.card.source_rows()
    content = {
        "adapter": subject.adapter_name,
        "base": base_name(subject.base),
        "dtype": str(subject.dtype).removeprefix("torch."),
        "source": run.card.source if run.card and numbers_R is not None else None,
        "counts": {
            "trained_on": len(run.trained_on),
            "held_out": len(run.held_out),
            **{kind: len(rows) for kind, rows in places.items()},
        },
        "levels": {"hard": levels.hard, "easy": levels.easy, "worse": WORSE},
        "trained_on": _means(losses, run.trained_on),
        "held_out": _means(losses, run.held_out),
        "rows": [
            {
                "row": int(row) + 1 if numbers_R is None else int(numbers_R[row]),
                "question": texts.question(row)[:_MOST_CHARACTERS],
                "answer": texts.answer(row)[:_MOST_CHARACTERS],
                "before": float(losses.before_R[row]),
                "after": float(losses.after_R[row]),
                "kind": kind,
            }
            for kind, rows in places.items()
            for row in rows[:MOST_LISTED]
        ],
    }
    path = settings.json_path or str(find_adapter(settings.adapter) / LEDGER_FILE)
    write_json(content, path)
    report(content, settings.limit)
    print(f"written: {path}")
    return content


def score_rows(model: PeftModel, rows: TokenRows) -> Losses:
    """The losses of all rows, adapter off and on: one packed pass over them each.

    Rows that have more tokens than the model has positions, or none that is supervised, are left
    out, and a note says how many.
    """
    limit = model.config.max_position_embeddings
    parts = scorable(rows, limit)
    return joined(rows, parts, (score_part(model, rows, part) for part in parts))


def scorable(rows: TokenRows, limit: int) -> list[np.ndarray]:
    """The numbers of rows of at most `limit` tokens with a supervised one, some at a time."""
    asked = np.flatnonzero((rows.lengths_R <= limit) & (rows.num_labels_R > 0))
    if num_out := len(rows) - len(asked):
        note(f"{num_out:,} of {len(rows):,} rows cannot be scored: too long, or nothing supervised")
    starts = range(0, len(asked), _ROWS_AT_A_TIME)
    return [asked[start : start + _ROWS_AT_A_TIME] for start in starts]


def score_part(
    model: PeftModel, rows: TokenRows, part: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The losses of some rows, adapter off and on."""
    sides = []
    for is_tuned in (False, True):
        with nullcontext() if is_tuned else model.disable_adapter():
            packed = packed_layers(model)
            sums_R = packed_sums(packed, rows, part) if packed else padded_sums(model, rows, part)
        sides.append(-sums_R[part] / rows.num_labels_R[part])
    return sides[0], sides[1]


def joined(
    rows: TokenRows, parts: Sequence[np.ndarray], found: Iterable[tuple[np.ndarray, np.ndarray]]
) -> Losses:
    """The losses of all rows.

    Args:
        rows: all rows.
        parts: numbers of those that are scored.
        found: their losses, part by part.
    """
    losses = Losses(np.full(len(rows), np.nan), np.full(len(rows), np.nan))
    progress = Progress(2 * sum(map(len, parts)), 0, "rows scored")
    num_done = 0
    for part, sides in zip(parts, found, strict=True):
        for losses_R, of_part in zip(losses, sides, strict=True):
            losses_R[part] = of_part
        num_done += 2 * len(part)
        progress.tell(num_done)
    return losses


class Texts:
    """Questions and answers of token rows, decoded when they are asked for."""

    def __init__(self, rows: TokenRows, tokenizer: Any):
        self._rows, self._tokenizer = rows, tokenizer

    def question(self, row: int) -> str:
        """What stands before the answer, without the template's own words."""
        return question_of(self._read(row, slice(None, self._length(row))))

    def answer(self, row: int) -> str:
        """The answer; of a conversation the last one, of a text all of it."""
        return self._read(row, slice(self._length(row), None)).strip()

    def _length(self, row: int) -> int:
        return int(self._rows.prompt_lengths_R[row])

    def _read(self, row: int, part: slice) -> str:
        return self._tokenizer.decode(self._rows[row][part].tolist(), skip_special_tokens=True)


def find_rows_of(
    losses: Losses, levels: Levels, trained_on: np.ndarray, texts: Texts
) -> Iterator[tuple[str, list[int]]]:
    """For each of `KINDS` its rows, those that stand out most first.

    A contradiction's rows follow each other, those of equal questions before others.
    """
    before, after = losses.before_R[trained_on], losses.after_R[trained_on]
    is_worse = after > before + WORSE
    is_hard = ~is_worse & (after > KEPT_SHARE * before) & (after > levels.hard)
    yield "not_learnt", _ranked(trained_on[is_hard], -losses.after_R)
    is_easy = np.zeros(len(trained_on), bool)
    if levels.easy is not None:
        is_easy = (after < MEMORISED_SHARE * levels.easy) & (before >= levels.easy)
    yield "memorised", _ranked(trained_on[is_easy], losses.after_R)
    yield "worse", _ranked(trained_on[is_worse], losses.before_R - losses.after_R)
    yield "contradiction", list(contradictions(trained_on, texts))


def _ranked(rows: np.ndarray, key_R: np.ndarray) -> list[int]:
    return rows[np.argsort(key_R[rows], kind="stable")].tolist()


def contradictions(row_ids: Sequence[int] | np.ndarray, texts: Texts) -> Iterator[int]:
    """Rows of near-equal questions with different answers, one group after another.

    Questions and answers are compared as `glmtune validate` compares them; of very many rows equal
    questions alone.
    """
    bare = [_bare(texts.question(row)) for row in row_ids]
    groups = first_of_each(np.array([hash(text) for text in bare], np.int64))
    if len(bare) <= MOST_COMPARED:
        pieces = Pieces()
        pieces.add(bare)
        firsts = np.flatnonzero(groups == np.arange(len(groups)))
        groups = group(groups, near_pairs(pieces, firsts))
    order = np.argsort(groups, kind="stable")
    for members in np.split(order, np.flatnonzero(np.diff(groups[order])) + 1):
        rows = [int(row_ids[place]) for place in members]
        if len(rows) > 1 and bare[members[0]] and first_different([texts.answer(r) for r in rows]):
            yield from rows


def _bare(text: str) -> bytes:
    return survey(text.encode("utf-8", "replace")).bare


def _means(losses: Losses, row_ids: np.ndarray) -> dict[str, float | None]:
    """Mean losses of rows before and after; None without any that could be scored."""
    found = {}
    for name, losses_R in (("before", losses.before_R), ("after", losses.after_R)):
        scored = losses_R[row_ids][np.isfinite(losses_R[row_ids])]
        found[name] = float(scored.mean()) if len(scored) else None
    return found


_HEADINGS = {
    "not_learnt": "stayed hard",
    "memorised": "memorised",
    "worse": "made worse",
    "contradiction": "near-equal questions, different answers",
}


def report(content: dict[str, Any], limit: int) -> None:
    """Print the figures, and the first rows of each kind."""
    counts, pairs = content["counts"], {}
    for name, words in (("trained_on", "rows trained on"), ("held_out", "rows held out")):
        means = content[name]
        loss = "" if means["before"] is None else f", loss {means['before']:.3f} before and " \
            f"{means['after']:.3f} after"  # fmt: skip
        pairs[words] = f"{counts[name]:,}{loss}"
    for kind, heading in _HEADINGS.items():
        pairs[heading] = f"{counts[kind]:,}"
    if content["levels"]["easy"] is None:
        pairs["memorised"] = f"not known: fewer than {LEAST_HELD_OUT} rows were held out"
    print_pairs(f"Rows of {content['adapter']}", pairs)
    where = f"row of {content['source']}" if content["source"] else "token row"
    for kind, heading in _HEADINGS.items():
        rows = [row for row in content["rows"] if row["kind"] == kind][:limit]
        if rows:
            print(f"{heading} ({where}: loss before, after):")
        for row in rows:
            asked, answered = show(row["question"]), show(row["answer"])
            losses = f"{row['before']:.3f}, {row['after']:.3f}"
            print(f"  {row['row']:,}: {losses}  {asked} -> {answered}")
        if rows and counts[kind] > len(rows):
            print(f"  and {counts[kind] - len(rows):,} more in the file (--limit)")
