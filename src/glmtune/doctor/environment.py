"""Checks of the machine: Python, libraries, card, and what lies in the hub's cache."""

import importlib
import os
import platform
import re
import shutil
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

from packaging.version import Version

from glmtune.doctor.checkout import OLDEST_PYTHON
from glmtune.doctor.explain import find_known
from glmtune.doctor.findings import OK, PROBLEM, WARNING, CheckLine
from glmtune.errors import UserError, reason_of
from glmtune.hardware import GIB, device_name, pick_device, pick_dtype

# As in pyproject.toml.
OLDEST = {
    "torch": "2.11", "transformers": "5.17", "peft": "0.21", "accelerate": "1.15",
    "datasets": "4.0", "safetensors": "0.8", "sentencepiece": "0.2.3", "orjson": "3.11",
    "xxhash": "3.5", "pydantic": "2.12", "pyyaml": "6.0", "tensorboard": "2.20",
    "matplotlib": "3.10", "tqdm": "4.67", "sacrebleu": "2.6", "rapidfuzz": "3.14.1",
}  # fmt: skip
# Newer ones may work, but were not tested.
NEWEST_TESTED = {"torch": "2.13", "transformers": "5.24", "peft": "0.21"}


class BadVersion(NamedTuple):
    """Versions known to be harmful: from `first` on, before `fixed`."""

    package: str
    first: str
    fixed: str
    reason: str
    source: str


BAD_VERSIONS = (
    BadVersion(
        "sentencepiece", "0", "0.2.3",
        "encodes a character of the recorded texts otherwise, so rows get other ids",
        "docs/log.md",
    ),
    BadVersion(
        "transformers", "4.34", "5.17",
        "stopped the published remote code at 4.34, 4.45, 4.49 and 5.0, and is too old for the "
        "native model",
        "zai-org/ChatGLM-6B#1505, zai-org/ChatGLM3#1324, zai-org/GLM-4#715",
    ),
    BadVersion(
        "peft", "0", "0.3",
        "writes adapters with enable_lora, which no later one reads",
        "hiyouga/LlamaFactory#5348",
    ),
    BadVersion(
        "bitsandbytes", "0", "0.49",
        "rounds a saved 8-bit folder twice on a CPU, and before 0.43 looks for CUDA where it often "
        "is not (CUDA Setup failed)",
        "docs/log.md, bitsandbytes-foundation/bitsandbytes#966",
    ),
)  # fmt: skip
# What a run imports before its first step, and what PEFT and transformers import if it is
# installed, needed or not.
_NEEDED = ("numpy", "torch", "transformers", "peft", "accelerate", "datasets", "sentencepiece")
_IMPORTED_IF_THERE = ("bitsandbytes", "torchvision")
_FREE_SHARE = 0.9  # if less of a card's memory is free, another program uses it


def installed(package: str) -> str | None:
    """The version of an installed package."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def check_python() -> Iterator[CheckLine]:
    """Python's version and the machine."""
    found = platform.python_version()
    if sys.version_info < OLDEST_PYTHON:
        oldest = ".".join(map(str, OLDEST_PYTHON))
        yield PROBLEM, f"{found} is too old: make an environment with Python {oldest} or newer"
    else:
        yield OK, f"{found}, {platform.system()} {platform.machine()}"


def check_packages() -> Iterator[CheckLine]:
    """Check that each library is installed, neither too old nor newer than tested, nor harmful."""
    fine = []
    for package in dict.fromkeys([*OLDEST, *(bad.package for bad in BAD_VERSIONS)]):
        found = installed(package)
        oldest, newest = OLDEST.get(package), NEWEST_TESTED.get(package)
        if found is None:
            if oldest:
                yield PROBLEM, f"{package} is not installed: pip install '{package}>={oldest}'"
            continue
        number = Version(Version(found).base_version)
        bad = [
            entry for entry in BAD_VERSIONS
            if entry.package == package and Version(entry.first) <= number < Version(entry.fixed)
        ]  # fmt: skip
        for entry in bad:
            harm = f"{package} {found} {entry.reason} ({entry.source})"
            yield PROBLEM, f"{harm}: pip install '{package}>={oldest or entry.fixed}'"
        if not bad and oldest and number < Version(oldest):
            yield PROBLEM, f"{package} {found} is too old: pip install '{package}>={oldest}'"
        elif newest and number.release[:2] > Version(newest).release:
            untried = f"{package} {found} is newer than what was tested ({newest})"
            yield WARNING, f"{untried}; if something is odd, pip install '{package}~={newest}.0'"
        elif not bad:
            fine.append(f"{package} {found}")
    yield OK, ", ".join(fine)


def check_imports() -> Iterator[CheckLine]:
    """Whether the libraries can be imported together: a wrong pair fails at its first import."""
    names = [*_NEEDED, *(name for name in _IMPORTED_IF_THERE if installed(name))]
    failed = False
    for name in names:
        try:
            importlib.import_module(name)
        except Exception as error:  # also RuntimeError and OSError, from inner libraries
            failed = True
            reason = reason_of(error)
            known = "".join(f" ({known.cause})" for known in find_known(str(error))[:1])
            spare = "" if name in _NEEDED else f", or pip uninstall {name}: few settings need it"
            yield PROBLEM, f"import {name}: {reason[:200]}{known}; pip install -U {name}{spare}"
    torch = sys.modules.get("torch")
    if torch is not None and "numpy" in sys.modules:
        try:
            torch.zeros(1).numpy()
        except RuntimeError as error:
            failed = True
            yield PROBLEM, f"torch and numpy do not fit ({error}): pip install -U torch numpy"
    if not failed:
        yield OK, f"{', '.join(names)} load"


def check_card(use_cpu: bool, bf16: bool | None, fp16: bool) -> Iterator[CheckLine]:
    """The device a run would use, and its number format."""
    import torch

    cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
    build = f"torch {torch.__version__} with {cuda}"
    has_card = shutil.which("nvidia-smi") is not None or Path("/proc/driver/nvidia").exists()
    sees_card = torch.cuda.is_available()
    if sees_card and not use_cpu:
        yield from _check_gpu(build)
    elif has_card and not use_cpu:
        why = "this build has no CUDA"
        if torch.version.cuda:
            why = "the driver is too old for it, or CUDA_VISIBLE_DEVICES hides the card"
        fix = "install the build that pytorch.org names for your driver"
        yield PROBLEM, f"{build} does not see the NVIDIA card: {why}; {fix}"
    else:
        name = device_name(torch.device("cpu"))
        yield WARNING, f"{build}, on the {name}: enough for glm-tiny; 6B needs a card"
    dtype, caution = pick_dtype(pick_device(use_cpu or not sees_card), bf16, fp16)
    yield (WARNING, caution) if caution else (OK, f"computes in {str(dtype)[6:]}")


def _check_gpu(build: str) -> Iterator[CheckLine]:
    import torch

    device = pick_device()
    name = device_name(device)
    major, minor = torch.cuda.get_device_capability(device)
    kernels = torch.cuda.get_arch_list()
    if kernels and not any(_serves(kernel, 10 * major + minor) for kernel in kernels):
        lack = f"{build} has no kernels for {name}, sm_{major}{minor} ({', '.join(kernels)})"
        yield PROBLEM, f"{lack}: install a build that has"
    free, total = (size / GIB for size in torch.cuda.mem_get_info(device))
    text = f"{name}, {total:.0f} GiB, {build}"
    if free < _FREE_SHARE * total:
        yield WARNING, f"{text}; only {free:.0f} GiB are free: nvidia-smi shows who has the rest"
    else:
        yield OK, text


def _serves(kernel: str, card: int) -> bool:
    """Whether a card runs code that was built as sm_80 or compute_80, for example.

    Machine code (sm) runs on cards of its own generation from that version on, PTX (compute) on all
    later ones.
    """
    number = int(re.sub(r"\D", "", kernel))
    return number <= card and (kernel.startswith("compute") or number // 10 == card // 10)


def check_hub_cache(hub_ids: tuple[str, ...]) -> Iterator[CheckLine]:
    """Incomplete copies of ChatGLM-6B in the hub's cache, and old remote code."""
    from huggingface_hub.constants import HF_HOME, HF_HUB_CACHE

    from glmtune.models.folders import is_lfs_pointer, weight_files

    modules = Path(os.environ.get("HF_MODULES_CACHE", Path(HF_HOME, "modules")))
    if code := list(modules.rglob("modeling_chatglm.py")):
        text = f"{len(code)} copies of ChatGLM's remote code in {modules}, left by other tools"
        yield WARNING, f"{text}: glmtune runs none, they may run a stale one; rm -r {modules}"
    found = False
    for hub_id in hub_ids:
        folder = Path(HF_HUB_CACHE, f"models--{hub_id.replace('/', '--')}")
        if not folder.is_dir():
            continue
        found = True
        faults = [f"{path.name[:12]} is half downloaded" for path in folder.rglob("*.incomplete")]
        for snapshot in folder.glob("snapshots/*"):
            there = list(snapshot.iterdir())
            faults += [f"{path.name} leads nowhere" for path in there if not path.exists()]
            faults += [
                f"{path.name} is a Git-LFS pointer" for path in there
                if path.is_file() and is_lfs_pointer(path)
            ]  # fmt: skip
            try:
                weight_files(snapshot)
            except UserError as error:
                faults.append(str(error))
        if faults:
            more = " ..." if faults[3:] else ""
            told = f"{folder}: {', '.join(faults[:3])}{more}"
            yield WARNING, f"{told}; hf download {hub_id} completes it"
        else:
            yield OK, f"{hub_id} lies whole in {HF_HUB_CACHE}"
    if not found:
        yield OK, f"no ChatGLM-6B in {HF_HUB_CACHE}"


def check_hub() -> Iterator[CheckLine]:
    """Which hub the environment selects, and whether it answers.

    Raises:
        UserError: HF_ENDPOINT is no address.
    """
    from huggingface_hub.constants import ENDPOINT, HF_HUB_OFFLINE

    from glmtune.models.hubs import TIMEOUT_SECONDS, ask, check_endpoint

    check_endpoint()
    if HF_HUB_OFFLINE:
        yield OK, "HF_HUB_OFFLINE is set: nothing is downloaded"
    elif ask(ENDPOINT) is None:
        yield (
            WARNING,
            (
                f"{ENDPOINT} does not answer within {TIMEOUT_SECONDS:g} s, so nothing can be "
                "downloaded: export HF_ENDPOINT=https://... names a mirror, such as hf-mirror.com"
            ),
        )
    elif ENDPOINT != "https://huggingface.co":
        yield OK, f"HF_ENDPOINT is {ENDPOINT}; what it sends is checked against published hashes"
    else:
        yield OK, f"{ENDPOINT} (HF_ENDPOINT names a mirror)"
