"""Rows of any format to token rows on disk: encoded in batches, counted, plotted by length."""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from tqdm import tqdm

from glmtune import __version__
from glmtune.config.settings import RowSettings, TokenizeSettings
from glmtune.data.conversation_rows import MAX_LENGTH, check_supervised, encode_conversations
from glmtune.data.dataset import (
    CARD_FILE,
    CONVERSATION,
    HISTOGRAM_FILE,
    DataCard,
    RowTokenizer,
    check_replaceable,
)
from glmtune.data.encoded_rows import SHARE_TO_KEEP, EncodedRows
from glmtune.data.fields import FieldUse
from glmtune.data.files import new_folder, sha256_of
from glmtune.data.lengths import LengthStats, plot_lengths
from glmtune.data.records import (
    AnyRows,
    BadRow,
    Conversation,
    Row,
    list_bad_rows,
    name_rows,
    read_any,
    read_rows,
)
from glmtune.data.templates import has_rounds, is_alpaca
from glmtune.errors import UserError, visible

Rows = TypeVar("Rows", bound=RowSettings)

ROWS_PER_BATCH = 4096
MIN_LENGTH = 4
"""Tokens that a row has at least: the settings allow no shorter limit."""


@dataclass(frozen=True, slots=True)
class TokenizeSummary:
    """The result of tokenising a file; printed, it lists every row that was dropped or cut."""

    jsonl_path: str
    save_path: str
    card: DataCard
    bad_rows: list[BadRow]
    fields: FieldUse
    advice: str | None
    """Advice on a max_seq_length that leaves more rows whole; None where this one left all."""
    of_turns: tuple[str, ...] = ()
    """Lines on conversations."""

    def __str__(self) -> str:
        card, limit = self.card, self.card.flags["max_seq_length"]
        assert card.num_read is not None
        lines = [
            f"{self.jsonl_path} -> {self.save_path}",
            f"  rows        {card.num_read:,} read, {card.num_kept:,} kept, "
            f"{card.num_read - card.num_kept:,} dropped",
        ]
        for what, rows in [
            ("dropped, empty target", card.rows_out["empty"]),
            ("dropped, nothing is supervised", card.rows_out.get("unsupervised")),
            (f"dropped, longer than {limit} tokens", card.rows_out["overlength"]),
            (f"kept, context cut to {limit} tokens", card.rows_cut.get("context")),
            (f"kept, target cut to {limit} tokens", card.rows_cut.get("target")),
            (f"kept, last turns cut to be within {limit} tokens", card.rows_cut.get("turns")),
        ]:
            if rows:
                lines.append(f"    {len(rows):,} {what}: {name_rows(rows, limit=12)}")
        if self.bad_rows:
            lines.append(f"    {len(self.bad_rows):,} bad, skipped:")
            lines += [f"      {line}" for line in list_bad_rows(self.bad_rows)]
        lines += [f"    {line}" for line in (*self.of_turns, *self.fields.lines())]
        what = "supervised" if "turns" in card.rows_cut else "targets"
        if card.template == CONVERSATION:
            lines.append(
                f"  layout      {card.vocab_revision}'s own conversations; words that convert puts "
                "around a record are left out"
            )
        lines += [
            f"  row length  {card.lengths} tokens",
            f"  tokens      {card.num_tokens:,}, "
            f"{card.num_target_tokens / card.num_tokens:.1%} of them {what}",
            *([f"  lost        {lost}"] if (lost := card.describe_loss()) else []),
            *([f"  advice      {self.advice}"] if self.advice else []),
            f"  beside it   {CARD_FILE} (with all these row numbers), {HISTOGRAM_FILE}",
        ]
        return "\n".join(lines)


def tokenize(
    settings: TokenizeSettings, tokenizer: RowTokenizer, base_name: str
) -> TokenizeSummary:
    """Write the rows of a file as a data set of token rows, with its card and histogram.

    Prints the summary that it returns. Raises UserError for what read_any and encode_conversations
    refuse, for a save_path that holds anything else than such a data set, when no row is left, and
    for settings that the rows have no use for.
    """
    check_replaceable(settings.save_path)
    with _no_collection():
        summary = _tokenize(settings, tokenizer, base_name)
    print(visible(str(summary)))
    return summary


@contextmanager
def _no_collection() -> Iterator[None]:
    """Let Python not look for cycles among millions of objects: rows have none."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _tokenize(
    settings: TokenizeSettings, tokenizer: RowTokenizer, base_name: str
) -> TokenizeSummary:
    read, encoded = encode_file(settings, tokenizer)
    if encoded.labels is not None:
        settings = _with_length(settings)
    if not encoded.seq_len:
        raise _no_row_left(settings, encoded)
    if encoded.labels is not None:
        check_supervised(encoded, tokenizer, settings.jsonl_path)
    card = _card(settings, tokenizer, base_name, read, encoded)
    with new_folder(settings.save_path) as folder:
        _save(encoded, folder)
        card.write(folder)
        plot_lengths(
            folder / HISTOGRAM_FILE,
            kept=encoded.lengths,
            dropped=encoded.lengths_out,
            max_seq_length=settings.max_seq_length,
        )
    return TokenizeSummary(
        settings.jsonl_path,
        settings.save_path,
        card,
        _bad_rows(read, encoded),
        read.fields,
        encoded.advice(settings.max_seq_length),
        _describe(encoded) if encoded.labels is not None else (),
    )


def encode_file(
    settings: Rows, tokenizer: RowTokenizer, limit: int | None = None
) -> tuple[AnyRows, EncodedRows]:
    """Read the rows of a file, and encode them, or the first `limit`.

    Raises:
        UserError: see `read_any` and `encode_conversations`; or a setting has no use for them.
    """
    read = read_any(settings.jsonl_path, settings.format, settings.on_bad_row, settings.encoding)
    contexts = [row for row in read.rows if isinstance(row, Row)][:limit]
    conversations = [row for row in read.rows if isinstance(row, Conversation)][:limit]
    if conversations:
        return read, encode_conversations(conversations, tokenizer, _with_length(settings))
    _check_settings_of_contexts(settings)
    return read, encode_rows(contexts, tokenizer, settings)


def _with_length(settings: Rows) -> Rows:
    """The settings with the length that conversations have by default."""
    if "max_seq_length" in settings.model_fields_set:
        return settings
    return settings.model_copy(update={"max_seq_length": MAX_LENGTH})


def row_fates(encoded: EncodedRows) -> dict[int, str]:
    """Why rows are left out, by their number."""
    reasons = {
        "dropped, empty answer": encoded.empty,
        "dropped, nothing is supervised": encoded.unsupervised,
        "dropped, too long": encoded.overlength,
    }
    fates = {row: reason for reason, rows in reasons.items() for row in rows}
    return fates | {bad.row: f"bad, {bad.reason}" for bad in encoded.refused}


def _check_settings_of_contexts(settings: RowSettings) -> None:
    """Raise UserError where settings of conversations are given for rows of one answer each."""
    path = settings.jsonl_path
    if settings.too_long:
        raise UserError(
            f"{path}: too_long is for conversations, and these rows are a context and a target "
            "each; leave it out, or set skip_overlength"
        )
    if settings.learn == "marked":
        raise UserError(
            f"{path}: learn marked is for conversations, and these rows have no loss; leave it out"
        )


def _no_row_left(settings: TokenizeSettings, encoded: EncodedRows) -> UserError:
    advice = encoded.advice(settings.max_seq_length) if encoded.limits else None
    fix = f"raise max_seq_length ({advice})" if advice else "set keep_empty true"
    unsupervised = ""
    if encoded.labels is not None:
        unsupervised = f"{len(encoded.unsupervised):,} have no supervised answer, "
        if encoded.unsupervised and not advice:
            fix = "set learn each, and loss true or nothing in the row"
    what = "answer" if unsupervised else "target"
    return UserError(
        f"{settings.jsonl_path}: no row is left: {len(encoded.empty):,} have an empty {what}, "
        f"{unsupervised}{len(encoded.overlength):,} are longer than max_seq_length "
        f"{settings.max_seq_length}; {fix}"
    )


def _bad_rows(read: AnyRows, encoded: EncodedRows) -> list[BadRow]:
    return sorted([*read.bad_rows, *encoded.refused], key=lambda bad: bad.row)


def _describe(encoded: EncodedRows) -> tuple[str, ...]:
    """What to report of conversations beside their rows."""
    lines = []
    if encoded.num_in_prompts:
        lines.append(
            f"earlier answers that are not supervised: {encoded.num_in_prompts:,}; the base reads "
            "them as part of the prompt, so it learns the last answer of a row only"
        )
    if encoded.num_thoughts:
        lines.append(f"{encoded.num_thoughts:,} answers had a thought before them, left out")
    if encoded.num_dropped:
        lines.append(
            f"{encoded.num_dropped:,} supervised tokens stood in the rows that are dropped"
        )
    return tuple(lines)


def fit_length(settings: TokenizeSettings, tokenizer: RowTokenizer) -> TokenizeSettings:
    """The settings with the least max_seq_length that leaves 95 % of the rows whole.

    It is theirs at most. The rows are encoded for it. Raises UserError for what read_rows refuses.
    """
    rows, _ = read_rows(settings.jsonl_path, settings.on_bad_row, settings.encoding)
    uncut = encode_rows(
        rows, tokenizer, settings.model_copy(update={"max_seq_length": sys.maxsize})
    )
    length = uncut.keeping(SHARE_TO_KEEP) if uncut.limits else MIN_LENGTH
    length = min(max(MIN_LENGTH, length), settings.max_seq_length)
    return settings.model_copy(update={"max_seq_length": length})


def encode_rows(rows: list[Row], tokenizer: RowTokenizer, settings: RowSettings) -> EncodedRows:
    """Encode rows as the script of 2023 did: prompt, target, end, with the family's special ids.

    Prompt (with its special ids) and target are cut to max_seq_length each (a context of several
    rounds at its start), so a row may hold twice that unless skip_overlength drops it. Rows with an
    empty target are left out unless keep_empty.

    Unlike in that script, a target that is cut gets no end id: the model would learn to stop in the
    middle of an answer.
    """
    limit, rule = settings.max_seq_length, tokenizer.row_rule
    out = EncodedRows()
    for row, context, target in _encode_in_batches(rows, tokenizer, settings.num_threads):
        length = len(context) + rule.num_prompt_specials
        # After earlier rounds comes the question that the answer is about: keep the end.
        prompt = rule.prompt(context, limit, cut="start" if has_rounds(row.context) else "end")
        answer = rule.answer(target)
        num_lost = len(answer) - limit if len(target) > limit else 0
        input_ids = prompt + answer[: len(answer) - num_lost]
        is_empty = not settings.keep_empty and not (target and row.target.strip())
        if not is_empty:
            whole = length + len(answer) if settings.skip_overlength else max(length, len(target))
            out.limits.append(whole)
        if is_empty:
            out.empty.append(row.row)
        elif settings.skip_overlength and len(input_ids) > limit:
            out.overlength.append(row.row)
            out.lengths_out.append(out.limits[-1])
        else:
            out.input_ids.extend(input_ids)
            out.ends.append(len(out.input_ids))
            out.seq_len.append(len(prompt))
            if length > limit:
                out.cut_contexts.append(row.row)
            if num_lost:
                out.cut_targets.append(row.row)
                out.num_targets_lost += num_lost
    return out


def _encode_in_batches(
    rows: list[Row], tokenizer: RowTokenizer, num_threads: int | None
) -> Iterator[tuple[Row, list[int], list[int]]]:
    """Yield each row with the ids of its context and of its target, uncut, without specials."""
    with tqdm(total=len(rows), desc="tokenize", unit="row", delay=1) as progress:
        for start in range(0, len(rows), ROWS_PER_BATCH):
            batch = rows[start : start + ROWS_PER_BATCH]
            contexts = tokenizer.encode_contexts(
                [row.context for row in batch], num_threads=num_threads
            )
            targets = tokenizer.encode_batch([row.target for row in batch], num_threads=num_threads)
            yield from zip(batch, contexts, targets, strict=True)
            progress.update(len(batch))


def _card(
    settings: TokenizeSettings,
    tokenizer: RowTokenizer,
    base_name: str,
    read: AnyRows,
    encoded: EncodedRows,
) -> DataCard:
    num_tokens, bad_rows = len(encoded.input_ids), _bad_rows(read, encoded)
    contexts = [row for row in read.rows if isinstance(row, Row)]
    has_turns = encoded.labels is not None
    template = CONVERSATION if has_turns else getattr(tokenizer, "template", None)
    flags = {"max_seq_length", "skip_overlength", "keep_empty", "on_bad_row"}
    return DataCard(
        glmtune_version=__version__,
        base_model=base_name,
        tokenizer_sha256=tokenizer.vocab_hash,
        vocab_revision=tokenizer.revision,
        special_ids=tokenizer.row_rule.special_ids,
        template=template or _template(contexts),
        flags=settings.model_dump(include=flags | ({"learn", "too_long"} if has_turns else set())),
        source=Path(settings.jsonl_path).name,
        source_sha256=sha256_of(settings.jsonl_path),
        num_read=len(read.rows) + len(read.bad_rows),
        num_kept=len(encoded.seq_len),
        num_tokens=num_tokens,
        num_target_tokens=encoded.num_targets,
        lengths=LengthStats.of(encoded.lengths),
        rows_out={
            "bad": [bad.row for bad in bad_rows],
            "empty": encoded.empty,
            "overlength": encoded.overlength,
            **({"unsupervised": encoded.unsupervised} if has_turns else {}),
        },
        rows_cut=(
            {"turns": encoded.cut_turns}
            if has_turns
            else {"context": encoded.cut_contexts, "target": encoded.cut_targets}
        ),
        num_targets_lost=encoded.num_targets_lost,
        row_is_line=all(row.row == row.line for row in (*read.rows, *read.bad_rows)),
    )


def _template(rows: list[Row]) -> str:
    """Name the template of a first question; one after earlier rounds has none."""
    firsts = [row for row in rows if not has_rounds(row.context)]
    return "alpaca" if firsts and all(is_alpaca(row.context) for row in firsts) else "custom"


def _save(encoded: EncodedRows, folder: Path) -> None:
    import pyarrow as pa

    from glmtune.data.arrow_files import as_column, write_dataset

    offsets = as_column(np.concatenate([[0], encoded.ends]).astype(np.int32))
    columns = {
        "input_ids": pa.ListArray.from_arrays(offsets, as_column(encoded.input_ids)),
        "seq_len": as_column(encoded.seq_len),
    }
    if encoded.labels is not None:
        columns["labels"] = pa.ListArray.from_arrays(offsets, as_column(encoded.labels))
    write_dataset(pa.table(columns), folder)
