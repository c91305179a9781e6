"""Rows of any format to token rows on disk: read, encoded and written batch by batch."""

import gc
import sys
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar, cast

from tqdm import tqdm

from glmtune import __version__
from glmtune.config.settings import RowSettings, TokenizeSettings
from glmtune.data.conversation_rows import (
    MAX_LENGTH,
    check_lengths,
    encode_conversations,
)
from glmtune.data.dataset import HISTOGRAM_FILE, RowTokenizer, check_replaceable
from glmtune.data.encoded_rows import SHARE_TO_KEEP, EncodedRows, RowCounts
from glmtune.data.files import resumable_folder
from glmtune.data.lengths import plot_lengths
from glmtune.data.records import Conversation, Row, TextRow
from glmtune.data.row_files import RowFile, look_through
from glmtune.data.row_sets import RowSet, joined, look_through_sets, name_of, settings_of
from glmtune.data.spelled import Spelled
from glmtune.data.templates import has_rounds
from glmtune.data.text_rows import check_settings_of_texts, check_texts, encode_texts
from glmtune.data.thoughts import AS_TEXT, begins_with_thought
from glmtune.data.token_files import TokenFiles, has_whole_file, stays
from glmtune.data.token_rows import why_refused
from glmtune.data.token_summary import TokenizeSummary, make_card, summarise
from glmtune.errors import UserError, note, visible

Rows = TypeVar("Rows", bound=RowSettings)

AnyRow = Row | Conversation | TextRow

ROWS_PER_BATCH, CONVERSATIONS_PER_BATCH = 4096, 1024
CHARACTERS_PER_BATCH = 1 << 22
"""Characters from which on a batch is full, so that long rows do not fill the memory."""
MIN_LENGTH = 4
"""Tokens that a row has at least: the settings allow no shorter limit."""
_WITHOUT_EFFECT = {
    "base", "jsonl_path", "save_path", "num_threads", "resume", "engine", "ray_address",
}  # fmt: skip
"""Settings that rows do not depend on; files and vocabularies are known by their sha256."""


def tokenize(
    settings: TokenizeSettings, tokenizer: RowTokenizer, base_name: str
) -> TokenizeSummary:
    """Write the rows of a file as a data set of token rows, with its card and histogram.

    Prints the summary that it returns. Raises UserError for what look_through and
    encode_conversations refuse, for a save_path that holds anything else than such a data set, when
    no row is left, for settings that the rows have no use for, and for an unfinished data set that
    cannot be resumed.
    """
    check_replaceable(settings.save_path)
    if settings.engine == "ray":
        from glmtune.data import spread_rows
        from glmtune.spread import running_ray

        with running_ray(settings.ray_address):
            look, encode = spread_rows.look_through, spread_rows.encode
            summary = _tokenize(settings, tokenizer, base_name, look, encode)
    else:
        with no_collection():
            summary = _tokenize(settings, tokenizer, base_name, look_through, _encode_taken)
    print(visible(str(summary)))
    return summary


@contextmanager
def no_collection() -> Iterator[None]:
    """Let Python not look for cycles among millions of objects: rows have none."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _tokenize(
    settings: TokenizeSettings,
    tokenizer: RowTokenizer,
    base_name: str,
    look: Callable[..., RowFile],
    encode: Callable[..., Iterator[EncodedRows]],
) -> TokenizeSummary:
    sets = look_through_sets(settings, look, tokenizer.opens_thoughts)
    settings = in_effect(settings, sets[0].file)
    for one in sets[1:]:
        in_effect(settings, one.file)
    made_from = _made_from(settings, tokenizer, sets)
    with resumable_folder(settings.save_path, stays) as folder:
        files = _begin(folder, settings, made_from, len(sets))
        try:
            for number, one in enumerate(sets):
                num_done = files.begin(number)
                for batch in encode(one, tokenizer, settings_of(settings, one), num_done):
                    files.add(batch)
            files.flush()
        except KeyboardInterrupt:
            if has_whole_file(folder):
                note(f"{files.num_written:,} rows are kept; --resume true goes on after them")
            raise
        for one, of_set in zip(sets, files.of_sets, strict=True):
            one.counts = of_set
            check_lengths(one.file, of_set, settings_of(settings, one))
        file, counts = joined(sets)
        if not counts.lengths:
            raise no_row_left(name_of(sets), settings, file.has_turns, counts)
        if file.is_text:
            check_texts(counts, name_of(sets))
        has_labels = file.has_turns or file.is_text
        reason = why_refused(counts.num_ends, counts.num_targets, counts.num_tokens, has_labels)
        if reason:
            raise UserError(f"{name_of(sets)}: {reason}")
        card = make_card(settings, tokenizer, base_name, sets)
        files.close()
        card.write(folder)
        plot_lengths(
            folder / HISTOGRAM_FILE,
            kept=counts.lengths,
            dropped=counts.lengths_out,
            max_seq_length=settings.max_seq_length,
        )
    return summarise(settings, tokenizer, sets, card)


def _begin(
    folder: Path, settings: TokenizeSettings, made_from: dict[str, Any], num_sets: int
) -> TokenFiles:
    """Begin to write in a folder, or go on; say which where it is not plain."""
    was_left = has_whole_file(folder)
    files = TokenFiles(folder, settings.save_path, made_from, settings.resume, num_sets)
    if files.num_written:
        note(f"{settings.save_path}: goes on after {files.num_written:,} rows that are there")
    elif settings.resume:
        note(f"{settings.save_path}: there is nothing to resume, it begins with the first row")
    elif was_left:
        note(
            f"{settings.save_path}: what a stopped command had left of it is removed, since resume "
            "is false"
        )
    return files


def _made_from(
    settings: TokenizeSettings, tokenizer: RowTokenizer, sets: Sequence[RowSet]
) -> dict[str, Any]:
    """All that the rows depend on, as plain data."""
    return {
        "glmtune_version": __version__,
        **{
            f"sha256 of {one.file.path if len(sets) > 1 else 'jsonl_path'}": one.sha256
            for one in sets
        },
        "sha256 of the vocabulary": tokenizer.vocab_hash,
        "vocabulary": tokenizer.revision,
        **settings.model_dump(mode="json", exclude=_WITHOUT_EFFECT),
    }


def encode_file(
    settings: Rows, tokenizer: RowTokenizer, limit: int | None = None
) -> tuple[RowFile, list[AnyRow], EncodedRows]:
    """Read the rows of a file, or the first `limit`, and encode them.

    Raises:
        UserError: see `look_through` and `encode_conversations`; or a setting has no use for them.
    """
    file = look_through(
        settings.jsonl_path, settings.format, settings.on_bad_row, settings.encoding
    )
    file.has_turns = file.talks(tokenizer.opens_thoughts)
    settings = in_effect(settings, file)
    rows = list(islice(file.rows(), limit))
    encoded = EncodedRows(labels=array("i") if file.has_turns or file.is_text else None)
    for batch in encode_batches(rows, tokenizer, settings, file):
        encoded.extend(batch)
    check_lengths(file, encoded, settings)
    return file, rows, encoded


def _encode_taken(
    one: RowSet, tokenizer: RowTokenizer, settings: RowSettings, num_done: int = 0
) -> Iterator[EncodedRows]:
    """Encode the rows of a file that are taken behind those that are done; show the progress."""
    rows = islice(one.rows(), num_done, None)
    with tqdm(
        total=one.num_taken, initial=num_done, desc="tokenize", unit="row", delay=1
    ) as progress:
        for batch in encode_batches(rows, tokenizer, settings, one.file):
            yield batch
            progress.update(batch.num_rows)


def encode_batches(
    rows: Iterable[AnyRow], tokenizer: RowTokenizer, settings: RowSettings, file: RowFile
) -> Iterator[EncodedRows]:
    """Encode rows of a file one batch after another, all of them of one kind."""
    for batch in _batches(rows, rows_per_batch(file)):
        if file.is_text:
            yield encode_texts(cast(list[TextRow], batch), tokenizer, settings)
        elif file.has_turns:
            yield encode_conversations(cast(list[Conversation], batch), tokenizer, settings)
        else:
            yield encode_rows(cast(list[Row], batch), tokenizer, settings)


def rows_per_batch(file: RowFile) -> int:
    """Rows of a batch at most, of short rows."""
    return CONVERSATIONS_PER_BATCH if file.is_text or file.has_turns else ROWS_PER_BATCH


def _batches(rows: Iterable[AnyRow], most_rows: int) -> Iterator[list[AnyRow]]:
    batch: list[AnyRow] = []
    num_characters = 0
    for row in rows:
        batch.append(row)
        num_characters += row.num_characters
        if len(batch) == most_rows or num_characters >= CHARACTERS_PER_BATCH:
            yield batch
            batch, num_characters = [], 0
    if batch:
        yield batch


def in_effect(settings: Rows, file: RowFile) -> Rows:
    """The settings for the rows of a file: those with labels have another default length.

    Raises:
        UserError: one has no effect on them.
    """
    if file.is_text:
        check_settings_of_texts(settings)
    elif not file.has_turns:
        _check_settings_of_contexts(settings)
        return settings
    if "max_seq_length" not in settings.model_fields_set:
        return settings.model_copy(update={"max_seq_length": MAX_LENGTH})
    return settings


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
    if settings.thoughts:
        raise UserError(
            f"{path}: thoughts is for conversations, and these rows are a context and a target "
            "each, in which a thought is text; leave it out"
        )
    if settings.too_long:
        raise UserError(
            f"{path}: too_long is for conversations and texts, and these rows are a context and a "
            "target each; leave it out, or set skip_overlength"
        )
    if settings.learn == "marked":
        raise UserError(
            f"{path}: learn marked is for conversations, and these rows have no loss; leave it out"
        )


def no_row_left(name: str, settings: RowSettings, has_turns: bool, counts: RowCounts) -> UserError:
    """The error of rows of which none is kept: why, and the fix.

    Args:
        name: what the message calls them.
        settings: those they were encoded with.
        has_turns: whether they are conversations.
        counts: what became of them.
    """
    advice = counts.advice(settings.max_seq_length) if counts.limits else None
    fix = f"raise max_seq_length ({advice})" if advice else "set keep_empty true"
    unsupervised = ""
    if has_turns:
        unsupervised = f"{len(counts.unsupervised):,} have no supervised answer, "
        if counts.unsupervised and not advice:
            fix = "set learn each, and loss true or nothing in the row"
    refused = ""
    if counts.refused:
        refused = f"{len(counts.refused):,} cannot be written, "
        if not (advice or counts.empty or counts.unsupervised):
            fix = counts.refused[0].reason
    what = "answer" if unsupervised else "target"
    return UserError(
        f"{name}: no row is left: {len(counts.empty):,} have an empty {what}, "
        f"{unsupervised}{refused}{len(counts.overlength):,} are longer than max_seq_length "
        f"{settings.max_seq_length}; {fix}"
    )


def fit_length(settings: TokenizeSettings, tokenizer: RowTokenizer) -> TokenizeSettings:
    """The settings with the least max_seq_length that leaves 95 % of the rows whole.

    It is theirs at most; texts, which are split, take the default. The rows are encoded for it.
    Raises UserError for what look_through refuses.
    """
    (one,) = look_through_sets(settings, opens_thoughts=tokenizer.opens_thoughts)
    if one.file.is_text:
        length = min(MAX_LENGTH, settings.max_seq_length)
        return settings.model_copy(update={"max_seq_length": length})
    uncut = settings.model_copy(update={"max_seq_length": sys.maxsize})
    counts = RowCounts()
    for batch in _encode_taken(one, tokenizer, uncut):
        counts.add(batch)
    length = counts.keeping(SHARE_TO_KEEP) if counts.limits else MIN_LENGTH
    length = min(max(MIN_LENGTH, length), settings.max_seq_length)
    return settings.model_copy(update={"max_seq_length": length})


def encode_rows(rows: Sequence[Row], tokenizer: RowTokenizer, settings: RowSettings) -> EncodedRows:
    """Encode rows as the script of 2023 did: prompt, target, end, with the family's special ids.

    Prompt (with its special ids) and target are cut to max_seq_length each (a context of several
    rounds at its start), so a row may hold twice that unless skip_overlength drops it. Rows with an
    empty target are left out unless keep_empty.

    Unlike in that script, a target that is cut gets no end id: the model would learn to stop in the
    middle of an answer.
    """
    limit, rule = settings.max_seq_length, tokenizer.row_rule
    tokenizer.allow_special = settings.allow_special
    out = EncodedRows(num_rows=len(rows), spelled=Spelled(tokenizer.special_names))
    num_threads = settings.num_threads
    contexts = tokenizer.encode_contexts([row.context for row in rows], num_threads=num_threads)
    targets = tokenizer.encode_batch([row.target for row in rows], num_threads=num_threads)
    for row, context, target in zip(rows, contexts, targets, strict=True):
        length = len(context) + rule.num_prompt_specials
        # After earlier rounds comes the question that the answer is about: keep the end.
        cuts_start = length > limit and has_rounds(row.context)
        prompt = rule.prompt(context, limit, cut="start" if cuts_start else "end")
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
            out.input_ids.fromlist(input_ids)
            out.lengths.append(len(input_ids))
            out.seq_len.append(len(prompt))
            out.num_targets += len(input_ids) - len(prompt)
            out.num_ends += not num_lost
            out.spelled.count((row.context, row.target))
            out.thoughts[AS_TEXT] += begins_with_thought(row.target)
            if length > limit:
                out.cut_contexts.append(row.row)
            if num_lost:
                out.cut_targets.append(row.row)
                out.num_targets_lost += num_lost
    return out
