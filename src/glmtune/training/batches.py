"""From token rows to batches: which rows make up step N, and how they become tensors.

The order of the rows is a pure function of seed and epoch, so a run that resumes needs no memory of
where its data stood, and one process with batches of 6 sees the same rows as two with batches of 3.

Shapes: B rows of a batch, S tokens, R rows of the data set, T tokens of all rows end to end.
"""

import hashlib
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedConfig

from glmtune.errors import UserError
from glmtune.ops.loss import IGNORED

# Random streams that must never be the same one.
_STREAM_ORDER, _STREAM_SPLIT = 0, 1


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
    def from_dataset(cls, dataset: Dataset) -> "TokenRows":
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

    def digest(self) -> str:
        """A sha256 of the rows, which says whether two runs train on the same data."""
        state = hashlib.sha256()
        for array in (self.ids_T, self.starts_R1, self.prompt_lengths_R):
            state.update(np.ascontiguousarray(array, dtype=np.int64).data)
        return state.hexdigest()

    def check(self, config: PreTrainedConfig, path: str) -> None:
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
        last_R = self.starts_R1[:-1] + np.where(fits_R, self.prompt_lengths_R - 1, 0)
        # An empty row at the very end would start beyond the last id.
        last_R = np.minimum(last_R, len(self.ids_T) - 1)
        ends_well_R = (
            fits_R
            & (self.ids_T[last_R] == config.bos_token_id)
            & (self.ids_T[last_R - 1] == config.gmask_token_id)
        )
        if not ends_well_R.all():
            row = int(ends_well_R.argmin())
            raise UserError(
                f"{path}: row {row + 1} (seq_len {self.prompt_lengths_R[row]} of "
                f"{self.lengths_R[row]} ids) has a prompt that does not end with [gMASK] <sop> "
                f"({config.gmask_token_id} {config.bos_token_id}); {fix}"
            )


def split_rows(num_rows: int, eval_ratio: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Hold out a share of the rows for evaluation: at least one of them, and never all.

    Returns:
        Row numbers to train on and row numbers to evaluate on, each in ascending order.

    Raises:
        UserError: too few rows to hold one out.
    """
    if not eval_ratio:
        return np.arange(num_rows), np.arange(0)
    if num_rows < 2:
        raise UserError(
            f"eval_ratio {eval_ratio}: one row cannot be split; leave eval_ratio out or add rows"
        )
    held_out = min(max(1, round(num_rows * eval_ratio)), num_rows - 1)
    shuffled = np.random.default_rng([seed, _STREAM_SPLIT]).permutation(num_rows)
    return np.sort(shuffled[held_out:]), np.sort(shuffled[:held_out])


@lru_cache(maxsize=2)
def epoch_order(num_rows: int, seed: int, epoch: int) -> np.ndarray:
    """The order of the rows in an epoch, which depends on nothing but these three numbers."""
    order = np.random.default_rng([seed, _STREAM_ORDER, epoch]).permutation(num_rows)
    order.setflags(write=False)
    return order


@dataclass(frozen=True)
class DataPlan:
    """Which rows each step trains on."""

    row_ids: np.ndarray
    """Row numbers to train on."""
    global_batch_size: int
    """Rows of one step, over all processes and accumulated passes."""
    seed: int
    shuffle: bool

    @property
    def steps_per_epoch(self) -> int:
        """The last step of an epoch may have fewer rows; no row is left out."""
        return -(-len(self.row_ids) // self.global_batch_size)

    def global_batch(self, step: int) -> np.ndarray:
        """Row numbers of a step, counted from 0."""
        epoch, place = divmod(step, self.steps_per_epoch)
        chosen = slice(place * self.global_batch_size, (place + 1) * self.global_batch_size)
        if not self.shuffle:
            return self.row_ids[chosen]
        return self.row_ids[epoch_order(len(self.row_ids), self.seed, epoch)[chosen]]


def micro_batches(
    row_ids: np.ndarray, batch_size: int, rank: int, num_processes: int
) -> list[np.ndarray]:
    """One process's share of a step, pass by pass.

    Every process gets the same number of passes, of at most `batch_size` rows and as even as can
    be. Where there are fewer rows than processes a pass may be empty.
    """
    num_passes = -(-len(row_ids) // (batch_size * num_processes))
    return np.array_split(row_ids, num_passes * num_processes)[rank::num_processes]


def collate(rows: TokenRows, row_ids: np.ndarray, pad_token_id: int) -> dict[str, Tensor]:
    """Put rows into one batch, padded at the right.

    Labels are the ids, but `IGNORED` for the first ``seq_len - 1`` of a row and for padding: <sop>
    itself is learned, from [gMASK]. The model shifts them. (The original's rule.)

    Without a row the batch is one row with no label: it adds nothing to a gradient, but lets a
    process take part in a step that has no row left for it.

    Returns:
        `input_ids` and `labels`, int64 ``(B, S)`` on the CPU.
    """
    chosen = row_ids if len(row_ids) else np.zeros(1, dtype=np.int64)
    shape = len(chosen), int(rows.lengths_R[chosen].max())
    input_ids = np.full(shape, pad_token_id, dtype=np.int64)
    labels = np.full(shape, IGNORED, dtype=np.int64)
    for place, row in enumerate(chosen):
        ids = rows[row]
        input_ids[place, : len(ids)] = ids
        if len(row_ids):
            start = rows.prompt_lengths_R[row] - 1
            labels[place, start : len(ids)] = ids[start:]
    return {"input_ids": torch.from_numpy(input_ids), "labels": torch.from_numpy(labels)}
