"""What `glmtune tokenize` reports of a file: its data card, and the lines that it prints."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from glmtune import __version__
from glmtune.config.settings import TokenizeSettings
from glmtune.data import thoughts
from glmtune.data.dataset import (
    CARD_FILE,
    CONVERSATION,
    HISTOGRAM_FILE,
    DataCard,
    RowTokenizer,
)
from glmtune.data.encoded_rows import RowCounts
from glmtune.data.fields import FieldUse
from glmtune.data.lengths import LengthStats
from glmtune.data.records import TEXT, BadRow, list_bad_rows, name_rows
from glmtune.data.row_files import RowFile
from glmtune.data.row_sets import RowSet, describe, joined, name_of


@dataclass(frozen=True, slots=True)
class TokenizeSummary:
    """The result of tokenising a file; printed, it lists every row that was dropped or cut."""

    jsonl_path: str
    save_path: str
    card: DataCard
    num_rows: int
    """Rows of the file, or taken of several; one that is taken twice counts twice."""
    num_kept: int
    """Those of them that were kept, whole or in part."""
    bad_rows: list[BadRow]
    fields: FieldUse
    advice: str | None
    """Advice on a max_seq_length that leaves more rows whole; None where this one left all."""
    of_texts: tuple[str, ...] = ()
    """Lines on what the rows say."""
    of_sets: tuple[str, ...] = ()
    """Lines on the files, where there are several."""

    def __str__(self) -> str:
        card, limit = self.card, self.card.flags["max_seq_length"]
        written = f" as {card.num_kept:,}" if card.num_kept > self.num_kept else ""
        lines = [
            f"{self.jsonl_path} -> {self.save_path}",
            f"  rows        {self.num_rows:,} {'taken' if self.of_sets else 'read'}, "
            f"{self.num_kept:,} kept{written}, {self.num_rows - self.num_kept:,} dropped",
            *(f"  {line}" for line in self.of_sets),
        ]
        lines += [f"    {line}" for line in describe_rows(card.rows_out, card.rows_cut, limit)]
        if self.bad_rows:
            lines.append(f"    {len(self.bad_rows):,} bad, skipped:")
            lines += [f"      {line}" for line in list_bad_rows(self.bad_rows)]
        lines += [f"    {line}" for line in (*self.of_texts, *self.fields.lines())]
        what = "targets" if "target" in card.rows_cut else "supervised"
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


def describe_rows(
    out: Mapping[str, Sequence[int]], cut: Mapping[str, Sequence[int]], limit: object
) -> Iterator[str]:
    """A line for each reason for which rows are left out, cut or split; bad ones aside.

    Args:
        out: the rows that are left out, by why.
        cut: those that are cut or split, by what is.
        limit: the tokens that a row may have.
    """
    for what, rows in [
        ("dropped, empty target", out["empty"]),
        ("dropped, nothing is supervised", out.get("unsupervised")),
        (f"dropped, longer than {limit} tokens", out["overlength"]),
        (f"kept, context cut to {limit} tokens", cut.get("context")),
        (f"kept, target cut to {limit} tokens", cut.get("target")),
        (f"kept, turns cut or left out to be within {limit} tokens", cut.get("turns")),
        (f"kept, text cut to {limit} tokens", cut.get("text")),
        (f"split into rows of at most {limit} tokens", cut.get("split")),
    ]:
        if rows:
            yield f"{len(rows):,} {what}: {name_rows(rows, limit=12)}"


def summarise(
    settings: TokenizeSettings, tokenizer: RowTokenizer, sets: Sequence[RowSet], card: DataCard
) -> TokenizeSummary:
    """The summary of files whose rows have all been encoded."""
    file, counts = joined(sets)
    of_sets = tuple(describe(sets))
    return TokenizeSummary(
        name_of(sets),
        settings.save_path,
        card,
        file.num_good if of_sets else file.num_rows,
        len(counts.lengths) - counts.num_added,
        _all_bad(file, counts),
        file.fields,
        counts.advice(settings.max_seq_length),
        describe_texts(counts, tokenizer, file.is_text),
        of_sets,
    )


def make_card(
    settings: TokenizeSettings,
    tokenizer: RowTokenizer,
    base_name: str,
    sets: Sequence[RowSet],
) -> DataCard:
    """The card of files whose rows have all been encoded."""
    file, counts = joined(sets)
    is_whole = file is sets[0].file
    has_turns, is_text = file.has_turns, file.is_text
    template = CONVERSATION if has_turns else getattr(tokenizer, "template", None)
    template = TEXT if is_text else template
    flags = {"max_seq_length", "skip_overlength", "keep_empty", "on_bad_row", "allow_special"}
    flags |= {"learn", "thoughts"} if has_turns else set()
    flags |= {"too_long"} if has_turns or is_text else set()
    return DataCard(
        glmtune_version=__version__,
        base_model=base_name,
        tokenizer_sha256=tokenizer.vocab_hash,
        vocab_revision=tokenizer.revision,
        special_ids=tokenizer.row_rule.special_ids,
        template=template or file.template or "custom",
        flags=settings.model_dump(include=flags),
        source=Path(file.path).name if is_whole else None,
        source_sha256=sets[0].sha256 if is_whole else None,
        num_read=file.num_rows,
        num_kept=len(counts.lengths),
        num_tokens=counts.num_tokens,
        num_target_tokens=counts.num_targets,
        lengths=LengthStats.of(counts.lengths),
        rows_out=rows_out(counts, file),
        rows_cut=rows_cut(counts, file),
        rows_several={str(row): count for row, count in counts.several.items()},
        num_targets_lost=counts.num_targets_lost,
        row_is_line=file.row_is_line,
        sets=tuple(one.card() for one in sets),
        spelled_specials=dict(counts.spelled.names.most_common()),
        num_spelling=counts.spelled.num_rows,
    )


def rows_out(counts: RowCounts, file: RowFile) -> dict[str, list[int]]:
    """The rows of the source that are left out, by why."""
    return {
        "bad": [bad.row for bad in _all_bad(file, counts)],
        "empty": counts.empty,
        "overlength": counts.overlength,
        **({"unsupervised": counts.unsupervised} if file.has_turns else {}),
    }


def rows_cut(counts: RowCounts, file: RowFile) -> dict[str, list[int]]:
    """The rows of the source that were cut or split, by what was."""
    if not (file.has_turns or file.is_text):
        return {"context": counts.cut_contexts, "target": counts.cut_targets}
    cut = {"turns": counts.cut_turns} if file.has_turns else {}
    cut |= {"text": counts.cut_texts} if file.is_text else {}
    return cut | ({"split": counts.split} if counts.split else {})


def _all_bad(file: RowFile, counts: RowCounts) -> list[BadRow]:
    return sorted([*file.bad_rows, *counts.refused], key=lambda bad: bad.row)


def describe_texts(counts: RowCounts, tokenizer: RowTokenizer, is_text: bool) -> tuple[str, ...]:
    """What to report of what rows say, and of how the base takes it."""
    lines = []
    if is_text:
        rule = tokenizer.row_rule
        begin = " ".join(special.text for special in rule.before_text) or "nothing"
        end = " ".join(special.text for special in rule.after_text or rule.end)
        lines.append(f"texts alone, each behind {begin} and, where it is whole, before {end}")
    if counts.spelled.num_rows:
        meant = tokenizer.special_names if tokenizer.allow_special else {}
        lines.append(counts.spelled.describe(meant))
    if counts.num_apart:
        lines.append(
            f"{counts.num_apart:,} answers are rows of their own, since the base reads earlier "
            f"ones as part of the prompt; that takes {counts.num_repeated:,} tokens more than "
            "learning the last ones alone (--learn last)"
        )
    lines += thoughts.describe(counts.thoughts)
    if counts.num_dropped:
        lines.append(f"{counts.num_dropped:,} supervised tokens stood in the rows that are dropped")
    return tuple(lines)
