"""Allowed imports: a package imports only from floors below its own, or from itself.

docs/architecture.md has the picture. And what must not be imported at all before it is needed.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import glmtune

PACKAGE = Path(glmtune.__file__).parent
FLOORS = [
    {"cards", "launched", "locks"},
    {"errors"},
    {"disk", "drafts", "imports", "run_files", "signals"},
    {"ray_driver"},
    {"spread"},
    {"config", "hardware", "runlog"},
    {"data", "ops"},
    {"models"},
    {"adapters", "general"},
    {"generation"},
    {"training"},
    {"evaluation", "bench", "early", "integrations"},
    {"export"},
    {"tune", "serving"},
    {"demo", "doctor"},
    {"cli"},
    {"__main__"},
]
FLOOR_OF = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
HEAVY = {"torch", "transformers", "datasets", "matplotlib", "peft", "accelerate", "numpy"}


def imports(source: str, module: str, is_package: bool) -> Iterator[str]:
    """Every module that `source` imports, at the top or inside a function, by its full name.

    Of `from x import y` both `x` and `x.y` are given, since y may be a module.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            origin = node.module or ""
            if node.level:
                parts = module.split(".")
                folder = parts[: len(parts) - node.level + is_package]
                origin = ".".join([*folder, *([origin] if origin else [])])
            yield origin
            yield from (f"{origin}.{alias.name}" for alias in node.names)


def rooms_used(source: str, module: str, is_package: bool = False) -> set[str]:
    """The packages of glmtune that a module imports from."""
    names = (name.split(".") for name in imports(source, module, is_package))
    return {parts[1] for parts in names if parts[0] == "glmtune" and parts[1:]} & set(FLOOR_OF)


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down(path):
    room = room_of(path)
    module = ".".join(["glmtune", *path.relative_to(PACKAGE).with_suffix("").parts])
    is_package = path.name == "__init__.py"
    used = rooms_used(
        path.read_text(encoding="utf-8"), module.removesuffix(".__init__"), is_package
    )
    if room == "__init__":
        assert used == set()
        return
    assert room in FLOOR_OF, f"{room} has no floor yet: give it one here and in the picture"
    wrong = {other for other in used - {room} if FLOOR_OF[other] >= FLOOR_OF[room]}
    assert wrong == set()


def test_the_walk_sees_every_form_of_import():
    source = """
import glmtune.data.records
from glmtune import adapters
from glmtune.models.resolve import resolve_base
from ..training import loop
def later():
    from . import report
    import glmtune.config as c
"""
    assert rooms_used(source, "glmtune.evaluation.infer") == {
        "data",
        "adapters",
        "models",
        "training",
        "evaluation",
        "config",
    }
    assert rooms_used("from . import x", "glmtune.ops", is_package=True) == {"ops"}
    assert rooms_used("import os, torch", "glmtune.ops") == set()


def imported_by(code: str) -> set[str]:
    """The top-level packages in memory after `code` has run in a fresh process."""
    code += "\nimport sys\nprint('\\n', *{name.partition('.')[0] for name in sys.modules})"
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(PACKAGE.parent)!r})\n{code}"],
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    return set(done.stdout.splitlines()[-1].split())


@pytest.mark.parametrize(
    "code, absent",
    [
        ("import glmtune", HEAVY | {"pydantic", "yaml"}),
        ("import glmtune.cli", HEAVY | {"pydantic", "yaml"}),
        ("from glmtune.cli import main; main(['--help'])", HEAVY | {"pydantic", "yaml"}),
        ("from glmtune.cli import main; main(['train', '--help'])", HEAVY),
        ("from glmtune.cli import main; main(['train', '--no_such_flag'])", HEAVY),
        ("import glmtune.config", HEAVY),
        ("import glmtune.errors", HEAVY | {"pydantic"}),
    ],
)
def test_light_imports(code, absent):
    present = imported_by(code)
    assert "glmtune" in present
    assert present & absent == set()
