"""Check an adapter that has just been written: does a fresh load give the model's results?"""

import math
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor

from glmtune.adapters.biases import biases_in_effect
from glmtune.adapters.formats import read_adapter
from glmtune.adapters.lora import adapter_weights
from glmtune.adapters.merge import TOLERANCE, probe
from glmtune.errors import UserError
from glmtune.models.sharded import is_sharded
from glmtune.run_files import WEIGHTS_FILE

_RUNNING, _SAVED = "default", "as saved"


def verify_saved(model: PeftModel, folder: str | Path) -> float:
    """Read an adapter back and compare it with the one on the model.

    Its tensors must be the same bit for bit. Then, unless it has biases, which a model can hold for
    one adapter only, or the base is shared out among processes, PEFT loads it again, beside the
    running adapter and on the same base, so that no second base is needed; on a short row both must
    give the same logits. The run is left unchanged, its random numbers included.

    Args:
        model: the model in training, in whatever mode.
        folder: folder that its adapter was written to.

    Returns:
        The largest difference of a logit.

    Raises:
        UserError: the file cannot be read, or is another adapter (the message names the
            difference), or its logits are not finite.
    """
    saved, running = read_adapter(folder).weights, adapter_weights(model)
    path = Path(folder) / WEIGHTS_FILE
    fault = _first_difference(saved, running)
    if fault is None and (biases_in_effect(model) or is_sharded(model)):
        return 0.0
    if fault is None:
        difference, largest = _compare_logits(model, folder)
        if not math.isfinite(largest):
            raise UserError(
                f"{path}: with these weights the model's logits are not finite, so it is not kept; "
                "lower learning_rate, and resume from an earlier checkpoint"
            )
        if difference <= TOLERANCE * largest:
            return difference
        fault = f"the logits of a fresh load differ by {difference:.1e}"
    raise UserError(
        f"{path}: what was saved is not what was trained: {fault}; check the disk, and resume "
        "from an earlier checkpoint"
    )


def _first_difference(saved: dict[str, Tensor], running: dict[str, Tensor]) -> str | None:
    """Name a tensor that only one side has, or that differs."""
    for missing, where in (
        (running.keys() - saved.keys(), "is missing"),
        (saved.keys() - running.keys(), "is there and should not be"),
    ):
        if missing:
            return f"{min(missing)} {where}"
    for key, tensor in running.items():
        wanted = tensor.detach().float().cpu()
        if saved[key].shape != wanted.shape:
            return f"{key} has shape {list(saved[key].shape)} instead of {list(wanted.shape)}"
        if not torch.equal(saved[key], wanted):
            num_other = int((saved[key] != wanted).sum())
            return f"{key} differs in {num_other} of {wanted.numel()} numbers"
    return None


def _compare_logits(model: PeftModel, folder: str | Path) -> tuple[float, float]:
    """The largest logit difference between running and saved adapter, and the largest logit."""
    devices = [model.device] if model.device.type == "cuda" else []
    was_training = model.training
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    with torch.random.fork_rng(devices):
        try:
            model.eval()
            wanted = probe(model)
            model.load_adapter(str(folder), _SAVED)
            model.to(model.device)  # PEFT skips linears without `weight`, as in float8
            model.set_adapter(_SAVED)
            found = probe(model)
        finally:
            model.set_adapter(_RUNNING)
            if _SAVED in model.peft_config:
                model.delete_adapter(_SAVED)
            model.train(was_training)
    assert trained == {name for name, weight in model.named_parameters() if weight.requires_grad}
    return (found - wanted).abs().max().item(), wanted.abs().max().item()
