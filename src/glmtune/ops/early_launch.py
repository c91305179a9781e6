"""Programmatic dependent launch: each kernel is launched while the one before it ends.

A kernel that is launched so waits for its inputs by itself. Hopper and newer GPUs have it.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


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


@lru_cache(maxsize=8)
def launches_early(device: torch.device) -> bool:
    """Whether the GPU has programmatic dependent launch: Hopper and newer do."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
