"""Products of a matrix with one vector for each of a few rows, as Triton kernels.

Each block reads a few whole rows of the matrix, and numbers of 8 or 4 bits become floats by placing
their bits in a float's fraction. `ops.decoding_kernels` calls them.
"""

import triton
import triton.language as tl

from glmtune.ops.early_launch import await_last, let_next_begin


@triton.jit
def load_tile(matrix, output, start, NUM_OUTPUTS, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Load some columns of some rows of a matrix, each read once and not worth caching."""
    column = start + tl.arange(0, BLOCK)
    inside = (output < NUM_OUTPUTS)[:, None] & (column < WIDTH)[None, :]
    at = matrix + output.to(tl.int64)[:, None] * WIDTH + column[None, :]
    return tl.load(at, inside, 0, eviction_policy="evict_first")


@triton.jit
def number_at(words, N: tl.constexpr, BITS: tl.constexpr):
    """Number q of each word as the subnormal float ``q * 2^(_place - 149)``."""
    PLACE: tl.constexpr = _place(N, BITS)
    MASK: tl.constexpr = ((1 << BITS) - 1) << PLACE
    return ((words >> (N * BITS - PLACE)) & MASK).to(tl.float32, bitcast=True)


@triton.constexpr_function
def _place(n: int, bits: int) -> int:
    """The bit of a float's fraction where number n of a word begins, so that few need a shift."""
    return n * bits if (n + 1) * bits <= 20 else n * bits - (12 if bits == 4 else 16)


@triton.constexpr_function
def power_at(n: int, bits: int) -> float:
    """The factor of an input that makes its product with `number_at` ``q x 2^-69``."""
    return 2.0 ** (80 - _place(n, bits))


@triton.jit
def _sums(
    x, weight, scales, output, row, NUM_OUTPUTS, NUM_INPUTS: tl.constexpr,
    EARLY: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, BLOCK_O: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Products of one row of inputs with some rows of a matrix: of BITS bits, or of floats if 0.

    The first weights load while the kernel waits for the inputs.
    """
    if BITS == 0:
        column = tl.arange(0, BLOCK)
        total = tl.zeros([BLOCK_O, BLOCK], tl.float32)
        tile = load_tile(weight, output, 0, NUM_OUTPUTS, NUM_INPUTS, BLOCK)
        await_last(EARLY)
        for start in range(0, NUM_INPUTS, BLOCK):
            at_x = x + row * NUM_INPUTS + start + column[None, :]
            inside = (start + column < NUM_INPUTS)[None, :]
            value = tl.load(at_x, inside, 0.0).to(tl.float32)
            total += value * tile.to(tl.float32)
            tile = load_tile(weight, output, start + BLOCK, NUM_OUTPUTS, NUM_INPUTS, BLOCK)
    else:
        # Words and inputs have four bytes each, four to a thread.
        column, four = tl.arange(0, BLOCK), 4 * tl.arange(0, BLOCK // 4)
        W: tl.constexpr = NUM_INPUTS * BITS // 32
        HALF: tl.constexpr = 2.0 ** (BITS - 1)
        total = tl.zeros([BLOCK_O, BLOCK // 4], tl.float32)
        at_scales = scales + output[:, None] * (NUM_INPUTS // GROUP)
        is_output = (output < NUM_OUTPUTS)[:, None]
        tile = load_tile(weight, output, 0, NUM_OUTPUTS, W, BLOCK)
        await_last(EARLY)
        for start in range(0, W, BLOCK):
            inside = (start + column < W)[None, :]
            group = (start + four[None, :]) // (GROUP * BITS // 32)
            pair = tl.load(at_scales + group, is_output & (start + four < W)[None, :], 0)
            scale = (pair << 16).to(tl.float32, bitcast=True)  # two bfloat16
            middle = (pair & -65536).to(tl.float32, bitcast=True)
            products = tl.zeros_like(tile).to(tl.float32)
            inputs = tl.zeros([1, BLOCK], tl.float32)
            for n in tl.static_range(32 // BITS):
                at = n * W + start + column[None, :]
                value = tl.load(x + row * NUM_INPUTS + at, inside, 0.0).to(tl.float32)
                products += number_at(tile, n, BITS) * (value * power_at(n, BITS))
                inputs += value
            products = tl.sum(tl.reshape(products, [BLOCK_O, BLOCK // 4, 4]), 2)
            inputs = tl.sum(tl.reshape(inputs, [1, BLOCK // 4, 4]), 2)
            total += products * (scale * 2.0**69) + inputs * (middle - HALF * scale)
            tile = load_tile(weight, output, start + BLOCK, NUM_OUTPUTS, W, BLOCK)
    return tl.sum(total, 1)


@triton.jit
def _add(sums, output, row, bias, low, up, low_scale, NUM_OUTPUTS, R: tl.constexpr,
         R_PADDED: tl.constexpr):  # fmt: skip
    """Add the bias and an adapter's update to some outputs of one row."""
    is_output = output < NUM_OUTPUTS
    if bias is not None:
        sums += tl.load(bias + output, is_output, 0.0).to(tl.float32)
    if R > 0:
        inner = tl.arange(0, R_PADDED)
        low_R = tl.load(low + row * R + inner, inner < R, 0.0).to(tl.float32)
        is_up = is_output[:, None] & (inner < R)[None, :]
        up_OR = tl.load(up + output[:, None] * R + inner[None, :], is_up, 0.0).to(tl.float32)
        sums += low_scale * tl.sum(low_R[None, :] * up_OR, 1)
    return sums


@triton.jit
def gelu_of(x):
    """GELU in its tanh form, as a sigmoid, which takes one exponential."""
    return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))


@triton.jit
def project_vectors(
    x, weight, scales, bias, low, up, residual, y, low_scale, alpha, NUM_OUTPUTS,
    R: tl.constexpr, R_PADDED: tl.constexpr, GELU: tl.constexpr, GATED: tl.constexpr,
    NUM_INPUTS: tl.constexpr, EARLY: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One block of a product, and what follows it."""
    let_next_begin(EARLY)
    column, row = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O), tl.program_id(1)
    num_columns, output = NUM_OUTPUTS, column
    if GATED:  # each gate beside what it multiplies, half of the outputs away
        output = column // 2 + column % 2 * (NUM_OUTPUTS // 2)
    sums = _sums(
        x, weight, scales, output, row, NUM_OUTPUTS, NUM_INPUTS, EARLY, BITS, GROUP, BLOCK_O, BLOCK,
    )  # fmt: skip
    sums = _add(sums, output, row, bias, low, up, low_scale, NUM_OUTPUTS, R, R_PADDED)
    if GELU:
        sums = gelu_of(sums)
    if GATED:
        gate, value = tl.split(tl.reshape(sums, [BLOCK_O // 2, 2]))
        sums, num_columns = gate * tl.sigmoid(gate) * value, NUM_OUTPUTS // 2
        column = tl.program_id(0) * (BLOCK_O // 2) + tl.arange(0, BLOCK_O // 2)
    at, is_column = row * num_columns + column, column < num_columns
    if residual is not None:
        sums += alpha * tl.load(residual + at, is_column, 0.0).to(tl.float32)
    tl.store(y + at, sums.to(y.dtype.element_ty), is_column)


@triton.jit
def project_three_vectors(
    x, weight_0, scales_0, bias_0, low_0, up_0, weight_1, scales_1, bias_1, low_1, up_1,
    weight_2, scales_2, bias_2, low_2, up_2, y, scale_0, scale_1, scale_2,
    NUM_0, NUM_1, NUM_2, R_0: tl.constexpr, R_1: tl.constexpr, R_2: tl.constexpr,
    P_0: tl.constexpr, P_1: tl.constexpr, P_2: tl.constexpr,
    NUM_INPUTS: tl.constexpr, EARLY: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One block of three products of the same inputs, whose outputs lie side by side."""
    let_next_begin(EARLY)
    block, row = tl.program_id(0), tl.program_id(1)
    blocks_0, blocks_1 = tl.cdiv(NUM_0, BLOCK_O), tl.cdiv(NUM_1, BLOCK_O)
    at = y + row * (NUM_0 + NUM_1 + NUM_2)
    if block < blocks_0:
        output = block * BLOCK_O + tl.arange(0, BLOCK_O)
        sums = _sums(
            x, weight_0, scales_0, output, row, NUM_0, NUM_INPUTS, EARLY, BITS, GROUP, BLOCK_O,
            BLOCK,
        )  # fmt: skip
        sums = _add(sums, output, row, bias_0, low_0, up_0, scale_0, NUM_0, R_0, P_0)
        tl.store(at + output, sums.to(y.dtype.element_ty), output < NUM_0)
    elif block < blocks_0 + blocks_1:
        output = (block - blocks_0) * BLOCK_O + tl.arange(0, BLOCK_O)
        sums = _sums(
            x, weight_1, scales_1, output, row, NUM_1, NUM_INPUTS, EARLY, BITS, GROUP, BLOCK_O,
            BLOCK,
        )  # fmt: skip
        sums = _add(sums, output, row, bias_1, low_1, up_1, scale_1, NUM_1, R_1, P_1)
        tl.store(at + NUM_0 + output, sums.to(y.dtype.element_ty), output < NUM_1)
    else:
        output = (block - blocks_0 - blocks_1) * BLOCK_O + tl.arange(0, BLOCK_O)
        sums = _sums(
            x, weight_2, scales_2, output, row, NUM_2, NUM_INPUTS, EARLY, BITS, GROUP, BLOCK_O,
            BLOCK,
        )  # fmt: skip
        sums = _add(sums, output, row, bias_2, low_2, up_2, scale_2, NUM_2, R_2, P_2)
        tl.store(at + NUM_0 + NUM_1 + output, sums.to(y.dtype.element_ty), output < NUM_2)
