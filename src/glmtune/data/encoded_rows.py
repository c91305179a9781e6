"""Rows while they are encoded: what is kept of them, and what happened to the others."""

import math
from array import array
from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from glmtune.data.conversations import IGNORED
from glmtune.data.records import BadRow
from glmtune.data.row_rule import RowRule
from glmtune.data.spelled import Spelled
from glmtune.data.token_rows import TokenRows

SHARE_TO_KEEP = 0.95


@dataclass(slots=True)
class EncodedRows:
    """Kept rows, and what happened to the others.

    `input_ids` holds all rows end to end as int32, `ends` where each ends, `seq_len` each prompt's
    length. The lists hold row numbers, except `lengths_out`: the full lengths of overlong rows.
    `num_targets_lost` counts the ids cut off from targets, their end ids included, or the
    supervised ones of turns that were cut.
    """

    input_ids: array = field(default_factory=lambda: array("i"))
    ends: array = field(default_factory=lambda: array("i"))
    seq_len: array = field(default_factory=lambda: array("i"))
    empty: list[int] = field(default_factory=list)
    overlength: list[int] = field(default_factory=list)
    lengths_out: list[int] = field(default_factory=list)
    cut_contexts: list[int] = field(default_factory=list)
    cut_targets: list[int] = field(default_factory=list)
    num_targets_lost: int = 0
    limits: array = field(default_factory=lambda: array("i"))
    """For each row that is not empty, the smallest max_seq_length that leaves it whole."""
    labels: array | None = None
    """The labels of conversations, end to end; None for rows of one prompt and one answer."""
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
    split: list[int] = field(default_factory=list)
    """Those that did because they are too long."""
    cut_texts: list[int] = field(default_factory=list)
    num_apart: int = 0
    """Rows of one answer each, where the base reads earlier answers as part of the prompt."""
    num_repeated: int = 0
    """Ids that these have more than one row of each conversation would."""

    @property
    def lengths(self) -> np.ndarray:
        """The length of each kept row."""
        return np.diff(self.ends, prepend=0)

    def as_token_rows(self, rule: RowRule) -> TokenRows:
        """The kept rows in the form that training takes them in; `rule` is their family's."""
        return TokenRows(
            ids_T=np.array(self.input_ids),
            starts_R1=np.concatenate(([0], np.array(self.ends, dtype=np.int64))),
            prompt_lengths_R=np.array(self.seq_len),
            rule=rule,
            labels_T=None if self.labels is None else np.array(self.labels),
        )

    @property
    def num_targets(self) -> int:
        """Ids of targets in kept rows, or supervised ones where there are labels."""
        if self.labels is None:
            return len(self.input_ids) - sum(self.seq_len)
        return int(np.count_nonzero(np.asarray(self.labels) != IGNORED))

    def keeping(self, share: float) -> int:
        """The least max_seq_length that leaves a share of the rows whole."""
        return int(np.sort(self.limits)[math.ceil(share * len(self.limits)) - 1])

    def advice(self, limit: int) -> str | None:
        """Say which max_seq_length leaves 95 % of the rows whole, and which all of them."""
        num_whole = int(np.sum(np.asarray(self.limits) <= limit))
        if num_whole == len(self.limits):
            return None
        share, most = SHARE_TO_KEEP, self.keeping(SHARE_TO_KEEP)
        whole = f"{num_whole:,} of {len(self.limits):,} rows are whole; "
        for_all = f"--max_seq_length {self.keeping(1)} keeps all of them"
        return whole + (f"--max_seq_length {most} keeps {share:.0%}, " * (most > limit)) + for_all
