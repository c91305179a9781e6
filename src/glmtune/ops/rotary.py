"""Rotary positions in two streams: half of each head is rotated by one, half by the other.

Shapes: B rows of a batch, S tokens, N heads, D head size.
"""

from functools import lru_cache

import torch
from torch import Tensor

ROTARY_BASE = 10_000.0


def rotary_angles(position_ids_B2S: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of both position streams, in float32 at any position.

    Half of a head is rotated by the first stream, half by the second; each half of d elements has
    d/2 frequencies ``10000^(-2i/d)``, rounded to float16 as in the published weights (their
    ``rotary_emb.inv_freq``). The angles themselves are never rounded.

    Returns:
        Two float32 tensors of shape ``(B, S, 2, head_dim / 4)``.
    """
    frequency = _frequencies(head_dim // 2, position_ids_B2S.device)
    angle = position_ids_B2S.transpose(1, 2)[..., None].float() * frequency
    return angle.cos(), angle.sin()


@lru_cache(maxsize=8)
def _frequencies(half: int, device: torch.device) -> Tensor:
    # Computed on the CPU, so that they are the same everywhere, and copied to a device once: a copy
    # from pageable memory would make the host wait for the device in each step.
    exponent = torch.arange(0, half, 2, dtype=torch.float32) / half
    return (1.0 / ROTARY_BASE**exponent).half().float().to(device)


def rotate(x_BNSD: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Rotate each half of each head by its own stream: element i is paired with i + D/4.

    Args:
        x_BNSD: queries or keys.
        cos: ``(B, S, 2, D/4)``, from `rotary_angles`.
        sin: ``(B, S, 2, D/4)``, from `rotary_angles`.
        interleaved: neighbouring elements 2i and 2i + 1 are a pair instead, and the angles are
            those of the pairs in their order.
    """
    cos, sin = cos[:, None].to(x_BNSD.dtype), sin[:, None].to(x_BNSD.dtype)
    if interleaved:
        return rotate_pairs(x_BNSD, cos.flatten(-2), sin.flatten(-2))
    first, second = x_BNSD.unflatten(-1, (2, 2, -1)).unbind(-2)
    turned = torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-2)
    return turned.flatten(-3)


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair ``(2i, 2i + 1)`` of a head by its angle.

    Args:
        x: queries or keys, ``(..., D)``.
        cos: ``(..., D / 2)``, broadcastable, of the type of `x`.
        sin: of the same shape.
    """
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((first * cos - second * sin, second * cos + first * sin), -1)
    return turned.flatten(-2)


def whole_angles(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Expand angles once for `rotate_whole`, where many layers rotate by them.

    Args:
        cos: ``(B, S, 2, D/4)``, from `rotary_angles`.
        sin: ``(B, S, 2, D/4)``, from `rotary_angles`.

    Returns:
        Two tensors ``(B, S, D)``; the sines carry the sign of an element's partner.
    """
    return torch.stack((cos, cos), -2).flatten(-3), torch.stack((-sin, sin), -2).flatten(-3)


def rotate_whole(x_BNSD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`rotate` in few kernels, for small inputs, where a launch takes longer than the work.

    Args:
        x_BNSD: queries or keys.
        cos: from `whole_angles`, broadcastable to ``x_BNSD`` and of its type.
        sin: from `whole_angles`, broadcastable to ``x_BNSD`` and of its type.
    """
    partner = x_BNSD.unflatten(-1, (2, 2, -1)).flip(-2).flatten(-3)
    return torch.addcmul(x_BNSD * cos, partner, sin)


def whole_pair_angles(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """`whole_angles` for `rotate_whole_pairs`: ``(..., D / 2)`` of the pairs to ``(..., D)``."""
    return torch.stack((cos, cos), -1).flatten(-2), torch.stack((-sin, sin), -1).flatten(-2)


def rotate_whole_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`rotate_pairs` in few kernels, as `rotate_whole` is `rotate`.

    Args:
        x: queries or keys, ``(..., D)``.
        cos: from `whole_pair_angles`, broadcastable to `x` and of its type.
        sin: from `whole_pair_angles`, broadcastable to `x` and of its type.
    """
    partner = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return torch.addcmul(x * cos, partner, sin)
