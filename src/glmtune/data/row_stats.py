"""What token rows hold, in figures: lengths, languages, turns, and what is taught.

Shapes: R rows of a data set, T tokens of all rows end to end.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from tqdm import tqdm

from glmtune.data.characters import LANGUAGES, survey
from glmtune.data.conversations import Example
from glmtune.data.lengths import LengthStats
from glmtune.data.thoughts import CLOSE, OPEN
from glmtune.data.token_rows import TokenRows


@dataclass(frozen=True)
class RowStats:
    """Figures of a data set's rows; counts are of rows where nothing else is said."""

    num_rows: int
    num_tokens: int
    num_supervised: int
    """Supervised tokens."""
    lengths: LengthStats
    languages: Mapping[str, int]
    """Rows by the language of what is supervised: that of most letters, where a Chinese character
    counts as two."""
    answers: Mapping[int, int]
    """Rows by their number of stretches of supervised tokens."""
    num_ends: int
    """Rows that teach the end of an answer."""
    num_thoughts: int
    """Rows that teach a thought."""
    turns: Mapping[int, int] | None
    """Conversations by their turns, each of which may be several rows; None where only token rows
    are known."""
    num_tools: int | None
    """Conversations with tools or calls; None as for `turns`."""

    @classmethod
    def of(
        cls,
        rows: TokenRows,
        decode: Callable[[list[int]], str],
        examples: Sequence[Example] | None = None,
    ) -> "RowStats":
        """Count the rows of a data set, at least one.

        Args:
            rows: all of them.
            decode: ids to their text.
            examples: the conversations that they were made of, where those are known.
        """
        languages, num_thoughts = Counter(dict.fromkeys(LANGUAGES, 0)), 0
        for row in tqdm(range(len(rows)), desc="inspect", unit="row", delay=1):
            one = rows.take(np.array([row]))
            text = decode(np.asarray(one.ids_T)[one.is_supervised_T].tolist())
            num_thoughts += CLOSE in text
            languages[_language_of(text.replace(OPEN, "").replace(CLOSE, ""))] += 1
        return cls(
            num_rows=len(rows),
            num_tokens=len(rows.ids_T),
            num_supervised=int(rows.num_labels_R.sum()),
            lengths=LengthStats.of(rows.lengths_R),
            languages=dict(languages),
            answers=_sorted(rows.num_answers_R.tolist()),
            num_ends=int(rows.teaches_end_R.sum()),
            num_thoughts=num_thoughts,
            turns=None if examples is None else _sorted([len(ex.turns) for ex in examples]),
            num_tools=None if examples is None else sum(map(_has_tools, examples)),
        )

    @property
    def share(self) -> float:
        """The supervised share of all tokens."""
        return self.num_supervised / self.num_tokens

    def as_json(self) -> dict[str, object]:
        """The same as plain data."""
        return asdict(self) | {"supervised_share": self.share}

    def lines(self) -> list[str]:
        """The same as lines of a summary."""
        languages = ", ".join(f"{num:,} {name}" for name, num in self.languages.items())
        lines = [
            f"rows        {self.num_rows:,}; {self.num_ends:,} teach the end of an answer, "
            f"{self.num_thoughts:,} a thought",
            f"row length  {self.lengths} tokens",
            f"tokens      {self.num_tokens:,}, {self.share:.1%} of them supervised",
            f"languages   {languages}, by what is supervised",
            f"answers     {count_words(self.answers)}",
        ]
        if self.turns is not None:
            lines.append(f"turns       {count_words(self.turns)} of the file")
        if self.num_tools is not None:
            lines.append(f"tools       in {self.num_tools:,} rows of the file")
        return lines


WORDS_EN = ("{} in {:,} rows", "more in {:,}", ", ")
WORDS_ZH = ("{} 的 {:,} 条", "更多的 {:,} 条", "，")
_MOST_SHOWN = 8


def count_words(rows_of: Mapping[int, int], words: tuple[str, str, str] = WORDS_EN) -> str:
    """Numbers with the rows that have them, the smallest first: "1 in 20 rows, 2 in 3 rows"."""
    each, rest, comma = words
    counts = list(rows_of.items())
    parts = [each.format(number, num) for number, num in counts[:_MOST_SHOWN]]
    if more := sum(num for _, num in counts[_MOST_SHOWN:]):
        parts.append(rest.format(more))
    return comma.join(parts)


def _sorted(numbers: Sequence[int]) -> dict[int, int]:
    return dict(sorted(Counter(numbers).items()))


def _language_of(text: str) -> str:
    chinese, latin, other = survey(text.encode("utf-8", "replace")).letters.tolist()
    weights = dict(zip(LANGUAGES, (2 * chinese, latin, other), strict=True))
    most = max(weights.values())
    return LANGUAGES[-1] if not most else max(weights, key=weights.__getitem__)


def _has_tools(example: Example) -> bool:
    return bool(example.tools) or any(turn.metadata for turn in example.turns)
