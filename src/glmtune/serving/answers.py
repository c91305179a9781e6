"""One answer of a request: its tokens become text, probabilities and calls of tools."""

from collections.abc import Sequence
from typing import Any

from glmtune.evaluation.conversation import polish, polish_beginning
from glmtune.generation.slots import TokenScore
from glmtune.generation.streaming import TextStream, before_stop
from glmtune.models.family import Family
from glmtune.serving.load import Side
from glmtune.serving.scheduler import STOP, Update, Work


class Choice:
    """An answer while its tokens arrive.

    Args:
        index: among the answers of its request.
        side: who gives it.
        work: that generates it.
        tokenizer: of the model.
        stops: texts before which it ends.
        family: whose chat edits what is shown; None for the continuation of a text.
        tools: that the model may call.
    """

    def __init__(
        self,
        index: int,
        side: Side,
        work: Work,
        tokenizer: Any,
        stops: Sequence[str],
        family: Family | None,
        tools: Sequence[dict[str, Any]],
    ):
        self.index, self.side, self.work, self.family = index, side, work, family
        self.tokenizer = tokenizer
        self.finish: str | None = None
        self.num_tokens = 0
        self.text = ""
        """What has been shown."""
        self.scores: list[tuple[int, TokenScore]] = []
        self._stream = TextStream(tokenizer, stops)
        self._said = ""

    def push(self, update: Update) -> dict[str, Any]:
        """Take new tokens; the piece that they add, with its text under "content"."""
        kept = list(before_stop(update.ids, self.work.stop_ids))
        self._said += self._stream.push(kept)
        if self._stream.stopped:
            self.finish = STOP
        elif update.finish is not None:
            self.finish = update.finish
            self._said += self._stream.end()
        self.num_tokens += len(kept)
        shown = self._shown()
        piece: dict[str, Any] = {"content": shown[len(self.text) :]}
        self.text = shown
        if update.scores:
            piece["scores"] = list(zip(kept, update.scores, strict=False))
            self.scores += piece["scores"]
        return piece

    def _shown(self) -> str:
        if self.family is None:
            return self._said
        edit = polish_beginning if self.finish is None else polish
        return edit(self.family.chat, self._said)
