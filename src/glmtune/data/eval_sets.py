"""Rows of folders of their own that a run only evaluates on."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from glmtune.data.dataset import RowTokenizer, check_data_card, load_dataset
from glmtune.data.joined import joined
from glmtune.data.row_rule import RowRule
from glmtune.data.token_rows import TokenRows
from glmtune.errors import UserError

HELD_OUT = "held_out"
"""The name of the rows held out of dataset_path itself, beside those of other folders."""


def name_folders(texts: Sequence[str]) -> dict[str, str]:
    """Name -> folder, of texts that are NAME=FOLDER or a folder, whose last part is its name.

    Raises:
        UserError: two have one name.
    """
    named: dict[str, str] = {}
    for text in texts:
        name, is_named, folder = text.partition("=")
        if not is_named or "/" in name:
            name, folder = Path(text).expanduser().resolve().name, text
        if name in named or name == HELD_OUT:
            known = named.get(name, "rows held out of dataset_path")
            raise UserError(
                f"eval_dataset_path {text}: {name} is the name of {known} already; give it "
                f"another: {name}_2={folder}"
            )
        named[name] = folder
    return named


def load_eval_sets(
    texts: Sequence[str], rule: RowRule, tokenizer: RowTokenizer, vocab_size: int | None = None
) -> dict[str, TokenRows]:
    """The rows of each folder, by name.

    Args:
        texts: see `name_folders`.
        rule: row rule of the family.
        tokenizer: must be the one that made the rows.
        vocab_size: rows of the model's embedding; None for rows of a run, which it has checked.

    Raises:
        UserError: a folder cannot be read, its rows are of another tokenizer, or none of their
            tokens is supervised.
    """
    found = {}
    for name, folder in name_folders(texts).items():
        table, card = load_dataset(folder, rule)
        check_data_card(card, tokenizer, folder)
        rows = TokenRows.from_table(table, rule)
        if vocab_size is not None:
            rows.check(vocab_size, folder)
        if not rows.num_labels_R.any():
            raise UserError(
                f"{folder}: no token of its rows is supervised, so they have no loss; tokenize "
                "rows that have answers"
            )
        found[name] = rows
    return found


def with_eval_sets(rows: TokenRows, sets: Mapping[str, TokenRows]) -> TokenRows:
    """Rows to train on, and behind them those that are only evaluated on."""
    if not sets:
        return rows
    parts = [rows, *sets.values()]
    labels_T = None
    if any(part.labels_T is not None for part in parts):
        labels_T = joined([part.as_labels_T for part in parts])
    ends = np.cumsum([len(part) for part in parts])
    lengths_R = np.concatenate([part.lengths_R for part in parts])
    return replace(
        rows,
        ids_T=joined([part.ids_T for part in parts]),
        starts_R1=np.concatenate(([0], np.cumsum(lengths_R, dtype=np.int64))),
        prompt_lengths_R=np.concatenate([part.prompt_lengths_R for part in parts]),
        labels_T=labels_T,
        eval_sets={
            name: np.arange(start, end)
            for name, start, end in zip(sets, ends[:-1], ends[1:], strict=True)
        },
    )


def tell_overlap(rows: TokenRows, texts: Sequence[str]) -> Iterator[str]:
    """Sentences on rows of evaluation that ask nearly what a row to train on asks.

    Args:
        rows: grouped, see `TokenRows.grouped`.
        texts: see `name_folders`.
    """
    assert rows.groups_R is not None
    folders = name_folders(texts)
    trained_on = rows.groups_R[: rows.num_own]
    for name, row_ids in rows.eval_sets.items():
        if count := int(np.isin(rows.groups_R[row_ids], trained_on).sum()):
            yield (
                f"{folders[name]}: {count:,} of its {len(row_ids):,} rows ask nearly what rows of "
                "dataset_path ask: what they show is partly memory"
            )
