"""The device a run uses, its number format, and its memory: available and used."""

import ctypes
import os
import re
import runpy
import sys
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

from glmtune.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

T = TypeVar("T")

GIB = 1024**3
# For each card: GiB as torch reports them (measured on H100 and H200; for others the rated size
# less some percent for drivers and error correction), compute capability, and dense TFLOP/s of its
# tensor cores in 16 bits with sums in float32; None where the vendor states none or, as for laptops
# of 2021, only ranges. If a card was sold with several sizes, each has its own name.
#
# Sources of the TFLOP/s are NVIDIA's own: for data-centre and RTX A/Ada/PRO cards the data sheets
# (halved where those count sparsity, and again where they count 8 bits), for GeForce cards the
# white papers of Turing (TU102), Ampere (GA102), Ada (AD102) and Blackwell (GB202); where these do
# not list a card, the "AI TOPS" of its product page, which are 8 times that figure for the 40
# series and 16 times for the 50 series, and before those 2 (30 series) or 4 (20 series) times the
# float32 TFLOP/s.
CARDS: dict[str, tuple[float, tuple[int, int], float | None]] = {
    "H200": (139.8, (9, 0), 989), "H100": (79.1, (9, 0), 989), "H100 PCIe": (79.1, (9, 0), 756),
    "H100 NVL": (93.0, (9, 0), 835), "H800": (79.1, (9, 0), 989), "H20": (95.0, (9, 0), 148),
    "B200": (178.0, (10, 0), 2250), "A100 40GB": (39.4, (8, 0), 312),
    "A100 80GB": (79.1, (8, 0), 312), "A800 40GB": (39.4, (8, 0), 312),
    "A800 80GB": (79.1, (8, 0), 312), "A30": (23.5, (8, 0), 165), "L40S": (44.4, (8, 9), 362),
    "L40": (44.4, (8, 9), 181), "L20": (44.4, (8, 9), 119.5), "L4": (22.0, (8, 9), 121),
    "A40": (44.4, (8, 6), 150), "A10": (22.1, (8, 6), 125), "A10G": (22.1, (8, 6), 70),
    "A2": (14.5, (8, 6), 18), "V100 16GB": (15.8, (7, 0), 125), "V100 32GB": (31.7, (7, 0), 125),
    "T4": (14.6, (7, 5), 65), "P100": (15.9, (6, 0), 21), "P40": (22.4, (6, 1), None),
    "P4": (7.4, (6, 1), None), "RTX 5090": (31.4, (12, 0), 209.5),
    "RTX 5090 D": (31.4, (12, 0), 148), "RTX 5090 Laptop": (23.5, (12, 0), 114),
    "RTX 5080": (15.6, (12, 0), 112.6), "RTX 5080 Laptop": (15.6, (12, 0), 83.4),
    "RTX 5070 Ti": (15.6, (12, 0), 87.9), "RTX 5070 Ti Laptop": (11.7, (12, 0), 62),
    "RTX 5070": (11.7, (12, 0), 61.7), "RTX 5070 Laptop": (7.8, (12, 0), 49.9),
    "RTX 5060 Ti 8GB": (7.8, (12, 0), 47.4), "RTX 5060 Ti 16GB": (15.6, (12, 0), 47.4),
    "RTX 5060": (7.8, (12, 0), 38.4), "RTX 5060 Laptop": (7.8, (12, 0), 35.7),
    "RTX 5050": (7.8, (12, 0), 26.3), "RTX 4090": (23.6, (8, 9), 165),
    "RTX 4090 D": (23.6, (8, 9), 147), "RTX 4090 Laptop": (15.7, (8, 9), 85.7),
    "RTX 4080": (15.7, (8, 9), 97.5), "RTX 4080 Super": (15.7, (8, 9), 104.5),
    "RTX 4080 Laptop": (11.7, (8, 9), 67.7), "RTX 4070": (11.7, (8, 9), 58.3),
    "RTX 4070 Super": (11.7, (8, 9), 71), "RTX 4070 Ti": (11.7, (8, 9), 80.2),
    "RTX 4070 Ti Super": (15.7, (8, 9), 88.2), "RTX 4070 Laptop": (7.8, (8, 9), 40.1),
    "RTX 4060 Ti 8GB": (7.8, (8, 9), 44.1), "RTX 4060 Ti 16GB": (15.7, (8, 9), 44.1),
    "RTX 4060": (7.8, (8, 9), 30.2), "RTX 4060 Laptop": (7.8, (8, 9), 29.1),
    "RTX 4050 Laptop": (5.8, (8, 9), 24.2), "RTX 3090": (23.7, (8, 6), 71),
    "RTX 3090 Ti": (23.7, (8, 6), 80), "RTX 3080 Ti": (11.8, (8, 6), 68.2),
    "RTX 3080 Ti Laptop": (15.7, (8, 6), None), "RTX 3080 10GB": (9.8, (8, 6), 59.5),
    "RTX 3080 12GB": (11.8, (8, 6), 61.3), "RTX 3080 Laptop 8GB": (7.8, (8, 6), None),
    "RTX 3080 Laptop 16GB": (15.7, (8, 6), None), "RTX 3070": (7.8, (8, 6), 40.6),
    "RTX 3070 Ti": (7.8, (8, 6), 43.5), "RTX 3070 Laptop": (7.8, (8, 6), None),
    "RTX 3070 Ti Laptop": (7.8, (8, 6), None), "RTX 3060 Ti": (7.8, (8, 6), 32.4),
    "RTX 3060 8GB": (7.8, (8, 6), 25.5), "RTX 3060 12GB": (11.8, (8, 6), 25.5),
    "RTX 3060 Laptop": (5.8, (8, 6), None), "RTX 3050 6GB": (5.8, (8, 6), 13.5),
    "RTX 3050 8GB": (7.8, (8, 6), 18.2), "RTX 3050 Laptop 4GB": (3.8, (8, 6), None),
    "RTX 3050 Laptop 6GB": (5.8, (8, 6), None), "RTX 3050 Ti Laptop": (3.8, (8, 6), None),
    "RTX 2080 Ti": (10.8, (7, 5), 53.8), "RTX 2080": (7.8, (7, 5), 40.3),
    "RTX 2080 Super": (7.8, (7, 5), 44.6), "RTX 2070": (7.8, (7, 5), 29.9),
    "RTX 2070 Super": (7.8, (7, 5), 36.2), "RTX 2060 6GB": (5.8, (7, 5), 25.8),
    "RTX 2060 12GB": (11.8, (7, 5), 28.7), "RTX 2060 Super": (7.8, (7, 5), 28.7),
    "GTX 1660": (5.8, (7, 5), None), "GTX 1660 Ti": (5.8, (7, 5), None),
    "GTX 1660 Super": (5.8, (7, 5), None), "GTX 1650": (3.8, (7, 5), None),
    "GTX 1080 Ti": (10.9, (6, 1), None), "GTX 1080": (7.9, (6, 1), None),
    "GTX 1070": (7.9, (6, 1), None), "GTX 1070 Ti": (7.9, (6, 1), None),
    "GTX 1060 3GB": (2.9, (6, 1), None), "GTX 1060 6GB": (5.9, (6, 1), None),
    "TITAN RTX": (23.6, (7, 5), 130.5), "RTX A2000 6GB": (5.8, (8, 6), 32),
    "RTX A2000 12GB": (11.7, (8, 6), 32), "RTX A4000": (15.7, (8, 6), 76.7),
    "RTX A4500": (19.7, (8, 6), 94.6), "RTX A5000": (23.7, (8, 6), 111.1),
    "RTX A5500": (23.7, (8, 6), 136.4), "RTX A6000": (47.5, (8, 6), 155),
    "RTX 2000 Ada": (15.6, (8, 9), 48), "RTX 4000 Ada": (19.5, (8, 9), 81.9),
    "RTX 4500 Ada": (23.5, (8, 9), 158.5), "RTX 5000 Ada": (31.5, (8, 9), 261),
    "RTX 6000 Ada": (47.4, (8, 9), 364), "RTX PRO 6000 Blackwell": (95.0, (12, 0), 500),
    "Quadro RTX 5000": (15.7, (7, 5), 89.2), "Quadro RTX 6000": (23.6, (7, 5), 130.5),
    "Quadro RTX 8000": (47.4, (7, 5), 130.5),
}  # fmt: skip
# What vendors and drivers add to a card's own name.
_AROUND = {
    "NVIDIA", "GEFORCE", "TESLA", "RTX", "GTX", "GPU", "PCIE", "SXM", "SXM2", "SXM3", "SXM4",
    "SXM5", "HBM2", "HBM2E", "HBM3", "HBM3E", "GENERATION", "EDITION", "WORKSTATION", "SERVER",
}  # fmt: skip
# Advertised gigabytes are at most this many times the GiB that torch reports.
_RATED = 1.11


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
                f"card {name!r} is not known here; plan by its memory instead, such as "
                f"--memory_gib {_card_words(name)[1] or 24}"
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


def find_cards(name: str) -> list[str]:
    """Names in `CARDS` that a name means: one, several where it leaves that open, or none."""
    words, size = _card_words(name)
    cards = {card: _card_words(card)[0] for card in CARDS}
    found = [card for card, of_card in cards.items() if of_card == words]
    found = found or [card for card, of_card in cards.items() if words and words < of_card]
    if size:
        found = [card for card in found if CARDS[card][0] <= size <= _RATED * CARDS[card][0]]
    return found


def _card_words(name: str) -> tuple[set[str], int | None]:
    """The words that identify a card, and the gigabytes stated in its name."""
    text = re.sub(r"[^A-Z0-9]+", " ", name.upper()).replace("MOBILE", "LAPTOP")
    size = re.search(r"(?<!\S)(\d{1,3}) ?(?:GI?B?)?(?!\S)", text)
    if size:
        text = text[: size.start()] + text[size.end() :]
    text = re.sub(r"\bH100 +PCIE\b", "H100PCIE", text)  # slower than the others of its name
    text = re.sub(r"\b(RTX|GTX)(?=A?\d)", r"\1 ", text)  # RTX4090, RTXA6000
    text = re.sub(r"(?<=\d{4})(?=[A-Z])|(?<=TI)(?=SUPER)", " ", text)  # 4060TI, 4070TISUPER
    return set(text.split()) - _AROUND, int(size[1]) if size else None


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


def free_memory() -> None:
    """Give back what no tensor in use needs, cycles of modules and GPU caches among it."""
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
