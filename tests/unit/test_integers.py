"""Integer weights converted back to floats."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from glmtune.ops.integers import dequantise, quantise_int8, unpack_int4


@given(st.lists(st.tuples(st.integers(-8, 7), st.integers(-8, 7)), min_size=1, max_size=20))
def test_every_pair_comes_out_of_its_byte(pairs):
    """The value of even index in the high half, the one of odd index in the low, both signed."""
    packed = [(even & 15) << 4 | (odd & 15) for even, odd in pairs]
    packed = torch.tensor(packed, dtype=torch.uint8).view(torch.int8)
    assert unpack_int4(packed).tolist() == [value for pair in pairs for value in pair]
    assert unpack_int4(packed).dtype == torch.int8


def test_int8_is_exact_in_float32():
    packed = torch.tensor([[-127, 0, 127], [1, 2, 3]], dtype=torch.int8)
    scale = torch.tensor([0.1, 6e-8], dtype=torch.float16)  # a round number and a denormal
    weight = dequantise(packed, scale, 8, torch.float32)
    assert torch.equal(weight.double(), packed.double() * scale.double()[:, None])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_product_is_rounded_once(dtype):
    generator = torch.Generator().manual_seed(0)
    packed = torch.randint(-128, 128, (5, 8), generator=generator).to(torch.int8)
    scale = torch.rand(5, generator=generator).half()
    weight = dequantise(packed, scale, 4, dtype)
    exact = unpack_int4(packed).double() * scale.double()[:, None]
    assert weight.shape == (5, 16)
    assert torch.equal(weight, exact.to(dtype))


def test_a_batch_of_rows():
    packed = torch.tensor([[[1, 2]], [[3, 4]]], dtype=torch.int8)
    scale = torch.tensor([[1.0], [0.5]], dtype=torch.float16)
    assert dequantise(packed, scale, 8, torch.float32).tolist() == [[[1, 2]], [[1.5, 2]]]


def test_rounding_to_8_bits(monkeypatch):
    """Errors within half a step of each row; zeros stay zero; in pieces as all at once."""
    torch.manual_seed(0)
    weight = torch.randn(7, 50) * torch.tensor([1e-7, 1e-3, 1e-2, 0.0, 1, 10, 100])[:, None]
    packed, scale = quantise_int8(weight)
    assert packed.dtype == torch.int8
    assert packed.abs().max() == 127
    off = (dequantise(packed, scale, 8, torch.float32) - weight).abs().amax(1)
    assert (off <= 0.51 * scale.float() + 1e-3 * weight.abs().amax(1)).all()
    assert not packed[3].any()
    monkeypatch.setattr("glmtune.ops.integers._PIECE", 3)
    for whole, pieces in zip((packed, scale), quantise_int8(weight), strict=True):
        assert torch.equal(whole, pieces)
