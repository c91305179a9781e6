"""Rows as the passes of training get them: padded to a batch, and laid end to end in a pack."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from glmtune.data.packing import lay_out
from glmtune.data.token_rows import IGNORED, TokenRows
from glmtune.training.batches import collate

_LOST = "\ufffd"
"""What a decoder has for a part of a character."""
_MOST_TOKENS_OF_A_CHARACTER = 8


class ShownToken(NamedTuple):
    """A token of a row."""

    place: int
    id: int
    positions: tuple[int, ...]
    """Its place in each stream of positions."""
    is_supervised: bool
    """Whether it is to be predicted, from the tokens before it."""
    is_in_prefix: bool
    """Whether it is one of those that see each other in both directions."""
    is_special: bool
    text: str
    """Where several tokens make one character, the first has it, and the others have none."""


class ShownRow(NamedTuple):
    """A row, in a batch and a pack of the rows that are shown beside it."""

    where: str
    """The words for its place in its file."""
    fate: str | None
    """Why it is left out; the rest is then empty."""
    tokens: Sequence[ShownToken] = ()
    answer_at: int = 0
    """Where the last answer starts."""
    prefix: int = 0
    """Tokens at the start that see each other in both directions."""
    padding: int = 0
    """Ids that fill it up to the longest row of the batch."""
    start: int = 0
    """Its first place in the pack."""

    @property
    def num_supervised(self) -> int:
        """Supervised tokens."""
        return sum(token.is_supervised for token in self.tokens)


def view_rows(
    placed: Sequence[tuple[str, str | None]], rows: TokenRows | None, tokenizer: Any
) -> list[ShownRow]:
    """The first rows of a data set as training computes on them.

    Args:
        placed: for each row to show, the words for its place, and why it is left out, if it is.
        rows: the others, in their order; may be more. None where all are left out.
        tokenizer: their own.
    """
    num_kept = sum(fate is None for _, fate in placed)
    kept: Iterator[ShownRow] = iter(())
    if rows is not None and num_kept:
        kept = _view(rows, np.arange(num_kept), tokenizer)
    return [
        ShownRow(where, fate) if fate else next(kept)._replace(where=where)
        for where, fate in placed
    ]


def _view(rows: TokenRows, numbers: np.ndarray, tokenizer: Any) -> Iterator[ShownRow]:
    batch = {name: tensor.numpy() for name, tensor in collate(rows, numbers).items()}
    pack = lay_out(rows, numbers, int(rows.lengths_R[numbers].sum()))
    taught_T = np.zeros(pack.num_tokens, dtype=bool)
    taught_T[pack.supervised_at_L + 1] = True
    rule, start = rows.rule, 0
    listed = (*rule.before_prompt, *rule.after_prompt, *rule.end, *rule.after_text)
    names = {special.id: special.text for special in listed}
    names |= {ids[0]: n for n, ids in tokenizer.special_names.items() if len(ids) == 1}
    for place, row in enumerate(numbers):
        length = int(rows.lengths_R[row])
        at = slice(start, start + length)
        ids, is_label = batch["input_ids"][place], batch["labels"][place] != IGNORED
        # Both ways of computing a step teach the same tokens of the same ids.
        assert (pack.input_ids_T[at] == ids[:length]).all()
        assert (taught_T[at] == is_label[:length]).all()
        prefix_end = int(pack.prefix_end_T[start]) - start
        texts = _texts_of([int(i) for i in ids[:length]], names, tokenizer.decode)
        yield ShownRow(
            where="",
            fate=None,
            tokens=[
                ShownToken(
                    place=i,
                    id=int(ids[i]),
                    positions=tuple(pack.position_ids_XT[:, start + i].tolist()),
                    is_supervised=bool(is_label[i]),
                    is_in_prefix=i < prefix_end,
                    is_special=int(ids[i]) in names,
                    text=texts[i],
                )
                for i in range(length)
            ],
            answer_at=int(rows.prompt_lengths_R[row]),
            prefix=prefix_end,
            padding=len(ids) - length,
            start=start,
        )
        start += length


def _texts_of(
    ids: Sequence[int], names: Mapping[int, str], decode: Callable[[list[int]], str]
) -> list[str]:
    """The text of each id; see `ShownToken.text`."""
    texts = [names[id_] if id_ in names else decode([id_]) for id_ in ids]
    for place, text in enumerate(texts):
        if not text.endswith(_LOST):
            continue
        for end in range(place + 2, min(place + _MOST_TOKENS_OF_A_CHARACTER, len(ids)) + 1):
            whole = decode(list(ids[place:end]))
            if not any(id_ in names for id_ in ids[place:end]) and _LOST not in whole:
                texts[place:end] = [whole] + [""] * (end - place - 1)
                break
    return texts
