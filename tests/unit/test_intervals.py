"""Intervals hold what they promise, and small samples do not promise more than they can."""

import numpy as np
import pytest

from glmtune.evaluation import intervals as module
from glmtune.evaluation.intervals import (
    Interval,
    intervals,
    student_quantile,
)
from glmtune.training.planning.power import LEAST_ROWS, smallest_difference

TRUTHS = 1000


def draw(kind, rng, shape):
    """Differences of rows whose true mean is 0."""
    if kind == "bell":  # such as of log-probabilities
        return rng.normal(0, 1, shape)
    if kind == "right or wrong":  # a third of the rows change, 3 for the better to 1 for the worse
        return rng.choice([-1.0, 0.0, 1.0], size=shape, p=[0.11, 0.59, 0.3]) - 0.19
    return rng.gamma(2, 1, shape) - 2  # most gain little, some much


@pytest.mark.parametrize("kind", ["bell", "right or wrong", "skewed"])
@pytest.mark.parametrize("num_rows", [40, 200])
def test_95_percent_intervals_hold_95_percent_of_truths(kind, num_rows, monkeypatch):
    """1,000 made-up truths are 1,000 columns, so that one bootstrap serves all of them."""
    monkeypatch.setattr(module, "DRAWS", 2000)
    rng = np.random.default_rng([num_rows, len(kind)])
    truths_M = rng.normal(0, 3, TRUTHS)
    found = intervals(draw(kind, rng, (num_rows, TRUTHS)) + truths_M)
    held = np.mean([i.low <= truth <= i.high for i, truth in zip(found, truths_M, strict=True)])
    assert 0.93 <= held <= 0.97


def test_few_rows_get_wide_intervals(monkeypatch):
    monkeypatch.setattr(module, "DRAWS", 2000)
    rng = np.random.default_rng(1)
    found = intervals(rng.normal(0, 1, (LEAST_ROWS, TRUTHS)))
    assert 0.92 <= np.mean([i.low <= 0 <= i.high for i in found]) <= 0.97


@pytest.mark.parametrize("share", [0.05, 0.2, 1.0])
def test_sides_that_are_equally_good_seldom_differ(share, monkeypatch):
    """Also where few rows differ, and those by very unequal amounts."""
    monkeypatch.setattr(module, "DRAWS", 2000)
    rng, shape = np.random.default_rng(5), (40, 2 * TRUTHS)
    signs_NM = rng.choice([-1, 0, 1], size=shape, p=[share / 2, 1 - share, share / 2])
    signs = [found.sign for found in intervals(signs_NM * rng.exponential(20, shape))]
    assert max(signs.count(1), signs.count(-1)) <= 0.05 * len(signs)


def test_intervals_are_the_same_each_time_and_shift_with_the_rows():
    rows_NM = np.random.default_rng(2).normal(0, 1, (30, 2))
    one, two = intervals(rows_NM), intervals(rows_NM + 5)
    assert one == intervals(rows_NM)
    assert np.allclose(np.array(two)[:, :3] - np.array(one)[:, :3], 5)


def test_many_rows_are_drawn_in_parts(monkeypatch):
    rows_NM = np.random.default_rng(3).normal(0, 1, (50, 1))
    whole = intervals(rows_NM)
    monkeypatch.setattr(module, "_NUMBERS_AT_ONCE", 1000)
    assert np.allclose(intervals(rows_NM), whole, atol=0.02)


def test_equal_sides_differ_by_nothing():
    assert intervals(np.zeros((20, 1))) == [Interval(0, 0, 0, 0)]


@pytest.mark.parametrize(
    ("low", "high", "num_changed", "sign"),
    [(0, 0, 9, 0), (0.1, 1, 9, 1), (-2, -1, 9, -1), (-1, 1, 9, 0), (0.1, 1, 5, 0), (0.1, 1, 6, 1)],
)
def test_an_interval_decides_where_0_lies_outside_and_enough_rows_differ(
    low, high, num_changed, sign
):
    assert Interval(0, low, high, num_changed).sign == sign


@pytest.mark.parametrize(
    ("freedom", "wanted"), [(7, 2.3646), (10, 2.2281), (39, 2.0227), (1000, 1.9623)]
)
def test_students_quantiles_are_those_of_the_tables(freedom, wanted):
    assert student_quantile(0.975, freedom) == pytest.approx(wanted, abs=1e-3)


def test_the_smallest_difference_is_found_in_four_of_five_samples(monkeypatch):
    """As stated: a true difference of that size lies beyond 0 with a chance of 80 %."""
    monkeypatch.setattr(module, "DRAWS", 2000)
    rng = np.random.default_rng(4)
    size = smallest_difference(40, 25)
    assert size == pytest.approx(11.07, abs=0.01)
    found = intervals(rng.normal(size, 25, (40, TRUTHS)))
    assert 0.75 <= np.mean([i.sign == 1 for i in found]) <= 0.84
