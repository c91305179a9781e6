"""The linears of decoding: in their own type, in 8 or 4 bits, with an adapter beside them.

Each can be called with any number of rows; those with kernels for one token a row
(`ops.decoding_kernels`) offer them as `fused`.

Shapes: O output rows of a linear, I inputs, R rank of an adapter, G groups of inputs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from glmtune.errors import UserError
from glmtune.models.decoding import Projection
from glmtune.ops.lora import LowRank
from glmtune.ops.words import GROUP_SIZE, Words, round_groups


def _goes_through_onednn(x: Tensor) -> bool:
    # For a few rows, MKL, which `F.linear` uses on a CPU, runs on one thread, oneDNN on all.
    if torch.compiler.is_compiling() or x.device.type != "cpu" or x.dtype != torch.float32:
        return False
    return torch.backends.mkldnn.is_available() and torch.get_num_threads() > 1


@dataclass(frozen=True)
class DenseLinear:
    """A linear in its own type."""

    weight_OI: Tensor
    bias_O: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        """``(..., I)`` to ``(..., O)``."""
        if _goes_through_onednn(x):
            return torch.ops.mkldnn._linear_pointwise(
                x, self.weight_OI, self.bias_O, "none", [], ""
            )
        return F.linear(x, self.weight_OI, self.bias_O)

    def input_dtype(self, num_rows: int, dtype: torch.dtype) -> torch.dtype:
        """The input type in which `fused` is fastest, for some rows and the model's type."""
        return self.weight_OI.dtype

    def fused(self, x: Tensor, **more: Any) -> Tensor:
        """The same for a batch, fused with what else `ops.decoding_kernels.project` takes."""
        return _kernels().project(x, self.weight_OI, self.bias_O, **more)

    def factor(self, x: Tensor) -> Any:
        """The linear as `ops.decoding_kernels.project_three` takes it."""
        return _kernels().Factor(self.weight_OI, self.bias_O, None)


@dataclass(frozen=True)
class SeparateLinear(DenseLinear):
    """A linear in whose results no row depends on the others, nor on how many there are.

    On a GPU that is so of batches of one size alone; see `multiply_separately` for a CPU.
    """

    def __call__(self, x: Tensor) -> Tensor:
        """``(..., I)`` to ``(..., O)``."""
        return multiply_separately(x, self.weight_OI, self.bias_O)


# On some processors the order in which products of 16 bits sum depends on how many rows they have
# (docs/log.md): so all have this many; of prompts, what their columns are padded to.
_ROWS_OF_STEP, _ROWS_OF_PROMPT = 16, 64


def multiply_separately(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias``, in which no row depends on the others; see `SeparateLinear`.

    On a CPU that is so of oneDNN's products of two rows of float32 or more (MKL's depend on how
    many there are), and of products of one size; `tests/unit/test_separate_rows.py` holds both.

    Args:
        x: ``(B, S, I)``, or ``(T, I)``: new tokens, or with more than one column whole prompts.
        weight_OI: the linear's weight.
        bias_O: its bias.
    """
    if x.device.type != "cpu":
        return F.linear(x, weight_OI, bias_O)
    rows = x.flatten(0, -2)
    if rows.dtype == torch.float32 and torch.backends.mkldnn.is_available():
        if len(rows) == 1:  # a kernel for vectors would sum in another order
            rows = rows.expand(2, -1)
        y = torch.ops.mkldnn._linear_pointwise(rows.contiguous(), weight_OI, bias_O, "none", [], "")
    else:
        size = _ROWS_OF_PROMPT if x.dim() > 2 and x.shape[1] > 1 else _ROWS_OF_STEP
        blocks = F.pad(rows, (0, 0, 0, -len(rows) % size)).split(size)
        y = torch.cat([F.linear(block, weight_OI, bias_O) for block in blocks])
    return y[: x[..., 0].numel()].unflatten(0, x.shape[:-1])


# torch's product with int8 weights is faster than one with them as floats up to 64 rows, and reads
# out of bounds unless the inputs are a multiple of 32 (docs/log.md).
_FEW_ROWS, _INPUTS = 64, 32


@dataclass(frozen=True)
class Int8:
    """A linear in int8 with a scale a row, on a CPU.

    Inputs are rounded to bfloat16, for which torch has fast products on a CPU.
    """

    weight_OI: Tensor
    scale_O: Tensor
    bias_O: Tensor | None

    @classmethod
    def of(cls, weight_OI: Tensor, bias_O: Tensor | None) -> "Int8":
        """Round each row to 255 steps, symmetric around 0, up to its largest magnitude."""
        scale_O1 = weight_OI.abs().amax(1, keepdim=True).float().clamp(min=1e-12) / 127
        rounded = (weight_OI / scale_O1).round().to(torch.int8)
        return cls(rounded, scale_O1.flatten().to(weight_OI.dtype), bias_O)

    def __call__(self, x: Tensor) -> Tensor:
        """``(..., I)`` to ``(..., O)``."""
        rows = x.flatten(0, -2).bfloat16()
        if len(rows) <= _FEW_ROWS and rows.shape[1] % _INPUTS == 0:
            ones_O = torch.ones_like(self.scale_O, dtype=torch.bfloat16)
            y = torch._weight_int8pack_mm(rows, self.weight_OI, ones_O)
        else:
            y = F.linear(rows, self.weight_OI.bfloat16())
        y = y.to(x.dtype).unflatten(0, x.shape[:-1]) * self.scale_O
        return y if self.bias_O is None else y + self.bias_O


@dataclass(frozen=True)
class Int4:
    """A linear of 4-bit groups, each with a scale and a middle, by torch's own product on a CPU.

    An element q of 0..15 means ``(q - 8) * scale + middle``. Inputs are rounded to bfloat16, in
    which the product is 30 times as fast as in float32.
    """

    packed: Tensor
    scale_middle_GO2: Tensor
    bias_O: Tensor | None

    @classmethod
    def of(cls, weight_OI: Tensor, bias_O: Tensor | None) -> "Int4":
        """Round each group of inputs to 16 steps between its smallest and largest element.

        Raises:
            UserError: the packed product does not support this width.
        """
        _check_width(weight_OI, 4)
        numbers_OGI, scale, middle = round_groups(weight_OI.unflatten(1, (-1, GROUP_SIZE)), -1, 4)
        packed = torch._convert_weight_to_int4pack_for_cpu(numbers_OGI.flatten(1), 1)
        scale_middle = torch.cat((scale, middle), -1).transpose(0, 1)
        return cls(packed, scale_middle.contiguous(), bias_O)

    def __call__(self, x: Tensor) -> Tensor:
        """``(..., I)`` to ``(..., O)``."""
        rows = x.flatten(0, -2).bfloat16()
        y = torch._weight_int4pack_mm_for_cpu(rows, self.packed, GROUP_SIZE, self.scale_middle_GO2)
        y = y.to(x.dtype).unflatten(0, x.shape[:-1])
        return y if self.bias_O is None else y + self.bias_O


@dataclass(frozen=True)
class GroupQuantised:
    """A linear of 8 or 4 bits on a GPU, in groups of inputs; see `ops.words`."""

    weight: Words
    bias_O: Tensor | None

    @classmethod
    def of(cls, weight_OI: Tensor, bias_O: Tensor | None, bits: int) -> "GroupQuantised":
        """Round the weights.

        Raises:
            UserError: the width is not a multiple of the group size.
        """
        _check_width(weight_OI, bits)
        return cls(Words.pack(weight_OI, bits), bias_O)

    def __call__(self, x: Tensor) -> Tensor:
        """``(..., I)`` to ``(..., O)``; for many rows the weights are unpacked to floats first."""
        weight_OI = _kernels().unpack(self.weight, x.dtype)
        return F.linear(x, weight_OI, self.bias_O)

    def input_dtype(self, num_rows: int, dtype: torch.dtype) -> torch.dtype:
        """The input type in which `fused` is fastest, for some rows and the model's type."""
        return torch.float32 if num_rows <= _kernels().few_rows(self.weight) else dtype

    def fused(self, x: Tensor, **more: Any) -> Tensor:
        """The same for a batch, fused with what else `ops.decoding_kernels.project` takes."""
        return _kernels().project(x, self.weight, self.bias_O, **more)

    def factor(self, x: Tensor) -> Any:
        """The linear as `ops.decoding_kernels.project_three` takes it."""
        return _kernels().Factor(self.weight, self.bias_O, None)


@dataclass(frozen=True)
class _Updated:
    """A linear whose outputs get an update: how kernels take it, for one token a row."""

    base: Projection

    def input_dtype(self, num_rows: int, dtype: torch.dtype) -> torch.dtype:
        """The input type in which `fused` is fastest, for some rows and the model's type."""
        return self.base.input_dtype(num_rows, dtype)

    def fused(self, x: Tensor, **more: Any) -> Tensor:
        """The same for one token a row, fused with what else the base's `fused` takes."""
        return self.base.fused(x, update=self._update(x), **more)

    def factor(self, x: Tensor) -> Any:
        """The linear as `ops.decoding_kernels.project_three` takes it, for some inputs."""
        return self.base.factor(x)._replace(update=self._update(x))

    def _update(self, x: Tensor) -> Any:
        """The factors of the update and its scale, as kernels take them."""
        raise NotImplementedError


@dataclass(frozen=True)
class Adapted(_Updated):
    """A linear with low-rank updates beside it, computed in the updates' own type, as in PEFT."""

    updates: tuple[LowRank, ...]

    def __call__(self, x: Tensor) -> Tensor:
        """``(..., I)`` to ``(..., O)``."""
        y = self.base(x)
        total = y
        for a_RI, b_OR, scale in self.updates:
            total = total + F.linear(F.linear(x.to(a_RI.dtype), a_RI), b_OR) * scale
        return total.to(y.dtype)

    def _update(self, x: Tensor) -> Any:
        ((a_RI, b_OR, scale),) = self.updates
        if x[..., 0].numel() > 1:  # a kernel for a rank's outputs would occupy few processors
            low = F.linear(x.to(a_RI.dtype), a_RI)
        else:
            low = _kernels().project(x, a_RI, dtype=torch.float32)
        return low.flatten(0, -2), b_OR, scale


@dataclass(frozen=True)
class AdaptedByRow(_Updated):
    """A linear with the updates of several adapters beside it, of which each row takes one.

    All are computed as one product, in which the ranks of other adapters are set to zero: a row
    costs the same whichever adapter its neighbours have, and a step is the same kernels.
    """

    a_RI: Tensor
    """The adapters' A, one under another."""
    b_OR: Tensor
    """Their B side by side, each multiplied by its scale."""
    is_taken: Callable[[], Tensor]
    """1 for the ranks of each row's adapter and 0 for others, ``(B, R)``; see
    `mixed.MixedAdapters`."""

    def __call__(self, x: Tensor) -> Tensor:
        """``(B, S, I)`` to ``(B, S, O)``."""
        y = self.base(x)
        low = multiply_separately(x.to(self.a_RI.dtype), self.a_RI) * self.is_taken()[:, None]
        return (y + multiply_separately(low, self.b_OR)).to(y.dtype)

    def _update(self, x: Tensor) -> Any:
        low = F.linear(x.to(self.a_RI.dtype), self.a_RI) * self.is_taken()[:, None]
        return low.flatten(0, -2), self.b_OR, 1.0


def can_be_fused(linear: Projection) -> bool:
    """Whether a linear has kernels for one token a row."""
    if isinstance(linear, AdaptedByRow):
        return can_be_fused(linear.base)
    if isinstance(linear, Adapted):
        return len(linear.updates) == 1 and can_be_fused(linear.base)
    return isinstance(linear, (DenseLinear, GroupQuantised))


def _kernels() -> ModuleType:
    # Importable only with Triton, which is installed only with a GPU.
    from glmtune.ops import decoding_kernels

    return decoding_kernels


def _check_width(weight_OI: Tensor, bits: int) -> None:
    num_outputs, num_inputs = weight_OI.shape
    if num_inputs % GROUP_SIZE or num_outputs % 16:
        raise UserError(
            f"{bits} bits: a linear of {num_inputs} inputs and {num_outputs} outputs cannot be "
            f"packed, which goes by {GROUP_SIZE} and 16; choose 16 bits"
        )
