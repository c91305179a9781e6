"""The fast operations of a step, each against a few plain lines."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from glmtune.ops import loss
from glmtune.ops import quantised as quantised_ops
from glmtune.ops.integers import quantise_int8
from glmtune.ops.linear import (
    FP8_MAX,
    Dense,
    Fp8Linear,
    frozen_linear,
    joined,
    lay_together,
    products,
    quantise,
    quantise_rows,
)
from glmtune.ops.lora import Dropout, LowRank, hash_int32, lora_linear, padded_rank
from glmtune.ops.loss import IGNORED, head_loss
from glmtune.ops.quantised import Quantised, quantised_linear


def dropout(rate, seed=5):
    below = torch.tensor(round(rate * 2**32) - 2**31, dtype=torch.int32)
    return Dropout(torch.tensor(seed, dtype=torch.int32), below, torch.tensor(1 / (1 - rate)))


class TestDropout:
    def test_the_share_dropped_and_the_scale_of_the_rest(self):
        dropped = dropout(0.1)(torch.ones(500, 400))
        assert (dropped == 0).float().mean() == pytest.approx(0.1, abs=0.003)
        torch.testing.assert_close(dropped.unique(), torch.tensor([0, 1 / 0.9]))
        for axis in (0, 1):  # no row and no column has a much larger error than others
            shares = (dropped == 0).float().mean(axis)
            assert shares.max() < 0.2
            assert shares.min() > 0.03

    def test_rate_0_changes_nothing(self):
        x = torch.randn(50, 40)
        assert torch.equal(dropout(0.0)(x), x)

    def test_other_seeds_drop_other_places(self):
        a, b = (dropout(0.5, seed)(torch.ones(200, 200)) == 0 for seed in (1, 2))
        assert (a & b).float().mean() == pytest.approx(0.25, abs=0.01)

    def test_linears_of_one_input_drop_other_places(self):
        """One seed, spread by a factor of each; an even factor counts as the next odd one."""
        masks = [
            dropout(0.5)._replace(factor=torch.tensor(factor, dtype=torch.int32))(
                torch.ones(300, 300)
            )
            == 0
            for factor in (-1403630843, 1103515245, 134775812)
        ]
        for mask in masks:
            assert mask.float().mean() == pytest.approx(0.5, abs=0.01)
        for one, other in itertools.combinations(masks, 2):
            assert (one & other).float().mean() == pytest.approx(0.25, abs=0.01)

    def test_the_hash_meets_no_number_twice(self):
        numbers = torch.arange(-(2**15), 2**15, dtype=torch.int32)
        assert len(hash_int32(numbers).unique()) == len(numbers)


@given(st.booleans(), st.booleans(), st.sampled_from([0.0, 0.3]))
def test_lora_is_its_formula(has_bias, has_adapter, rate):
    torch.manual_seed(0)
    x = torch.randn(7, 12, requires_grad=True)
    frozen = Dense(torch.randn(10, 12), torch.randn(10) if has_bias else None)
    a, b = torch.randn(3, 12, requires_grad=True), torch.randn(10, 3, requires_grad=True)
    adapter = LowRank(a, b, 4.0) if has_adapter else None
    result = lora_linear(x, frozen, adapter, dropout(rate))
    mask = dropout(rate)(torch.ones(7, 12))
    wanted = F.linear(x, *frozen)
    if has_adapter:
        wanted = wanted + 4.0 * (x * mask) @ a.T @ b.T
    torch.testing.assert_close(result, wanted)
    inputs = (x, a, b) if has_adapter else (x,)
    upstream = torch.randn(7, 10)
    for grad, expected in zip(
        torch.autograd.grad(result, inputs, upstream),
        torch.autograd.grad(wanted, inputs, upstream),
        strict=True,
    ):
        torch.testing.assert_close(grad, expected)


class TestLinearsOfOneInput:
    @pytest.mark.parametrize("biased", [True, False])
    def test_they_become_views_of_one(self, biased):
        linears = [nn.Linear(6, size, biased) for size in (4, 2, 2)]
        x = torch.randn(3, 6)
        wanted = torch.cat([linear(x) for linear in linears], -1)
        whole = lay_together(linears)
        torch.testing.assert_close(frozen_linear(x, whole), wanted)
        torch.testing.assert_close(torch.cat([linear(x) for linear in linears], -1), wanted)
        assert {x.weight.untyped_storage().data_ptr() for x in linears} == {
            whole.weight_NK.untyped_storage().data_ptr()
        }
        again = lay_together(linears)  # no second copy
        assert again.weight_NK.data_ptr() == whole.weight_NK.data_ptr()

    def test_other_tensors_are_not_taken_for_neighbours(self):
        whole = torch.arange(12.0).view(6, 2)
        top, middle, end = whole.split(2)
        assert torch.equal(joined([top, middle], 0), whole[:4])
        assert joined([top, end], 0) is None
        assert joined([middle, top], 0) is None
        assert joined([top, middle.clone()], 0) is None
        left, right = whole.split(1, 1)
        assert torch.equal(joined([left, right], 1), whole)

    def test_in_float8_they_are_quantised_as_one(self):
        linears = [nn.Linear(64, size) for size in (32, 16, 16)]
        eights = Fp8Linear.together(linears)
        whole = quantise(torch.cat([linear.weight.data for linear in linears]), None)
        for name, dim in (("by_row_NK", 0), ("row_scale_N", 0), ("by_column_KN", 1)):
            found = joined([getattr(eight, name) for eight in eights], dim)
            assert torch.equal(found.float(), getattr(whole, name).float())
        x = torch.randn(5, 64, requires_grad=True)
        for linear, eight in zip(linears, eights, strict=True):
            upstream = torch.randn(5, linear.out_features)
            wanted, found = (torch.autograd.grad(f(x), x, upstream)[0] for f in (linear, eight))
            assert (found - wanted).norm() / wanted.norm() < 0.06

    def test_their_products_lie_side_by_side(self):
        linears = [Dense(torch.randn(size, 6), None) for size in (4, 2)]
        x = torch.randn(3, 6)
        wanted = torch.cat([x @ linear.weight_NK.T for linear in linears], 1)
        torch.testing.assert_close(products(x, linears), wanted)


class TestFloat8:
    def test_rows_keep_three_bits_and_their_largest_value(self):
        x = torch.randn(20, 300) * torch.logspace(-6, 6, 20)[:, None]
        numbers, scales = quantise_rows(x)
        back = numbers.float() * scales
        assert (numbers.float().abs().amax(1) == FP8_MAX).all()  # all of the format is used
        large = x.abs() > x.abs().amax(1, keepdim=True) / 1000
        assert ((back - x).abs() / x.abs())[large].max() < 2**-4
        torch.testing.assert_close(back.abs().amax(1), x.abs().amax(1))

    def test_a_row_of_zeros_stays_zero(self):
        numbers, scales = quantise_rows(torch.zeros(2, 4))
        assert (numbers.float() * scales == 0).all()

    def test_both_layouts_hold_the_weight(self):
        weight = torch.randn(30, 50)
        eight = quantise(weight, None)
        for back in (
            eight.by_row_NK.float() * eight.row_scale_N[:, None],
            eight.by_column_KN.float().T * eight.column_scale_K,
        ):
            assert (back - weight).norm() / weight.norm() < 0.04

    def test_a_linear_and_the_gradient_of_its_input(self):
        linear = nn.Linear(64, 48)
        x = torch.randn(2, 5, 64, requires_grad=True)
        upstream = torch.randn(2, 5, 48)
        results = []
        for module in (linear, Fp8Linear(linear)):
            y = module(x)
            results.append((y, *torch.autograd.grad(y, x, upstream)))
        for exact, eight in zip(*results, strict=True):
            assert exact.shape == eight.shape
            assert 0 < (eight - exact).norm() / exact.norm() < 0.06

    def test_no_weight_gets_a_gradient(self):
        eight = Fp8Linear(nn.Linear(64, 48).requires_grad_(False))
        frozen_linear(torch.randn(3, 64, requires_grad=True), eight.frozen).sum().backward()
        assert not any(parameter.requires_grad for parameter in eight.parameters())


class TestHeadLoss:
    @given(st.integers(1, 20), st.integers(1, 7))
    def test_chunks_give_what_one_product_gives(self, num_supervised, chunk):
        torch.manual_seed(num_supervised)
        hidden = torch.randn(num_supervised, 6, requires_grad=True)
        head, targets = torch.randn(11, 6), torch.randint(0, 11, (num_supervised,))
        targets[::3] = IGNORED
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loss, "CHUNK", chunk)
            total = head_loss(hidden, head, targets)
        wanted = F.cross_entropy(hidden @ head.T, targets, ignore_index=IGNORED, reduction="sum")
        torch.testing.assert_close(total, wanted)
        (grad,) = torch.autograd.grad(3 * total, hidden)
        torch.testing.assert_close(grad, torch.autograd.grad(3 * wanted, hidden)[0])

    def test_no_gradient_is_taken_where_none_is_asked_for(self):
        with torch.no_grad():
            assert not head_loss(
                torch.randn(3, 6), torch.randn(11, 6), torch.arange(3)
            ).requires_grad

    def test_a_head_in_8_bits_is_never_whole_as_floats(self, monkeypatch):
        torch.manual_seed(0)
        head, hidden = int8(11, 6), torch.randn(5, 6, requires_grad=True)
        targets = torch.tensor([0, 10, IGNORED, 3, 4])
        wanted = head_loss(hidden, head.weight(torch.float32), targets)
        monkeypatch.setattr(quantised_ops, "PIECE", 4)
        assert [len(weight) for _, weight in head.pieces(torch.float32)] == [4, 4, 3]
        total = head_loss(hidden, head, targets)
        torch.testing.assert_close(total, wanted)
        grads = (torch.autograd.grad(each, hidden)[0] for each in (total, wanted))
        torch.testing.assert_close(*grads)


def int8(num_outputs, num_inputs, bias=None):
    parts = quantise_int8(torch.randn(num_outputs, num_inputs))
    return Quantised(parts, "int8", 0, num_inputs, bias)


def four_bits(kind, nested):
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    weight, state = bitsandbytes.functional.quantize_4bit(
        torch.randn(96, 64), quant_type=kind, compress_statistics=nested
    )
    parts = weight, state.absmax
    if nested:
        parts += state.state2.absmax, state.state2.code, state.offset
    wanted = bitsandbytes.functional.dequantize_4bit(weight, state)
    return Quantised(parts, kind, state.blocksize, 64, torch.randn(96)), wanted


class TestQuantised:
    def check(self, linear, compiled=False):
        x = torch.randn(5, linear.num_inputs, requires_grad=True)
        wanted = F.linear(x, linear.weight(torch.float32), linear.bias_N)
        call = torch.compile(frozen_linear, fullgraph=True, backend="aot_eager")
        result = (call if compiled else frozen_linear)(x, linear)
        torch.testing.assert_close(result, wanted)
        upstream = torch.randn_like(wanted)
        grads = (torch.autograd.grad(y, x, upstream)[0] for y in (result, wanted))
        torch.testing.assert_close(*grads)

    @pytest.mark.parametrize("compiled", [False, True])
    def test_int8_linear_equals_its_floats(self, compiled):
        self.check(int8(12, 6, torch.randn(12)), compiled)
        self.check(int8(12, 6), compiled)

    def test_int8_head_equals_its_floats_some_rows_at_a_time(self, monkeypatch):
        monkeypatch.setattr(quantised_ops, "PIECE", 4)
        self.check(int8(11, 6, torch.randn(11)))

    @pytest.mark.parametrize("kind", ["nf4", "fp4"])
    @pytest.mark.parametrize("nested", [True, False])
    def test_4_bits_are_bitsandbytes_own(self, kind, nested):
        linear, wanted = four_bits(kind, nested)
        assert torch.equal(linear.weight(torch.float32), wanted)
        self.check(linear)
        self.check(linear, compiled=True)

    def test_what_a_compiler_is_told_of_the_operator_is_so(self):
        linear, _ = four_bits("nf4", True)
        x = torch.randn(5, 64, requires_grad=True)
        torch.library.opcheck(
            quantised_linear, (x, list(linear.parts), linear.kind, linear.block, linear.bias_N)
        )


def test_kernels_take_ranks_as_powers_of_two():
    assert [padded_rank(rank) for rank in (1, 8, 16, 17, 64, 65)] == [16, 16, 16, 32, 64, 128]
