"""The smallest difference between base and tuned that N held-out rows can show.

Known before a run starts, so that too few rows are noticed before hours are spent.
"""

import math
from statistics import NormalDist

import numpy as np

CONFIDENCE = 0.95
POWER = 0.80
LEAST_ROWS = 8
"""With fewer rows there is no verdict: an interval from them does not hold what it promises."""
LEAST_CHANGED = 6
"""With fewer rows that differ at all, no sign test at 5 % could tell two sides apart: 2 / 2**5."""
WORST_DEVIATION = 50.0
"""Points: the largest standard deviation of a row's gain where no row loses (Popoviciu): a score
lies between 0 and 100, half of the rows go from wrong to right, and half stay as they are."""


def smallest_difference(num_rows: int, deviation: float = WORST_DEVIATION) -> float:
    """The smallest true mean difference that shows with a chance of 80 %.

    That of a paired two-sided test at 5 %, normal approximation: ``(1.96 + 0.84) sd / sqrt(N)``
    (Cohen, Statistical Power Analysis, 1988, chapter 2). A smaller one may show as well, but not
    reliably.

    Args:
        num_rows: N, at least one.
        deviation: standard deviation of a row's difference, in any unit.
    """
    normal = NormalDist()
    factor = normal.inv_cdf((1 + CONFIDENCE) / 2) + normal.inv_cdf(POWER)
    return factor * deviation / math.sqrt(num_rows)


def standard_error(values_N: np.ndarray) -> float:
    """The standard error of a mean over N rows; 0 for one row, which shows none."""
    num_rows = len(values_N)
    return float(values_N.std(ddof=1)) / math.sqrt(num_rows) if num_rows > 1 else 0.0


def describe_power(num_rows: int) -> str:
    """What a comparison on held-out rows will be able to show, in one line."""
    if num_rows < LEAST_ROWS:
        rows = f"{num_rows} rows are" if num_rows else "no row is"
        return f"{rows} held out, and a verdict on the adapter takes {LEAST_ROWS} (--eval_ratio)"
    points = smallest_difference(num_rows)
    return (
        f"your {num_rows:,} held-out rows can show {points:.0f} points or more, of right or wrong "
        "answers (docs/verdict.md)"
    )
