"""Token rows as flat arrays: the form that they have on disk and that packing needs.

Shapes: R rows of the data set, T tokens of all rows end to end.
"""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from glmtune.data.conversations import IGNORED
from glmtune.data.row_rule import RowRule
from glmtune.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True)
class TokenRows:
    """All rows of a data set as flat arrays, and the row rule of their family."""

    ids_T: np.ndarray
    """Token ids of all rows, end to end."""
    starts_R1: np.ndarray
    """Where each row starts in `ids_T`, and at last the end: ``(R + 1,)``."""
    prompt_lengths_R: np.ndarray
    """Ids before the answer, special ids among them (the column `seq_len`)."""
    rule: RowRule
    labels_T: np.ndarray | None = None
    """The column `labels`, where rows are more than one prompt and one answer: each token's own id,
    or `IGNORED`. Without it the rule decides what is supervised."""

    @classmethod
    def from_table(cls, table: "pa.Table", rule: RowRule) -> "TokenRows":
        """Take the columns `input_ids`, `seq_len` and, if there, `labels` of a data set.

        Args:
            table: holds at least one row.
            rule: row rule of the family that the rows were tokenised for.
        """
        from glmtune.data.arrow_files import as_numpy  # which imports pyarrow

        rows = table.column("input_ids").combine_chunks()
        lengths_R = as_numpy(rows.value_lengths())
        labels_T = None
        if "labels" in table.column_names:
            labels_T = as_numpy(table.column("labels").combine_chunks().flatten())
        return cls(
            ids_T=as_numpy(rows.flatten()),
            starts_R1=np.concatenate(([0], np.cumsum(lengths_R, dtype=np.int64))),
            prompt_lengths_R=as_numpy(table.column("seq_len")),
            rule=rule,
            labels_T=labels_T,
        )

    def __len__(self) -> int:
        return len(self.prompt_lengths_R)

    def __getitem__(self, row: int) -> np.ndarray:
        return self.ids_T[self.starts_R1[row] : self.starts_R1[row + 1]]

    @cached_property
    def lengths_R(self) -> np.ndarray:
        """Tokens of each row, prompt and answer."""
        return np.diff(self.starts_R1)

    @cached_property
    def is_supervised_T(self) -> np.ndarray:
        """Whether each token is a label, predicted from the token before it in its row.

        The first token of a row never is: nothing stands before it.
        """
        place_T = np.arange(len(self.ids_T)) - np.repeat(self.starts_R1[:-1], self.lengths_R)
        if self.labels_T is not None:
            return (self.labels_T != IGNORED) & (place_T > 0)
        first_R = self.rule.first_supervised(self.prompt_lengths_R)
        return place_T >= np.repeat(np.maximum(first_R, 1), self.lengths_R)

    @cached_property
    def num_labels_R(self) -> np.ndarray:
        """Supervised tokens of each row."""
        before_T1 = np.concatenate(([0], np.cumsum(self.is_supervised_T)))
        return np.diff(before_T1[self.starts_R1])

    @property
    def prefix_lengths_R(self) -> np.ndarray:
        """Tokens at the start of each row that see each other in both directions."""
        return self.rule.prefix_lengths(self.prompt_lengths_R)

    def digest(self) -> str:
        """A sha256 of the rows, to tell whether two runs train on the same data."""
        state = hashlib.sha256()
        arrays = self.ids_T, self.starts_R1, self.prompt_lengths_R, self.labels_T
        for array in arrays:
            if array is not None:
                state.update(np.ascontiguousarray(array, dtype=np.int64).data)
        return state.hexdigest()

    def check(self, vocab_size: int, path: str) -> None:
        """Make sure that every row can be trained on, before the first step rather than at it.

        Args:
            vocab_size: rows of the model's embedding.
            path: what the message calls the data set.

        Raises:
            UserError: see `RowRule.check`; or a label is neither its token's id nor `IGNORED`, as
                in data sets whose labels are shifted.
        """
        if self.labels_T is not None:
            is_wrong_T = (self.labels_T != self.ids_T) & (self.labels_T != IGNORED)
            if is_wrong_T.any():
                place = int(is_wrong_T.argmax())
                row = int(np.searchsorted(self.starts_R1, place, side="right")) - 1
                raise UserError(
                    f"{path}: row {row + 1} has the label {self.labels_T[place]} at the id "
                    f"{self.ids_T[place]}, and a label is the id itself or {IGNORED}; tokenize the "
                    "data again"
                )
        self.rule.check(self.ids_T, self.starts_R1, self.prompt_lengths_R, vocab_size, path)
