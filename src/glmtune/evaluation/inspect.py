"""`glmtune inspect`: rows as the model sees them in training, token by token."""

import os
from collections.abc import Iterator
from typing import Any

import numpy as np

from glmtune.config.settings import InspectSettings
from glmtune.data.dataset import check_data_card, load_dataset
from glmtune.data.flaws import show
from glmtune.data.token_rows import IGNORED, TokenRows
from glmtune.data.tokenizing import encode_file, row_fates
from glmtune.errors import visible
from glmtune.models.loading import load_tokenizer
from glmtune.models.resolve import resolve_base
from glmtune.training.batches import collate

SUPERVISED = "*"


def inspect(settings: InspectSettings) -> None:
    """Print the first rows of a file, or of a folder that `tokenize` wrote.

    Raises:
        UserError: as `tokenize` for a file, as training for a folder.
    """
    tokenizer = load_tokenizer(resolve_base(settings.base))
    of_path = _rows_of_folder if os.path.isdir(settings.jsonl_path) else _rows_of_file
    print(f"{SUPERVISED} marks what is supervised, each predicted from the tokens before it")
    for where, rows, row in of_path(settings, tokenizer):
        print(visible(where))
        if rows is not None:
            print("\n".join(map(visible, describe_row(rows, row, tokenizer))))


def _rows_of_file(
    settings: InspectSettings, tokenizer: Any
) -> Iterator[tuple[str, TokenRows | None, int]]:
    """The words for each row's place; the encoded rows and its number there, if it is kept."""
    read, encoded = encode_file(settings, tokenizer, limit=settings.limit)
    rows = encoded.as_token_rows(tokenizer.row_rule)
    fates, number = row_fates(encoded), 0
    for row in read.rows[: settings.limit]:
        fate = fates.get(row.row)
        if fate:
            yield f"{row.where}: {fate}", None, 0
        else:
            yield row.where, rows, number
            number += 1


def _rows_of_folder(
    settings: InspectSettings, tokenizer: Any
) -> Iterator[tuple[str, TokenRows | None, int]]:
    table, card = load_dataset(settings.jsonl_path, tokenizer.row_rule)
    check_data_card(card, tokenizer, settings.jsonl_path)
    rows = TokenRows.from_table(table, tokenizer.row_rule)
    for row in range(min(settings.limit, len(rows))):
        yield f"{settings.jsonl_path} (row {row + 1})", rows, row


def describe_row(rows: TokenRows, row: int, tokenizer: Any) -> Iterator[str]:
    """A line on a row, and one for each of its tokens: place, id, whether supervised, text.

    Args:
        rows: of the tokenizer's family.
        row: its number, from 0.
        tokenizer: has `decode`.
    """
    batch = collate(rows, np.array([row]))
    ids, labels = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
    num_supervised = sum(label != IGNORED for label in labels)
    prefix = int(rows.prefix_lengths_R[row])
    seen = f", the first {prefix} see each other in both directions" if prefix else ""
    yield (
        f"  {len(ids)} tokens, {num_supervised} supervised; the last answer starts at "
        f"{rows.prompt_lengths_R[row]}{seen}"
    )
    rule = rows.rule
    specials = (*rule.before_prompt, *rule.after_prompt, *rule.end)
    names = {special.id: special.text for special in specials}
    for place, (id_, label) in enumerate(zip(ids, labels, strict=True)):
        mark = SUPERVISED if label != IGNORED else " "
        yield f"  {place:>5} {id_:>7} {mark} {names.get(id_) or show(tokenizer.decode([id_]))}"
