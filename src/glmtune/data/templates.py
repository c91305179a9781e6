"""The text around a record: pure functions of strings, without a tokenizer."""

from collections.abc import Iterable, Sequence
from typing import Any

_START, _INPUT, _END = "Instruction: ", "\nInput: ", "\nAnswer: "


class Context(str):
    """A context that knows what it was made of.

    Read off its text alone, a question that spells ``[Round 0]`` would be taken for a round, and
    one that spells ``Input:`` for two fields; that is left to contexts that come from a file.
    """

    history: tuple[tuple[str, str], ...]
    """Earlier rounds of question and answer."""
    question: str
    """The question without the words of a template."""
    is_alpaca: bool
    """Whether those words are `alpaca`'s."""

    __slots__ = ("history", "is_alpaca", "question")

    def __new__(
        cls,
        text: str,
        question: str,
        history: Iterable[tuple[str, str]] = (),
        *,
        is_alpaca: bool = False,
    ) -> "Context":
        """See the class; `text` is the whole context."""
        made = super().__new__(cls, text)
        made.history, made.question, made.is_alpaca = tuple(history), question, is_alpaca
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        """How another process gets it: all that it knows, not its text alone."""
        return _made_again, (str(self), self.question, self.history, self.is_alpaca)


def _made_again(
    text: str, question: str, history: tuple[tuple[str, str], ...], is_alpaca: bool
) -> Context:
    return Context(text, question, history, is_alpaca=is_alpaca)


def alpaca(instruction: str, input: str = "") -> Context:
    """Return the context that ChatGLM-Tuning (2023) puts before the answer.

    The Input line is left out where a record has none; the answer follows "Answer: " directly.
    """
    text = f"{_START}{instruction}{_INPUT if input else ''}{input}{_END}"
    return Context(text, question_of(instruction, input), is_alpaca=True)


def rounds(history: Iterable[tuple[str, str]], question: str) -> Context:
    """Return a question after earlier rounds of question and answer, numbered from 0.

    Source: the published code's `chat`, and its fine-tuning with a history column.
    """
    pairs = list(history)
    earlier = "".join(f"[Round {i}]\n问：{q}\n答：{a}\n" for i, (q, a) in enumerate(pairs))
    return Context(f"{earlier}[Round {len(pairs)}]\n问：{question}\n答：", question, pairs)


def context_of(instruction: str, input: str, history: Iterable[tuple[str, str]] = ()) -> Context:
    """Return the context before a record's answer: `alpaca`, or `rounds` where there were earlier.

    With rounds the text is what the model's own chat would read, so the question is not put into
    the `alpaca` template; an input follows the instruction on a line of its own.
    """
    if pairs := list(history):
        return rounds(pairs, question_of(instruction, input))
    return alpaca(instruction, input)


def question_of(instruction: str, input: str) -> str:
    """Return a record's question outside of `alpaca`: its input on a line of its own."""
    return f"{instruction}\n{input}" if input else instruction


def after_rounds(history: Sequence[tuple[str, str]], question: str) -> Context:
    """Return a question as a chat has it: after earlier rounds, a first one as it stands."""
    return rounds(history, question) if history else Context(question, question)


def conversation_of(context: str) -> tuple[list[tuple[str, str]], str]:
    """Return the earlier rounds and the question that a context was made of.

    The inverse of `context_of`, for models whose rows are conversations: `alpaca`'s words around a
    record are dropped, and its input follows the instruction on a line of its own.
    """
    if isinstance(context, Context):
        return list(context.history), context.question
    if has_rounds(context) and (read := _read_rounds(context)):
        return read
    instruction, input = parts(context)
    return [], question_of(instruction, input)


def _read_rounds(context: str) -> tuple[list[tuple[str, str]], str] | None:
    """Undo `rounds`; None where the numbers of the rounds do not count up from 0."""
    rest = context
    pairs: list[tuple[str, str]] = []
    while True:
        begin, following = f"[Round {len(pairs)}]\n问：", f"\n[Round {len(pairs) + 1}]\n问："
        if not rest.startswith(begin):
            return None
        this, separator, after = rest[len(begin) :].partition(following)
        if not separator:
            return pairs, this.removesuffix("\n答：")
        question, separator, answer = this.partition("\n答：")
        if not separator:
            return None
        pairs.append((question, answer))
        rest = following[1:] + after


def has_rounds(context: str) -> bool:
    """Whether `rounds` wrote a context, or one from a file looks as if it had."""
    if isinstance(context, Context):
        return bool(context.history)
    return context.startswith("[Round 0]\n问：") and context.endswith("\n答：")


def is_alpaca(context: str) -> bool:
    """Whether `alpaca` wrote a context, or one from a file looks as if it had."""
    if isinstance(context, Context):
        return context.is_alpaca
    return context.startswith(_START) and context.endswith(_END)


def parts(context: str) -> tuple[str, str]:
    """Return instruction and input of a context that `alpaca` wrote, else all as instruction."""
    if not is_alpaca(context):
        return context, ""
    instruction, _, input = context[len(_START) : -len(_END)].partition(_INPUT)
    return instruction, input
