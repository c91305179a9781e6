"""The text around a record: pure functions of strings, without a tokenizer."""

from collections.abc import Iterable

_START, _INPUT, _END = "Instruction: ", "\nInput: ", "\nAnswer: "


def alpaca(instruction: str, input: str = "") -> str:
    """Return the context that ChatGLM-Tuning (2023) puts before the answer.

    The Input line is left out where a record has none; the answer follows "Answer: " directly.
    """
    return f"{_START}{instruction}{_INPUT if input else ''}{input}{_END}"


def rounds(history: Iterable[tuple[str, str]], question: str) -> str:
    """Return a question after earlier rounds of question and answer, numbered from 0.

    Source: the published code's `chat`, and its fine-tuning with a history column.
    """
    pairs = list(history)
    earlier = "".join(f"[Round {i}]\n问：{q}\n答：{a}\n" for i, (q, a) in enumerate(pairs))
    return f"{earlier}[Round {len(pairs)}]\n问：{question}\n答："


def context_of(instruction: str, input: str, history: Iterable[tuple[str, str]] = ()) -> str:
    """Return the context before a record's answer: `alpaca`, or `rounds` where there were earlier.

    With rounds the text is what the model's own chat would read, so the question is not put into
    the `alpaca` template; an input follows the instruction on a line of its own.
    """
    if pairs := list(history):
        return rounds(pairs, f"{instruction}\n{input}" if input else instruction)
    return alpaca(instruction, input)


def has_rounds(context: str) -> bool:
    """Whether a context looks as if `rounds` had written it."""
    return context.startswith("[Round 0]\n问：") and context.endswith("\n答：")


def is_alpaca(context: str) -> bool:
    """Whether a context looks as if `alpaca` had written it."""
    return context.startswith(_START) and context.endswith(_END)


def parts(context: str) -> tuple[str, str]:
    """Return instruction and input of a context that `alpaca` wrote, else all as instruction."""
    if not is_alpaca(context):
        return context, ""
    instruction, _, input = context[len(_START) : -len(_END)].partition(_INPUT)
    return instruction, input
