"""The mask rule, against its own definition spelled out element by element."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from glmtune.ops.attention import additive_mask, prefix_lm_mask


@given(
    left=st.integers(0, 3),
    prefix=st.integers(1, 4),
    answer=st.integers(1, 4),
    right=st.integers(0, 3),
    data=st.data(),
)
def test_rule(left, prefix, answer, right, data):
    length = left + prefix + answer + right
    num_queries = data.draw(st.integers(1, length))
    valid = torch.zeros(1, length, dtype=torch.bool)
    valid[:, left : left + prefix + answer] = True
    mask = prefix_lm_mask(torch.tensor([left + prefix]), valid, num_queries)
    assert mask.shape == (1, 1, num_queries, length)
    for row, query in enumerate(range(length - num_queries, length)):
        for key in range(length):
            sees = bool(valid[0, key]) and (key <= query or key < left + prefix)
            assert mask[0, 0, row, key] == (sees or key == query)


@pytest.mark.parametrize("num_keys", [16, 21])
def test_an_added_mask_is_the_mask_in_rows_that_no_kernel_copies(num_keys):
    mask = torch.rand(2, 1, 5, num_keys, generator=torch.Generator().manual_seed(0)) < 0.5
    mask[..., 0] = True
    added = additive_mask(mask, torch.float32)
    assert torch.equal(added == 0, mask)
    assert torch.equal(added.isneginf(), ~mask)
    assert all(stride % 16 == 0 for stride in added.stride()[:-1])
