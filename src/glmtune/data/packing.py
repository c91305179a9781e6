"""Rows of unequal lengths laid end to end in packs of one fixed length, without mixing them.

A pack is what one pass computes on. Which rows share a pack changes nothing but speed: each token
keeps the positions that it has in its row alone, and `start_T` and `prefix_end_T` say which
tokens it sees (`ops.attention.dense_mask`).

Shapes: R rows of a data set, D rows of a pack (its documents), T tokens of a pack, L supervised
tokens, X streams of positions.
"""

from bisect import bisect_right
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from glmtune.data.token_rows import TokenRows
from glmtune.errors import UserError

# How many of the next rows are searched for one that fills the rest of a pack.
_LOOK_AHEAD = 512
PACK_MULTIPLE = 64
"""The length of a pack is a multiple of it."""


@dataclass(frozen=True)
class Pack:
    """Rows end to end, and after them filler that no row sees and that is not supervised."""

    input_ids_T: np.ndarray
    position_ids_XT: np.ndarray
    """The streams of positions, which start again with each row."""
    start_T: np.ndarray
    """Place in the pack of the first token of each token's row; the filler is one more row."""
    prefix_end_T: np.ndarray
    """Place of the first token of that row that its prefix does not see."""
    end_T: np.ndarray
    """Place after the last token of that row."""
    supervised_at_L: np.ndarray
    """Places whose next token is supervised, ascending."""
    targets_L: np.ndarray
    """The supervised tokens that follow those places."""
    num_tokens: int
    """Number of tokens that are not filler."""


def plan_packs(lengths_R: np.ndarray, order: np.ndarray, pack_length: int) -> list[np.ndarray]:
    """Share rows out to packs, each row to exactly one.

    Rows are taken in the order given until the next does not fit. What is left of the pack is then
    filled with the longest rows that fit among the next few hundred, so that packs are full (more
    than 99 % on alpaca data) while the order stays nearly as random as given; only the last pack
    may be emptier.

    Args:
        lengths_R: tokens of every row of the data set.
        order: row numbers to pack; any subset, in any order.
        pack_length: T.

    Returns:
        Row numbers of each pack, in the order in which they lie in it.
    """
    lengths = lengths_R[order].tolist()
    assert not lengths or (min(lengths) > 0 and max(lengths) <= pack_length)
    is_taken = bytearray(len(lengths))
    packs: list[np.ndarray] = []
    first = 0  # every row before it is taken
    while first < len(lengths):
        chosen: list[int] = []
        room = pack_length
        while first < len(lengths) and (is_taken[first] or lengths[first] <= room):
            if not is_taken[first]:
                chosen.append(first)
                room -= lengths[first]
            first += 1
        ahead = range(first, min(first + _LOOK_AHEAD, len(lengths)))
        by_length = sorted((lengths[place], place) for place in ahead if not is_taken[place])
        while fits := bisect_right(by_length, (room, len(lengths))):
            length, place = by_length.pop(fits - 1)
            chosen.append(place)
            is_taken[place] = True
            room -= length
        packs.append(order[chosen])
    return packs


def full_length(lengths_R: np.ndarray) -> int:
    """The shortest pack that holds the longest of some rows."""
    return PACK_MULTIPLE * -(-int(lengths_R.max()) // PACK_MULTIPLE)


class HasLengths(Protocol):
    """Rows of which no more than the lengths may be known."""

    @property
    def lengths_R(self) -> np.ndarray:
        """Tokens of each row."""


def check_lengths(rows: HasLengths, row_ids: np.ndarray, pack_length: int, path: str) -> None:
    """Make sure that rows fit into a pack, before the first step.

    Args:
        rows: all rows.
        row_ids: numbers of the rows of one data set, which are consecutive.
        pack_length: tokens of a pack.
        path: what the message calls the data set.

    Raises:
        UserError: a row is too long; the message gives its number in the data set (from 1).
    """
    too_long = row_ids[rows.lengths_R[row_ids] > pack_length]
    if len(too_long):
        number, length = int(too_long[0] - row_ids[0]) + 1, int(rows.lengths_R[too_long[0]])
        enough = full_length(rows.lengths_R[row_ids])
        raise UserError(
            f"{path}: row {number} has {length:,} tokens; {len(too_long):,} row(s) "
            f"do not fit into tokens_per_step {pack_length:,}; raise it to "
            f"{enough} or more, or tokenize with a smaller "
            "max_seq_length"
        )


def lay_out(rows: TokenRows, row_ids: np.ndarray, pack_length: int) -> Pack:
    """Lay rows end to end.

    Args:
        rows: the data set; its rows have passed `TokenRows.check`.
        row_ids: at most as many rows as fit; none gives a pack of filler.
        pack_length: T.
    """
    taken = rows.take(row_ids)
    num_tokens = len(taken.ids_T)
    assert num_tokens <= pack_length
    lengths_D = np.append(taken.lengths_R, pack_length - num_tokens)
    starts_D = np.cumsum(lengths_D) - lengths_D
    start_T, length_T = np.repeat(starts_D, lengths_D), np.repeat(lengths_D, lengths_D)
    prefix_T = np.repeat(np.append(taken.prefix_lengths_R, 0), lengths_D)
    position_ids_XT = rows.rule.position_ids(np.arange(pack_length) - start_T, prefix_T)

    input_ids_T = np.full(pack_length, rows.rule.pad_id, dtype=np.int64)
    input_ids_T[:num_tokens] = taken.ids_T
    labels_at_L = np.flatnonzero(taken.is_supervised_T)
    return Pack(
        input_ids_T=input_ids_T,
        position_ids_XT=position_ids_XT,
        start_T=start_T.astype(np.int32),
        prefix_end_T=(start_T + prefix_T).astype(np.int32),
        end_T=(start_T + length_T).astype(np.int32),
        supervised_at_L=labels_at_L - 1,
        targets_L=input_ids_T[labels_at_L],
        num_tokens=num_tokens,
    )
