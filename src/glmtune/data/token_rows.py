"""Token rows as flat arrays: the form that they have on disk and that packing needs.

Shapes: R rows of the data set, T tokens of all rows end to end.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from glmtune.data.conversations import IGNORED
from glmtune.data.joined import Joined, Numbers
from glmtune.data.row_rule import RowRule
from glmtune.data.split import ShareOut, alone, group_rows, split_rows
from glmtune.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

LEAST_SHARE = 0.01
"""The share of a data set's tokens that has to be supervised."""
BLOCK_TOKENS = 1 << 18
"""Tokens of a block: figures of all tokens are computed block by block, to take little memory."""


@dataclass(frozen=True)
class TokenRows:
    """All rows of a data set as flat arrays, and the row rule of their family.

    Of a data set on disk the tokens stay there, mapped into memory: arrays as long as they are
    would be many times as large. What has to do with each of them goes by `blocks` or `take`.
    """

    ids_T: Numbers
    """Token ids of all rows, end to end."""
    starts_R1: np.ndarray
    """Where each row starts in `ids_T`, and at last the end: ``(R + 1,)``."""
    prompt_lengths_R: np.ndarray
    """Ids before the answer, special ids among them (the column `seq_len`)."""
    rule: RowRule
    labels_T: Numbers | None = None
    """The column `labels`, where rows are more than one prompt and one answer: each token's own id,
    or `IGNORED`. Without it the rule decides what is supervised."""
    sets_R: np.ndarray | None = None
    """The set that each row is of, where there are several; without `eval_sets`."""
    groups_R: np.ndarray | None = None
    """The group of each row, if near-equal rows have been looked for: see `split.group_rows`."""
    eval_sets: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Name -> numbers of rows that are only evaluated on; they stand behind all others."""

    @classmethod
    def from_table(
        cls, table: "pa.Table", rule: RowRule, num_of_sets: Sequence[int] = ()
    ) -> "TokenRows":
        """Take the columns `input_ids`, `seq_len` and, if there, `labels` of a data set.

        Args:
            table: holds at least one row.
            rule: row rule of the family that the rows were tokenised for.
            num_of_sets: how many rows of each set it holds, one set after the other.
        """
        from glmtune.data.arrow_files import as_numpy  # which imports pyarrow

        def tokens_of(column: str) -> Joined:
            return Joined([as_numpy(part.flatten()) for part in table.column(column).chunks])

        lengths = [as_numpy(part.value_lengths()) for part in table.column("input_ids").chunks]
        return cls(
            ids_T=tokens_of("input_ids"),
            starts_R1=np.concatenate(([0], np.cumsum(np.concatenate(lengths), dtype=np.int64))),
            prompt_lengths_R=as_numpy(table.column("seq_len")),
            rule=rule,
            labels_T=tokens_of("labels") if "labels" in table.column_names else None,
            sets_R=np.repeat(np.arange(len(num_of_sets)), num_of_sets) if num_of_sets else None,
        )

    def __len__(self) -> int:
        return len(self.prompt_lengths_R)

    def __getitem__(self, row: int) -> np.ndarray:
        return self.ids_T[self.starts_R1[row] : self.starts_R1[row + 1]]

    @cached_property
    def lengths_R(self) -> np.ndarray:
        """Tokens of each row, prompt and answer."""
        return np.diff(self.starts_R1)

    def take(self, row_ids: np.ndarray) -> "TokenRows":
        """Some rows alone, copied."""
        spans = [slice(self.starts_R1[row], self.starts_R1[row + 1]) for row in row_ids]

        def of(numbers: Numbers) -> np.ndarray:
            return np.concatenate([numbers[span] for span in spans] or [numbers[:0]])

        return TokenRows(
            of(self.ids_T),
            np.concatenate(([0], np.cumsum(self.lengths_R[row_ids]))),
            self.prompt_lengths_R[row_ids],
            self.rule,
            None if self.labels_T is None else of(self.labels_T),
        )

    def blocks(self, first: int = 0, end: int | None = None) -> Iterator[tuple[int, "TokenRows"]]:
        """Rows in order, some `BLOCK_TOKENS` at a time, each time with the first one's number.

        Args:
            first: the number of the row to begin with.
            end: the row to end before; None for all.
        """
        end = len(self) if end is None else end
        while first < end:
            most = self.starts_R1[first] + BLOCK_TOKENS
            last = min(int(np.searchsorted(self.starts_R1, most, side="right")) - 1, end)
            last = max(last, first + 1)
            start, stop = self.starts_R1[[first, last]]
            block = TokenRows(
                self.ids_T[start:stop],
                self.starts_R1[first : last + 1] - start,
                self.prompt_lengths_R[first:last],
                self.rule,
                None if self.labels_T is None else self.labels_T[start:stop],
            )
            yield first, block
            first = last

    @cached_property
    def is_supervised_T(self) -> np.ndarray:
        """Whether each token is a label, predicted from the token before it in its row.

        The first token of a row never is: nothing stands before it.
        """
        place_T = np.arange(len(self.ids_T)) - np.repeat(self.starts_R1[:-1], self.lengths_R)
        if self.labels_T is not None:
            return (np.asarray(self.labels_T) != IGNORED) & (place_T > 0)
        first_R = self.rule.first_supervised(self.prompt_lengths_R)
        return place_T >= np.repeat(np.maximum(first_R, 1), self.lengths_R)

    @property
    def targets_T(self) -> np.ndarray:
        """Each supervised token's own id, and `IGNORED` elsewhere."""
        return np.where(self.is_supervised_T, np.asarray(self.ids_T), IGNORED)

    @property
    def as_labels_T(self) -> Numbers:
        """The column `labels`, made by the rule where there is none."""
        if self.labels_T is not None:
            return self.labels_T
        return Joined([rows.targets_T for _, rows in self.blocks()])

    @cached_property
    def num_labels_R(self) -> np.ndarray:
        """Supervised tokens of each row."""
        return self._counted(lambda rows: rows.is_supervised_T)

    @property
    def num_answers_R(self) -> np.ndarray:
        """Stretches of supervised tokens of each row."""

        def begins(rows: TokenRows) -> np.ndarray:
            # A row's first token never is supervised, so no stretch begins in the row before.
            is_supervised_T = rows.is_supervised_T
            return is_supervised_T & ~np.append(False, is_supervised_T[:-1])

        return self._counted(begins)

    def _counted(self, which_T: Callable[["TokenRows"], np.ndarray]) -> np.ndarray:
        """How many tokens of each row are among those, block by block."""
        counts = [np.zeros(0, np.int64)]
        for _, rows in self.blocks():
            before_T1 = np.concatenate(([0], np.cumsum(which_T(rows))))
            counts.append(np.diff(before_T1[rows.starts_R1]))
        return np.concatenate(counts)

    @property
    def prefix_lengths_R(self) -> np.ndarray:
        """Tokens at the start of each row that see each other in both directions."""
        return self.rule.prefix_lengths(self.prompt_lengths_R)

    def grouped(
        self,
        decode_batch: Callable[[Sequence[Sequence[int]]], list[str]],
        sources_R: np.ndarray | None = None,
        share_out: ShareOut = alone,
    ) -> "TokenRows":
        """The same, with the groups of near-equal rows; see `split.group_rows`."""
        return replace(self, groups_R=group_rows(self, decode_batch, sources_R, share_out))

    def split(self, eval_ratio: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Row numbers to train on and to evaluate on; see `split.split_rows`."""
        groups_R = None if self.groups_R is None else self.groups_R[: self.num_own]
        trained_on, held_out = split_rows(self.num_own, eval_ratio, seed, groups_R, self.sets_R)
        return trained_on, np.concatenate([held_out, *self.eval_sets.values()])

    @property
    def num_own(self) -> int:
        """Rows of the data set itself, `eval_sets` left out."""
        return len(self) - sum(map(len, self.eval_sets.values()))

    def digest(self) -> str:
        """A sha256 of the rows, to tell whether two runs train on the same data."""
        state = hashlib.sha256()
        columns = self.ids_T, self.starts_R1, self.prompt_lengths_R, self.labels_T
        for numbers in (column for column in columns if column is not None):
            for start in range(0, len(numbers), BLOCK_TOKENS):
                part = numbers[start : start + BLOCK_TOKENS]
                state.update(np.ascontiguousarray(part, dtype=np.int64).data)
        return state.hexdigest()

    @cached_property
    def teaches_end_R(self) -> np.ndarray:
        """Whether each row has a supervised id that ends an answer."""
        ends = [*self.rule.end_ids, *self.rule.stops]
        return self._counted(lambda rows: rows.is_supervised_T & np.isin(rows.ids_T, ends)) > 0

    def why_refused(self) -> str | None:
        """Why training on the rows would teach hardly anything, and the fix; None if it would."""
        num_ends, num_supervised = int(self.teaches_end_R.sum()), int(self.num_labels_R.sum())
        has_labels = self.labels_T is not None
        return why_refused(num_ends, num_supervised, len(self.ids_T), has_labels)

    def check_taught(self, path: str) -> None:
        """Make sure that training on the rows would teach something, and where to stop.

        Raises:
            UserError: it would not, see `why_refused`; `path` is what the message calls the rows.
        """
        if reason := self.why_refused():
            raise UserError(f"{path}: {reason}")

    def check(self, vocab_size: int, path: str) -> None:
        """Make sure that every row can be trained on, before the first step rather than at it.

        Args:
            vocab_size: rows of the model's embedding.
            path: what the message calls the data set.

        Raises:
            UserError: see `RowRule.check`; or a label is neither its token's id nor `IGNORED`, as
                in data sets whose labels are shifted.
        """
        for first, rows in self.blocks():
            ids_T = np.asarray(rows.ids_T)
            if rows.labels_T is not None:
                labels_T = np.asarray(rows.labels_T)
                is_wrong_T = (labels_T != ids_T) & (labels_T != IGNORED)
                if is_wrong_T.any():
                    place = int(is_wrong_T.argmax())
                    row = int(np.searchsorted(rows.starts_R1, place, side="right")) - 1
                    raise UserError(
                        f"{path}: row {first + row + 1} has the label {labels_T[place]} at the id "
                        f"{ids_T[place]}, and a label is the id itself or {IGNORED}; tokenize the "
                        "data again"
                    )
            prompts_R = rows.prompt_lengths_R
            self.rule.check(ids_T, rows.starts_R1, prompts_R, vocab_size, path, first)


def why_refused(
    num_ends: int, num_supervised: int, num_tokens: int, has_labels: bool
) -> str | None:
    """Why training on rows would teach hardly anything, and the fix; None if it would.

    Args:
        num_ends: rows in which the end of an answer is supervised.
        num_supervised: supervised tokens.
        num_tokens: all tokens.
        has_labels: whether a row has a label for each token; else it is one prompt, which a smaller
            max_seq_length cuts, and one answer.
    """
    if not num_ends:
        return (
            "no row teaches the end of an answer, so the model would not stop; supervise an "
            "answer that a question or the end of the row follows, or raise max_seq_length if "
            "it cut all answers, and tokenize again"
        )
    if num_supervised < LEAST_SHARE * num_tokens:
        fix = "cut what stands before them with a smaller --max_seq_length"
        if has_labels:
            fix = "supervise more answers with --learn each, or shorten what stands before them"
        return (
            f"only {num_supervised:,} of {num_tokens:,} tokens "
            f"({num_supervised / num_tokens:.2%}) are supervised, so a run would teach little; "
            f"{fix}, and tokenize again"
        )
    return None
