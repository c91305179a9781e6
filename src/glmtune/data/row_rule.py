"""How a model family lays out a row: its special ids, its positions, and what is supervised.

A row is a prompt and the answer to it, with a family's special ids before, between and after::

    before_prompt  prompt text  after_prompt  before_answer  answer text  end
    `---------------- seq_len ids -----------'

Shapes: R rows of a data set, T tokens of some rows end to end, X streams of positions.
"""

from typing import Literal, NamedTuple

import numpy as np

from glmtune.errors import UserError


class Special(NamedTuple):
    """A special id that stands in every row."""

    name: str
    """What data cards call it, such as "eos"."""
    text: str
    """How the id is named in messages."""
    id: int


class RowRule(NamedTuple):
    """A family's row rule as plain numbers: all that data/ and training/ know about its rows."""

    after_prompt: tuple[Special, ...]
    end: tuple[Special, ...]
    pad_id: int
    before_prompt: tuple[Special, ...] = ()
    before_answer: tuple[Special, ...] = ()
    """Ids that the model writes itself before an answer's text: supervised, unlike the prompt's."""
    before_text: tuple[Special, ...] = ()
    """What a text alone begins with, which has no prompt; its tokens never see later ones."""
    after_text: tuple[Special, ...] = ()
    """What such a text ends with; nothing where it ends as an answer does."""
    stops: tuple[int, ...] = ()
    """Ids at which an answer ends as well as at `end`, such as the start of another's turn."""
    prompt_sees_all: bool = False
    """Whether tokens of the prompt see each other in both directions; else a row is causal.

    The last of `after_prompt` then begins the answer: only what follows it sees it, and it is the
    first supervised token."""
    positions: Literal["count", "stay", "stay_late"] = "count"
    """How positions continue after such a prompt. "count": they count on. "stay": they stay at the
    prompt's last place, while a second stream counts 1, 2, 3 ...; "stay_late": the same, but from
    the second token of the answer on."""

    @property
    def special_ids(self) -> dict[str, int]:
        """All special ids of a row, by name."""
        specials = (*self.before_prompt, *self.after_prompt, *self.before_answer, *self.end)
        return {special.name: special.id for special in specials}

    @property
    def end_ids(self) -> list[int]:
        """The special ids after an answer."""
        return [special.id for special in self.end]

    def prompt(
        self, text_ids: list[int], keep: int | None = None, *, cut: Literal["start", "end"] = "end"
    ) -> list[int]:
        """The ids of a prompt, special ids included.

        Args:
            text_ids: ids of its text.
            keep: ids to keep at most, special ids included; None for all.
            cut: "end" or "start": where a text that is too long loses ids.
        """
        before, after = _ids(self.before_prompt), _ids(self.after_prompt)
        room = len(text_ids) if keep is None else max(0, keep - len(before) - len(after))
        kept = text_ids[:room] if cut == "end" else text_ids[max(0, len(text_ids) - room) :]
        return [*before, *kept, *after]

    def answer(self, text_ids: list[int]) -> list[int]:
        """The ids of a whole answer, those before its text and its end included."""
        return [*_ids(self.before_answer), *text_ids, *self.end_ids]

    @property
    def text_prefix(self) -> list[int]:
        """The ids before a text alone."""
        return _ids(self.before_text)

    @property
    def text_start(self) -> int:
        """The place of the first supervised id of a text: nothing predicts a row's first id."""
        return max(1, len(self.before_text))

    @property
    def text_end(self) -> list[int]:
        """The ids after a whole one."""
        return _ids(self.after_text) or self.end_ids

    @property
    def num_prompt_specials(self) -> int:
        """Number of special ids in a prompt."""
        return len(self.before_prompt) + len(self.after_prompt)

    def prefix_lengths(self, prompt_lengths_R: np.ndarray) -> np.ndarray:
        """Tokens at the start of each row that see each other in both directions, ``(R,)``."""
        return prompt_lengths_R - 1 if self.prompt_sees_all else np.zeros_like(prompt_lengths_R)

    def first_supervised(self, prompt_lengths_R: np.ndarray) -> np.ndarray:
        """Place of the first supervised token of each row, ``(R,)``; all after it are, too."""
        return prompt_lengths_R - 1 if self.prompt_sees_all else prompt_lengths_R

    def position_ids(self, place_T: np.ndarray, prefix_T: np.ndarray) -> np.ndarray:
        """The position streams of tokens, ``(X, T)``: two where a second stream counts, else one.

        Args:
            place_T: place of each token in its row.
            prefix_T: prefix length of each token's row.
        """
        if self.positions == "count":
            return place_T[None]
        position_T = np.minimum(place_T, np.maximum(prefix_T - 1, 0))
        if self.positions == "stay_late":
            position_T = np.where(place_T == prefix_T, prefix_T, position_T)
        return np.stack((position_T, np.maximum(place_T - prefix_T + 1, 0)))

    def check(
        self,
        ids_T: np.ndarray,
        starts_R1: np.ndarray,
        prompt_lengths_R: np.ndarray,
        vocab_size: int,
        path: str,
        first_row: int = 0,
    ) -> None:
        """Make sure that every row can be trained on, before the first step rather than at it.

        Args:
            ids_T: ids of all rows, end to end.
            starts_R1: where each row starts, and the end.
            prompt_lengths_R: tokens of each prompt.
            vocab_size: rows of the model's embedding.
            path: what the message calls the data set.
            first_row: the number, in that data set, of the first of these rows.

        Raises:
            UserError: a row holds an id beyond the vocabulary, or its prompt does not end with the
                special ids of `after_prompt` (each exactly once in a family whose prompts are seen
                in both directions); the message names the row (from 1).
        """
        fix = "tokenize the data again with this model's tokenizer"
        outside_T = (ids_T < 0) | (ids_T >= vocab_size)
        if outside_T.any():
            place = int(outside_T.argmax())
            row = int(np.searchsorted(starts_R1, place, side="right")) - 1
            raise UserError(
                f"{path}: row {first_row + row + 1} holds id {ids_T[place]}, but the model's last "
                f"is {vocab_size - 1}; {fix}"
            )
        starts_R, lengths_R = starts_R1[:-1], np.diff(starts_R1)
        specials = _ids(self.after_prompt)
        fits_R = (prompt_lengths_R >= len(specials)) & (prompt_lengths_R <= lengths_R)
        prompts_R = np.where(fits_R, prompt_lengths_R, 0)
        is_right_R = fits_R.copy()
        for before_end, special in enumerate(reversed(specials), start=1):
            # An empty row at the very end would start beyond the last id.
            place_R = (starts_R + np.maximum(prompts_R - before_end, 0)).clip(max=len(ids_T) - 1)
            is_right_R &= ids_T[place_R] == special
            if self.prompt_sees_all:
                count_T1 = np.concatenate(([0], np.cumsum(ids_T == special)))
                is_right_R &= count_T1[starts_R + prompts_R] - count_T1[starts_R] == 1
        if not self.prompt_sees_all:
            is_right_R |= self._are_texts(ids_T, starts_R1, prompt_lengths_R)
        if not is_right_R.all():
            row = int(is_right_R.argmin())
            names = " ".join(special.text for special in self.after_prompt)
            ids = " ".join(map(str, specials))
            raise UserError(
                f"{path}: row {first_row + row + 1} (seq_len {prompt_lengths_R[row]} of "
                f"{lengths_R[row]} ids) has a prompt that does not end with {names} ({ids})"
                f"{', once and nowhere else' if self.prompt_sees_all else ''}; {fix}"
            )

    def _are_texts(
        self, ids_T: np.ndarray, starts_R1: np.ndarray, prompt_lengths_R: np.ndarray
    ) -> np.ndarray:
        """Whether each row is a text alone: nothing but its prefix stands before its labels."""
        lengths_R = np.diff(starts_R1)
        are_texts_R = (prompt_lengths_R == self.text_start) & (lengths_R > self.text_start)
        for place, id_ in enumerate(self.text_prefix):
            are_texts_R &= ids_T[(starts_R1[:-1] + place).clip(max=len(ids_T) - 1)] == id_
        return are_texts_R


def as_ids(named: int | list[int] | None) -> list[int]:
    """What an `eos_token_id` names: one id, several, or none."""
    return named if isinstance(named, list) else [] if named is None else [named]


def _ids(specials: tuple[Special, ...]) -> list[int]:
    return [special.id for special in specials]
