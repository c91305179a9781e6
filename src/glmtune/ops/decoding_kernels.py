"""What one layer computes for one new token of a few rows, as Triton kernels.

Such a step reads every weight once and computes little with it: it is bound by memory bandwidth, as
long as enough reads are in flight and little else stands between them. So each product is fused
with what follows it (bias, adapter, GELU, residual), each block reads a few whole rows of the
matrix, and numbers of 8 or 4 bits become floats by placing their bits in a float's fraction. On
Hopper and newer GPUs kernels use programmatic dependent launch: each is launched while the one
before it ends, and waits for it by itself.

Shapes: I inputs, O outputs, R rank of an adapter, H width; W and G as in `ops.words`.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from glmtune.ops.norm import Norm
from glmtune.ops.words import GROUP_SIZE, Words

# Registers a thread: 128 allow sixteen warps an SM, so that 16,384 outputs fit in one wave.
_REGISTERS = 128


@triton.jit
def let_next_begin(EARLY: tl.constexpr):
    """Allow the next kernel to be launched; called first in a kernel."""
    if EARLY:
        gdc_launch_dependents()


@triton.jit
def await_last(EARLY: tl.constexpr):
    """Wait until the previous kernel has written all its outputs.

    Until the wait, a kernel may only read tensors that no kernel of this step writes: even the
    kernel before the previous one may still be running.
    """
    if EARLY:
        gdc_wait()


@triton.jit
def _tile(matrix, output, start, NUM_OUTPUTS, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Load some columns of some rows of a matrix, each read once and not worth caching."""
    column = start + tl.arange(0, BLOCK)
    inside = (output < NUM_OUTPUTS)[:, None] & (column < WIDTH)[None, :]
    at = matrix + output.to(tl.int64)[:, None] * WIDTH + column[None, :]
    return tl.load(at, inside, 0, eviction_policy="evict_first")


@lru_cache(maxsize=8)
def launches_early(device: torch.device) -> bool:
    """Whether the GPU has programmatic dependent launch: Hopper and newer do."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


@triton.jit
def _number(words, N: tl.constexpr, BITS: tl.constexpr):
    """Number q of each word as the subnormal float ``q * 2^(_place - 149)``."""
    PLACE: tl.constexpr = _place(N, BITS)
    MASK: tl.constexpr = ((1 << BITS) - 1) << PLACE
    return ((words >> (N * BITS - PLACE)) & MASK).to(tl.float32, bitcast=True)


@triton.constexpr_function
def _place(n: int, bits: int) -> int:
    """The bit of a float's fraction where number n of a word begins, so that few need a shift."""
    return n * bits if (n + 1) * bits <= 20 else n * bits - (12 if bits == 4 else 16)


@triton.constexpr_function
def _power(n: int, bits: int) -> float:
    """The factor of an input that makes its product with `_number` ``q x 2^-69``."""
    return 2.0 ** (80 - _place(n, bits))


@triton.jit
def _finish(
    sums, output, row, bias, low, up, residual, y, low_scale, alpha, NUM_OUTPUTS,
    HAS_BIAS: tl.constexpr, R: tl.constexpr, R_PADDED: tl.constexpr, GELU: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
):  # fmt: skip
    """Apply what follows a product (bias, update, GELU, residual) to some outputs of one row."""
    is_output = output < NUM_OUTPUTS
    if HAS_BIAS:
        sums += tl.load(bias + output, is_output, 0.0).to(tl.float32)
    if R > 0:
        inner = tl.arange(0, R_PADDED)
        low_R = tl.load(low + row * R + inner, inner < R, 0.0).to(tl.float32)
        is_up = is_output[:, None] & (inner < R)[None, :]
        up_OR = tl.load(up + output[:, None] * R + inner[None, :], is_up, 0.0).to(tl.float32)
        sums += low_scale * tl.sum(low_R[None, :] * up_OR, 1)
    if GELU:
        sums *= tl.sigmoid(1.5957691216057308 * (sums + 0.044715 * sums * sums * sums))
    at = row * NUM_OUTPUTS + output
    if HAS_RESIDUAL:
        sums += alpha * tl.load(residual + at, is_output, 0.0).to(tl.float32)
    tl.store(y + at, sums.to(y.dtype.element_ty), is_output)


@triton.jit
def _project(
    x, weight, bias, low, up, residual, y, low_scale, alpha, NUM_OUTPUTS,
    HAS_BIAS: tl.constexpr, R: tl.constexpr, R_PADDED: tl.constexpr, GELU: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, NUM_INPUTS: tl.constexpr, EARLY: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """One block of a product; its first weights load while the kernel waits for the inputs."""
    let_next_begin(EARLY)
    output, row = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O), tl.program_id(1)
    column = tl.arange(0, BLOCK_I)
    total = tl.zeros([BLOCK_O, BLOCK_I], tl.float32)
    value = _tile(weight, output, 0, NUM_OUTPUTS, NUM_INPUTS, BLOCK_I)
    await_last(EARLY)
    for start in range(0, NUM_INPUTS, BLOCK_I):
        at_x = x + row * NUM_INPUTS + start + column[None, :]
        inside = (start + column < NUM_INPUTS)[None, :]
        total += tl.load(at_x, inside, 0.0).to(tl.float32) * value.to(tl.float32)
        value = _tile(weight, output, start + BLOCK_I, NUM_OUTPUTS, NUM_INPUTS, BLOCK_I)
    _finish(
        tl.sum(total, 1), output, row, bias, low, up, residual, y, low_scale, alpha, NUM_OUTPUTS,
        HAS_BIAS, R, R_PADDED, GELU, HAS_RESIDUAL,
    )  # fmt: skip


@triton.jit
def _project_words(
    x, words, scales, bias, low, up, residual, y, low_scale, alpha, NUM_OUTPUTS,
    HAS_BIAS: tl.constexpr, R: tl.constexpr, R_PADDED: tl.constexpr, GELU: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, NUM_INPUTS: tl.constexpr, EARLY: tl.constexpr,
    BITS: tl.constexpr, GROUP: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """`_project` for packed weights. Words and inputs have four bytes each, four to a thread."""
    let_next_begin(EARLY)
    output, row = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O), tl.program_id(1)
    column, four = tl.arange(0, BLOCK_W), 4 * tl.arange(0, BLOCK_W // 4)
    W: tl.constexpr = NUM_INPUTS * BITS // 32
    HALF: tl.constexpr = 2.0 ** (BITS - 1)
    total = tl.zeros([BLOCK_O, BLOCK_W // 4], tl.float32)
    at_scales = scales + output[:, None] * (NUM_INPUTS // GROUP)
    is_output = (output < NUM_OUTPUTS)[:, None]
    packed = _tile(words, output, 0, NUM_OUTPUTS, W, BLOCK_W)
    await_last(EARLY)
    for start in range(0, W, BLOCK_W):
        inside = (start + column < W)[None, :]
        group = (start + four[None, :]) // (GROUP * BITS // 32)
        pair = tl.load(at_scales + group, is_output & (start + four < W)[None, :], 0)
        scale = (pair << 16).to(tl.float32, bitcast=True)  # two bfloat16
        middle = (pair & -65536).to(tl.float32, bitcast=True)
        products, inputs = tl.zeros_like(packed).to(tl.float32), tl.zeros([1, BLOCK_W], tl.float32)
        for n in tl.static_range(32 // BITS):
            at_x = x + row * NUM_INPUTS + n * W + start + column[None, :]
            value = tl.load(at_x, inside, 0.0).to(tl.float32)
            products += _number(packed, n, BITS) * (value * _power(n, BITS))
            inputs += value
        products = tl.sum(tl.reshape(products, [BLOCK_O, BLOCK_W // 4, 4]), 2)
        inputs = tl.sum(tl.reshape(inputs, [1, BLOCK_W // 4, 4]), 2)
        total += products * (scale * 2.0**69) + inputs * (middle - HALF * scale)
        packed = _tile(words, output, start + BLOCK_W, NUM_OUTPUTS, W, BLOCK_W)
    _finish(
        tl.sum(total, 1), output, row, bias, low, up, residual, y, low_scale, alpha, NUM_OUTPUTS,
        HAS_BIAS, R, R_PADDED, GELU, HAS_RESIDUAL,
    )  # fmt: skip


def project(
    x: Tensor,
    weight: Tensor | Words,
    bias_O: Tensor | None = None,
    *,
    update: tuple[Tensor, Tensor, float] | None = None,
    gelu: bool = False,
    residual: Tensor | None = None,
    alpha: float = 1.0,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """``gelu(x @ weight.T + bias + update) + alpha * residual``, in float32 until it is stored.

    Args:
        x: ``(..., I)``, a few rows, contiguous; best in float32 where weights are packed, else in
            the weights' type, so that threads hold both in the same layout.
        weight: ``(O, I)``, floats or packed.
        bias_O: the bias; None without one.
        update: low ``(B, R)``, up ``(O, R)`` and a scale: an adapter adds ``low @ up.T * scale``.
        gelu: whether to apply GELU, in its tanh form.
        residual: ``(..., O)``, contiguous.
        alpha: factor of the residual.
        dtype: type of the result; by default that of x.

    Returns:
        ``(..., O)``.
    """
    matrix = weight.words_OW if isinstance(weight, Words) else weight
    num_outputs, num_inputs = len(matrix), x.shape[-1]
    assert x.is_contiguous()
    assert matrix.is_contiguous()
    y = x.new_empty(*x.shape[:-1], num_outputs, dtype=dtype)
    low, up, low_scale = update or (None, None, 0.0)
    rank = 0 if low is None else low.shape[-1]
    block_o, block_i, warps = _blocks(num_outputs, num_inputs, weight)
    grid = triton.cdiv(num_outputs, block_o), x.numel() // num_inputs
    early = launches_early(x.device)
    after = (
        bias_O, low, up, residual, y, low_scale, alpha, num_outputs,
        bias_O is not None, rank, triton.next_power_of_2(rank) if rank else 0, gelu,
        residual is not None, num_inputs, early,
    )  # fmt: skip
    if isinstance(weight, Words):
        scales, shape = weight.scale_middle_OG2.view(torch.int32), (block_o, block_i)
        _project_words[grid](
            x, matrix, scales, *after, weight.bits, GROUP_SIZE, *shape,
            num_warps=warps, maxnreg=_REGISTERS, launch_pdl=early,
        )  # fmt: skip
    else:
        _project[grid](x, matrix, *after, block_o, block_i, num_warps=warps, launch_pdl=early)
    return y


def _blocks(num_outputs: int, num_inputs: int, weight: Tensor | Words) -> tuple[int, int, int]:
    """Outputs and inputs (or words) of a block, and its warps, as measured fastest on an H200.

    A warp reads 128 words of 4 bytes at a time. With many outputs, one warp each keeps the GPU
    busy; with few, the long rows are divided among four warps.
    """
    if not isinstance(weight, Words):
        return 4, min(1024, triton.next_power_of_2(num_inputs)), 2
    return (8, 128, 1) if num_outputs >= 8192 else (32 // weight.bits, 512, 4)


@triton.jit
def _unpack(words, scales, y, NUM_INPUTS: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
            BLOCK: tl.constexpr):  # fmt: skip
    """The weights of some words of one output."""
    W: tl.constexpr = NUM_INPUTS * BITS // 32
    HALF: tl.constexpr = 2.0 ** (BITS - 1)
    output, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < W
    packed = tl.load(words + output * W + column, inside, 0)
    group = output * (NUM_INPUTS // GROUP) + column // (GROUP * BITS // 32)
    pair = tl.load(scales + group, inside, 0)
    scale = (pair << 16).to(tl.float32, bitcast=True)
    middle = (pair & -65536).to(tl.float32, bitcast=True)
    for n in tl.static_range(32 // BITS):
        number = _number(packed, n, BITS) * _power(n, BITS) * 2.0**69
        value = (number - HALF) * scale + middle
        at = output * NUM_INPUTS + n * W + column
        tl.store(y + at, value.to(y.dtype.element_ty), inside)


def unpack(weight: Words, dtype: torch.dtype) -> Tensor:
    """Do what `Words.unpack` does, in one kernel."""
    num_outputs, num_words = weight.words_OW.shape
    num_inputs, block = num_words * 32 // weight.bits, 512
    y = weight.words_OW.new_empty(num_outputs, num_inputs, dtype=dtype)
    scales = weight.scale_middle_OG2.view(torch.int32)
    _unpack[(num_outputs, triton.cdiv(num_words, block))](
        weight.words_OW, scales, y, num_inputs, weight.bits, GROUP_SIZE, block
    )
    return y


@triton.jit
def _normalise(x, weight, bias, y, epsilon, H, EARLY: tl.constexpr, BLOCK: tl.constexpr):
    let_next_begin(EARLY)
    row, column = tl.program_id(0), tl.arange(0, BLOCK)
    inside = column < H
    scale = tl.load(weight + column, inside, 0.0).to(tl.float32)
    shift = tl.load(bias + column, inside, 0.0).to(tl.float32)
    await_last(EARLY)
    value = tl.load(x + row * H + column, inside, 0.0).to(tl.float32)
    centred = tl.where(inside, value - tl.sum(value, 0) / H, 0.0)
    variance = tl.sum(centred * centred, 0) / H
    result = centred * tl.rsqrt(variance + epsilon) * scale + shift
    tl.store(y + row * H + column, result.to(y.dtype.element_ty), inside)


def normalise(x: Tensor, norm: Norm, dtype: torch.dtype) -> Tensor:
    """Apply a `Norm` to a few rows, ``(..., H)``, in one kernel."""
    y = torch.empty_like(x, dtype=dtype)
    width = x.shape[-1]
    block = triton.next_power_of_2(width)
    warps = 8 if block > 1024 else 2
    _normalise[(x.numel() // width,)](
        x, norm.weight, norm.bias, y, norm.epsilon, width, launches_early(x.device), block,
        num_warps=warps, launch_pdl=launches_early(x.device),
    )  # fmt: skip
    return y
