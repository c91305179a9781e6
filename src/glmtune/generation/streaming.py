"""Streamed text: never half a character, and never text that later tokens would change.

A character may be made of several byte pieces, and in some vocabularies a newline or a run of
blanks is written as a name that may itself be split into pieces. What could still change is held
back.
"""

import re
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from glmtune.errors import UserError

# A UTF-8 character has at most four bytes, so at most three are incomplete. Each of them decodes to
# the replacement character.
_HALF_CHARACTER = "\ufffd{1,3}$"
_UNSETTLED, _MOST_UNSETTLED = 5, 20


class TextStream:
    """The text of one answer as its tokens arrive; the pieces add up to the answer's text.

    Args:
        tokenizer: any with `decode`; its `unfinished`, if it has one, is a pattern for an end of
            text that further tokens may change.
        stop_strings: the text ends before the first of them.
    """

    def __init__(self, tokenizer: Any, stop_strings: Sequence[str] = ()):
        self.tokenizer = tokenizer
        self.stop_strings = stop_strings
        self.stopped = False
        self._ids: list[int] = []  # the last ids: what is before them changes their text no more
        self._settled = ""
        self._length_before = 0  # characters of the text of these ids that are settled
        self._shown = 0
        patterns = _HALF_CHARACTER, getattr(tokenizer, "unfinished", None)
        self._unfinished = re.compile("|".join(filter(None, patterns)))

    def push(self, ids: Iterable[int]) -> str:
        """Add tokens, and return the text that has become final."""
        self._ids += ids
        text = self._text()
        cut = cut_at_stop(text, self.stop_strings)
        if cut is not None:
            self.stopped = True
            return self._show(cut.rstrip())
        if unfinished := self._unfinished.search(text):
            text = text[: unfinished.start()]
        return self._show(without_beginning(text, self.stop_strings).rstrip())

    def end(self) -> str:
        """The rest of the text after the last token, without an incomplete character at its end."""
        if self.stopped:
            return ""
        return self._show(re.sub(_HALF_CHARACTER, "", self._text()).rstrip())

    def _text(self) -> str:
        """The text of all ids, of which only the last are decoded again."""
        whole = self.tokenizer.decode(self._ids, skip_special_tokens=True)
        text = self._settled + whole[self._length_before :]
        if len(self._ids) > _MOST_UNSETTLED:
            self._settle(text)
        return text.lstrip()

    def _settle(self, text: str) -> None:
        """Settle the text of all ids but the last few, if these then add the same text as now.

        Some of the settled ids stay, since the text of an id depends on those before it.
        """
        place = len(self._ids) - _UNSETTLED
        earlier = self.tokenizer.decode(self._ids[:place], skip_special_tokens=True)
        settled = self._settled + earlier[self._length_before :]
        if self._unfinished.search(settled) or not text.startswith(settled):
            return
        kept = self._ids[place - _UNSETTLED :]
        before = self.tokenizer.decode(kept[:_UNSETTLED], skip_special_tokens=True)
        whole = self.tokenizer.decode(kept, skip_special_tokens=True)
        if whole.startswith(before) and settled + whole[len(before) :] == text:
            self._ids, self._settled, self._length_before = kept, settled, len(before)

    def _show(self, text: str) -> str:
        new = text[self._shown :]
        self._shown = max(self._shown, len(text))
        return new


def before_stop(ids: Sequence[int], stop_ids: Collection[int]) -> Sequence[int]:
    """The ids before the first stop id; all of them if there is none."""
    return ids[: next((i for i, token in enumerate(ids) if token in stop_ids), None)]


def cut_at_stop(text: str, stop_strings: Sequence[str]) -> str | None:
    """The text before its first stop string; None if there is none."""
    found = [place for stop in stop_strings if (place := text.find(stop)) >= 0]
    return text[: min(found)] if found else None


def without_beginning(text: str, stop_strings: Sequence[str]) -> str:
    """The text without the beginning of a stop string at its end."""
    longest = 0
    for stop in stop_strings:
        lengths = range(len(stop) - 1, 0, -1)
        longest = max(longest, next((n for n in lengths if text.endswith(stop[:n])), 0))
    return text[: len(text) - longest]


def check_stop_strings(stop_strings: Sequence[str], tokenizer: Any) -> None:
    """Check that the model can generate each stop string.

    Raises:
        UserError: a stop string is empty, or the tokenizer does not reproduce it.
    """
    for stop in stop_strings:
        if not stop:
            raise UserError("stop string '': an empty one would end every answer; leave it out")
        (ids,) = tokenizer.encode_batch([f"a{stop}a"])  # blanks at the very ends may be dropped
        written = tokenizer.decode(ids)
        if stop not in written:
            raise UserError(
                f"stop string {stop!r} cannot occur: the model's vocabulary turns it into "
                f"{written[1:-1]!r}; stop at that, or leave it out"
            )
