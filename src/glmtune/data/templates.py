"""The text around a record: pure functions of strings, without a tokenizer."""


def alpaca(instruction: str, input: str = "") -> str:
    """Return the context that ChatGLM-Tuning (2023) puts before the answer.

    The Input line is left out where a record has none; the answer follows "Answer: " directly.
    """
    context = f"Instruction: {instruction}\n"
    if input:
        context += f"Input: {input}\n"
    return context + "Answer: "


def is_alpaca(context: str) -> bool:
    """Tell whether a context reads as if `alpaca` had written it."""
    return context.startswith("Instruction: ") and context.endswith("\nAnswer: ")
