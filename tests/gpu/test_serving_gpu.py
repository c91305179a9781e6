"""A server's batch on a GPU: captured steps, fixed shapes, an adapter of its own for each row."""

import pytest
import torch
from separate import alone, questions, together
from serving import strong_adapters

from glmtune.bench.random_model import CONFIGS, random_model
from glmtune.generation import Decoder, EncodedPrompt
from glmtune.generation.mixed import MixedAdapters
from glmtune.generation.reading import CapturedPass, Placed, PromptPass, read_prompts
from glmtune.generation.sampling import ChoiceSettings
from glmtune.generation.slots import Slots
from glmtune.models.decoding import KeyValueCache
from glmtune.models.families import family_of

pytestmark = pytest.mark.gpu
ONE_TOKEN = ChoiceSettings(max_new_tokens=1)


def served(shape, bits, dtype=torch.bfloat16):
    """A decoder of a random model with two adapters, and questions for it."""
    model = random_model(CONFIGS[shape], torch.device("cuda"), dtype).eval()
    mixed = MixedAdapters()
    for number, adapted in enumerate(strong_adapters(model, (1, 2), 0.2), start=1):
        mixed.add(adapted, f"number {number}")
    decoder = Decoder(model, [], bits=bits, separate=True, adapters=mixed)
    assert decoder.captures
    return decoder, questions(16, 5, ends_of(decoder), 3000)


def ends_of(decoder):
    """The ids with which each prompt has to end."""
    rule = family_of(decoder.config).row_rule(decoder.config)
    return [special.id for special in rule.after_prompt]


@pytest.mark.parametrize("overlaps", [False, True])
@pytest.mark.parametrize("bits", [16, 8])
@pytest.mark.parametrize("shape", ["small", "glm-small"])
def test_rows_are_what_they_are_alone_in_every_bit(shape, bits, overlaps):
    decoder, asked = served(shape, bits)
    for question, found in zip(asked, together(decoder, asked, overlaps), strict=True):
        assert found == alone(decoder, question)


@pytest.mark.parametrize("bits", [16, 8])
@pytest.mark.parametrize("shape", ["small", "glm-small"])
def test_captured_passes_read_prompts_to_the_same_bits(shape, bits, monkeypatch):
    """As passes that are launched kernel by kernel; each size is captured once, then replayed."""
    decoder, asked = served(shape, bits)
    captured, replayed = [], []
    capture, read = CapturedPass.of.__func__, CapturedPass.read
    monkeypatch.setattr(
        CapturedPass,
        "of",
        classmethod(lambda cls, *given: (captured.append(1), capture(cls, *given))[1]),
    )
    monkeypatch.setattr(
        CapturedPass, "read", lambda self, given: (replayed.append(1), read(self, given))[1]
    )
    found = together(decoder, asked, True)
    assert len(replayed) > len(captured) > 1
    monkeypatch.setattr("glmtune.generation.slots.MOST_COLUMNS_CAPTURED", 0)
    del captured[:], replayed[:]
    assert together(decoder, asked, True) == found
    assert not captured
    assert not replayed


@pytest.mark.parametrize("bits", [16, 8])
@pytest.mark.parametrize("shape", ["small", "glm-small"])
@torch.inference_mode()
def test_prompts_are_read_in_few_kernels_as_by_plain_layers(shape, bits, monkeypatch):
    """In float32, whose rounding is known; with adapters, into slots that are not neighbours."""
    decoder, _ = served(shape, bits, torch.float32)
    prompts = [
        Placed([300 + place for place in range(length)] + ends_of(decoder), slot, adapter)
        for length, slot, adapter in ((5, 2, 1), (50, 0, 0), (21, 3, 2))
    ]
    given, _ = PromptPass.of(decoder, prompts, 4, 64, 128)  # the fourth row repeats the third
    assert decoder.reads_in_few_kernels
    results = []
    for few in (True, False):
        monkeypatch.setattr(Decoder, "reads_in_few_kernels", few)
        cache = KeyValueCache.zeros(decoder.shape, 6, 128, decoder.weights.final_norm.weight)
        results.append((read_prompts(decoder, given, cache, given.slot_B), *cache))
    for found, expected in zip(*results, strict=True):
        assert torch.allclose(found, expected, atol=1e-4)
    found = results[0][1]
    assert found[:, [0, 2, 3], :, :64].any(-1).all()
    assert not found[:, [1, 4, 5]].any()
    assert not found[:, :, :, 64:].any()


def test_captured_passes_share_their_memory():
    """Of many sizes they take little more than of one."""
    decoder, _ = served("small", 16)
    slots = Slots(decoder, 4)

    def read(length):
        slots.admit([0], [EncodedPrompt([300] * length + ends_of(decoder), 0)], [ONE_TOKEN])
        slots.look()
        torch.cuda.synchronize()
        return torch.cuda.memory_reserved()

    read(900)  # grows the buffers
    first = read(500)
    assert len(slots._passes) == 2
    for length in (10, 100, 200, 300, 400):
        last = read(length)
    assert len(slots._passes) == 7
    assert last - first < 64 << 20
