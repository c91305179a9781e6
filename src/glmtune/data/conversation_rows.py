"""Conversations to token rows with labels, each whole or cut behind a whole answer."""

from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from tqdm import tqdm

from glmtune.config.settings import RowSettings
from glmtune.data.conversations import IGNORED, EncodedExample, Example
from glmtune.data.dataset import RowTokenizer
from glmtune.data.encoded_rows import EncodedRows
from glmtune.data.flaws import Flaw
from glmtune.data.records import BadRow, Conversation
from glmtune.data.spelled import Spelled, texts_of
from glmtune.data.thoughts import arrange, check_wish
from glmtune.errors import UserError

CONVERSATIONS_PER_BATCH = 1024
MAX_LENGTH = 2048
"""Tokens of a row where max_seq_length is not set."""


def encode_conversations(
    rows: Sequence[Conversation], tokenizer: RowTokenizer, settings: RowSettings
) -> EncodedRows:
    """Encode conversations in the family's layout, with the labels that `learn` asks for.

    A row longer than max_seq_length is dropped, or loses its last turns, so that it ends with a
    whole answer and what ends that. Rows in which nothing is supervised are left out, and so are
    those whose last answer is empty, unless keep_empty.

    Raises:
        UserError: a row is too long, or one that the family cannot write, where the settings say
            that this is an error; or thoughts shall be kept that the base cannot have.
    """
    check_wish(settings.thoughts, tokenizer.opens_thoughts, tokenizer.revision)
    tokenizer.allow_special = settings.allow_special
    out = EncodedRows(labels=array("i"), spelled=Spelled(tokenizer.special_names))
    for row, ready, whole, kept in _encode_in_batches(rows, tokenizer, settings):
        if isinstance(whole, Flaw):
            out.refused.append(BadRow(row.path, row.row, row.line, str(whole)))
        elif not settings.keep_empty and _is_empty(row.example):
            out.empty.append(row.row)
        elif not whole.num_answers:
            out.unsupervised.append(row.row)
        else:
            _take(out, row, ready, whole, kept)
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


class _Kept(NamedTuple):
    """A row that is short enough, and what it was made of."""

    row: EncodedExample
    ready: Ready


def _take(
    out: EncodedRows,
    row: Conversation,
    ready: Ready,
    whole: EncodedExample,
    kept: "_Kept | None",
) -> None:
    """Add a row as far as it is kept, and count what is not."""
    out.limits.append(len(whole.input_ids))
    if kept is None:
        out.overlength.append(row.row)
        out.lengths_out.append(len(whole.input_ids))
        out.num_dropped += _num_supervised(whole)
        return
    if kept.row is not whole:
        out.cut_turns.append(row.row)
        out.num_targets_lost += _num_supervised(whole) - _num_supervised(kept.row)
    else:
        out.num_in_prompts += ready.num_supervised - whole.num_answers
    assert out.labels is not None
    if kept.ready.thoughts:
        out.thoughts += kept.ready.thoughts
    out.spelled.count(texts_of(kept.ready.example))
    out.input_ids.fromlist(kept.row.input_ids)
    out.labels.fromlist(kept.row.labels)
    out.ends.append(len(out.input_ids))
    out.seq_len.append(kept.row.prompt_length)


def _encode_in_batches(
    rows: Sequence[Conversation], tokenizer: RowTokenizer, settings: RowSettings
) -> Iterator[tuple[Conversation, Ready, EncodedExample | Flaw, _Kept | None]]:
    """Yield each row, as it was given to the tokenizer; what the family makes of it, and what of
    that is within the limit.
    """
    limit = settings.max_seq_length
    with tqdm(total=len(rows), desc="tokenize", unit="row", delay=1) as progress:
        for start in range(0, len(rows), CONVERSATIONS_PER_BATCH):
            batch = rows[start : start + CONVERSATIONS_PER_BATCH]
            ready = [Ready.of(row.example, tokenizer, settings) for row in batch]
            wholes = tokenizer.encode_examples(
                [each.example for each in ready], num_threads=settings.num_threads
            )
            kept: list[_Kept | None] = [
                None
                if isinstance(whole, Flaw) or len(whole.input_ids) > limit
                else _Kept(whole, each)
                for whole, each in zip(wholes, ready, strict=True)
            ]
            if settings.cuts_turns:
                long = [
                    place
                    for place, whole in enumerate(wholes)
                    if not isinstance(whole, Flaw) and len(whole.input_ids) > limit
                ]
                cut = _cut([batch[place].example for place in long], tokenizer, settings)
                for place, row in zip(long, cut, strict=True):
                    kept[place] = row
            yield from zip(batch, ready, wholes, kept, strict=True)
            progress.update(len(batch))


def _cut(
    examples: Sequence[Example], tokenizer: RowTokenizer, settings: RowSettings
) -> list[_Kept | None]:
    """The longest beginning of each conversation that ends with an answer and is short enough.

    None where nothing supervised is. A binary search over the answers, of all conversations at
    once; where a thought that a later turn would not see is longer than that turn, what is found
    may not be the longest.
    """
    ends = [_ends(example) for example in examples]
    fits: list[_Kept | None] = [None] * len(examples)
    least, most = [0] * len(examples), [len(places) for places in ends]
    while open_ := [i for i in range(len(examples)) if least[i] < most[i]]:
        middles = [(least[i] + most[i]) // 2 for i in open_]
        shorter = [
            Ready.of(examples[i].shortened(ends[i][middle]), tokenizer, settings)
            for i, middle in zip(open_, middles, strict=True)
        ]
        encoded = tokenizer.encode_examples(
            [ready.example for ready in shorter], num_threads=settings.num_threads
        )
        for i, middle, ready, row in zip(open_, middles, shorter, encoded, strict=True):
            if isinstance(row, Flaw) or len(row.input_ids) > settings.max_seq_length:
                most[i] = middle
            else:
                least[i] = middle + 1
                fits[i] = _Kept(row, ready) if row.num_answers else None
    return fits


def _ends(example: Example) -> list[int]:
    """Numbers of turns after which a conversation may end: behind an answer that is no call."""
    places = (place for place in example.answers if not example.turns[place].metadata)
    return [place + 1 for place in places if place + 1 < len(example.turns)]


def _is_empty(example: Example) -> bool:
    """Whether the last answer says nothing and calls nothing."""
    last = example.turns[example.answers[-1]]
    return not (last.text.strip() or last.metadata)


def _num_supervised(row: EncodedExample) -> int:
    return len(row.labels) - row.labels.count(IGNORED)
