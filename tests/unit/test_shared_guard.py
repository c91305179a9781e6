"""Tests skip without ../shared; on CI, skipping is a failure if ../shared is present."""

import os
import shutil
import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    "is_ci, is_there, code", [(True, True, 1), (True, False, 0), (False, True, 0)]
)
def test_skipping_for_want_of_shared_fails_where_it_is_there(root, tmp_path, is_ci, is_there, code):
    """A run of the one test of a small project, whose ../shared is empty or absent."""
    tests = tmp_path / "project" / "tests"
    tests.mkdir(parents=True)
    shutil.copy(root / "tests" / "conftest.py", tests)
    (tests / "test_one.py").write_text("def test_one(shared):\n    raise AssertionError\n")
    if is_there:
        (tmp_path / "shared").mkdir()
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-rs",
            "-p",
            "no:cacheprovider",
            "--rootdir",
            tests.parent,
        ],
        cwd=tests.parent,
        env={name: value for name, value in os.environ.items() if name != "CI"}
        | ({"CI": "true"} if is_ci else {}),
        capture_output=True,
        text=True,
    )
    assert done.returncode == code, done.stdout
    assert "1 skipped" in done.stdout
    assert "../shared is not here" in done.stdout
