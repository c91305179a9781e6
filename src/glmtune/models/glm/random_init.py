"""A folder of random weights, as transformers saves a model of the same shape."""

import shutil
from pathlib import Path
from typing import Any

import torch


def write_random_model(
    model_class: Any,
    folder: Path,
    config: Any,
    vocab_file: Path | None = None,
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> None:
    """Write bfloat16 safetensors and config.json.

    Args:
        model_class: class of the model.
        folder: made if it is not there.
        config: the shape.
        vocab_file: a vocabulary to copy beside the weights.
        seed: of the weights.
        device: where the weights are drawn; a GPU is much faster for billions.
    """
    torch.manual_seed(seed)
    with torch.device(device):
        model = model_class._from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="4GB")
    if vocab_file is not None:
        shutil.copyfile(vocab_file, folder / vocab_file.name)
