"""A base whose linears are in 8 or 4 bits by bitsandbytes: LLM.int8, or NF4 with double scales.

transformers quantises while it loads, tensor by tensor, and bitsandbytes' modules compute, so that
PEFT and others recognise them. This module has what surrounds that: whether it is possible, what a
folder of such weights holds, and the same numbers as `ops.quantised` takes them.
"""

import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch
from packaging.version import Version
from torch import Tensor, nn
from transformers import BitsAndBytesConfig
from transformers.quantizers import AutoHfQuantizer

from glmtune.errors import UserError
from glmtune.hardware import device_name
from glmtune.models.integer_weights import IntegerLinear
from glmtune.models.weights import Outline
from glmtune.ops.linear import Dense, Fp8Linear, Frozen
from glmtune.ops.quantised import Quantised

INSTALL = "pip install -U bitsandbytes"
# Older releases quantise an int8 folder again when loading it to a CPU, which destroys it.
OLDEST_VERSION = "0.49.0"
# The oldest cards that bitsandbytes' kernels support: int8 matrix units came with Turing.
OLDEST_CARD = {8: (7, 5), 4: (6, 0)}
# What a folder holds for a linear beside its weight and bias.
_BESIDE_INT8 = ("SCB", "weight_format")
_BESIDE_4BIT = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
_STATES = ("quant_state.bitsandbytes__nf4", "quant_state.bitsandbytes__fp4")
# Outputs whose weights exist as floats at a time, where LLM.int8's inputs are not rounded.
_PIECE = 1024


def check_quantising(what: str, bits: int, device: torch.device | str | None) -> None:
    """Make sure that bitsandbytes is installed and runs on a device.

    Args:
        what: the setting that asks for it, for the message.
        bits: 8 or 4.
        device: the device to run on.

    Raises:
        UserError: it is not installed, or does not run there.
    """
    if find_spec("bitsandbytes") is None:
        raise UserError(f"{what}: needs bitsandbytes, which is not installed: {INSTALL}")
    if Version(found := version("bitsandbytes")) < Version(OLDEST_VERSION):
        raise UserError(f"{what}: bitsandbytes {found} is too old for it: {INSTALL}")
    device = torch.device(device or "cpu")
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < OLDEST_CARD[bits]:
        of_card, needed = torch.cuda.get_device_capability(device), OLDEST_CARD[bits]
        raise UserError(
            f"{what}: {device_name(device)} is of compute capability {of_card[0]}.{of_card[1]}, "
            f"and {needed[0]}.{needed[1]} is needed; take another number of bits, or a newer card"
        )


def quantising(bits: int, dtype: torch.dtype | None) -> BitsAndBytesConfig:
    """The transformers config of LLM.int8, or of NF4 with double quantisation."""
    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


@torch.no_grad()
def quantise(model: Any, layers: nn.Module, bits: int) -> None:
    """Quantise the linears of a model that is in memory already, in place, one by one.

    Args:
        model: a transformers model.
        layers: the part of it whose linears to quantise, in floats or packed.
        bits: 8 or 4; see `quantising`.
    """
    for parent in layers.modules():
        for name, linear in list(parent.named_children()):
            if isinstance(linear, nn.Linear):
                setattr(parent, name, _quantised(linear, bits, model.dtype))
    model.hf_quantizer = AutoHfQuantizer.from_config(
        quantising(bits, model.dtype), pre_quantized=False
    )
    model.hf_quantizer.postprocess_model(model)  # sets the attributes that PEFT reads
    finish_loading(model, model.dtype)


def _quantised(linear: nn.Linear, bits: int, dtype: torch.dtype) -> nn.Module:
    import bitsandbytes

    bnb: Any = bitsandbytes.nn
    weight, device = linear.weight.data, linear.weight.device
    if isinstance(linear, IntegerLinear):
        weight = linear.floats(dtype)
    sizes, biased = (linear.in_features, linear.out_features), linear.bias is not None
    with torch.device("meta"):
        if bits == 8:
            quantised = bnb.Linear8bitLt(*sizes, biased, has_fp16_weights=False, threshold=6.0)
        else:
            quantised = bnb.Linear4bit(*sizes, biased, quant_type="nf4")
    if bits == 8:
        # bitsandbytes quantises when a weight is moved from the CPU to a device.
        rounded: Any = bnb.Int8Params(weight.cpu(), requires_grad=False)
    else:
        rounded = bnb.Params4bit(weight, requires_grad=False, quant_type="nf4", module=quantised)
    quantised.weight = rounded.to(device)
    quantised.bias = linear.bias
    return quantised.requires_grad_(False).train(linear.training)


def as_floats(found: Mapping[str, Tensor], model: nn.Module) -> Outline:
    """The outline of a folder of bitsandbytes' weights, as if its linears were floats.

    A linear of another shape than the model's, or without its scales, is left unchanged.

    Args:
        found: the outline of the folder.
        model: a model of its configuration, in floats.
    """
    outline = dict(found)
    for name, linear in model.named_modules():
        weight = found.get(f"{name}.weight")
        if not isinstance(linear, nn.Linear) or weight is None or weight.is_floating_point():
            continue
        beside = {f"{name}.{key}" for key in _BESIDE_INT8}
        beside |= {f"{name}.weight.{key}" for key in (*_BESIDE_4BIT, *_STATES)}
        present = beside & found.keys()
        shape, num_values = linear.weight.shape, 2 * weight.nbytes
        is_int8 = weight.dtype == torch.int8 and weight.shape == shape
        is_4bit = num_values == linear.weight.numel() and any(
            f"{name}.weight.{state}" in present for state in _STATES
        )
        if (is_int8 and f"{name}.SCB" in present) or is_4bit:
            outline[f"{name}.weight"] = torch.empty_like(linear.weight, device="meta")
            for key in present:
                del outline[key]
    return outline


def finish_loading(model: nn.Module, dtype: torch.dtype) -> None:
    """Make bitsandbytes' modules compute in a type, convert the rest, and prevent repacking."""
    for parameter in model.parameters():
        # When loading quantised folders, transformers leaves some tensors in the type they were
        # saved in.
        if parameter.is_floating_point() and type(parameter) is nn.Parameter:
            parameter.data = parameter.data.to(dtype)
    linears: Iterator[Any] = model.modules()
    for linear in linears:
        if _is(linear, "Linear4bit"):
            linear.compute_dtype, linear.compute_type_is_set = dtype, True
            # For inference on a CPU with AVX512-BF16 it would reorder the weights, so that nothing
            # else can read them.
            linear.support_avx512bf16_for_cpu = False
    # LLM.int8 warns in every product that inputs are not float16.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)


def frozen_of(linear: nn.Module) -> Frozen:
    """The weight of a linear of any kind, as `frozen_linear` takes it.

    For LLM.int8 this omits the rounding of inputs: the product uses the dequantised weights.
    """
    if isinstance(linear, Fp8Linear | IntegerLinear):
        return linear.frozen
    if _is(linear, "Linear8bitLt"):
        return _frozen_int8(linear)
    if _is(linear, "Linear4bit"):
        return _frozen_4bit(linear)
    assert isinstance(linear, nn.Linear)
    return Dense(linear.weight, linear.bias)


def _frozen_int8(linear: Any) -> Quantised:
    packed_NK, largest_N = _int8_parts(linear)
    return Quantised((packed_NK, largest_N / 127), "int8", 0, linear.in_features, linear.bias)


def _int8_parts(linear: Any) -> tuple[Tensor, Tensor]:
    """Integers, and the value of 127 in each row; the first product moves them to `state`."""
    if linear.weight.CB is not None:
        linear.init_8bit_state()
    return linear.state.CB, linear.state.SCB


def _frozen_4bit(linear: Any) -> Quantised:
    # If sharded, the weight has its layer's state, and its bytes are called floats.
    state = getattr(linear.weight, "quant_state", linear.quant_state)
    parts: tuple[Tensor, ...] = linear.weight.data.view(torch.uint8).view(-1, 1), state.absmax
    if state.nested:
        parts += state.state2.absmax, state.state2.code, state.offset
    return Quantised(parts, state.quant_type, state.blocksize, linear.in_features, linear.bias)


@contextmanager
def unrounded_inputs(model: nn.Module) -> Iterator[None]:
    """Inside the `with` block, keep LLM.int8 from rounding its inputs.

    The product then uses the dequantised weights. A threshold near 0, with which every column
    counts as an outlier, would do the same, but holds several copies of a weight.
    """
    linears: list[Any] = [linear for linear in model.modules() if _is(linear, "Linear8bitLt")]
    hooks = [vars(linear).get("forward") for linear in linears]  # set by Accelerate
    try:
        for linear in linears:
            linear.forward = partial(_multiply_unrounded, linear)
        yield
    finally:
        for linear, hook in zip(linears, hooks, strict=True):
            del linear.forward
            if hook is not None:
                linear.forward = hook


def _multiply_unrounded(linear: Any, x: Tensor) -> Tensor:
    return _Unrounded.apply(x, *_int8_parts(linear), linear.bias)


class _Unrounded(torch.autograd.Function):
    """``x @ W^T + bias`` with bitsandbytes' own floats, some outputs at a time."""

    @staticmethod
    def forward(ctx, x, packed_NK, largest_N, bias_N):
        ctx.save_for_backward(packed_NK, largest_N)
        products = [x @ weight.T for _, weight in _pieces(packed_NK, largest_N, x.dtype)]
        product = torch.cat(products, -1)
        return product if bias_N is None else product + bias_N

    @staticmethod
    def backward(ctx, grad):
        packed_NK, largest_N = ctx.saved_tensors
        total: Any = 0
        for rows, weight in _pieces(packed_NK, largest_N, grad.dtype):
            total = total + grad[..., rows] @ weight
        return total, None, None, None


def _pieces(
    packed_NK: Tensor, largest_N: Tensor, dtype: torch.dtype
) -> Iterator[tuple[slice, Tensor]]:
    from bitsandbytes.functional import int8_vectorwise_dequant

    for start in range(0, len(packed_NK), _PIECE):
        rows = slice(start, start + _PIECE)
        yield rows, int8_vectorwise_dequant(packed_NK[rows], largest_N[rows]).to(dtype)


def _is(module: Any, name: str) -> bool:
    """Whether a module's class is of bitsandbytes, which need not be installed for this check."""
    bitsandbytes = sys.modules.get("bitsandbytes")
    return bitsandbytes is not None and isinstance(module, getattr(bitsandbytes.nn, name))
