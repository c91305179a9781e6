"""The modules of a published int8 or int4 folder, whose weights stay packed in memory.

Each replaces the float module of the same name, and unpacks its weight whenever it is used, without
keeping the result. Shapes: R rows and C columns of a weight, B rows of a batch, S tokens, H hidden.
"""

import torch
from torch import Tensor, nn

from glmtune.ops.integers import dequantise, quantise_int8
from glmtune.ops.linear import frozen_linear
from glmtune.ops.quantised import Quantised

SCALE = "weight_scale"


class IntegerModule(nn.Module):
    """The common base of packed modules: a weight in two tensors."""

    weight: Tensor
    """int8, ``(R, C * bits / 8)``; a parameter, because transformers ties only parameters"""
    weight_scale: Tensor
    """float16, ``(R,)``; a buffer, because it has no gradient"""
    bits: int

    def allocate(self, like: Tensor, bits: int) -> None:
        """Replace a float weight ``(R, C)`` by zeros, to be filled from a folder."""
        num_rows, num_columns = like.shape
        packed = torch.zeros(num_rows, num_columns * bits // 8, dtype=torch.int8)
        self.set_weight(packed, torch.zeros(num_rows, dtype=torch.float16), bits)

    def set_weight(self, packed: Tensor, scale: Tensor, bits: int) -> None:
        """Set the packed weight."""
        self.bits = bits
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.register_buffer(SCALE, scale)

    def floats(self, dtype: torch.dtype) -> Tensor:
        """The weight as floats, ``(R, C)``."""
        return dequantise(self.weight, self.weight_scale, self.bits, dtype)

    def dequantised(self, dtype: torch.dtype) -> nn.Module:
        """The float module that this one represents."""
        raise NotImplementedError


class IntegerLinear(IntegerModule, nn.Linear):
    """A linear with packed weight and float bias.

    It is an `nn.Linear`, so that PEFT accepts it; its input gets a gradient. An adapter cannot be
    merged into integers: dequantise the model first.

    Args:
        like: the float linear that it replaces, whose shape and bias it takes.
        bits: bits of a value, 8 or 4.
    """

    def __init__(self, like: nn.Linear, bits: int):
        super().__init__(like.in_features, like.out_features, bias=False, device="meta")
        self.bias = like.bias
        self.allocate(like.weight, bits)

    @property
    def frozen(self) -> Quantised:
        """The quantised weight, as `frozen_linear` takes it."""
        parts = self.weight, self.weight_scale
        return Quantised(parts, f"int{self.bits}", 0, self.in_features, self.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """``(..., C)`` to ``(..., R)``, in the type of the input."""
        rows = hidden.reshape(-1, hidden.shape[-1])
        return frozen_linear(rows, self.frozen).unflatten(0, hidden.shape[:-1])

    def dequantised(self, dtype: torch.dtype) -> nn.Linear:
        """The float linear that this one represents."""
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        linear.weight, linear.bias = nn.Parameter(self.floats(dtype)), self.bias
        return linear


class IntegerEmbedding(IntegerModule, nn.Embedding):
    """An embedding with packed weight, as `-int4-qe` has it.

    Args:
        like: the float embedding that it replaces, whose shape it takes.
        bits: bits of a value, 8 or 4.
    """

    def __init__(self, like: nn.Embedding, bits: int):
        super().__init__(like.num_embeddings, like.embedding_dim, device="meta")
        self.allocate(like.weight, bits)

    def forward(self, ids_BS: Tensor) -> Tensor:
        """``(B, S)`` to float32 ``(B, S, H)``: the model's compute type is unknown here."""
        return dequantise(self.weight[ids_BS], self.weight_scale[ids_BS], self.bits, torch.float32)

    def dequantised(self, dtype: torch.dtype) -> nn.Embedding:
        """The float embedding that this one represents."""
        embedding = nn.Embedding(self.num_embeddings, self.embedding_dim, device="meta")
        embedding.weight = nn.Parameter(self.floats(dtype))
        return embedding


def quantise_tables(
    embedding: nn.Embedding, head: nn.Linear
) -> tuple[IntegerEmbedding, IntegerLinear]:
    """Turn embedding and head into 8 bits; if they share a tensor, they still do."""
    packed_embedding, packed_head = IntegerEmbedding(embedding, 8), IntegerLinear(head, 8)
    packed_embedding.set_weight(*quantise_int8(embedding.weight), 8)
    if head.weight is embedding.weight:
        packed_head.bits = 8
        packed_head.weight = packed_embedding.weight
        packed_head.register_buffer(SCALE, packed_embedding.weight_scale)
    else:
        packed_head.set_weight(*quantise_int8(head.weight), 8)
    return packed_embedding, packed_head


def use_integer_modules(model: nn.Module, bits: int) -> None:
    """Replace every linear and embedding below a module by a packed one of zeros, in place."""
    for parent in model.modules():
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, name, IntegerLinear(child, bits))
            elif isinstance(child, nn.Embedding):
                setattr(parent, name, IntegerEmbedding(child, bits))


def dequantise_modules(model: nn.Module, dtype: torch.dtype) -> None:
    """Turn every packed module below a module into the float one it represents, in place.

    They are converted one by one, each packed weight being freed before the next.
    """
    for parent in model.modules():
        for name, child in list(parent.named_children()):
            if isinstance(child, IntegerModule):
                setattr(parent, name, child.dequantised(dtype))
