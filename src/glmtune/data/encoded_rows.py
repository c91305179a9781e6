"""Rows while they are encoded: what is kept of them, and what happened to the others."""

import math
from array import array
from collections import Counter
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import numpy as np

from glmtune.data.records import BadRow
from glmtune.data.row_rule import RowRule
from glmtune.data.spelled import Spelled
from glmtune.data.token_rows import TokenRows

SHARE_TO_KEEP = 0.95


@dataclass(slots=True)
class RowCounts:
    """What happened to rows; those of one part of a file can be added to those of another.

    The lists hold row numbers, except `lengths_out`: the full lengths of overlong rows.
    `num_targets_lost` counts the ids cut off from targets, their end ids included, or the
    supervised ones of turns that were cut.
    """

    num_rows: int = 0
    """Rows that were encoded, whatever became of them."""
    lengths: array = field(default_factory=lambda: array("i"))
    """The length of each kept row."""
    num_targets: int = 0
    """Ids of targets in kept rows, or supervised ones where there are labels."""
    num_ends: int = 0
    """Kept rows in which the end of an answer is supervised."""
    limits: array = field(default_factory=lambda: array("i"))
    """For each row that is not empty, the smallest max_seq_length that leaves it whole."""
    empty: list[int] = field(default_factory=list)
    overlength: list[int] = field(default_factory=list)
    lengths_out: list[int] = field(default_factory=list)
    cut_contexts: list[int] = field(default_factory=list)
    cut_targets: list[int] = field(default_factory=list)
    num_targets_lost: int = 0
    unsupervised: list[int] = field(default_factory=list)
    cut_turns: list[int] = field(default_factory=list)
    refused: list[BadRow] = field(default_factory=list)
    """Conversations that the family cannot write."""
    num_dropped: int = 0
    """Supervised ids of the rows in `overlength`, if they are conversations."""
    thoughts: Counter[str] = field(default_factory=Counter)
    """What became of the thoughts of kept rows, see `data.thoughts`."""
    spelled: Spelled = field(default_factory=Spelled)
    """Names of special tokens that texts of kept rows hold."""
    several: dict[int, int] = field(default_factory=dict)
    """Rows of the source that became several, and how many."""
    num_added: int = 0
    """Kept rows beyond the first of each that became several, however often that one is taken."""
    split: list[int] = field(default_factory=list)
    """Those that did because they are too long."""
    cut_texts: list[int] = field(default_factory=list)
    num_apart: int = 0
    """Rows of one answer each, where the base reads earlier answers as part of the prompt."""
    num_repeated: int = 0
    """Ids that these have more than one row of each conversation would."""

    @property
    def num_tokens(self) -> int:
        """Ids of all kept rows."""
        return int(np.sum(self.lengths, dtype=np.int64))

    def add(self, others: "RowCounts") -> None:
        """Count the rows that follow."""
        for name in _COUNTS:
            mine, more = getattr(self, name), getattr(others, name)
            if isinstance(mine, int):
                setattr(self, name, mine + more)
            elif isinstance(mine, dict):
                mine.update(more)  # counters add up
            else:
                mine.extend(more)

    def numbered_from(self, offset: int) -> "RowCounts":
        """The same, with every row once and its number raised: for rows of several files."""
        fate = {
            name: sorted({row + offset for row in getattr(self, name)}) for name in _LISTS_OF_ROWS
        }
        refused = {bad.row: replace(bad, row=bad.row + offset) for bad in self.refused}
        counts = {name: getattr(self, name) for name in _COUNTS}
        several = {row + offset: num for row, num in self.several.items()}
        return RowCounts(**counts | fate | {"refused": list(refused.values()), "several": several})

    def as_json(self) -> dict[str, Any]:
        """The same as plain data."""
        plain = {name: getattr(self, name) for name in _COUNTS}
        spelled = {"num_rows": self.spelled.num_rows, "names": self.spelled.names}
        plain |= {"refused": [asdict(bad) for bad in self.refused], "spelled": spelled}
        return {k: list(v) if isinstance(v, array) else v for k, v in plain.items()}

    @classmethod
    def of_json(cls, plain: dict[str, Any]) -> "RowCounts":
        """Undo `as_json`. Raises LookupError or TypeError where something else stands there."""
        counts = cls()
        refused = [BadRow(**bad) for bad in plain["refused"]]
        for name in {*_COUNTS} - {"spelled"}:
            value, kind = plain[name], type(getattr(counts, name))
            setattr(counts, name, array("i", value) if kind is array else kind(value))
        counts.refused = refused
        counts.several = {int(row): num for row, num in plain["several"].items()}
        counts.spelled.num_rows = plain["spelled"]["num_rows"]
        counts.spelled.names.update(plain["spelled"]["names"])
        return counts

    def keeping(self, share: float) -> int:
        """The least max_seq_length that leaves a share of the rows whole."""
        return int(np.sort(self.limits)[math.ceil(share * len(self.limits)) - 1])

    def advice(self, limit: int) -> str | None:
        """Say which max_seq_length leaves 95 % of the rows whole, and which all of them."""
        num_whole = int(np.sum(np.asarray(self.limits) <= limit))
        if num_whole == len(self.limits):
            return None
        share, most, all_ = SHARE_TO_KEEP, self.keeping(SHARE_TO_KEEP), self.keeping(1)
        whole = f"{num_whole:,} of {len(self.limits):,} rows are whole; "
        for_most = f"--max_seq_length {most} keeps {share:.0%}, " if limit < most < all_ else ""
        return f"{whole}{for_most}--max_seq_length {all_} keeps all of them"


_LISTS_OF_ROWS = (
    "empty", "overlength", "cut_contexts", "cut_targets", "unsupervised", "cut_turns", "split",
    "cut_texts",
)  # fmt: skip
_COUNTS = tuple(entry.name for entry in fields(RowCounts))


@dataclass(slots=True)
class EncodedRows(RowCounts):
    """Kept rows, and what happened to the others.

    `input_ids` holds all rows end to end as int32, `seq_len` each prompt's length, `lengths` that
    of each row.
    """

    input_ids: array = field(default_factory=lambda: array("i"))
    seq_len: array = field(default_factory=lambda: array("i"))
    labels: array | None = None
    """The labels of conversations, end to end; None for rows of one prompt and one answer."""

    def extend(self, others: "EncodedRows") -> None:
        """Add the rows that follow; rows with labels to rows with labels."""
        self.add(others)
        self.input_ids.extend(others.input_ids)
        self.seq_len.extend(others.seq_len)
        if others.labels is not None:
            if self.labels is None:
                self.labels = array("i")
            self.labels.extend(others.labels)

    @property
    def starts(self) -> np.ndarray:
        """Where each kept row starts in `input_ids`, and at last the end."""
        return np.concatenate(([0], np.cumsum(self.lengths, dtype=np.int64)))

    def as_token_rows(self, rule: RowRule) -> TokenRows:
        """The kept rows in the form that training takes them in; `rule` is their family's."""
        return TokenRows(
            ids_T=np.array(self.input_ids),
            starts_R1=self.starts,
            prompt_lengths_R=np.array(self.seq_len),
            rule=rule,
            labels_T=None if self.labels is None else np.array(self.labels),
        )
