"""The device a run uses, the number format it computes in, and how much memory it takes."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

GIB = 1024**3


def pick_device(use_cpu: bool = False) -> "torch.device":
    """The GPU where there is one, unless the CPU is asked for."""
    import torch

    return torch.device("cuda" if torch.cuda.is_available() and not use_cpu else "cpu")


def pick_dtype(
    device: "torch.device", bf16: bool | None = None, fp16: bool = False
) -> tuple["torch.dtype", str | None]:
    """The compute type, and a word of caution where one is due.

    bfloat16 on a GPU that has it, float16 where that is asked for or a GPU has nothing better,
    float32 on a CPU.
    """
    import torch

    caution = (
        "float16 overflows at 65,504: watch for a loss that turns NaN or 0; bfloat16 (--bf16 true) "
        "is safer where the GPU has it"
    )
    if fp16:
        return torch.float16, caution
    if bf16 or (bf16 is None and device.type == "cuda" and torch.cuda.is_bf16_supported(False)):
        return torch.bfloat16, None
    if bf16 is None and device.type == "cuda":
        return torch.float16, f"this GPU has no bfloat16, so float16 is used; {caution}"
    return torch.float32, None
