"""LoRA adapters: attach, load, save, convert and merge, in today's PEFT format or those of 2023."""

from glmtune.adapters.formats import convert_adapter, find_adapter, read_adapter
from glmtune.adapters.lora import attach_lora, load_adapter, restore_adapter, save_adapter
from glmtune.adapters.merge import merge_adapter
from glmtune.adapters.verify import verify_saved

__all__ = [
    "attach_lora",
    "convert_adapter",
    "find_adapter",
    "load_adapter",
    "merge_adapter",
    "read_adapter",
    "restore_adapter",
    "save_adapter",
    "verify_saved",
]
