"""Other projects' own tests, read from their source at test time; no copy is in this project.

The source is that of the installed release. It is looked for in ``$GLMTUNE_PEERS/NAME`` (a checkout
of the project NAME, "transformers" or "peft", of the same release), then in ``.cache/peers``, where
pip puts the source distribution. If neither is available, a test is skipped with the reason.

A source distribution has only ``tests/test_*.py``: what lies deeper needs a checkout.
"""

import fcntl
import importlib
import importlib.metadata
import os
import subprocess
import sys
import tarfile
import tempfile
import types
from pathlib import Path

import pytest

CHECKOUTS = "GLMTUNE_PEERS"
CACHE = Path(__file__).resolve().parents[2] / ".cache" / "peers"


def find_tests(project: str) -> Path | str:
    """The folder `tests` of an installed project's source, or why it is not available."""
    release = f"{project}-{importlib.metadata.version(project)}"
    if checkouts := os.environ.get(CHECKOUTS):
        tests = Path(checkouts, project, "tests")
        return tests if tests.is_dir() else f"{CHECKOUTS} is {checkouts}, which has no {tests}"
    CACHE.mkdir(parents=True, exist_ok=True)
    tests = CACHE / release / "tests"
    with open(CACHE / f"{release}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # several pytest workers may run this at once
        if not tests.is_dir() and (trouble := download(project, release)):
            return trouble
    return tests


def download(project: str, release: str) -> str:
    """Put a release's source distribution into the cache; returns an error text, or None."""
    with tempfile.TemporaryDirectory(dir=CACHE) as folder:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--retries", "1"]
        wanted = ["--no-binary", project, "--dest", folder, release.replace("-", "==", 1)]
        run = subprocess.run([*pip, *wanted], capture_output=True, text=True)
        archives = list(Path(folder).glob("*.tar.gz"))
        if not archives:
            last = (run.stderr.strip().splitlines() or ["no file came"])[-1]
            return f"the source of {release} cannot be had ({last}); {CHECKOUTS} may name checkouts"
        with tarfile.open(archives[0]) as archive:
            archive.extractall(folder, filter="data")
        Path(folder, release).rename(CACHE / release)
    return ""


@pytest.fixture(scope="session")
def peer_tests():
    """A function from a project's name to its folder `tests`; it skips where there is none."""

    def find(project: str, *files: str) -> Path:
        tests = find_tests(project)
        if isinstance(tests, str):
            pytest.skip(tests)
        if missing := [file for file in files if not (tests / file).is_file()]:
            pytest.skip(f"the source of {project} has no tests/{missing[0]}; {CHECKOUTS} may help")
        return tests

    return find


@pytest.fixture(scope="session")
def import_peer(peer_tests):
    """A function that imports a module of a project's tests, whose relative imports then work.

    They become the package `peers_of_NAME`, since `tests` is taken.
    """

    def load(project: str, module: str, *files: str) -> types.ModuleType:
        pytest.importorskip("parameterized")  # which those tests need
        tests = peer_tests(project, f"{module.replace('.', '/')}.py", *files)
        name = f"peers_of_{project}"
        if name not in sys.modules:
            sys.modules[name] = types.ModuleType(name)
            sys.modules[name].__path__ = [str(tests)]
        return importlib.import_module(f"{name}.{module}")

    return load


@pytest.fixture
def own_tasks_only(monkeypatch):
    """Let lm-evaluation-harness's command index the tasks of `--include_path` alone.

    Reading the thousands that come with it takes 11 s of CPU time; test_lm_eval.py has a process
    that does.
    """
    from lm_eval.tasks import TaskManager

    index = TaskManager.__init__
    without = {"include_defaults": False}
    monkeypatch.setattr(
        TaskManager, "__init__", lambda self, *args, **named: index(self, *args, **named | without)
    )
