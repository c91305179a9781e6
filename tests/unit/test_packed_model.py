"""The packed pass equals the padded one: packs and their rows by themselves, in float32."""

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import randomise_adapter

from glmtune.adapters import attach_lora
from glmtune.data.packing import plan_packs
from glmtune.errors import UserError
from glmtune.models.chatglm.configuration import VOCAB_SIZE_V1_0, ChatGLMConfig
from glmtune.models.chatglm.modeling import ChatGLMForConditionalGeneration, ChatGLMMLP
from glmtune.models.chatglm.packed import PACKED, gelu
from glmtune.models.packed import PackedModel, to_fp8
from glmtune.ops.attention import PaddedRows, dense_mask
from glmtune.training.first_step import check_agreement
from glmtune.training.passes import PackedPass, PaddedPass

V1_1 = ChatGLMConfig()
V1_0 = ChatGLMConfig(vocab_size=VOCAB_SIZE_V1_0, bos_token_id=150004, eos_token_id=150005)
SHAPES = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=12)
PACK_LENGTH = 32  # the longest row of SHAPES has 20 tokens


def make_model(like, targets="all", dropout=0.0, num_layers=2):
    """A few narrow layers with an adapter that has an effect."""
    torch.manual_seed(0)
    config = ChatGLMConfig(
        vocab_size=like.vocab_size, hidden_size=16, num_layers=num_layers, num_attention_heads=2,
        inner_hidden_size=32, bos_token_id=like.bos_token_id, eos_token_id=like.eos_token_id,
        initializer_range=0.1,
    )  # fmt: skip
    model = attach_lora(
        ChatGLMForConditionalGeneration(config), rank=4, dropout=dropout, targets=targets
    )
    return randomise_adapter(model, std=0.1)


@pytest.fixture(scope="module")
def models():
    """One of each revision, drawn once: the first has 150,528 ids."""
    return {"v1.1": make_model(V1_1), "v1.0": make_model(V1_0)}


def trained(model):
    return [weight for weight in model.parameters() if weight.requires_grad]


def differences(fast, plain, row_ids, weights):
    """Of the loss, and of the adapter tensor that differs most, as shares of loss and gradient."""
    loss, grads = fast.gradients(row_ids, weights)
    wanted_loss, wanted = plain.gradients(row_ids, weights)
    off = [(a - b).norm() for a, b in zip(grads, wanted, strict=True)]
    size = torch.nn.utils.get_total_norm(wanted).clamp(min=1e-3)
    return abs(loss - wanted_loss) / wanted_loss.clamp(min=1), max(off) / size


@settings(deadline=None, max_examples=40)
@given(shapes=SHAPES, revision=st.sampled_from(["v1.1", "v1.0"]), recompute=st.integers(0, 1))
def test_packed_pass_equals_padded_pass(models, make_rows, shapes, revision, recompute):
    """Loss and the gradient of every adapter tensor, whatever lies beside a row in its pack.

    Among the shapes are prefixes of one token, answers of none, and packs that are full.
    """
    model = models[revision]
    config, accelerator = model.config, Accelerator(cpu=True)
    rows = make_rows(shapes, config)
    packed = PackedModel(model, PACKED, compiled=False, recompute=recompute)
    plain = PaddedPass(accelerator, model, rows)
    for length in (PACK_LENGTH, None):  # with filler, and without
        fast = PackedPass(accelerator, packed, rows, 0.0, length)
        for row_ids in plan_packs(rows.lengths_R, np.arange(len(rows)), PACK_LENGTH):
            off_loss, off_grad = differences(fast, plain, row_ids, trained(model))
            assert off_loss < 1e-5
            assert off_grad < 1e-5


@pytest.mark.parametrize("targets", ["query_key_value", "dense", "dense_h_to_4h,dense_4h_to_h"])
def test_each_linear_may_have_an_adapter_or_none(make_rows, targets):
    model, rows = make_model(V1_1, targets), make_rows([(4, 6), (0, 3), (9, 9)])
    accelerator = Accelerator(cpu=True)
    fast = PackedPass(accelerator, PackedModel(model, PACKED, compiled=False), rows, 0.0, 64)
    plain = PaddedPass(accelerator, model, rows)
    assert max(differences(fast, plain, np.arange(3), trained(model))) < 1e-5


def test_a_pack_with_nothing_to_learn_gives_no_gradient(make_rows):
    model, rows = make_model(V1_1), make_rows([(4, 6)])
    packed = PackedModel(model, PACKED, compiled=False)
    fast = PackedPass(Accelerator(cpu=True), packed, rows, 0.0, 16)
    loss, grads = fast.gradients(np.array([], dtype=int), trained(model))
    assert loss == 0
    assert all((grad == 0).all() for grad in grads)


@pytest.mark.parametrize("recompute", [0, 1, 2, 4])
def test_packed_pass_recomputes_layers_with_equal_gradients(make_rows, spy, recompute):
    """The last layer never is: its backward pass begins as soon as it is done."""
    model, rows = make_model(V1_1, num_layers=5), make_rows([(4, 6), (0, 3)])
    packed = PackedModel(model, PACKED, compiled=False, recompute=recompute)
    calls = spy(packed, "block")
    fast = PackedPass(Accelerator(cpu=True), packed, rows, 0.0, 32)
    _, grads = fast.gradients(np.arange(2), trained(model))
    assert len(calls) == 4 + recompute
    keeping = PackedPass(
        Accelerator(cpu=True), PackedModel(model, PACKED, compiled=False), rows, 0.0, 32
    )
    _, wanted = keeping.gradients(np.arange(2), trained(model))
    assert all(torch.equal(a, b) for a, b in zip(grads, wanted, strict=True))


@pytest.mark.parametrize("recompute", [1, 4])
def test_padded_pass_recomputes_layers_with_equal_gradients(make_rows, spy, recompute):
    model, rows = make_model(V1_1, dropout=0.1, num_layers=5), make_rows([(4, 6)])
    calls = spy(ChatGLMMLP, "forward")
    row_ids, weights = np.array([0]), trained(model)
    results = []
    for count in (recompute, 0):
        plain = PaddedPass(Accelerator(cpu=True), model, rows, count)
        results.append(plain.gradients(row_ids, weights)[1])  # without dropout
        assert len(calls) == 5 + count
        torch.manual_seed(0)
        plain.run(row_ids, 1, seed=0)  # with it
        assert len(calls) == 2 * (5 + count)
        results[-1] += tuple(weight.grad for weight in weights)
        for weight in weights:
            weight.grad = None
        calls.clear()
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


class TestDropout:
    @pytest.fixture(autouse=True)
    def rows(self, make_rows):
        self.rows = make_rows([(4, 6), (0, 3), (9, 9)])

    def run(self, rate, seed, recompute=0):
        model, rows = make_model(V1_1, dropout=rate), self.rows
        packed = PackedModel(model, PACKED, compiled=False, recompute=recompute)
        fast = PackedPass(Accelerator(cpu=True), packed, rows, rate, 64)
        loss = fast.run(np.arange(3), 1, seed)
        return loss, torch.cat([weight.grad.flatten() for weight in trained(model)])

    def test_dropout_is_a_function_of_the_seed(self):
        loss, grad = self.run(0.2, seed=1)
        again, grad_again = self.run(0.2, seed=1)
        other, _ = self.run(0.2, seed=2)
        assert loss == again != other
        assert torch.equal(grad, grad_again)

    def test_recomputed_layers_drop_the_same_inputs(self):
        loss, grad = self.run(0.2, seed=1)
        again, grad_again = self.run(0.2, seed=1, recompute=1)
        assert loss == again
        torch.testing.assert_close(grad, grad_again)

    def test_mean_loss_over_seeds_is_the_loss_without_dropout(self):
        losses = torch.stack([self.run(0.1, seed)[0] for seed in range(40)])
        plain, _ = self.run(0.0, 0)
        assert abs(losses.mean() - plain) < 4 * losses.std() / 40**0.5
        assert losses.std() > 0

    def test_evaluation_drops_nothing(self):
        model, rows = make_model(V1_1, dropout=0.5), self.rows
        packed = PackedModel(model, PACKED, compiled=False)
        fast = PackedPass(Accelerator(cpu=True), packed, rows, 0.5, 64)
        plain = PaddedPass(Accelerator(cpu=True), model, rows)
        losses = [way.row_losses(np.arange(3)) for way in (fast, plain)]
        torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-5)


class TestFloat8:
    def test_the_packed_model_computes_what_the_modules_do(self, make_rows):
        model, rows = make_model(V1_1), make_rows([(4, 6), (0, 3), (9, 9)])
        to_fp8(model)
        accelerator = Accelerator(cpu=True)
        fast = PackedPass(accelerator, PackedModel(model, PACKED, compiled=False), rows, 0.0, 64)
        plain = PaddedPass(accelerator, model, rows)
        # Equal but for sums in another order, which may round a number the other way.
        assert max(differences(fast, plain, np.arange(3), trained(model))) < 0.02

    def test_float8_model_is_near_the_exact_model(self, make_rows):
        rows, losses = make_rows([(4, 6), (0, 3), (9, 9)]), []
        for eight_bits in (False, True):
            model = make_model(V1_1)
            if eight_bits:
                to_fp8(model)
            plain = PaddedPass(Accelerator(cpu=True), model, rows)
            losses.append(plain.row_losses(np.arange(3)).sum())
        assert losses[0] != losses[1]
        assert abs(losses[0] - losses[1]) / losses[0] < 0.02


class TestCheck:
    @pytest.fixture(autouse=True)
    def rows(self, make_rows):
        self.rows = make_rows([(4, 6), (0, 3), (9, 9)])

    def check(self, monkeypatch, mask=None):
        model, rows = make_model(V1_1), self.rows
        if mask:
            monkeypatch.setattr(PaddedRows, "of", mask)
        accelerator = Accelerator(cpu=True)
        fast = PackedPass(accelerator, PackedModel(model, PACKED, compiled=False), rows, 0.0, 64)
        plain = PaddedPass(accelerator, model, rows)
        return check_agreement(fast, plain, np.arange(3), trained(model), torch.float32)

    def test_equal_passes_agree(self, monkeypatch):
        assert max(self.check(monkeypatch)) < 1e-5

    def test_rows_that_see_each_other_are_refused(self, monkeypatch):
        of = PaddedRows.of

        def mixed(start_T, prefix_end_T, end_T):
            as_one = torch.zeros_like(start_T), prefix_end_T, torch.full_like(end_T, len(end_T))
            return of(*as_one)

        with pytest.raises(UserError, match=r"layout: one pass of 3 rows .* layout padded"):
            self.check(monkeypatch, mixed)

    def test_a_prefix_that_ends_a_token_early_is_refused(self, monkeypatch):
        of = PaddedRows.of
        with pytest.raises(UserError, match="gradient by"):
            self.check(monkeypatch, lambda start, prefix, end: of(start, prefix - 1, end))

    @pytest.mark.parametrize(("loss_a_label", "passes"), [(0.02, True), (2.0, False), (9.0, False)])
    def test_gradients_of_memorised_rows_may_differ_by_rounding(
        self, monkeypatch, loss_a_label, passes
    ):
        """The gradient is then a difference of nearly equal numbers, with a larger error."""
        num_labels = int(self.rows.num_labels_R[:3].sum())

        def gradients_as_if(off):
            def gradients(self, row_ids, weights):
                loss = loss_a_label * num_labels * len(row_ids) / 3
                return torch.tensor(loss), [torch.full_like(w, off * len(row_ids)) for w in weights]

            return gradients

        monkeypatch.setattr(PackedPass, "gradients", gradients_as_if(1.005))  # 0.001 is allowed
        monkeypatch.setattr(PaddedPass, "gradients", gradients_as_if(1.0))
        if passes:
            assert self.check(monkeypatch)[1] == pytest.approx(0.005, rel=0.01)
        else:
            with pytest.raises(UserError, match="gradient by"):
                self.check(monkeypatch)


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=8))
def test_the_mask_of_a_pack_is_that_of_its_rows(shapes):
    """Element by element, with rows of one token and rows that are all prefix or all answer."""
    lengths = [max(1, prefix + answer) for prefix, answer in shapes]
    place = [(row, i) for row, length in enumerate(lengths) for i in range(length)]
    starts = np.cumsum(lengths) - lengths
    start_T = torch.tensor([starts[row] for row, _ in place])
    prefix_end_T = torch.tensor([starts[row] + shapes[row][0] for row, _ in place])
    mask = dense_mask(start_T, prefix_end_T)
    for query, (query_row, i) in enumerate(place):
        for key, (key_row, j) in enumerate(place):
            seen = query_row == key_row and (j <= i or j < shapes[query_row][0])
            assert mask[query, key] == seen


def test_gelu_as_a_sigmoid_is_gelu(monkeypatch):
    x = torch.linspace(-12, 12, 1001, dtype=torch.float64)
    wanted = gelu(x.float())
    monkeypatch.setattr("torch.Tensor.is_cuda", True)
    torch.testing.assert_close(gelu(x.float()), wanted, atol=1e-6, rtol=1e-5)
