"""Runs of these tests are asked little when they end: training their few rows takes less."""

import pytest

WHOLE = ("test_collapse", "test_planted_adapters", "test_serve_page")
"""Tests of what such answers show."""


@pytest.fixture(autouse=True)
def brief_answers(request, monkeypatch):
    """The check-up after training and the answers at evaluations end after four tokens."""
    if request.path.stem not in WHOLE:
        monkeypatch.setattr("glmtune.evaluation.checkup.SHORT_ANSWER", 4)
        monkeypatch.setattr("glmtune.training.samples.MOST_TOKENS", 4)
