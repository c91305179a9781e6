"""Fixtures shared by all tests: the golden folders inside the project and, where it lies, ../shared."""

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden"


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return ROOT


@pytest.fixture(scope="session")
def shared() -> Path:
    """../shared: tokenizer models and alpaca records under their own licences, not in the project."""
    folder = ROOT.parent / "shared"
    if not (folder / "golden").is_dir():
        pytest.skip("../shared is not here: the real tokenizer and records lie outside the project")
    return folder


@pytest.fixture(scope="session")
def tiny_folder() -> Path:
    """A 4-layer ChatGLM-6B of revision v1.1 with random weights, in the published layout."""
    return GOLDEN / "chatglm-6b-tiny"
