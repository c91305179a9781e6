"""`--to vllm-adapter`: the adapter as `adapters.for_vllm` has it, opened with vLLM's loader."""

import json
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

from safetensors.torch import load_file

from glmtune.adapters.for_vllm import for_vllm, installed_vllm, version_numbers
from glmtune.adapters.formats import Adapter, write_adapter
from glmtune.adapters.naming import updates_of
from glmtune.data.files import write_json
from glmtune.errors import UserError
from glmtune.export import vllm_reader
from glmtune.export.adapter_names import USE_HF, has_published_base
from glmtune.export.job import Job
from glmtune.export.reopening import OURS, Reopened, reopen_adapter
from glmtune.models.resolve import base_name


def write(job: Job, folder: Path) -> Reopened:
    """Write the adapter for vLLM, and open it with vLLM's loader where that is installed."""
    wish = job.source.settings.vllm_version
    version = version_numbers(wish) if wish else installed_vllm()
    adapter = for_vllm(job.adapter, job.source.base, version, "--to vllm-adapter", USE_HF)
    write_adapter(adapter.config, adapter.weights, folder, base_name(job.source.base))
    found = reopen_adapter(job.source.base, str(job.source.adapter), str(folder))
    notes = [_which_versions(job, version)]
    if find_spec("vllm") is None:
        notes.append("vLLM is not installed here, so it did not read it")
        return Reopened(OURS, False, found, tuple(filter(None, notes)))
    by = _read_by_vllm(adapter, folder)
    found = f"the same A, B and scales; {found}"
    return Reopened(by, True, found, tuple(filter(None, notes)))


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
