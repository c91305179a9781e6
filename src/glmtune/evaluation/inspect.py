"""`glmtune inspect`: rows as the model sees them in training, token by token."""

import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from glmtune.config.settings import InspectSettings
from glmtune.data.conversations import Example
from glmtune.data.dataset import check_data_card, load_dataset
from glmtune.data.files import new_file
from glmtune.data.flaws import show
from glmtune.data.records import Conversation, name_rows
from glmtune.data.row_stats import RowStats
from glmtune.data.token_rows import TokenRows
from glmtune.data.token_summary import describe_rows, describe_texts, rows_cut, rows_out
from glmtune.data.tokenizing import encode_file, in_effect, no_row_left, row_fates
from glmtune.errors import visible
from glmtune.evaluation.inspect_page import page_of_rows
from glmtune.evaluation.row_view import ShownRow, view_rows
from glmtune.models.loading import load_tokenizer
from glmtune.models.resolve import base_name, resolve_base

SUPERVISED, IN_PREFIX = "*", "="
_CUT = ("context", "target", "turns", "text")
"""What may be cut of a row that is shown, as in `rows_cut`."""
_GREEN, _CYAN, _DIM, _BOLD, _END = "\x1b[32m", "\x1b[36m", "\x1b[2m", "\x1b[1m", "\x1b[0m"


@dataclass(frozen=True)
class Inspection:
    """Rows of a file or a folder: some to show, and figures of all where those were asked for."""

    path: str
    base: str
    shown: Sequence[ShownRow]
    stats: RowStats | None
    """None where only the rows that are shown were encoded, or none is kept."""
    notes: Sequence[str]
    """What else there is to say of all rows."""
    refusal: str | None
    """Why training refuses the rows; None where it does not, or not all rows were encoded."""

    def as_json(self) -> dict[str, object]:
        """The same as plain data."""
        return {
            "path": self.path,
            "base": self.base,
            "rows": [
                {
                    "where": row.where,
                    "left_out": row.fate,
                    "input_ids": [token.id for token in row.tokens],
                    "labels": [t.id if t.is_supervised else -100 for t in row.tokens],
                    "position_ids": [list(token.positions) for token in row.tokens],
                    "prefix": row.prefix,
                    "texts": [token.text for token in row.tokens],
                }
                for row in self.shown
            ],
            "stats": self.stats and self.stats.as_json(),
            "notes": list(self.notes),
            "refused": self.refusal,
        }


def inspect(settings: InspectSettings) -> Inspection:
    """Show the first rows of a file, or of a folder that `tokenize` wrote.

    Raises:
        UserError: as `tokenize` for a file, as training for a folder; except for rows that teach
            hardly anything, of which the result says so.
    """
    base = resolve_base(settings.base)
    tokenizer = load_tokenizer(base)
    of_path = _of_folder if os.path.isdir(settings.jsonl_path) else _of_file
    found = of_path(settings, tokenizer, base_name(base))
    print("\n".join(map(visible, _legend())))
    for row in found.shown:
        print("\n".join(_lines(row, _has_colour())))
    figures = found.stats.lines() if found.stats else []
    for line in (*figures, *map(visible, found.notes)):
        print(f"  {line}")
    if found.refusal:
        print(visible(f"  refused     by tokenize and train: {found.refusal}"))
    for path, write in (
        (settings.html_path, page_of_rows),
        (settings.json_path, lambda it: json.dumps(it.as_json(), ensure_ascii=False) + "\n"),
    ):
        if path:
            with new_file(path) as file:
                file.write(write(found))
            print(f"written: {path}")
    return found


def _of_file(settings: InspectSettings, tokenizer: Any, base: str) -> Inspection:
    counts = settings.stats or bool(settings.html_path or settings.json_path)
    file, read, encoded = encode_file(settings, tokenizer, None if counts else settings.limit)
    settings = in_effect(settings, file)
    fates, cut = row_fates(encoded), rows_cut(encoded, file)
    placed: list[tuple[str, str | None]] = []
    for row in read[: settings.limit]:
        fate = fates.get(row.row)
        count = 1 if fate else encoded.several.get(row.row, 1)
        parts = [f", part {part + 1} of {count}" if count > 1 else "" for part in range(count)]
        is_cut = [f", {what} cut" for what in _CUT if not fate and row.row in cut.get(what, ())]
        placed += [(f"{row.where}{part}{''.join(is_cut)}", fate) for part in parts]
    rows = encoded.as_token_rows(tokenizer.row_rule) if encoded.seq_len else None
    shown = view_rows(placed, rows, tokenizer)
    stats = None
    if counts and rows is not None:
        kept = [row for row in read if row.row not in fates]
        decode = partial(tokenizer.decode, skip_special_tokens=True)
        stats = RowStats.of(rows, decode, _examples(kept))
    notes: list[str] = []
    refusal = rows.why_refused() if counts and rows is not None else None
    if counts:
        out = rows_out(encoded, file)
        notes += describe_rows(out, cut, settings.max_seq_length)
        if out["bad"]:
            notes.append(f"{len(out['bad']):,} bad, skipped: {name_rows(out['bad'], limit=12)}")
        notes += describe_texts(encoded, tokenizer, file.is_text)
    if counts and rows is None:
        refusal = str(no_row_left(settings.jsonl_path, settings, file.has_turns, encoded))
    return Inspection(settings.jsonl_path, base, shown, stats, notes, refusal)


def _examples(rows: Sequence[Any]) -> list[Example] | None:
    """The conversations of rows; None where these are contexts and targets."""
    examples = [row.example for row in rows if isinstance(row, Conversation)]
    return examples if len(examples) == len(rows) else None


def _of_folder(settings: InspectSettings, tokenizer: Any, base: str) -> Inspection:
    path = settings.jsonl_path
    table, card = load_dataset(path, tokenizer.row_rule)
    check_data_card(card, tokenizer, path)
    rows = TokenRows.from_table(table, tokenizer.row_rule)
    num_shown = min(settings.limit, len(rows))
    placed = [(f"{path} (row {row + 1})", None) for row in range(num_shown)]
    counts = settings.stats or bool(settings.html_path or settings.json_path)
    decode = partial(tokenizer.decode, skip_special_tokens=True)
    stats = RowStats.of(rows, decode) if counts else None
    shown = view_rows(placed, rows, tokenizer)
    return Inspection(path, base, shown, stats, (), rows.why_refused())


def _has_colour() -> bool:
    """Whether the output is a terminal that shows colours; see no-color.org."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


def _legend() -> Iterator[str]:
    yield f"place, id, position; {SUPERVISED} is supervised, predicted from the tokens before it"


def _lines(row: ShownRow, has_colour: bool) -> Iterator[str]:
    """Lines on a row, and one for each of its tokens."""

    def painted(text: str, colour: str) -> str:
        return f"{colour}{text}{_END}" if has_colour and colour else text

    yield painted(visible(f"{row.where}: {row.fate}" if row.fate else row.where), _BOLD)
    if row.fate:
        return
    seen = f"; {IN_PREFIX} marks the first {row.prefix}, which see each other in both directions"
    yield (
        f"  {len(row.tokens)} tokens, {row.num_supervised} supervised; the last answer starts at "
        f"{row.answer_at}{seen if row.prefix else ''}"
    )
    yield (
        f"  {row.padding} ids of padding follow it in a batch; in a pack it starts at {row.start}"
    )
    for token in row.tokens:
        mark = SUPERVISED if token.is_supervised else IN_PREFIX if token.is_in_prefix else " "
        colour = _GREEN if token.is_supervised else _CYAN if token.is_special else _DIM
        position = ",".join(map(str, token.positions))
        text = visible(token.text if token.is_special else show(token.text))
        line = f"  {token.place:>5} {token.id:>7} {position:>7} {mark} {text}"
        yield painted(line, colour)
