"""Arrays end to end that stay where they are, as the parts of a file mapped into memory."""

from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

import numpy as np

_NOTHING = [np.zeros(0, np.int32)]


class Joined:
    """One array of numbers in several parts, of which slices are read as of an array.

    The columns of a data set on disk are such: nothing of them is copied until it is asked for, and
    the processes of a machine share what the system has read.
    """

    def __init__(self, parts: Sequence[np.ndarray]):
        self.parts = [part for part in parts if len(part)]
        self._starts = np.cumsum([0, *map(len, self.parts)]).tolist()

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, span: slice) -> np.ndarray:
        """The numbers from `span.start` up to `span.stop`; a copy where they lie in two parts."""
        start, stop, _ = span.indices(len(self))
        first = bisect_right(self._starts, start) - 1
        found = []
        while start < stop:
            before, after = self._starts[first : first + 2]
            found.append(self.parts[first][start - before : stop - before])
            start, first = after, first + 1
        return found[0] if len(found) == 1 else np.concatenate(found or _NOTHING)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """All of it in one array."""
        return np.concatenate(self.parts or _NOTHING, dtype=dtype)


def joined(numbers: Sequence["Numbers"]) -> Joined:
    """Numbers end to end."""
    parts = [one.parts if isinstance(one, Joined) else [one] for one in numbers]
    return Joined([part for of_one in parts for part in of_one])


Numbers = np.ndarray | Joined
"""Numbers of which `numbers[start:stop]` is an array."""
