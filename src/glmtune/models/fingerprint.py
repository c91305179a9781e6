"""Whether two runs use the same base model, without reading all of it twice."""

import hashlib

import torch
from torch import nn

_SAMPLES = 256


@torch.no_grad()
def fingerprint(model: nn.Module) -> str:
    """A sha256 of each parameter's name, shape and some 256 of its values, evenly spread.

    Another model, another revision or a further trained model differs in nearly every value. A
    change of a few single values may go unnoticed, and another number format counts as a change.

    Args:
        model: on any device, in any number format.
    """
    state = hashlib.sha256()
    for name, weight in model.named_parameters():
        values = weight.flatten()[:: max(1, weight.numel() // _SAMPLES)]
        state.update(f"{name} {tuple(weight.shape)}".encode())
        state.update(values.float().cpu().numpy().tobytes())
    return state.hexdigest()
