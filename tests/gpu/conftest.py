"""Fixtures for tests of compiled passes."""

import pytest
import torch


@pytest.fixture(scope="module")
def rows(request):
    """Random rows for the module's CONFIG."""
    from glmtune.bench.rows import random_rows

    return random_rows(request.module.CONFIG, 400)


@pytest.fixture
def fresh_compiler():
    """Clear compiled code, so that a test counts only its own recompilations."""
    torch._dynamo.reset()
