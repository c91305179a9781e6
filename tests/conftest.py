"""Fixtures shared by all tests: golden folders in the project and, where it lies, ../shared."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden"
SHARED = ROOT.parent / "shared"
NO_SHARED = "../shared is not here: the real tokenizer and records lie outside the project"


def pytest_sessionfinish(session):
    """On CI a test may not skip for want of ../shared while ../shared is there."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    skipped = reporter.stats.get("skipped", []) if reporter else []
    unfounded = SHARED.is_dir() and any(NO_SHARED in str(report.longrepr) for report in skipped)
    if os.environ.get("CI") and unfounded:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return ROOT


@pytest.fixture(scope="session")
def shared() -> Path:
    """../shared: tokenizer models and alpaca records under their own licences."""
    if not (SHARED / "golden").is_dir():
        pytest.skip(NO_SHARED)
    return SHARED


@pytest.fixture(scope="session")
def tiny_folder() -> Path:
    """A 4-layer ChatGLM-6B of revision v1.1 with random weights, in the published layout."""
    return GOLDEN / "chatglm-6b-tiny"
