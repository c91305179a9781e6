"""How long a run takes, computed from the matrix products of its passes; see docs/cards.md.

A pass of n tokens takes as long as n + `FIXED_TOKENS` tokens of an infinitely long one, whose
matrix products reach `EFFICIENCY` of the card's rated TFLOP/s. Shapes: R rows.
"""

import numpy as np

from glmtune.cards import find_cards
from glmtune.training.planning.forecast import Forecast
from glmtune.training.planning.memory import Setup
from glmtune.training.planning.ranks import PassCost, TokensOf

# Fitted to steps of ChatGLM-6B with rank 8 on query_key_value; tests/unit/test_run_speed.py
# compares them with the records in benchmarks/.
EFFICIENCY = 0.616
"""Share of the rated 16-bit TFLOP/s that matrix products reach in long packs, on an H200."""
FP8_SPEEDUP = 1.56
FIXED_TOKENS = {None: 150, 8: 1230, 4: 500}
"""The fixed cost of a pass, in tokens, by the bits of the weights: mostly reading the weights,
which are dequantised once a pass."""

# Where a pass was measured: card, layout, and how the base is held. Layers were not recomputed.
_MEASURED = {
    ("H200", "packed", None, False), ("H200", "packed", None, True),
    ("H200", "exact", None, False), ("H200", "exact", 4, False),
    ("H100", "packed", None, False), ("H100", "packed", 8, False), ("H100", "packed", 4, False),
}  # fmt: skip
_MEASURED_PARAMETERS = 6_171_787_264  # ChatGLM-6B's


def no_speed(forecast: Forecast) -> str | None:
    """Why the time of a run cannot be computed, or None where it can."""
    card, setup = forecast.card, forecast.setup
    if not card.on_gpu:
        return "not computed for a CPU"
    if card.rated_tflops is None:
        return f"not computed: TFLOP/s of {card.name} are not known here (--card NAME)"
    if not setup.compiled:
        return "not computed: padded rows, and cards before Ampere, have no measured speed"
    return None


def pass_cost(forecast: Forecast) -> PassCost:
    """How long a pass takes on the forecast's card; `no_speed` must have returned None."""
    setup = forecast.setup
    assert forecast.card.rated_tflops is not None
    flops_per_second = EFFICIENCY * 1e12 * forecast.card.rated_tflops
    flops_per_second *= FP8_SPEEDUP if setup.is_fp8 else 1
    flops = flops_per_token(setup, forecast.recompute)
    return PassCost(flops / flops_per_second, FIXED_TOKENS[setup.bits])


def tokens_of_pass(forecast: Forecast, lengths_R: np.ndarray) -> TokensOf:
    """What a pass over some rows computes: compiled packs are filled up, padded rows padded."""
    setup = forecast.setup

    def count(row_ids: np.ndarray) -> float:
        lengths_B = lengths_R[row_ids]
        if not len(lengths_B):
            return 0.0
        if setup.layout == "padded":
            return float(len(lengths_B) * lengths_B.max())
        if setup.compiled and forecast.pack_length:
            return float(forecast.pack_length)
        return float(lengths_B.sum())

    return count


def forward_share(setup: Setup, recompute: int) -> float:
    """Share of a step's matrix products that belong to the forward pass, all an evaluation does."""
    return 2 * setup.shape.matmul_parameters() / flops_per_token(setup, recompute)


def flops_per_token(setup: Setup, recompute: int) -> int:
    """FLOPs of a step's matrix products with frozen weights.

    Each weight is multiplied in the forward pass and for the gradient of its input, which is 4
    FLOPs a token, and those of a recomputed layer once more.
    """
    shape = setup.shape
    return 4 * shape.matmul_parameters() + 2 * recompute * shape.layer_parameters()


def is_measured(forecast: Forecast) -> bool:
    """Whether passes like these were measured on this card."""
    card, setup = forecast.card, forecast.setup
    key = (*find_cards(card.name)[:1], setup.layout, setup.bits, setup.is_fp8)
    return (
        key in _MEASURED
        and not forecast.recompute
        and setup.num_shares == 1
        and str(setup.dtype).endswith("bfloat16")
        and setup.shape.matmul_parameters() == _MEASURED_PARAMETERS
    )
