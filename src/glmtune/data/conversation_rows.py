"""Conversations to token rows with labels, each whole, cut behind a whole answer, or split."""

from array import array
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from glmtune.config.settings import RowSettings
from glmtune.data.conversations import IGNORED, SYSTEM, USER, EncodedExample, Example
from glmtune.data.dataset import RowTokenizer
from glmtune.data.encoded_rows import EncodedRows
from glmtune.data.flaws import Flaw
from glmtune.data.records import BadRow, Conversation
from glmtune.errors import UserError

CONVERSATIONS_PER_BATCH = 1024
MAX_LENGTH = 2048
"""Tokens of a row where max_seq_length is not set."""
LEAST_SHARE = 0.01
"""The share of a data set's tokens that has to be supervised."""


class _Row(NamedTuple):
    """What becomes of a conversation."""

    whole: list[EncodedExample] | Flaw
    """Its rows: one, or one for each answer that is supervised (see `_rows_of`)."""
    kept: list[EncodedExample]
    """Those that are kept, or of shorter conversations if it is too long."""
    is_split: bool = False


def encode_conversations(
    rows: Sequence[Conversation], tokenizer: RowTokenizer, settings: RowSettings
) -> EncodedRows:
    """Encode conversations in the family's layout, with the labels that `learn` asks for.

    One longer than max_seq_length is dropped; or loses its last turns, so that it ends with a whole
    answer and what ends that; or is split into rows that do. Rows in which nothing is supervised
    are left out, and so are those whose last answer is empty, unless keep_empty.

    Raises:
        UserError: a row is too long, or one that the family cannot write, where the settings say
            that this is an error.
    """
    out = EncodedRows(labels=array("i"))
    for row, made in _encode_in_batches(rows, tokenizer, settings):
        if isinstance(made.whole, Flaw):
            out.refused.append(BadRow(row.path, row.row, row.line, str(made.whole)))
        elif not settings.keep_empty and _is_empty(row.example):
            out.empty.append(row.row)
        elif not any(part.num_answers for part in made.whole):
            out.unsupervised.append(row.row)
        else:
            _take(out, row, made.whole, made.kept, made.is_split)
    if out.refused and settings.on_bad_row == "fail":
        bad = out.refused[0]
        raise UserError(f"{bad.where}: {bad.reason}, or leave bad rows out with --on_bad_row skip")
    if out.overlength and settings.too_long == "error":
        row = next(row for row in rows if row.row == out.overlength[0])
        raise UserError(
            f"{row.where}: has {out.lengths_out[0]:,} tokens, more than max_seq_length "
            f"{settings.max_seq_length:,}, as {len(out.overlength):,} row(s) have; raise it to "
            f"{max(out.lengths_out)}, or set too_long truncate"
        )
    return out


def _take(
    out: EncodedRows,
    row: Conversation,
    whole: list[EncodedExample],
    kept: list[EncodedExample],
    is_split: bool,
) -> None:
    """Add a conversation as far as it is kept, and count what is not."""
    assert out.labels is not None
    out.limits.append(_length(whole))
    if not kept:
        out.overlength.append(row.row)
        out.lengths_out.append(_length(whole))
        out.num_dropped += sum(map(_num_supervised, whole))
        return
    if len(kept) > 1:
        out.several[row.row] = len(kept)
    if is_split:
        out.split.append(row.row)
    elif len(kept) > 1:
        out.num_apart += len(kept)
        out.num_repeated += sum(len(part.input_ids) for part in kept[:-1])
    lost = sum(map(_num_supervised, whole)) - sum(map(_num_supervised, kept))
    if lost > 0:
        out.cut_turns.append(row.row)
        out.num_targets_lost += lost
    out.num_thoughts += row.example.num_thoughts
    for part in kept:
        out.input_ids.fromlist(part.input_ids)
        out.labels.fromlist(part.labels)
        out.ends.append(len(out.input_ids))
        out.seq_len.append(part.prompt_length)


def _encode_in_batches(
    rows: Sequence[Conversation], tokenizer: RowTokenizer, settings: RowSettings
) -> Iterator[tuple[Conversation, _Row]]:
    """Yield each conversation with what the family makes of it within the limit."""
    with tqdm(total=len(rows), desc="tokenize", unit="row", delay=1) as progress:
        for start in range(0, len(rows), CONVERSATIONS_PER_BATCH):
            batch = rows[start : start + CONVERSATIONS_PER_BATCH]
            examples = [row.example.supervise(settings.learn) for row in batch]
            made = [
                _Row(whole, [] if isinstance(whole, Flaw) else whole)
                for whole in _rows_of(examples, tokenizer, settings)
            ]
            long = [place for place, row in enumerate(made) if _is_long(row.whole, settings)]
            examples = [batch[place].example for place in long]
            if settings.too_long == "split":
                parts = _split(examples, tokenizer, settings)
            elif settings.cuts_turns:
                parts = [cut.rows for cut in _cut(examples, tokenizer, settings)]
            else:
                parts = [[] for _ in long]
            for place, kept in zip(long, parts, strict=True):
                made[place] = _Row(made[place].whole, kept, settings.too_long == "split")
            yield from zip(batch, made, strict=True)
            progress.update(len(batch))


def _rows_of(
    examples: Sequence[Example], tokenizer: RowTokenizer, settings: RowSettings
) -> list[list[EncodedExample] | Flaw]:
    """The rows of conversations that have passed `supervise`: one of each, as a rule.

    Where the base reads earlier answers as part of the prompt, each answer that should be
    supervised gets a row of its own, which ends with it.
    """
    encoded = tokenizer.encode_examples(examples, num_threads=settings.num_threads)
    found = [row if isinstance(row, Flaw) else [row] for row in encoded]
    apart: dict[int, list[Example]] = {}
    for place, row in enumerate(encoded):
        wanted = sum(bool(turn.supervised) for turn in examples[place].turns)
        if not isinstance(row, Flaw) and row.num_answers < wanted:
            apart[place] = examples[place].one_answer_each()
    if apart:
        shorter = [example for each in apart.values() for example in each]
        rows = iter(tokenizer.encode_examples(shorter, num_threads=settings.num_threads))
        for place, each in apart.items():
            made = [next(rows) for _ in each]
            found[place] = written = [row for row in made if not isinstance(row, Flaw)]
            assert len(written) == len(each), "the beginning of what can be written can, too"
    return found


class _Cut(NamedTuple):
    """The beginning of a conversation that is short enough."""

    rows: list[EncodedExample]
    num_turns: int = 0


def _cut(examples: Sequence[Example], tokenizer: RowTokenizer, settings: RowSettings) -> list[_Cut]:
    """The longest beginning of each conversation that ends with an answer and is short enough.

    Without rows where nothing in it is supervised. A binary search over the answers, of all
    conversations at once.
    """
    ends = [_ends(example) for example in examples]
    fits = [_Cut([])] * len(examples)
    least, most = [0] * len(examples), [len(places) for places in ends]
    while open_ := [i for i in range(len(examples)) if least[i] < most[i]]:
        middles = [(least[i] + most[i]) // 2 for i in open_]
        shorter = [
            examples[i].shortened(ends[i][middle]).supervise(settings.learn)
            for i, middle in zip(open_, middles, strict=True)
        ]
        encoded = _rows_of(shorter, tokenizer, settings)
        for i, middle, rows in zip(open_, middles, encoded, strict=True):
            if isinstance(rows, Flaw) or _is_long(rows, settings):
                most[i] = middle
            else:
                least[i] = middle + 1
                supervised = [row for row in rows if row.num_answers]
                fits[i] = _Cut(supervised, ends[i][middle])
    return fits


def _split(
    examples: Sequence[Example], tokenizer: RowTokenizer, settings: RowSettings
) -> list[list[EncodedExample]]:
    """The rows of conversations that are split where a question follows an answer.

    Each has as many turns as fit, behind the system's words at the start of the conversation. A
    question and an answer that are too long by themselves are left out.
    """
    found: list[list[EncodedExample]] = [[] for _ in examples]
    rest = dict(enumerate(examples))
    while rest:
        cuts = _cut([*rest.values()], tokenizer, settings)
        for place, cut in zip([*rest], cuts, strict=True):
            example = rest.pop(place)
            found[place] += cut.rows
            following = example.continued(cut.num_turns or _ends(example)[0])
            if following.answers:
                rest[place] = following
    return found


def _ends(example: Example) -> list[int]:
    """Numbers of turns after which a conversation may end: behind an answer that is no call, and
    that a question follows; at last behind all.
    """
    turns = example.turns
    places = (place for place in example.answers if not turns[place].metadata)
    ends = [p + 1 for p in places if p + 1 < len(turns) and turns[p + 1].role in (USER, SYSTEM)]
    return [*ends, len(turns)]


def _length(rows: Sequence[EncodedExample]) -> int:
    return max(len(row.input_ids) for row in rows)


def _is_long(rows: Sequence[EncodedExample] | Flaw, settings: RowSettings) -> bool:
    """Whether any of a conversation's rows is longer than it may be."""
    return not isinstance(rows, Flaw) and _length(rows) > settings.max_seq_length


def _is_empty(example: Example) -> bool:
    """Whether the last answer says nothing and calls nothing."""
    last = example.turns[example.answers[-1]]
    return not (last.text.strip() or last.metadata)


def _num_supervised(row: EncodedExample) -> int:
    return len(row.labels) - row.labels.count(IGNORED)


def check_supervised(encoded: EncodedRows, tokenizer: RowTokenizer, path: str) -> None:
    """Make sure that training on the rows would teach something, and where to stop.

    Raises:
        UserError: no row teaches an end, or hardly a token is supervised; `path` is the file.
    """
    rule = tokenizer.row_rule
    labels = np.asarray(encoded.labels)
    if not np.isin(labels, [*rule.end_ids, *rule.stops]).any():
        raise UserError(
            f"{path}: no row teaches the end of an answer, so the model would not stop; "
            "supervise an answer that a question or the end of the row follows"
        )
    num_supervised = encoded.num_targets
    if num_supervised < LEAST_SHARE * len(labels):
        raise UserError(
            f"{path}: only {num_supervised:,} of {len(labels):,} tokens "
            f"({num_supervised / len(labels):.2%}) are supervised, so a run would teach little; "
            "supervise more answers with --learn each, or shorten what stands before them"
        )
