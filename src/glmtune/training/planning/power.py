"""The smallest difference between base and tuned that N held-out rows can show.

Known before a run starts, so that too few rows are noticed before hours are spent.
"""

import math
from statistics import NormalDist

CONFIDENCE = 0.95
POWER = 0.80
ASSUMED_DEVIATION = 25.0
"""Standard deviation, in points of chrF, of a row's difference between two sides."""


def smallest_difference(num_rows: int, deviation: float = ASSUMED_DEVIATION) -> float:
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
