"""A checkout without its environment, or outside of it: one line with the fix."""

import ast
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from glmtune.demo.run import activation
from glmtune.doctor import checkout
from glmtune.errors import program

SCRIPTS = ("cover_alpaca2jsonl.py", "tokenize_dataset_rows.py", "finetune.py", "infer.py")
OLD_PYTHONS = ("python3.10", "python3.9")


def run(*command, **settings):
    return subprocess.run(command, capture_output=True, text=True, check=False, **settings)


def old_python():
    found = [name for name in OLD_PYTHONS if checkout._runs(name)]
    return found[0] if found else pytest.skip(f"none of {', '.join(OLD_PYTHONS)} is here")


@pytest.fixture
def copy(root, tmp_path):
    """A checkout of its own, with no environment in it."""
    folder = tmp_path / "a checkout"
    shutil.copytree(
        root / "src", folder / "src", ignore=shutil.ignore_patterns("glm-tiny", "*.pyc")
    )
    for name in (*SCRIPTS, "Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(root / name, folder)
    return folder


@pytest.mark.parametrize("script", SCRIPTS)
def test_outside_the_environment_a_script_says_how_to_get_inside(script, copy):
    # -S: the standard library alone
    done = run(sys.executable, "-S", script, "--help", cwd=copy, env={"PATH": os.environ["PATH"]})
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert " has no module " in done.stderr
    assert "run `make setup PYTHON=" in done.stderr


@pytest.mark.skipif(os.name == "nt", reason="a shell's command")
@pytest.mark.parametrize("place", ["inside", "elsewhere"])
def test_the_line_that_activates_works(copy, tmp_path, place):
    run(sys.executable, "-m", "venv", "--without-pip", str(copy / ".venv"))
    (packages,) = (copy / ".venv").glob("lib/python*/site-packages")
    (packages / "of-the-tests.pth").write_text(sysconfig.get_path("purelib") + "\n")
    cwd, script = (copy, "infer.py") if place == "inside" else (tmp_path, f"'{copy}/infer.py'")
    done = run("bash", "-c", f"{sys.executable} -S {script} --help", cwd=cwd)
    assert done.returncode == 2
    advised = done.stderr.split("`")[1]
    assert advised.startswith("source ")
    done = run("bash", "-c", f"{advised} && python {script} --help", cwd=cwd)
    assert done.stdout.startswith("usage: glmtune infer"), done.stderr


def test_an_old_python_is_told_in_the_first_line(copy):
    python = old_python()
    for command in ((python, "finetune.py"), ("make", "demo", f"PYTHON={python}")):
        done = run(*command, cwd=copy)
        assert done.returncode == 2
        assert done.stdout == ""
        first, *_ = done.stderr.splitlines()
        assert first.startswith(f"error: Python {python[6:]}.")
        assert " is too old, glmtune needs 3.11 or newer: " in first
    assert not (copy / ".venv").exists(), "nothing was begun"


def test_processes_of_make_keep_what_python_compiles(root):
    """Where they do not, each that imports torch compiles it again."""
    name = "PYTHONDONTWRITEBYTECODE"
    make = ("make", "--eval", "told: ; @env", "told")
    done = run(*make, cwd=root, env=os.environ | {name: "1", "TOLD": "1"})
    assert "TOLD=1" in done.stdout
    assert name not in done.stdout


def test_the_check_can_be_read_by_an_old_python(root):
    for path in (*(root / name for name in SCRIPTS), Path(checkout.__file__)):
        ast.parse(path.read_text(encoding="utf-8"), feature_version=(3, 8))


def test_what_an_old_python_is_told(monkeypatch, tmp_path):
    monkeypatch.setattr(checkout.sys, "version_info", (3, 10, 4))
    monkeypatch.setattr(checkout, "_runs", lambda name: name == "python3.12")
    told = checkout.unfit(root=tmp_path)
    assert "setup PYTHON=python3.12` and `source " in told
    monkeypatch.setattr(checkout, "_runs", lambda _: False)
    assert checkout.unfit(root=tmp_path).endswith("needs 3.11 or newer: install one")


def test_a_half_made_environment_is_made_again(monkeypatch, tmp_path):
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "activate").touch()
    lacks = checkout.unfit(("no_such_module",), tmp_path)
    assert lacks.endswith("run `source " + str(tmp_path / ".venv/bin/activate") + "` first")
    monkeypatch.setattr(checkout.sys, "prefix", str(tmp_path / ".venv"))
    assert " setup PYTHON=" in checkout.unfit(("no_such_module",), tmp_path)


# --- commands as they work where the user is ---


@pytest.fixture
def environment(tmp_path, monkeypatch):
    """An environment in `work/.venv`, which is not activated; the user is in `work`."""
    folder = tmp_path / "work" / ".venv" / "bin"
    folder.mkdir(parents=True)
    for name in ("python", "glmtune"):
        (folder / name).write_text("#!/bin/sh\n")
        (folder / name).chmod(0o755)
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.setattr(sys, "executable", str(folder / "python"))
    monkeypatch.setattr(sys, "prefix", str(folder.parent))
    monkeypatch.setattr(sys, "base_prefix", "/usr")
    return folder


def test_a_program_that_is_not_on_the_path(environment, monkeypatch, tmp_path):
    assert program() == ".venv/bin/glmtune"
    assert activation() == {"shorter": "source .venv/bin/activate, then glmtune is enough"}
    assert run("sh", "-c", program()).returncode == 0
    monkeypatch.chdir(tmp_path)
    assert program() == "work/.venv/bin/glmtune"
    (tmp_path / "else where").mkdir()
    monkeypatch.chdir(tmp_path / "else where")
    assert program() == str(environment / "glmtune")


def test_a_program_that_is_on_the_path(environment, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", f"{environment}:/usr/bin")
    assert program() == "glmtune"
    assert activation() == {}
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(environment / "glmtune", other)
    monkeypatch.setenv("PATH", f"{other}:/usr/bin")
    assert program() == ".venv/bin/glmtune", "another environment's comes first"


def test_a_program_that_was_not_installed(environment):
    (environment / "glmtune").unlink()
    assert program() == ".venv/bin/python -m glmtune"
