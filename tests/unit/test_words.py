"""Weights packed into 32-bit words: unpacked values are within half a step of their group."""

import pytest
import torch

from glmtune.ops.words import GROUP_SIZE, Words

BITS = pytest.mark.parametrize("bits", [8, 4])


@BITS
@pytest.mark.parametrize("num_inputs", [GROUP_SIZE, 1024])
def test_no_weight_is_further_off_than_half_a_step(bits, num_inputs):
    weight = torch.randn(6, num_inputs, generator=torch.Generator().manual_seed(0)) + 0.3
    packed = Words.pack(weight, bits)
    assert packed.words_OW.shape == (6, num_inputs * bits // 32)
    found = packed.unpack(torch.float32)
    per_word, words = 32 // bits, GROUP_SIZE * bits // 32
    groups = (found - weight).unflatten(1, (per_word, -1, words)).abs().amax((1, 3))
    step = packed.scale_middle_OG2[..., 0].float()
    # Ends of a group may be cut by as much as bfloat16 rounds its scale and middle.
    slack = 2**-8 * (packed.scale_middle_OG2[..., 1].float().abs() + 2**bits * step)
    assert (groups <= step / 2 + slack).all()


@BITS
def test_numbers_of_a_word_belong_to_inputs_far_apart(bits):
    """Neighbouring words hold neighbouring inputs, and a group shares one scale."""
    num_inputs = 4 * GROUP_SIZE
    num_words = num_inputs * bits // 32
    numbers = torch.arange(num_inputs) * 7 % 2**bits
    words_of_group = GROUP_SIZE * bits // 32
    group = torch.arange(num_inputs) % num_words // words_of_group
    weight = (numbers - 2 ** (bits - 1)) * 2.0**group
    for first in range(0, num_words, words_of_group):  # each group has both ends of its range
        weight[first] = -(2.0 ** (bits - 1)) * 2.0 ** (first // words_of_group)
        weight[first + 1] = (2.0 ** (bits - 1) - 1) * 2.0 ** (first // words_of_group)
    packed = Words.pack(weight[None].float(), bits)
    assert torch.equal(packed.scale_middle_OG2[0, :, 0].float(), 2.0 ** torch.arange(4))
    assert torch.equal(packed.unpack(torch.float32)[0], weight.float())
    word = int(packed.words_OW[0, 2]) & 0xFFFFFFFF
    given = weight[2::num_words] + 2 ** (bits - 1)
    assert [word >> shift & (2**bits - 1) for shift in range(0, 32, bits)] == given.int().tolist()


@BITS
def test_weights_that_are_all_alike_stay_so(bits):
    weight = torch.full((2, GROUP_SIZE), 0.5)
    assert torch.allclose(Words.pack(weight, bits).unpack(torch.float32), weight, atol=1e-5)
