"""LayerNorm as a plain function of its weights."""

from typing import NamedTuple

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
