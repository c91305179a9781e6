"""Texts alone to token rows, every token of which is supervised: pre-training continued."""

from array import array
from collections.abc import Iterator, Sequence

from tqdm import tqdm

from glmtune.config.settings import RowSettings
from glmtune.data.conversations import IGNORED
from glmtune.data.dataset import RowTokenizer
from glmtune.data.encoded_rows import EncodedRows
from glmtune.data.records import TextRow
from glmtune.data.spelled import Spelled
from glmtune.errors import UserError

TEXTS_PER_BATCH = 1024


def encode_texts(
    rows: Sequence[TextRow], tokenizer: RowTokenizer, settings: RowSettings
) -> EncodedRows:
    """Encode texts: what the family begins one with, the text, and the end of text if it is whole.

    One longer than max_seq_length is split into rows without overlap, unless `too_long` says
    otherwise; its end is taught behind its last token, and never where it was cut.

    Raises:
        UserError: a text is too long where the settings say that this is an error; no text ends
            within a row; or a setting is for rows with answers.
    """
    _check_settings(settings)
    tokenizer.allow_special = settings.allow_special
    rule, limit = tokenizer.row_rule, settings.max_seq_length
    prefix, num_ends = rule.text_prefix, 0
    out = EncodedRows(labels=array("i"), spelled=Spelled(tokenizer.special_names))
    for row, text in _encode_in_batches(rows, tokenizer, settings.num_threads):
        if not text:
            out.empty.append(row.row)
            continue
        whole = [*text, *rule.text_end]
        out.limits.append(length := len(prefix) + len(whole))
        if length > limit and (settings.skip_overlength or settings.too_long in ("drop", "error")):
            out.overlength.append(row.row)
            out.lengths_out.append(length)
            out.num_dropped += len(whole)
            continue
        parts = [whole]
        if length > limit:
            parts = _split(whole, limit - len(prefix), rule.text_start - len(prefix), text)
            if settings.too_long == "truncate":
                out.cut_texts.append(row.row)
                parts = parts[:1]
            else:
                out.split.append(row.row)
            if len(parts) > 1:
                out.several[row.row] = len(parts)
        num_lost = len(whole) - sum(map(len, parts))
        out.num_targets_lost += num_lost
        num_ends += not num_lost
        out.spelled.count([row.text.text])
        for part in parts:
            _add(out, prefix, part, rule.text_start)
    if out.overlength and settings.too_long == "error":
        first = next(row for row in rows if row.row == out.overlength[0])
        raise UserError(
            f"{first.where}: has {out.lengths_out[0]:,} tokens, more than max_seq_length "
            f"{limit:,}, as {len(out.overlength):,} row(s) have; raise it to "
            f"{max(out.lengths_out)}, or set too_long split"
        )
    if out.seq_len and not num_ends:
        fix = "set too_long split, or raise" if out.cut_texts else "raise"
        raise UserError(
            f"{settings.jsonl_path}: no row teaches the end of a text, since all are cut; {fix} "
            "max_seq_length"
        )
    return out


def _split(whole: list[int], room: int, num_unseen: int, text: list[int]) -> list[list[int]]:
    """The parts of a text and its end, none of which teaches nothing.

    Args:
        whole: ids of both.
        room: ids of a part at most.
        num_unseen: ids at the start of a part that nothing predicts.
        text: ids of the text alone.
    """
    parts = [whole[start : start + room] for start in range(0, len(whole), room)]
    starts_in_end = (len(parts) - 1) * room >= len(text)
    if len(parts) > 1 and (starts_in_end or len(parts[-1]) <= num_unseen):
        parts.pop()  # an end by itself says nothing of where texts end
    return parts


def _add(out: EncodedRows, prefix: list[int], part: list[int], start: int) -> None:
    """Add a row of which everything from `start` on is supervised."""
    assert out.labels is not None
    ids = [*prefix, *part]
    out.input_ids.extend(ids)
    out.labels.extend([IGNORED] * start + ids[start:])
    out.ends.append(len(out.input_ids))
    out.seq_len.append(start)


def _encode_in_batches(
    rows: Sequence[TextRow], tokenizer: RowTokenizer, num_threads: int | None
) -> Iterator[tuple[TextRow, list[int]]]:
    """Yield each row with the ids of its text; none of one that is blank."""
    with tqdm(total=len(rows), desc="tokenize", unit="row", delay=1) as progress:
        for start in range(0, len(rows), TEXTS_PER_BATCH):
            batch = rows[start : start + TEXTS_PER_BATCH]
            texts = [row.text.text if row.text.text.strip() else "" for row in batch]
            yield from zip(
                batch, tokenizer.encode_batch(texts, num_threads=num_threads), strict=True
            )
            progress.update(len(batch))


def _check_settings(settings: RowSettings) -> None:
    path = settings.jsonl_path
    if settings.learn != "each":
        raise UserError(
            f"{path}: learn {settings.learn} is for conversations, and of these texts every token "
            "is supervised; leave it out"
        )
    if settings.thoughts:
        raise UserError(
            f"{path}: thoughts is for conversations, and in these texts a thought is text; leave "
            "it out"
        )
    if settings.keep_empty:
        raise UserError(
            f"{path}: keep_empty is for rows of a question without an answer, and these are texts; "
            "leave it out"
        )
