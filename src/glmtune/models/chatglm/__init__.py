"""ChatGLM-6B as a native transformers model: configuration, model and tokenizer.

They are imported, and with them torch, when they are first asked for.
"""

from importlib import import_module
from typing import Any

_HOMES = {
    "ChatGLMConfig": "configuration",
    "ChatGLMForConditionalGeneration": "modeling",
    "ChatGLMModel": "modeling",
    "ChatGLMTokenizer": "tokenization",
}

__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
