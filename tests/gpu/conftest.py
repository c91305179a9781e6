"""What tests of compiled passes share."""

import pytest
import torch


@pytest.fixture(scope="module")
def rows(request):
    """Random rows for the module's CONFIG."""
    from glmtune.bench.rows import random_rows

    return random_rows(request.module.CONFIG, 400)


@pytest.fixture
def fresh_compiler():
    """What an earlier test compiled does not count as this one's recompilation."""
    torch._dynamo.reset()
