"""Conversations to token rows with labels, each whole, cut behind a whole answer, or split."""

from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from glmtune.config.settings import RowSettings
from glmtune.data.conversations import IGNORED, SYSTEM, USER, EncodedExample, Example
from glmtune.data.dataset import RowTokenizer
from glmtune.data.encoded_rows import EncodedRows, RowCounts
from glmtune.data.flaws import Flaw
from glmtune.data.records import BadRow, Conversation
from glmtune.data.row_files import RowFile
from glmtune.data.spelled import Spelled, texts_of
from glmtune.data.thoughts import arrange, check_wish
from glmtune.errors import UserError

MAX_LENGTH = 2048
"""Tokens of a row where max_seq_length is not set."""


class Ready(NamedTuple):
    """A conversation as it is given to a family's tokenizer."""

    example: Example
    """Each turn says whether it is supervised, and has the thought that is to be written."""
    thoughts: Counter[str]
    """What became of its thoughts."""

    @classmethod
    def of(cls, example: Example, tokenizer: RowTokenizer, settings: RowSettings) -> "Ready":
        """What the settings make of a conversation."""
        supervised = example.supervise(settings.learn)
        return cls(*arrange(supervised, settings.thoughts, tokenizer.opens_thoughts))

    @property
    def num_supervised(self) -> int:
        """Answers that are to be supervised."""
        return sum(bool(turn.supervised) for turn in self.example.turns)


class _Piece(NamedTuple):
    """A conversation or a part of one, and its rows."""

    rows: list[EncodedExample]
    """One, or one for each answer that is supervised (see `_pieces_of`)."""
    ready: Ready
    num_turns: int
    """Turns of the source that it has, from its first one on."""


class _Made(NamedTuple):
    """What becomes of a conversation."""

    whole: _Piece | Flaw
    kept: list[_Piece]
    """What is kept: the whole, or shorter ones if it is too long."""
    is_split: bool = False
    is_cut: bool = False
    """Whether turns of it are lost."""


def encode_conversations(
    rows: Sequence[Conversation], tokenizer: RowTokenizer, settings: RowSettings
) -> EncodedRows:
    """Encode some conversations in the family's layout, with the labels that `learn` asks for.

    One longer than max_seq_length is dropped; or loses its last turns, so that it ends with a whole
    answer and what ends that; or is split into rows that do. Rows in which nothing is supervised
    are left out, and so are those whose last answer is empty, unless keep_empty.

    Raises:
        UserError: the family cannot write one, where the settings say that this is an error; or
            thoughts shall be kept that the base cannot have.
    """
    check_wish(settings.thoughts, tokenizer.opens_thoughts, tokenizer.revision)
    tokenizer.allow_special = settings.allow_special
    spelled = Spelled(tokenizer.special_names)
    out = EncodedRows(labels=array("i"), num_rows=len(rows), spelled=spelled)
    ends = frozenset((*tokenizer.row_rule.end_ids, *tokenizer.row_rule.stops))
    for row, made in _encode(rows, tokenizer, settings):
        if isinstance(made.whole, Flaw):
            out.refused.append(BadRow(row.path, row.row, row.line, str(made.whole)))
        elif not settings.keep_empty and _is_empty(row.example):
            out.empty.append(row.row)
        elif not any(part.num_answers for part in made.whole.rows):
            out.unsupervised.append(row.row)
        else:
            _take(out, row.row, made.whole, made, ends)
    if out.refused and settings.on_bad_row == "fail":
        bad = out.refused[0]
        raise UserError(f"{bad.where}: {bad.reason}, or leave bad rows out with --on_bad_row skip")
    return out


def check_lengths(file: RowFile, counts: RowCounts, settings: RowSettings) -> None:
    """Make sure that no row is too long, where the settings say that this is an error.

    Raises:
        UserError: one is, which it names.
    """
    if counts.overlength and settings.too_long == "error":
        row = next(row for row in file.rows() if row.row == counts.overlength[0])
        raise UserError(
            f"{row.where}: has {counts.lengths_out[0]:,} tokens, more than max_seq_length "
            f"{settings.max_seq_length:,}, as {len(counts.overlength):,} row(s) have; raise it to "
            f"{max(counts.lengths_out)}, or set too_long {'split' if file.is_text else 'truncate'}"
        )


def _take(out: EncodedRows, number: int, whole: _Piece, made: _Made, ends: frozenset[int]) -> None:
    """Add a conversation as far as it is kept, and count what is not."""
    assert out.labels is not None
    out.limits.append(_length(whole.rows))
    kept = [row for piece in made.kept for row in piece.rows]
    if not kept:
        out.overlength.append(number)
        out.lengths_out.append(_length(whole.rows))
        out.num_dropped += sum(map(_num_supervised, whole.rows))
        return
    if len(kept) > 1:
        out.several[number] = len(kept)
        out.num_added += len(kept) - 1
    if made.is_split:
        out.split.append(number)
    elif len(kept) > 1:
        out.num_apart += len(kept)
        out.num_repeated += sum(len(row.input_ids) for row in kept[:-1])
    num_supervised = sum(map(_num_supervised, kept))
    if made.is_cut:
        out.cut_turns.append(number)
        lost = sum(map(_num_supervised, whole.rows)) - num_supervised
        out.num_targets_lost += max(0, lost)  # shorter ones may teach more, as of thoughts
    for piece in made.kept:
        if piece.ready.thoughts:
            out.thoughts += piece.ready.thoughts
    out.spelled.count(text for piece in made.kept for text in texts_of(piece.ready.example))
    out.num_targets += num_supervised
    for row in kept:
        out.input_ids.fromlist(row.input_ids)
        out.labels.fromlist(row.labels)
        out.lengths.append(len(row.input_ids))
        out.seq_len.append(row.prompt_length)
        # The end of a row is looked at first, since looking at all of it takes time.
        out.num_ends += row.labels[-1] in ends or not ends.isdisjoint(row.labels)


def _encode(
    rows: Sequence[Conversation], tokenizer: RowTokenizer, settings: RowSettings
) -> Iterator[tuple[Conversation, _Made]]:
    """Yield each conversation with what the family makes of it within the limit."""
    made = [
        _Made(whole, [] if isinstance(whole, Flaw) else [whole])
        for whole in _pieces_of([row.example for row in rows], tokenizer, settings)
    ]
    long = [place for place, row in enumerate(made) if _is_long(row.whole, settings)]
    examples = [rows[place].example for place in long]
    wholes = [made[place].whole for place in long]
    shortened = _shortened(examples, wholes, tokenizer, settings)
    for place, row in zip(long, shortened, strict=True):
        made[place] = row
    yield from zip(rows, made, strict=True)


def _shortened(
    examples: Sequence[Example],
    wholes: Sequence[_Piece | Flaw],
    tokenizer: RowTokenizer,
    settings: RowSettings,
) -> list[_Made]:
    """What is kept of conversations that are too long, as the settings have it."""
    if settings.too_long == "split":
        parts = _split(examples, tokenizer, settings)
        return [
            _Made(whole, kept, is_split=True, is_cut=is_cut)
            for whole, (kept, is_cut) in zip(wholes, parts, strict=True)
        ]
    if settings.cuts_turns:
        cuts = _cut(examples, tokenizer, settings)
        return [
            _Made(whole, [cut] if cut else [], is_cut=True)
            for whole, cut in zip(wholes, cuts, strict=True)
        ]
    return [_Made(whole, []) for whole in wholes]


def _pieces_of(
    examples: Sequence[Example], tokenizer: RowTokenizer, settings: RowSettings
) -> list[_Piece | Flaw]:
    """Whole conversations and their rows: one of each, as a rule.

    Where the base reads earlier answers as part of the prompt, each answer that should be
    supervised gets a row of its own, which ends with it.
    """
    ready = [Ready.of(example, tokenizer, settings) for example in examples]
    num_threads = settings.num_threads
    encoded = tokenizer.encode_examples([each.example for each in ready], num_threads=num_threads)
    found: list[_Piece | Flaw] = []
    apart: list[tuple[_Piece, list[Example]]] = []
    for example, each, row in zip(examples, ready, encoded, strict=True):
        if isinstance(row, Flaw):
            found.append(row)
            continue
        found.append(piece := _Piece([row], each, len(example.turns)))
        if row.num_answers < each.num_supervised:
            apart.append((piece, each.example.one_answer_each()))
    if apart:
        shorter = [example for _, answers in apart for example in answers]
        rows = iter(tokenizer.encode_examples(shorter, num_threads=num_threads))
        for piece, answers in apart:
            made = [next(rows) for _ in answers]
            piece.rows[:] = [row for row in made if not isinstance(row, Flaw)]
            assert len(piece.rows) == len(made), "the beginning of a conversation can be written"
    return found


def _cut(
    examples: Sequence[Example], tokenizer: RowTokenizer, settings: RowSettings
) -> list[_Piece | None]:
    """The longest beginning of each conversation that ends with an answer and is short enough.

    None where there is no such beginning; without rows where nothing in it is supervised. A binary
    search over the answers, of all conversations at once; where a thought that a later turn would
    not see is longer than that turn, what is found may not be the longest.
    """
    ends = [_ends(example) for example in examples]
    fits: list[_Piece | None] = [None] * len(examples)
    least, most = [0] * len(examples), [len(places) for places in ends]
    while open_ := [i for i in range(len(examples)) if least[i] < most[i]]:
        middles = [(least[i] + most[i]) // 2 for i in open_]
        shorter = [
            examples[i].shortened(ends[i][middle]) for i, middle in zip(open_, middles, strict=True)
        ]
        pieces = _pieces_of(shorter, tokenizer, settings)
        for i, middle, piece in zip(open_, middles, pieces, strict=True):
            if isinstance(piece, Flaw) or _is_long(piece, settings):
                most[i] = middle
            else:
                least[i] = middle + 1
                fits[i] = piece._replace(rows=[row for row in piece.rows if row.num_answers])
    return fits


def _split(
    examples: Sequence[Example], tokenizer: RowTokenizer, settings: RowSettings
) -> list[tuple[list[_Piece], bool]]:
    """The parts of conversations that are split where a question follows an answer.

    Each has as many turns as fit, behind the system's words at the start of the conversation. A
    question and an answer that are too long by themselves are left out.

    Returns:
        For each, the parts that teach something, and whether anything was left out.
    """
    found: list[list[_Piece]] = [[] for _ in examples]
    is_cut = [False] * len(examples)
    rest = dict(enumerate(examples))
    while rest:
        cuts = _cut([*rest.values()], tokenizer, settings)
        for place, cut in zip([*rest], cuts, strict=True):
            example = rest.pop(place)
            is_cut[place] |= cut is None
            found[place] += [cut] if cut and cut.rows else []
            following = example.continued(cut.num_turns if cut else _ends(example)[0])
            if following.answers:
                rest[place] = following
    return list(zip(found, is_cut, strict=True))


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


def _is_long(piece: _Piece | Flaw, settings: RowSettings) -> bool:
    """Whether any of a conversation's rows is longer than it may be."""
    return not isinstance(piece, Flaw) and _length(piece.rows) > settings.max_seq_length


def _is_empty(example: Example) -> bool:
    """Whether the last answer says nothing and calls nothing."""
    last = example.turns[example.answers[-1]]
    return not (last.text.strip() or last.metadata)


def _num_supervised(row: EncodedExample) -> int:
    return len(row.labels) - row.labels.count(IGNORED)
