"""LayerNorm and RMSNorm as plain functions of their weights."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Norm(NamedTuple):
    """A LayerNorm's weights, ``(H,)``, for code that takes weights as arguments."""

    weight: Tensor
    bias: Tensor
    epsilon: float

    @classmethod
    def of(cls, norm: nn.LayerNorm) -> "Norm":
        """Take the weights of a module, without a copy."""
        return cls(norm.weight, norm.bias, norm.eps)

    def __call__(self, x: Tensor) -> Tensor:
        """Normalise over the last dimension, ``(..., H)``."""
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.epsilon)


class RmsNorm(NamedTuple):
    """An RMSNorm's weight, ``(H,)``, as `Norm` has a LayerNorm's.

    The sum of squares is taken in float32, and the result rounded before it is multiplied with the
    weight, as transformers' modules do; torch's own kernel rounds it once, afterwards.
    """

    weight: Tensor
    epsilon: float

    @classmethod
    def of(cls, norm: Any) -> "RmsNorm":
        """Take the weight of one of transformers' modules, without a copy."""
        return cls(norm.weight, norm.variance_epsilon)

    def __call__(self, x: Tensor) -> Tensor:
        """Normalise over the last dimension, ``(..., H)``."""
        if x.is_cuda and not torch.compiler.is_compiling():  # one kernel instead of seven
            return F.rms_norm(x, self.weight.shape, self.weight, self.epsilon)
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.epsilon)
        return self.weight * y.to(x.dtype)
