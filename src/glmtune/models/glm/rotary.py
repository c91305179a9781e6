"""Rotary positions of the younger family: neighbouring elements of a head are pairs.

The first elements of a head are rotated, as many as the configuration's partial_rotary_factor says;
the others are pairs of angle 0 here, so that all code sees whole heads. Source: transformers'
modeling_glm.py.

Shapes: D head size.
"""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.glm.modeling_glm import GlmRotaryEmbedding

from glmtune.errors import UserError
from glmtune.models.glm.settings import SCALINGS


def pair_angles(positions: Tensor, config: Any) -> tuple[Tensor, Tensor]:
    """Cosines and sines of all pairs of a head, float32 ``(..., D / 2)``.

    Args:
        positions: of any shape ``(...)``.
        config: of the model.

    Raises:
        UserError: the configuration scales positions in a way that depends on a row's length.
    """
    rope = config.rope_parameters
    if rope["rope_type"] not in SCALINGS:  # of a configuration that no folder was read for
        raise UserError(
            f"rope_type {rope['rope_type']!r} is not known here; there are {', '.join(SCALINGS)}"
        )
    frequency, factor = _frequencies(_Key(config), positions.device)
    angle = positions[..., None].float() * frequency
    cos, sin = angle.cos() * factor, angle.sin() * factor
    num_still = config.head_dim // 2 - len(frequency)
    if num_still:
        cos = torch.nn.functional.pad(cos, (0, num_still), value=1.0)
        sin = torch.nn.functional.pad(sin, (0, num_still))
    return cos, sin


class _Key:
    """A configuration as a key of the cache: by what frequencies depend on."""

    def __init__(self, config: Any):
        self.config = config
        rope = sorted((name, str(value)) for name, value in config.rope_parameters.items())
        self.parts = (config.head_dim, config.max_position_embeddings, *rope)

    def __hash__(self) -> int:
        return hash(self.parts)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and self.parts == other.parts


@lru_cache(maxsize=8)
def _frequencies(key: _Key, device: torch.device) -> tuple[Tensor, float]:
    # Computed on the CPU and copied once: a copy from pageable memory would make the host wait for
    # the device in each step.
    kind = key.config.rope_parameters["rope_type"]
    compute = (
        GlmRotaryEmbedding.compute_default_rope_parameters
        if kind == "default"
        else ROPE_INIT_FUNCTIONS[kind]
    )
    frequency, factor = compute(key.config)
    return frequency.float().to(device), factor
