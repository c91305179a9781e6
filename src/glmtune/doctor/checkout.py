"""What the scripts of a checkout check first, before anything is known to be installed.

This file runs on Pythons that are too old for the rest, in order to say so. `make` runs it by
itself before it downloads anything.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

OLDEST_PYTHON = (3, 11)
_NEWER = [f"python3.{minor}" for minor in range(14, OLDEST_PYTHON[1] - 1, -1)]
# In the order in which they are imported.
_NEEDED = ("yaml", "pydantic", "torch", "transformers", "peft", "datasets", "sentencepiece")
_ROOT = Path(__file__).resolve().parents[3]


def check() -> None:
    """End the process, with a line on stderr, if this Python cannot run glmtune."""
    if fault := unfit(_NEEDED):
        print(f"error: {fault}", file=sys.stderr)
        sys.exit(2)


def unfit(needed: tuple[str, ...] = (), root: Path = _ROOT) -> str | None:
    """One line on why this Python cannot run glmtune, and which can; None if it can.

    Args:
        needed: modules that it must have.
        root: the checkout.
    """
    is_old = sys.version_info[:2] < OLDEST_PYTHON
    lacking = [name for name in needed if importlib.util.find_spec(name) is None]
    if not is_old and not lacking:
        return None
    oldest, found = ".".join(map(str, OLDEST_PYTHON)), sys.version.split()[0]
    fault = f"Python {found} is too old, glmtune needs {oldest} or newer"
    if not is_old:
        fault = f"{sys.executable} has no module {lacking[0]}"
    where = "" if Path.cwd() == root else f"{root}{os.sep}"
    place = shlex.quote(f"{where}.venv/bin/activate")
    folder = "Scripts" if os.name == "nt" else "bin"
    in_venv = Path(sys.prefix).resolve() == (root / ".venv").resolve()
    if (root / ".venv" / folder / "activate").is_file() and not in_venv:
        how = f"{where}.venv\\Scripts\\activate" if os.name == "nt" else f"source {place}"
        return f"{fault}: run `{how}` first"
    python = sys.executable
    if is_old:
        python = next(filter(_runs, _NEWER), "")
    if not python:
        return f"{fault}: install one"
    if os.name == "nt":
        return f"{fault}: run `{python} -m venv .venv` and `.venv\\Scripts\\pip install -e .`"
    make = f"make -C {shlex.quote(str(root))}" if where else "make"
    return f"{fault}: run `{make} setup PYTHON={shlex.quote(python)}` and `source {place}`"


def _runs(python: str) -> bool:
    """Whether a name runs a Python: version managers have names for some that are not installed."""
    return (
        bool(shutil.which(python))
        and not subprocess.run([python, "-c", ""], capture_output=True, check=False).returncode
    )


if __name__ == "__main__":
    sys.exit(f"error: {fault}" if (fault := unfit()) else 0)
