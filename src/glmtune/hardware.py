"""The device a run uses, its number format, and its memory: available and used."""

import ctypes
import os
import runpy
import sys
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

from glmtune.cards import CARDS, card_words, find_cards, near_cards
from glmtune.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

T = TypeVar("T")

GIB = 1024**3


class NumberFormat(Protocol):
    """What a plan needs of a `torch.dtype`; `NamedFormat` has it without torch."""

    @property
    def itemsize(self) -> int:
        """Bytes of a number."""


class NamedFormat(NamedTuple):
    """A `torch.dtype` by its name, for a plan that needs no torch."""

    name: str
    itemsize: int

    def __str__(self) -> str:
        return self.name


BFLOAT16, FLOAT16 = NamedFormat("bfloat16", 2), NamedFormat("float16", 2)
FLOAT32 = NamedFormat("float32", 4)


@dataclass(frozen=True)
class Card:
    """A device as a plan needs it: that of this machine, or any other."""

    name: str
    gib: float
    """All of its memory in GiB; 0 if unknown."""
    free_gib: float
    """Memory in GiB that other programs leave free."""
    capability: tuple[int, int] | None
    """Compute capability of a GPU; None of a CPU."""
    rated_tflops: float | None = None
    """Dense 16-bit TFLOP/s by the vendor; None where they are not known here."""

    @classmethod
    def of(cls, device: "torch.device") -> "Card":
        """The device of a run."""
        import torch

        gib = free_gib = total_memory_gib(device)
        capability = None
        if device.type == "cuda":
            capability = torch.cuda.get_device_capability(device)
            free_gib = torch.cuda.mem_get_info(device)[0] / GIB
        return cls(device_name(device), gib, free_gib, capability, rated_tflops(device))

    @classmethod
    def of_cpu(cls) -> "Card":
        """This machine's CPU, for a plan, without torch."""
        gib = machine_memory_gib()
        return cls("CPU", gib, gib, None)

    @classmethod
    def sized(cls, gib: float) -> "Card":
        """A GPU with some memory, of a generation that computes in bfloat16."""
        return cls(f"a card of {gib:g} GiB", gib, gib, (8, 0))

    @classmethod
    def named(cls, name: str) -> "Card":
        """Look up a GPU by its name, or by a unique part of it.

        Raises:
            UserError: no known card matches, or several do.
        """
        found = find_cards(name)
        if not found:
            raise UserError(
                f"card {name!r} is not known here; there are {', '.join(near_cards(name))} and "
                f"others ({len(CARDS)} in all); or plan by its memory, such as --memory_gib "
                f"{card_words(name)[1] or 24}"
            )
        if len(found) > 1:
            raise UserError(
                f"card {name!r} may be {', '.join(found[:-1])} or {found[-1]}: say which, such as "
                f"--card '{found[0]}'"
            )
        gib, capability, tflops = CARDS[found[0]]
        return cls(found[0], gib, gib, capability, tflops)

    @property
    def on_gpu(self) -> bool:
        """Whether it is a GPU."""
        return self.capability is not None

    @property
    def is_hopper(self) -> bool:
        """Whether it is of the Hopper generation, for which cuBLAS uses larger workspaces."""
        return self.capability == (9, 0)


def pick_device(use_cpu: bool = False) -> "torch.device":
    """The GPU if there is one, unless the CPU is requested.

    With several processes on one machine, each gets its own GPU, by the launcher's LOCAL_RANK.

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
    """The compute type, and a warning if there is one to give.

    bfloat16 on a GPU that supports it, float16 if requested or if a GPU supports nothing better,
    float32 on a CPU.

    Raises:
        UserError: float16 on a CPU, or bfloat16 on a GPU without it.
    """
    import torch

    on_gpu = device.type == "cuda"
    has_bf16 = not on_gpu or torch.cuda.is_bf16_supported(including_emulation=False)
    wanted, caution = pick_format(device_name(device), on_gpu, has_bf16, bf16, fp16)
    return getattr(torch, wanted.name), caution


def pick_format(
    card: str, on_gpu: bool, has_bf16: bool, bf16: bool | None = None, fp16: bool = False
) -> tuple[NamedFormat, str | None]:
    """Choose the compute type like `pick_dtype`, from a card's name and what it supports."""
    caution = (
        "float16 overflows at 65,504: watch for a loss that turns NaN or 0; bfloat16 (--bf16 true) "
        "is safer where the GPU has it"
    )
    if fp16 and not on_gpu:
        raise UserError("fp16 true: float16 needs a GPU; leave fp16 out and the CPU takes float32")
    if bf16 and not has_bf16:
        raise UserError(
            f"bf16 true: {card} computes no bfloat16; leave bf16 out and it takes "
            "float16, or set bf16 false for float32"
        )
    if fp16:
        return FLOAT16, caution
    if bf16 or (bf16 is None and on_gpu and has_bf16):
        return BFLOAT16, None
    if bf16 is None and on_gpu:
        return FLOAT16, f"this GPU has no bfloat16, so float16 is used; {caution}"
    return FLOAT32, None


def has_gpu() -> bool:
    """Whether torch can compute on a GPU here; torch is imported only if there may be one."""
    if "torch" not in sys.modules and not _may_have_gpu():
        return False
    import torch

    return torch.cuda.is_available()


def _may_have_gpu() -> bool:
    """Whether the torch that is installed could use a GPU, and CUDA's driver is there.

    The version file of a build without CUDA has no CUDA version; it holds plain assignments only.
    """
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        return True
    build = runpy.run_path(str(Path(spec.origin).with_name("version.py")))
    if not build.get("cuda"):
        return bool(build.get("hip"))
    try:
        ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return False
    return True


def can_compile(card: Card, head_dim: int, head_dims: tuple[int, ...]) -> bool:
    """Whether the kernels run on a card: Ampere or newer, and heads of a supported size.

    They also need Triton, which is looked for only if this machine has a GPU: a plan for another
    machine's card assumes it.

    Args:
        card: any.
        head_dim: of the model.
        head_dims: those that the family's packed block is compiled for.
    """
    if card.capability is None or card.capability < (8, 0):
        return False
    has_triton = find_spec("triton") is not None or not has_gpu()
    return has_triton and head_dim in head_dims


def check_decoding(device: "torch.device", bits: int, compiled: bool) -> None:
    """Make sure that a device supports the requested kind of decoding.

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
    """A device's name for messages, e.g. "NVIDIA H200" or "CPU, 2 threads"."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} thread(s)"


def rated_tflops(device: "torch.device") -> float | None:
    """Dense 16-bit TFLOP/s of a GPU by its vendor; None where they are not known here.

    Where its name leaves open which of several cards it is, those of the slowest.
    """
    if device.type != "cuda":
        return None
    rates = [CARDS[card][2] for card in find_cards(device_name(device))]
    return min(filter(None, rates), default=None)


def capture_graph(
    warm_up: "Callable[[], object]", times: int, work: "Callable[[], T]", pool: Any = None
) -> "tuple[torch.cuda.CUDAGraph, T]":
    """Record what `work` does on the current GPU as one CUDA graph.

    Args:
        warm_up: like `work`; run before recording, on the same stream, so that what libraries set
            up and compile at first use is not recorded.
        times: how often to run `warm_up`.
        work: recorded, not executed. It must not wait for the device.
        pool: memory of another graph that never runs at the same time, to be shared.

    Returns:
        The graph, and what `work` returned: tensors that each replay fills again.

    Source: PyTorch's notes on CUDA graphs.
    """
    import torch

    aside = _capture_stream(torch.cuda.current_device())
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(times):
            warm_up()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, stream=aside):
        result = work()
    return graph, result


@cache
def _capture_stream(index: int) -> "torch.cuda.Stream":
    """One stream for all graphs of a GPU: cuBLAS keeps 32 MiB a thread for each stream."""
    import torch

    return torch.cuda.Stream(index)


def memory_gib(device: "torch.device") -> float:
    """Peak memory of this process so far, in GiB: tensors on a GPU, or everything on a CPU."""
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
    return machine_memory_gib()


def machine_memory_gib() -> float:
    """The machine's memory in GiB; 0 where unknown."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    except (AttributeError, ValueError, OSError):  # Windows
        return 0.0


def num_cores() -> int:
    """Cores that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # macOS and Windows
        return os.cpu_count() or 1


def free_memory() -> None:
    """Give back what no tensor in use needs, cycles of modules and GPU caches among it."""
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
