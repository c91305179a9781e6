"""The package's data files are in the checkout and in a wheel."""

import tomllib
from importlib import resources
from pathlib import Path

PACKAGE = Path(str(resources.files("glmtune")))


def files() -> list[Path]:
    """Every file of the package that is not a module."""
    found = (path for path in PACKAGE.rglob("*") if path.is_file())
    return [path for path in found if path.suffix not in (".py", ".pyc")]


def test_the_demo_finds_its_model_and_its_grammar():
    names = {path.relative_to(PACKAGE).as_posix() for path in files()}
    model = ("config.json", "ice_text.model", "model.safetensors", "README.md")
    assert {f"models/glm-tiny/{name}" for name in model} <= names
    assert "demo/grammar/words.txt" in names


def test_pages_find_their_style_and_script():
    names = {path.relative_to(PACKAGE).as_posix() for path in files()}
    assert {
        f"evaluation/{name}"
        for name in ("page.css", "rows.css", "rows.js", "language.js", "inspect.css", "inspect.js")
    } <= names
    scripts = ("main.js", "chat.js", "run.js", "server.js", "history.js", "parts.js")
    assert {f"serving/page/{name}" for name in ("index.html", "serving.css", *scripts)} <= names
    assert {"general/zh.jsonl", "general/en.jsonl", "models/glm-tiny/general_zh.jsonl"} <= names


def test_a_wheel_takes_along_every_file(root):
    # setuptools takes only what is named here.
    settings = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = settings["tool"]["setuptools"]["package-data"]["glmtune"]
    taken = {path for pattern in patterns for path in PACKAGE.glob(pattern)}
    assert [path for path in files() if path not in taken] == []
