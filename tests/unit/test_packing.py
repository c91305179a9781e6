"""Packs: which rows share one, and the positions and labels of their tokens."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from glmtune.data.packing import check_lengths, lay_out, plan_packs
from glmtune.errors import UserError
from glmtune.models.chatglm.configuration import VOCAB_SIZE_V1_0, ChatGLMConfig
from glmtune.models.chatglm.layout import read_layout
from glmtune.ops.loss import IGNORED
from glmtune.training import plan as plan_module
from glmtune.training.batches import collate
from glmtune.training.plan import PackPlan

V1_1 = ChatGLMConfig()
V1_0 = ChatGLMConfig(vocab_size=VOCAB_SIZE_V1_0, bos_token_id=150004, eos_token_id=150005)
CONFIGS = pytest.mark.parametrize("config", [V1_1, V1_0], ids=["v1.1", "v1.0"])


SHAPES = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=12)


class TestPlan:
    @given(st.lists(st.integers(1, 64), min_size=0, max_size=200), st.integers(64, 300))
    def test_each_row_lies_in_one_pack_that_it_fits_into(self, lengths, pack_length):
        lengths_R = np.array(lengths, dtype=int)
        order = np.random.default_rng(0).permutation(len(lengths))
        packs = plan_packs(lengths_R, order, pack_length)
        assert sorted(row for pack in packs for row in pack) == list(range(len(lengths)))
        assert all(0 < lengths_R[pack].sum() <= pack_length for pack in packs)

    @given(st.lists(st.integers(1, 64), min_size=2, max_size=200))
    def test_no_row_waits_beyond_the_next_pack(self, lengths):
        """The first row that did not fit begins the next pack."""
        packs = plan_packs(np.array(lengths), np.arange(len(lengths)), 64)
        left = np.arange(len(lengths))
        for pack in packs:
            assert pack[0] == left[0]
            left = left[~np.isin(left, pack)]

    def test_packs_of_real_lengths_are_full(self):
        """As long as Chinese alpaca rows: more than 99 % of each but the last."""
        random = np.random.default_rng(0)
        lengths_R = np.exp(random.normal(4.04, 0.54, 20_000)).round().clip(15, 200).astype(int)
        for pack_length in (2048, 8192):
            packs = plan_packs(lengths_R, random.permutation(20_000), pack_length)
            shares = [lengths_R[pack].sum() / pack_length for pack in packs]
            assert min(shares[:-1]) > 0.99, pack_length
            assert np.mean(shares) > 0.99

    def test_a_row_that_is_too_long_is_named(self, make_rows):
        rows = make_rows([(3, 4), (30, 40), (20, 60)])
        check_lengths(rows, np.arange(3), 82, "data/zh")
        with pytest.raises(UserError, match=r"data/zh: row 2 has 72 tokens; 2 row\(s\) .* 128 or"):
            check_lengths(rows, np.arange(3), 64, "data/zh")
        check_lengths(rows, np.array([0]), 64, "data/zh")


class TestLayOut:
    @CONFIGS
    @given(shapes=SHAPES, spare=st.integers(0, 9))
    def test_each_token_is_told_what_it_would_be_told_alone(self, make_rows, config, shapes, spare):
        rows = make_rows(shapes, config)
        ids = np.random.default_rng(1).permutation(len(rows))
        num_tokens = int(rows.lengths_R.sum())
        pack = lay_out(rows, ids, num_tokens + spare)
        assert pack.num_tokens == num_tokens
        supervised, start = [], 0
        for row in ids:
            alone = collate(rows, np.array([row]))
            layout = read_layout(alone["input_ids"], config)
            end = start + rows.lengths_R[row]
            place = slice(start, end)
            assert pack.input_ids_T[place].tolist() == rows[row].tolist()
            positions = pack.position_ids_XT[:, place]
            assert positions.tolist() == layout.position_ids_B2S[0].tolist()
            assert set(pack.start_T[place]) == {start}
            assert set(pack.end_T[place]) == {end}
            assert set(pack.prefix_end_T[place] - start) == {int(layout.prefix_end_B)}
            labels = alone["labels"][0, 1:]
            at = (labels != IGNORED).nonzero()[:, 0]
            supervised += zip((at + start).tolist(), labels[at].tolist(), strict=True)
            start = end
        assert list(zip(pack.supervised_at_L, pack.targets_L, strict=True)) == supervised
        assert (pack.start_T[num_tokens:] == num_tokens).all()
        assert (pack.input_ids_T[num_tokens:] == config.pad_token_id).all()

    def test_a_pack_of_nothing_teaches_nothing(self, make_rows):
        pack = lay_out(make_rows([(1, 1)]), np.array([], dtype=int), 8)
        assert (pack.num_tokens, len(pack.targets_L)) == (0, 0)
        assert torch.from_numpy(pack.input_ids_T).tolist() == [3] * 8


class TestPackPlan:
    LENGTHS = np.random.default_rng(0).integers(5, 60, 100)

    def plan(self, packs_per_step=1, shuffle=True):
        row_ids = np.arange(10, 100)
        return PackPlan(row_ids, 7, shuffle, self.LENGTHS, 128, packs_per_step)

    @pytest.mark.parametrize("packs_per_step", [1, 3])
    def test_an_epoch_has_every_row_once_in_packs_of_its_own(self, packs_per_step):
        plan, step, orders = self.plan(packs_per_step), 0, []
        for epoch in range(3):
            steps = range(step, step + plan.steps_in(epoch))
            assert [plan.locate(i) for i in steps] == [(epoch, i - step) for i in steps]
            parts = [part for i in steps for part in plan.parts(i, 1)]
            assert max(len(plan.parts(i, 1)) for i in steps) == packs_per_step
            orders.append(np.concatenate(parts).tolist())
            assert sorted(orders[-1]) == list(range(10, 100))
            step = steps.stop
        assert orders[0] != orders[1] != orders[2]
        assert plan.epoch(step) == 3
        assert plan.num_steps(3) == step
        assert plan.num_steps(0.5) == -(-plan.steps_in(0) // 2)

    def test_a_step_does_not_depend_on_earlier_steps(self):
        straight, back = self.plan(), self.plan()
        parts = [straight.parts(step, 1)[0].tolist() for step in range(60)]
        assert [back.parts(step, 1)[0].tolist() for step in reversed(range(60))] == parts[::-1]

    def test_how_many_steps_an_epoch_has_is_learned_once(self, spy):
        """Packing a million rows takes seconds: a run's banner must not do it for each number."""
        calls = spy(plan_module, "plan_packs")
        plan = self.plan()
        steps = plan.num_steps(3)
        assert (plan.epoch(steps), plan.num_steps(3)) == (3, steps)
        assert len(calls) == 3
        assert len(plan._packs) == 1, "one epoch's packs are held at a time"

    def test_without_shuffling_all_epochs_are_alike(self):
        plan = self.plan(shuffle=False)
        first = [part.tolist() for part in plan.packs(0)]
        assert [part.tolist() for part in plan.packs(1)] == first
