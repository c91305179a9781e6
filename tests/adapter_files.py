"""Names and changes of the files of an adapter's folder."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from glmtune.errors import UserError

CONFIG, WEIGHTS, BIN = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
STEM = "base_model.model.transformer.layers.0.attention.query_key_value"


def edit_weights(folder: Path, change) -> None:
    """Apply `change` to a folder's dict of tensors and write the weights file again."""
    if (folder / WEIGHTS).exists():
        tensors = load_file(folder / WEIGHTS)
        save_file(change(tensors) or tensors, folder / WEIGHTS)
    else:
        tensors = torch.load(folder / BIN, weights_only=True)
        torch.save(change(tensors) or tensors, folder / BIN)


def edit_config(folder: Path, **settings) -> None:
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    (folder / CONFIG).write_text(json.dumps(config | settings), encoding="utf-8")


def fails(fragment: str):
    return pytest.raises(UserError, match=fragment)


def rename(old: str, new: str):
    """A change for `edit_weights`: every key with `new` for `old`."""
    return lambda tensors: {key.replace(old, new): t for key, t in tensors.items()}
