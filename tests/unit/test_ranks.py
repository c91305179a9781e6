"""The model of several processes against numbers worked out by hand."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from glmtune.training.plan import PackPlan, RowPlan
from glmtune.training.planning.ranks import (
    EpochTime,
    Link,
    PassCost,
    World,
    epoch_time,
    gradient_bytes,
    step_time,
)

FAST, SLOW = Link(1e9, 0.001), Link(1e8, 0.002)
COST = PassCost(1.0, 5)  # a second a token, and five seconds a pass


def pack_plan(num_packs, packs_per_step):
    """Each row fills a pack of ten tokens."""
    lengths = np.full(num_packs, 10)
    return PackPlan(np.arange(num_packs), 0, True, lengths, 10, packs_per_step)


def row_plan(lengths, global_batch, batch):
    return RowPlan(np.arange(len(lengths)), 0, False, np.array(lengths), global_batch, batch)


def tokens_of(plan):
    return lambda row_ids: float(plan.lengths_R[row_ids].sum())


class TestSums:
    def test_one_process_sums_nothing(self):
        assert World(1, 1, FAST, SLOW).sum_seconds(1e9) == 0

    def test_two_cards_send_half_an_array_twice(self):
        # 2 turns of 2 MB at 1 GB/s, 2 ms, and 1 ms of latency
        assert World(2, 1, FAST, SLOW).sum_seconds(4e6) == pytest.approx(2 * 0.003)

    def test_a_ring_over_nodes_waits_for_the_slowest_link(self):
        # 6 turns of 1 MB at 100 MB/s, 10 ms, and 2 ms of latency
        assert World(2, 2, FAST, SLOW).sum_seconds(4e6) == pytest.approx(6 * 0.012)
        assert World(1, 4, FAST, SLOW).sum_seconds(4e6) == pytest.approx(6 * 0.012)
        slow_inside = World(2, 2, SLOW, FAST)
        assert slow_inside.sum_seconds(4e6) == pytest.approx(6 * 0.012)

    def test_processes_beyond_the_cores_share_them(self):
        assert [World(n, 1, FAST, SLOW, 2).sharing for n in (1, 2, 3, 4)] == [1, 1, 1.5, 2]
        assert World(8, 1, FAST, SLOW).sharing == 1
        # 6 turns of 1 MB at 1 GB/s, 1 ms, and 1 ms of latency, on half a core
        assert World(4, 1, FAST, SLOW, 2).sum_seconds(4e6) == pytest.approx(2 * 6 * 0.002)

    def test_gradients_are_float32_with_two_numbers_beside(self):
        assert gradient_bytes(3_670_016) == 14_680_072


class TestEpochs:
    def test_passes_take_their_tokens_and_a_fixed_part(self):
        assert (COST.seconds(10), COST.seconds(0)) == (15, 0)

    @pytest.mark.parametrize(
        ("num_ranks", "passes", "expected"),
        [
            (1, 1, (5, 75, 75)),
            (2, 1, (3, 45, 37.5)),  # the last step has one pack for two
            (4, 1, (2, 30, 18.75)),
            (2, 2, (2, 45, 37.5)),  # two passes each, then one pack for two
        ],
    )
    def test_five_packs(self, num_ranks, passes, expected):
        plan = pack_plan(5, num_ranks * passes)
        assert epoch_time(plan, num_ranks, COST, tokens_of(plan)) == pytest.approx(expected)

    def test_a_step_takes_as_long_as_its_heaviest_process(self):
        # steps of two rows, one each: 10 and 30, 20 and 20, and 40 alone
        plan = row_plan([10, 30, 20, 20, 40], 2, 1)
        epoch = epoch_time(plan, 2, COST, tokens_of(plan))
        assert epoch == pytest.approx((3, 35 + 25 + 45, (15 + 35) / 2 + 25 + 45 / 2))

    def test_more_equal_rows_are_scaled_up(self):
        plan = pack_plan(100, 4)
        once, often = (epoch_time(plan, 4, COST, tokens_of(plan), scale) for scale in (1, 1000))
        assert often == pytest.approx([1000 * part for part in once])

    def test_of_many_steps_some_are_looked_at(self):
        """Rows of 10 and 30 by turns, so that a mean of the first ones is that of all."""
        plan = row_plan([10, 30] * 3000, 2, 1)
        assert epoch_time(plan, 2, COST, tokens_of(plan)) == pytest.approx(
            (3000, 3000 * 35, 3000 * 25)
        )


class TestSteps:
    def test_a_step_is_passes_and_two_sums(self):
        epoch = EpochTime(10, 40, 30)
        step = step_time(epoch, World(2, 1, FAST, SLOW), 999_998)
        # 4 MB as above, and 8 bytes in two turns of 1 ms
        assert (step.passes, step.waiting) == pytest.approx((4, 1))
        assert step.summing == pytest.approx(0.006 + 0.002, rel=1e-4)
        assert step.all == pytest.approx(4.008, rel=1e-4)

    def test_on_half_a_core_all_of_it_takes_twice_as_long(self):
        epoch, alone = EpochTime(10, 40, 30), World(4, 1, FAST, SLOW)
        shared = World(4, 1, FAST, SLOW, 2)
        for there, here in zip(*(step_time(epoch, w, 1000) for w in (alone, shared)), strict=True):
            assert here == pytest.approx(2 * there)


@pytest.mark.slow
def test_measured_processes_are_met_within_15_percent(tmp_path):
    """1, 2 and 4 processes on this machine, by turns: benchmarks/scaling.py.

    With the cores that other programs left them; with the cores counted only where none run.
    """
    script = Path(__file__).parents[2] / "benchmarks" / "scaling.py"
    was_idle = os.getloadavg()[0] < 0.5
    command = [sys.executable, str(script), str(tmp_path / "out"), "--rounds", "3"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert {(record["adapter"], record["processes"]) for record in found} == {
        ("small", 2), ("small", 4), ("large", 2), ("large", 4)
    }  # fmt: skip
    for record in found:
        assert abs(record["off, cores as measured"]) < 0.15, record
        if was_idle:
            assert abs(record["off, cores counted"]) < 0.15, record
