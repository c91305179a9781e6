"""Answers as OpenAI's objects: whole ones, and the parts of a stream."""

from collections.abc import Sequence
from typing import Any

from glmtune.generation.slots import TokenScore
from glmtune.serving.answers import Choice, Piece, TokenTexts

_LOWEST = -9999.0
"""What stands for the logarithm of a probability of 0."""


class ChatForm:
    """The objects of answers to a conversation."""

    prefix, whole, part = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, texts: TokenTexts):
        self.texts = texts

    def first(self, choice: Choice) -> dict[str, Any] | None:
        """What a stream says of an answer before its first token."""
        return self._delta(choice, {"role": "assistant", "content": ""}, None)

    def piece(self, choice: Choice, piece: Piece) -> dict[str, Any] | None:
        """What a stream says of new tokens."""
        delta: dict[str, Any] = {"content": piece.text} if piece.text else {}
        if piece.calls:
            delta["tool_calls"] = [
                {"index": place, **call} for place, call in enumerate(piece.calls)
            ]
        if not delta and choice.finish is None:
            return None
        return self._delta(choice, delta, self._logprobs(choice, piece.scores))

    def choice(self, choice: Choice) -> dict[str, Any]:
        """A whole answer."""
        message: dict[str, Any] = {"role": "assistant", "content": choice.text, "refusal": None}
        if choice.calls:
            message |= {"content": choice.text or None, "tool_calls": choice.calls}
        return {
            "index": choice.index,
            "message": message,
            "logprobs": self._logprobs(choice, choice.scores),
            "finish_reason": choice.finish,
        }

    @staticmethod
    def _delta(choice: Choice, delta: dict[str, Any], logprobs: Any) -> dict[str, Any]:
        return {
            "index": choice.index,
            "delta": delta,
            "logprobs": logprobs,
            "finish_reason": choice.finish,
        }

    def _logprobs(
        self, choice: Choice, scores: Sequence[tuple[int, TokenScore]]
    ) -> dict[str, Any] | None:
        if choice.work.settings.num_listed is None:
            return None
        content = [
            {
                **self._token(id_, score.chosen),
                "top_logprobs": [self._token(*each) for each in score.listed],
            }
            for id_, score in scores
        ]
        return {"content": content, "refusal": None}

    def _token(self, id_: int, logprob: float) -> dict[str, Any]:
        text = self.texts.of(id_)
        is_whole = "\ufffd" not in text
        return {
            "token": text,
            "logprob": max(logprob, _LOWEST),
            "bytes": list(text.encode()) if is_whole else None,
        }


class CompletionForm:
    """The objects of continuations."""

    prefix, whole, part = "cmpl", "text_completion", "text_completion"

    def __init__(self, texts: TokenTexts):
        self.texts = texts

    def first(self, choice: Choice) -> dict[str, Any] | None:
        """What a stream says of an answer before its first token."""
        return None

    def piece(self, choice: Choice, piece: Piece) -> dict[str, Any] | None:
        """What a stream says of new tokens."""
        if not piece.text and choice.finish is None:
            return None
        return self._choice(choice, piece.text, piece.scores)

    def choice(self, choice: Choice) -> dict[str, Any]:
        """A whole answer."""
        return self._choice(choice, choice.text, choice.scores)

    def _choice(
        self, choice: Choice, text: str, scores: Sequence[tuple[int, TokenScore]]
    ) -> dict[str, Any]:
        return {
            "index": choice.index,
            "text": text,
            "logprobs": self._logprobs(choice, scores),
            "finish_reason": choice.finish,
        }

    def _logprobs(
        self, choice: Choice, scores: Sequence[tuple[int, TokenScore]]
    ) -> dict[str, Any] | None:
        if choice.work.settings.num_listed is None:
            return None
        tokens = [self.texts.of(id_) for id_, _ in scores]
        offsets = []
        for token in tokens:
            offsets.append(choice.offset)
            choice.offset += len(token)
        listed = [
            {self.texts.of(id_): max(score, _LOWEST) for id_, score in of_token.listed}
            for _, of_token in scores
        ]
        return {
            "tokens": tokens,
            "token_logprobs": [max(of_token.chosen, _LOWEST) for _, of_token in scores],
            "top_logprobs": listed if choice.work.settings.num_listed else None,
            "text_offset": offsets,
        }


Form = ChatForm | CompletionForm
