"""Token rows as flat arrays: the form in which they lie on disk, and in which packing wants them.

Shapes: R rows of the data set, T tokens of all rows end to end.
"""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from glmtune.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedConfig


@dataclass(frozen=True)
class TokenRows:
    """All rows of a data set as flat arrays, which is how they lie on disk."""

    ids_T: np.ndarray
    """Token ids of all rows, end to end."""
    starts_R1: np.ndarray
    """Where each row starts in them, and after the last row the end: ``(R + 1,)``."""
    prompt_lengths_R: np.ndarray
    """Ids before the answer, [gMASK] and <sop> among them (the column `seq_len`)."""

    @classmethod
    def from_dataset(cls, dataset: "Dataset") -> "TokenRows":
        """Take the columns `input_ids` and `seq_len` of a data set that holds at least one row."""
        table = dataset.select_columns(["input_ids", "seq_len"]).with_format("arrow")[:]
        rows = table.column("input_ids").combine_chunks()
        lengths_R = rows.value_lengths().to_numpy()
        return cls(
            ids_T=rows.flatten().to_numpy(),
            starts_R1=np.concatenate(([0], np.cumsum(lengths_R, dtype=np.int64))),
            prompt_lengths_R=table.column("seq_len").to_numpy(),
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
    def num_labels_R(self) -> np.ndarray:
        """Tokens of each row that are learned: <sop>, the answer and <eop>; see `collate`."""
        return self.lengths_R - self.prompt_lengths_R + 1

    @property
    def prefix_lengths_R(self) -> np.ndarray:
        """Tokens of each row that are seen in both directions: all before <sop>."""
        return self.prompt_lengths_R - 1

    def digest(self) -> str:
        """A sha256 of the rows, which says whether two runs train on the same data."""
        state = hashlib.sha256()
        for array in (self.ids_T, self.starts_R1, self.prompt_lengths_R):
            state.update(np.ascontiguousarray(array, dtype=np.int64).data)
        return state.hexdigest()

    def check(self, config: "PreTrainedConfig", path: str) -> None:
        """Make sure that every row can be trained on, before the first step rather than at it.

        Raises:
            UserError: a row holds an id beyond the vocabulary, or its prompt does not end with
                [gMASK] and <sop>; the message names the row (from 1).
        """
        fix = "tokenize the data again with this model's tokenizer"
        outside_T = (self.ids_T < 0) | (self.ids_T >= config.vocab_size)
        if outside_T.any():
            place = int(outside_T.argmax())
            row = int(np.searchsorted(self.starts_R1, place, side="right")) - 1
            raise UserError(
                f"{path}: row {row + 1} holds id {self.ids_T[place]}, but the model's last "
                f"is {config.vocab_size - 1}; {fix}"
            )
        fits_R = (self.prompt_lengths_R >= 2) & (self.prompt_lengths_R <= self.lengths_R)
        prompts_R = np.where(fits_R, self.prompt_lengths_R, 0)
        last_R = self.starts_R1[:-1] + np.maximum(prompts_R, 1) - 1
        # An empty row at the very end would start beyond the last id.
        last_R = np.minimum(last_R, len(self.ids_T) - 1)
        ends_well_R = (
            fits_R
            & (self.ids_T[last_R] == config.bos_token_id)
            & (self.ids_T[last_R - 1] == config.gmask_token_id)
        )
        for special in (config.bos_token_id, config.gmask_token_id):
            count_T1 = np.concatenate(([0], np.cumsum(self.ids_T == special)))
            starts_R = self.starts_R1[:-1]
            ends_well_R &= count_T1[starts_R + prompts_R] - count_T1[starts_R] == 1
        if not ends_well_R.all():
            row = int(ends_well_R.argmin())
            raise UserError(
                f"{path}: row {row + 1} (seq_len {self.prompt_lengths_R[row]} of "
                f"{self.lengths_R[row]} ids) has a prompt that does not end with [gMASK] <sop> "
                f"({config.gmask_token_id} {config.bos_token_id}), once and nowhere else; {fix}"
            )
