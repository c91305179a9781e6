"""The device a run uses, the number format it computes in, and how much memory there is and was."""

import os
import sys
from typing import TYPE_CHECKING, Any, TypeVar

from glmtune.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

T = TypeVar("T")

GIB = 1024**3
# Dense bfloat16 TFLOP/s (float16 where a card has no bfloat16) by the vendor's datasheets; of two
# names that fit a card the first one counts.
RATED_TFLOPS = {
    "H200": 989, "H100 PCIe": 756, "H100": 989, "A100": 312, "L40S": 362, "A10": 125, "A6000": 155,
    "RTX 4090": 165, "RTX 3090": 71, "T4": 65, "V100": 125,
}  # fmt: skip


def pick_device(use_cpu: bool = False) -> "torch.device":
    """The GPU where there is one, unless the CPU is asked for.

    Of several processes on one machine each gets a GPU of its own, by the launcher's LOCAL_RANK.

    Raises:
        UserError: more processes than GPUs.
    """
    import torch

    if use_cpu or not torch.cuda.is_available():
        return torch.device("cpu")
    index, num_gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if index >= num_gpus:
        raise UserError(
            f"LOCAL_RANK {index}: this machine has {num_gpus} GPU(s); start at most as many "
            "processes on it"
        )
    return torch.device("cuda", index)


def pick_dtype(
    device: "torch.device", bf16: bool | None = None, fp16: bool = False
) -> tuple["torch.dtype", str | None]:
    """The compute type, and a word of caution where one is due.

    bfloat16 on a GPU that has it, float16 where that is asked for or a GPU has nothing better,
    float32 on a CPU.

    Raises:
        UserError: float16 on a CPU, or bfloat16 on a GPU without it.
    """
    import torch

    caution = (
        "float16 overflows at 65,504: watch for a loss that turns NaN or 0; bfloat16 (--bf16 true) "
        "is safer where the GPU has it"
    )
    on_gpu = device.type == "cuda"
    has_bf16 = not on_gpu or torch.cuda.is_bf16_supported(including_emulation=False)
    if fp16 and not on_gpu:
        raise UserError("fp16 true: float16 needs a GPU; leave fp16 out and the CPU takes float32")
    if bf16 and not has_bf16:
        raise UserError(
            f"bf16 true: {device_name(device)} computes no bfloat16; leave bf16 out and it takes "
            "float16, or set bf16 false for float32"
        )
    if fp16:
        return torch.float16, caution
    if bf16 or (bf16 is None and on_gpu and has_bf16):
        return torch.bfloat16, None
    if bf16 is None and on_gpu:
        return torch.float16, f"this GPU has no bfloat16, so float16 is used; {caution}"
    return torch.float32, None


def check_decoding(device: "torch.device", bits: int, compiled: bool) -> None:
    """Make sure that a device can decode as is asked for.

    Raises:
        UserError: no GPU, or one that is too old.
    """
    import torch

    if compiled and device.type != "cuda":
        raise UserError("decode_compile true: needs a GPU; leave it out")
    if device.type != "cuda":
        return
    generation = torch.cuda.get_device_capability(device)
    for asked, oldest, name in (
        (compiled, (7, 0), "decode_compile true"),
        (bits == 4, (8, 0), "decode_bits 4"),
    ):
        if asked and generation < oldest:
            raise UserError(
                f"{name}: {device_name(device)} is of compute capability {generation[0]}."
                f"{generation[1]}, and {oldest[0]}.{oldest[1]} is needed; leave it out"
            )


def device_name(device: "torch.device") -> str:
    """What to call a device in a line for people, e.g. "NVIDIA H200" or "CPU, 2 threads"."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} thread(s)"


def rated_tflops(device: "torch.device") -> float | None:
    """Dense 16-bit TFLOP/s of a GPU by its datasheet; None where it is not known here."""
    if device.type != "cuda":
        return None
    name = device_name(device)
    return next((rate for card, rate in RATED_TFLOPS.items() if card in name), None)


def capture_graph(
    warm_up: "Callable[[], object]", times: int, work: "Callable[[], T]", pool: Any = None
) -> "tuple[torch.cuda.CUDAGraph, T]":
    """Record what `work` does on the current GPU as one CUDA graph.

    Args:
        warm_up: like `work`, so that what libraries set up and compile at first use is not
            recorded; runs so many times before, on a stream of its own.
        times: how often.
        work: is recorded, not done. It must not wait for the device.
        pool: memory of another graph that never runs at the same time, to be shared.

    Returns:
        The graph, and what `work` returned: tensors that each replay fills again.

    Source: PyTorch's notes on CUDA graphs.
    """
    import torch

    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(times):
            warm_up()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        result = work()
    return graph, result


def memory_gib(device: "torch.device") -> float:
    """Most memory this process has held so far, in GiB: tensors of a GPU, or all of it on a CPU."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / GIB  # macOS counts bytes


def total_memory_gib(device: "torch.device") -> float:
    """The device's memory in GiB: a GPU's own, or the machine's for a CPU (0 where unknown)."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory / GIB
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    except (AttributeError, ValueError, OSError):  # Windows
        return 0.0
