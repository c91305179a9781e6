"""Texts alone to token rows, every token of which is supervised: pre-training continued."""

from array import array
from collections.abc import Sequence

from glmtune.config.settings import RowSettings
from glmtune.data.conversations import IGNORED
from glmtune.data.dataset import RowTokenizer
from glmtune.data.encoded_rows import EncodedRows, RowCounts
from glmtune.data.records import TextRow
from glmtune.data.spelled import Spelled
from glmtune.errors import UserError


def encode_texts(
    rows: Sequence[TextRow], tokenizer: RowTokenizer, settings: RowSettings
) -> EncodedRows:
    """Encode texts: what the family begins one with, the text, and the end of text if it is whole.

    One longer than max_seq_length is split into rows without overlap, unless `too_long` says
    otherwise; its end is taught behind its last token, and never where it was cut.

    """
    tokenizer.allow_special = settings.allow_special
    rule, limit = tokenizer.row_rule, settings.max_seq_length
    prefix = rule.text_prefix
    spelled = Spelled(tokenizer.special_names)
    out = EncodedRows(labels=array("i"), num_rows=len(rows), spelled=spelled)
    plain = [row.text.text if row.text.text.strip() else "" for row in rows]
    encoded = tokenizer.encode_batch(plain, num_threads=settings.num_threads)
    for row, text in zip(rows, encoded, strict=True):
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
                out.num_added += len(parts) - 1
        num_lost = len(whole) - sum(map(len, parts))
        out.num_targets_lost += num_lost
        out.num_ends += not num_lost
        out.spelled.count([row.text.text])
        for part in parts:
            _add(out, prefix, part, rule.text_start)
    return out


def check_texts(counts: RowCounts, name: str) -> None:
    """Make sure that the end of a text is taught; raises UserError where all are cut."""
    if counts.lengths and not counts.num_ends:
        fix = "set too_long split, or raise" if counts.cut_texts else "raise"
        raise UserError(
            f"{name}: no row teaches the end of a text, since all are cut; {fix} max_seq_length"
        )


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
    out.lengths.append(len(ids))
    out.seq_len.append(start)
    out.num_targets += len(ids) - start


def check_settings_of_texts(settings: RowSettings) -> None:
    """Raise UserError where a setting is for rows with answers."""
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
