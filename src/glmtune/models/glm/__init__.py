"""The younger family: ChatGLM2-6B, ChatGLM3-6B, GLM-4, GLM-4-0414, GLM-Edge.

The tokenizer of its folders is imported at its first use, because that imports transformers.
"""

from importlib import import_module
from typing import Any

_MODULES = {"GLMTokenizer": "tokenization"}

__all__ = [*_MODULES]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
