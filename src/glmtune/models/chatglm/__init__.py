"""ChatGLM-6B as a native transformers model: configuration, model and tokenizer.

Each is imported at its first use, because that imports torch.
"""

from importlib import import_module
from typing import Any

_MODULES = {
    "ChatGLMConfig": "configuration",
    "ChatGLMForConditionalGeneration": "modeling",
    "ChatGLMModel": "modeling",
    "ChatGLMTokenizer": "tokenization",
}

__all__ = [*_MODULES]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
