"""One answer of a request: its tokens become text, probabilities and calls of tools."""

import secrets
from collections.abc import Sequence
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

from glmtune.evaluation.conversation import polish, polish_beginning
from glmtune.generation.slots import TokenScore
from glmtune.generation.streaming import TextStream, before_stop
from glmtune.models.family import Family
from glmtune.serving.load import Side
from glmtune.serving.scheduler import STOP, Update, Work

TOOL_CALLS = "tool_calls"


class Piece(NamedTuple):
    """What has been added to an answer."""

    text: str
    scores: list[tuple[int, TokenScore]]
    """Tokens with their scores, where the request asks for them."""
    calls: list[dict[str, Any]]
    """Calls of tools, which come at the end."""


class TokenTexts:
    """The text of single tokens, as they add to a text before them.

    Args:
        tokenizer: of the model.
    """

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self.of = lru_cache(maxsize=4096)(self._of)

    @cached_property
    def _before(self) -> int:
        return self._tokenizer.encode_batch(["a"])[0][-1]

    def _of(self, id_: int) -> str:
        before = len(self._tokenizer.decode([self._before]))
        return self._tokenizer.decode([self._before, id_])[before:]


class Choice:
    """An answer while its tokens arrive.

    Args:
        index: among the answers of its request.
        side: who gives it.
        work: that generates it.
        tokenizer: of the model.
        stops: texts before which it ends.
        family: whose chat edits what is shown; None for the continuation of a text.
        tools: names of those that the model may call.
        echo: a text that the answer begins with.
    """

    def __init__(
        self,
        index: int,
        side: Side,
        work: Work,
        tokenizer: Any,
        stops: Sequence[str],
        family: Family | None,
        tools: Sequence[str] = (),
        echo: str = "",
    ):
        self.index, self.side, self.work, self.family = index, side, work, family
        self.tools = tools
        self.finish: str | None = None
        self.num_tokens = 0
        self.text = ""
        """What has been shown."""
        self.scores: list[tuple[int, TokenScore]] = []
        self.calls: list[dict[str, Any]] = []
        self.offset = len(echo)
        """Where the next token with scores begins in the text."""
        self._stream = TextStream(tokenizer, stops)
        self._said, self._echo = "", echo
        self._waiting: list[tuple[int, TokenScore]] = []

    def push(self, update: Update) -> Piece:
        """Take new tokens, and return what they add."""
        kept = list(before_stop(update.ids, self.work.stop_ids))
        self._said += self._stream.push(kept)
        if self._stream.stopped:
            self.finish = STOP
        elif update.finish is not None:
            self.finish = update.finish
            self._said += self._stream.end()
        self.num_tokens += len(kept)
        self._waiting += zip(kept, update.scores, strict=False)
        shown = self._echo + self._shown()
        if self.finish is not None and self.tools and self.family is not None:
            if found := self.family.chat.read_calls(self._said, self.tools):
                self.calls = [_call(*each) for each in found]
                self.finish, shown = TOOL_CALLS, self.text
        elif self.tools and self._may_call():
            shown = self.text
        text, self.text = shown[len(self.text) :], shown
        scores: list[tuple[int, TokenScore]] = []
        if text or self.finish is not None:
            scores, self._waiting = self._waiting, []
            self.scores += scores
        return Piece(text, scores, self.calls)

    def _may_call(self) -> bool:
        """Whether the answer so far may turn out to call a tool: it begins with a tool's name."""
        first, newline, _ = self._said.lstrip().partition("\n")
        if newline:
            return first.strip() in self.tools
        return any(name.startswith(first) for name in self.tools)

    def _shown(self) -> str:
        if self.family is None:
            return self._said
        edit = polish_beginning if self.finish is None else polish
        return edit(self.family.chat, self._said)


def _call(name: str, arguments: str) -> dict[str, Any]:
    return {
        "id": f"call_{secrets.token_hex(12)}",
        "type": "function",
        "function": {"name": name, "arguments": arguments},
    }
