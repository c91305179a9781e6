"""LoRA adapters: attach, load, save, convert and merge, in today's PEFT format or those of 2023.

And P-Tuning v2 prefixes, which are read.

Each function is imported, and with it torch and PEFT, when it is first asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from glmtune.adapters.convert import convert_adapter
    from glmtune.adapters.find import find_adapter
    from glmtune.adapters.formats import read_adapter
    from glmtune.adapters.lora import (
        attach_lora,
        continue_adapter,
        load_adapter,
        restore_adapter,
        save_adapter,
    )
    from glmtune.adapters.merge import merge_adapter
    from glmtune.adapters.prefix import load_prefix, read_prefix
    from glmtune.adapters.verify import verify_saved

_HOMES = {
    "attach_lora": "lora",
    "continue_adapter": "lora",
    "convert_adapter": "convert",
    "find_adapter": "find",
    "load_adapter": "lora",
    "load_prefix": "prefix",
    "merge_adapter": "merge",
    "read_adapter": "formats",
    "read_prefix": "prefix",
    "restore_adapter": "lora",
    "save_adapter": "lora",
    "verify_saved": "verify",
}

__all__ = [
    "attach_lora",
    "continue_adapter",
    "convert_adapter",
    "find_adapter",
    "load_adapter",
    "load_prefix",
    "merge_adapter",
    "read_adapter",
    "read_prefix",
    "restore_adapter",
    "save_adapter",
    "verify_saved",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
