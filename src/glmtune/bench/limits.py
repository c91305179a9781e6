"""The upper limit of a training step: the time of the model's matrix products alone.

A LoRA step multiplies each frozen weight twice, forward and for the gradient of its input. No step
can be faster than these products on random numbers, run one after the other.
"""

import torch
from torch import Tensor

from glmtune.bench.timing import median_ms
from glmtune.models.shape import Shape
from glmtune.ops import CHUNK
from glmtune.ops.linear import quantise, quantise_rows

# Number of layers whose weights are allocated: enough that a GPU's cache does not keep any weights
# until they are used again.
_LAYERS_HELD = 4


def matmul_limit(
    shape: Shape,
    num_tokens: int,
    num_supervised: int,
    device: torch.device,
    dtype: torch.dtype,
    fp8: bool = False,
) -> float:
    """Milliseconds of the matrix products of a step, median of five runs.

    Args:
        shape: of the model.
        num_tokens: rows multiplied with the layers' weights.
        num_supervised: rows multiplied with the head's.
        device: to run on.
        dtype: the compute type.
        fp8: multiply the layers in float8, with weights and inputs quantised beforehand.
    """

    def random(*size: int) -> Tensor:
        return 0.02 * torch.randn(size, device=device, dtype=dtype)

    shapes = [(linear.outputs, linear.inputs) for linear in shape.linears]
    head, hidden = random(shape.vocab_size, shape.hidden_size), random(CHUNK, shape.hidden_size)
    logits = random(CHUNK, shape.vocab_size)
    inputs = {size: random(num_tokens, size) for size in {n for pair in shapes for n in pair}}
    held = min(_LAYERS_HELD, shape.num_layers)
    weights = [random(*pair) for _ in range(held) for pair in shapes]
    rounds = shape.num_layers / held
    if fp8:
        eight = {size: quantise_rows(x) for size, x in inputs.items()}
        quantised = [quantise(weight, None) for weight in weights]
        inputs, weights = {}, []

    def layers() -> None:
        for weight in weights:
            torch.mm(inputs[weight.shape[1]], weight.T)
        for weight in weights:
            torch.mm(inputs[weight.shape[0]], weight)

    def layers_fp8() -> None:
        for back in (False, True):
            for linear in quantised:
                w8, scale = linear[2:4] if back else linear[:2]
                assert w8 is not None
                x8, x_scale = eight[w8.shape[1]]
                torch._scaled_mm(
                    x8, w8.T, x_scale, scale[None], out_dtype=dtype, use_fast_accum=True
                )

    def all_products() -> None:
        for _ in range(round(rounds)):
            layers_fp8() if fp8 else layers()
        for start in range(0, num_supervised, CHUNK):
            size = min(CHUNK, num_supervised - start)
            torch.mm(hidden[:size], head.T)
            torch.mm(logits[:size], head)

    return median_ms(all_products, device, warmup=2, repeats=5)


def copy_rate(device: torch.device) -> float:
    """Bytes read and written a second while a large tensor is copied."""
    source = torch.randn(2**28 if device.type == "cuda" else 2**25, device=device)
    target = torch.empty_like(source)
    ms = median_ms(lambda: target.copy_(source), device, warmup=2, repeats=7)
    return 2 * source.nbytes / ms * 1e3
