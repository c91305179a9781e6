"""The text around a record: pure functions of strings, without a tokenizer."""

_START, _INPUT, _END = "Instruction: ", "\nInput: ", "\nAnswer: "


def alpaca(instruction: str, input: str = "") -> str:
    """Return the context that ChatGLM-Tuning (2023) puts before the answer.

    The Input line is left out where a record has none; the answer follows "Answer: " directly.
    """
    return f"{_START}{instruction}{_INPUT if input else ''}{input}{_END}"


def is_alpaca(context: str) -> bool:
    """Tell whether a context reads as if `alpaca` had written it."""
    return context.startswith(_START) and context.endswith(_END)


def parts(context: str) -> tuple[str, str]:
    """Return instruction and input of a context that `alpaca` wrote; any other as instruction."""
    if not is_alpaca(context):
        return context, ""
    instruction, _, input = context[len(_START) : -len(_END)].partition(_INPUT)
    return instruction, input
