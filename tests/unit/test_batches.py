"""Rows of a data set, their order, and the batches they become."""

from types import SimpleNamespace

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig

import glmtune.models  # noqa: F401
from glmtune.data.dataset import load_dataset
from glmtune.data.split import split_rows
from glmtune.data.token_rows import TokenRows
from glmtune.errors import UserError
from glmtune.models.chatglm.rows import row_rule
from glmtune.training.batches import collate
from glmtune.training.plan import RowPlan, epoch_order

GMASK, SOP, EOP, PAD = 1001, 1004, 1005, 3
RULE = row_rule(
    SimpleNamespace(gmask_token_id=GMASK, bos_token_id=SOP, eos_token_id=EOP, pad_token_id=PAD)
)


def token_rows(*rows):
    """Rows of (prompt without specials, answer)."""
    ids = [[*prompt, GMASK, SOP, *answer, EOP] for prompt, answer in rows]
    columns = {"input_ids": ids, "seq_len": [len(prompt) + 2 for prompt, _ in rows]}
    return TokenRows.from_table(pa.table(columns), RULE)


def broken_rows(input_ids, seq_len):
    columns = {"input_ids": input_ids, "seq_len": seq_len}
    return TokenRows.from_table(pa.table(columns), RULE)


@pytest.fixture(scope="module")
def config(tiny_folder):
    return AutoConfig.from_pretrained(tiny_folder)


class TestTokenRows:
    def test_rows_come_back_as_they_went_in(self):
        rows = token_rows(([7, 8], [9]), ([5], [10, 11, 12]))
        assert len(rows) == 2
        assert rows[0].tolist() == [7, 8, GMASK, SOP, 9, EOP]
        assert rows[1].tolist() == [5, GMASK, SOP, 10, 11, 12, EOP]
        assert rows.lengths_R.tolist() == [6, 7]

    def test_rows_of_several_chunks_and_more_columns(self, tmp_path):
        columns = [{"input_ids": [[i, i + 1]], "seq_len": [1], "note": ["x"]} for i in range(3)]
        parts = [datasets.Dataset.from_dict(column) for column in columns]
        datasets.concatenate_datasets(parts).save_to_disk(tmp_path / "d")
        rows = TokenRows.from_table(load_dataset(str(tmp_path / "d"))[0], RULE)
        assert [rows[i].tolist() for i in range(3)] == [[0, 1], [1, 2], [2, 3]]

    def test_labels_counted_are_the_labels_that_the_model_will_see(self):
        rows = token_rows(([7, 8], [9]), ([5], [10, 11, 12]), ([], []))
        labels = collate(rows, np.arange(3))["labels"]
        # The model shifts: the label of the first token is never asked for.
        assert rows.num_labels_R.tolist() == (labels[:, 1:] != -100).sum(1).tolist()

    def test_digest_tells_rows_apart(self):
        rows = token_rows(([7, 8], [9]), ([5], [10]))
        assert rows.digest() == token_rows(([7, 8], [9]), ([5], [10])).digest()
        assert rows.digest() != token_rows(([7, 8], [9]), ([5], [11])).digest()
        # The same ids, split differently into rows or into prompt and answer.
        assert (
            broken_rows([[1, 2], [3]], [1, 1]).digest()
            != broken_rows([[1], [2, 3]], [1, 1]).digest()
        )
        assert broken_rows([[1, 2]], [1]).digest() != broken_rows([[1, 2]], [2]).digest()

    def test_good_rows_pass_the_check(self, config):
        token_rows(([7, 8], [9]), ([], [])).check(config.vocab_size, "data")

    @pytest.mark.parametrize(
        ("row", "seq_len", "words"),
        [
            ([7, GMASK, SOP, 1024, EOP], 3, ["row 2", "1024", "1023"]),
            ([7, GMASK, SOP, -1, EOP], 3, ["row 2", "-1"]),
            ([7, 8, SOP, 9, EOP], 3, ["row 2", "[gMASK] <sop>", "seq_len 3 of 5"]),
            ([7, GMASK, 8, 9, EOP], 3, ["row 2", "[gMASK] <sop>"]),
            ([7, GMASK, SOP, 9, EOP], 2, ["row 2", "seq_len 2"]),
            ([7, GMASK, SOP, 9, EOP], 6, ["row 2", "seq_len 6"]),
            ([7, GMASK, SOP, 9, EOP], 0, ["row 2", "seq_len 0"]),
            ([], 0, ["row 2", "of 0 ids"]),
        ],
        ids=["id too high", "id below 0", "no gMASK", "no sop", "short", "long", "none", "empty"],
    )
    @pytest.mark.parametrize("more", [[], [[7, GMASK, SOP, 9, EOP]]], ids=["last", "not last"])
    def test_a_bad_row_is_named(self, config, row, seq_len, words, more):
        rows = broken_rows([[7, GMASK, SOP, 9, EOP], row, *more], [3, seq_len, *[3] * len(more)])
        with pytest.raises(UserError) as error:
            rows.check(config.vocab_size, "data/zh")
        assert all(word in str(error.value) for word in ["data/zh", *words]), error.value


class TestSplit:
    @given(st.integers(2, 300), st.floats(0.001, 0.5), st.integers(0, 2**32 - 1))
    def test_every_row_is_on_one_side(self, num_rows, ratio, seed):
        train, held_out = split_rows(num_rows, ratio, seed)
        assert sorted([*train, *held_out]) == list(range(num_rows))
        assert len(held_out) == max(1, round(num_rows * ratio))
        assert len(train) >= 1

    def test_the_split_depends_on_the_seed_alone(self):
        assert np.array_equal(split_rows(100, 0.2, 1)[1], split_rows(100, 0.2, 1)[1])
        assert not np.array_equal(split_rows(100, 0.2, 1)[1], split_rows(100, 0.2, 2)[1])

    def test_no_ratio_holds_nothing_out(self):
        train, held_out = split_rows(5, 0.0, 1)
        assert train.tolist() == [0, 1, 2, 3, 4]
        assert not len(held_out)

    def test_one_row_cannot_be_split(self):
        with pytest.raises(UserError, match=r"eval_ratio 0\.1"):
            split_rows(1, 0.1, 1)


def row_plan(row_ids, size, seed=1, shuffle=True):
    lengths_R = np.ones(row_ids.max() + 1, dtype=int)
    return RowPlan(row_ids, seed, shuffle, lengths_R, global_batch_size=size, batch_size=size)


class TestRowPlan:
    def rows_seen(self, plan, steps):
        return np.concatenate([plan.global_batch(step) for step in steps]).tolist()

    def test_an_epoch_has_every_row_once_in_an_order_of_its_own(self):
        plan = row_plan(np.arange(10, 33), 6)
        assert plan.steps_in(0) == 4
        epochs = [self.rows_seen(plan, range(4 * e, 4 * e + 4)) for e in range(3)]
        assert all(sorted(epoch) == list(range(10, 33)) for epoch in epochs)
        assert epochs[0] != epochs[1] != epochs[2] != epochs[0]

    def test_a_step_does_not_depend_on_earlier_steps(self):
        plan = row_plan(np.arange(23), 6)
        straight = [plan.global_batch(step).tolist() for step in range(12)]
        epoch_order.cache_clear()
        assert [plan.global_batch(step).tolist() for step in reversed(range(12))] == straight[::-1]

    def test_the_seed_makes_the_order(self):
        def first(seed):
            return row_plan(np.arange(50), 50, seed).global_batch(0).tolist()

        assert first(1) == first(1) != first(2)

    def test_without_shuffling_rows_keep_their_order(self):
        plan = row_plan(np.arange(5), 2, shuffle=False)
        assert self.rows_seen(plan, range(6)) == [0, 1, 2, 3, 4] * 2

    def test_the_order_stays_what_it_was(self):
        # Checkpoints rely on it: a changed order would resume a run on other rows.
        assert epoch_order(8, 42, 0).tolist() == [3, 4, 2, 7, 6, 1, 5, 0]

    @given(st.integers(1, 60), st.integers(1, 7), st.integers(1, 4))
    def test_rows_are_dealt_out_once_and_evenly(self, num_rows, batch_size, num_processes):
        plan = RowPlan(np.arange(num_rows), 1, False, np.ones(num_rows), num_rows, batch_size)
        parts = plan.parts(0, num_processes)
        assert len(parts) % num_processes == 0, "processes would wait for each other"
        assert np.concatenate(parts).tolist() == list(range(num_rows))
        sizes = [len(part) for part in parts]
        assert max(sizes) <= batch_size
        assert max(sizes) - min(sizes) <= 1

    def test_no_pass_is_empty_in_a_single_process(self):
        plan = RowPlan(np.arange(7), 1, False, np.ones(7), 7, 3)
        assert [len(part) for part in plan.parts(0, 1)] == [3, 2, 2]


class TestCollate:
    def test_the_originals_labels_and_padding(self):
        rows = token_rows(([7, 8], [9]), ([5], [10, 11, 12]))
        batch = collate(rows, np.array([1, 0]))
        assert batch["input_ids"].tolist() == [
            [5, GMASK, SOP, 10, 11, 12, EOP],
            [7, 8, GMASK, SOP, 9, EOP, PAD],
        ]
        assert batch["labels"].tolist() == [
            [-100, -100, SOP, 10, 11, 12, EOP],
            [-100, -100, -100, SOP, 9, EOP, -100],
        ]
        assert {tensor.dtype for tensor in batch.values()} == {torch.int64}
