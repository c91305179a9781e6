"""Rows of a server's batch: bit for bit what they are alone, each with an adapter of its own."""

import pytest
import torch
from separate import NUM_SLOTS, admit, alone, questions, together
from serving import strong_adapters

from glmtune.adapters import attach_lora
from glmtune.errors import UserError
from glmtune.generation import Decoder, EncodedPrompt
from glmtune.generation.linears import multiply_separately
from glmtune.generation.mixed import MixedAdapters
from glmtune.generation.reading import CapturedPass
from glmtune.generation.sampling import ChoiceSettings
from glmtune.generation.slots import Slots
from glmtune.models.loading import load_base_model
from glmtune.models.resolve import GLM_TINY

STOPS, ENDS = [2652], (2648, 2651)


DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(scope="module", params=DTYPES, ids=str)
def decoder(request):
    """With two adapters, of which one adapts more linears than the other."""
    model, mixed = load_base_model(GLM_TINY, dtype=request.param), MixedAdapters()
    for number, adapted in enumerate(strong_adapters(model, (1, 2)), start=1):
        mixed.add(adapted, f"number {number}")
    return Decoder(model, STOPS, separate=True, adapters=mixed)


@pytest.mark.parametrize("overlaps", [False, True])
def test_rows_are_what_they_are_alone_in_every_bit(decoder, overlaps):
    """Whatever joins, leaves and stands beside them: tokens and probabilities are equal."""
    asked = questions(14, overlaps, ENDS)
    for question, found in zip(asked, together(decoder, asked, overlaps), strict=True):
        assert found == alone(decoder, question)


def test_mixed_rows_are_those_of_one_adapter_at_a_time():
    """The plain reference: the adapter on the model, as every other verb has it."""
    model, mixed, plain = load_base_model(GLM_TINY, dtype=torch.float32), MixedAdapters(), []
    asked = [(prompt, ChoiceSettings(max_new_tokens=12, num_listed=1)) for prompt, _, _ in
             questions(3, 9, ENDS)]  # fmt: skip

    def reference():
        decoder = Decoder(model_now, STOPS)
        slots, answers = Slots(decoder, 3), [([], []) for _ in asked]
        slots.admit(0, *map(list, zip(*asked, strict=True)))
        while True:
            for slot, ids in enumerate(slots.look()):
                answers[slot][0].extend(ids)
                answers[slot][1].extend(score.chosen for score in slots.scores.get(slot, []))
            if not slots.num_live:
                return answers
            slots.step()

    model_now = model
    plain.append(reference())
    for number, model_now in enumerate(strong_adapters(model, (1, 2), 0.2), start=1):
        plain.append(reference())
        mixed.add(model_now, f"number {number}")
    decoder = Decoder(model, STOPS, separate=True, adapters=mixed)
    for adapter, answers in enumerate(plain):
        for question, (ids, scores) in zip(asked, answers, strict=True):
            made, its = alone(decoder, (*question, adapter))
            assert made == ids
            assert torch.allclose(
                torch.tensor([score.chosen for score in its]), torch.tensor(scores), atol=1e-3
            )
    assert plain[0] != plain[1] != plain[2]


class Graphs:
    """Stands for captured graphs: work that reads and writes where it did the first time."""

    def __init__(self, monkeypatch, decoder):
        self.sizes, self.num_read = [], 0
        monkeypatch.setattr(decoder, "captures", True)
        graphs = self
        monkeypatch.setattr(Slots, "_graph", lambda _, *given: graphs.capture(*given))

    def capture(self, work, warm_up):
        made = work()
        if made is None:  # a step
            return work, made

        def replay():
            self.num_read += 1
            made.copy_(work())

        self.sizes.append(tuple(work.args[1].ids_BS.shape))
        return replay, made


@pytest.mark.parametrize("fails", [False, True])
def test_captured_passes_read_prompts_to_the_same_bits(decoder, monkeypatch, fails):
    """Also where there is no memory for them, and behind rows of other sizes and adapters."""
    asked = questions(26, 7, ENDS)
    expected = [alone(decoder, question) for question in asked]
    graphs = Graphs(monkeypatch, decoder)
    if fails:
        monkeypatch.setattr(CapturedPass, "of", lambda *_: fail_for_memory())
    for question, found, its in zip(asked, together(decoder, asked, True), expected, strict=True):
        assert found == its, question
    assert graphs.num_read > len(graphs.sizes) > 1 or (fails and not graphs.sizes)


def fail_for_memory():
    raise torch.OutOfMemoryError


def test_only_passes_that_are_launched_slowly_are_captured(decoder, monkeypatch):
    graphs, slots = Graphs(monkeypatch, decoder), Slots(decoder, NUM_SLOTS)
    monkeypatch.setattr("glmtune.generation.slots.MOST_COLUMNS_CAPTURED", 64)
    for place, length in enumerate((10, 70, 30)):
        prompt = EncodedPrompt([300] * length + [*ENDS], 0)
        slots.admit([place], [prompt], [ChoiceSettings(max_new_tokens=20)])
    assert graphs.sizes == [(1, 64)]
    assert graphs.num_read == 2


@torch.inference_mode()
def test_a_prompt_is_written_to_its_own_columns_alone(decoder):
    """Whole rows of the cache take a GPU as long as a quarter of the pass itself."""
    slots, (first, second) = Slots(decoder, NUM_SLOTS), long_questions()
    admit(slots, [3], [first])
    before, num_columns = 2.0**13, slots.num_columns
    for tensor in slots._buffers.cache:
        tensor.fill_(before)
    admit(slots, [1], [second])
    width = decoder.reads(len(second[0].ids), 1)[1]
    assert slots.num_columns == num_columns > width
    for tensor in slots._buffers.cache:
        assert (tensor[:, 1, :, :width] != before).all()
        tensor[:, 1, :, :width] = before
        assert (tensor == before).all()


@torch.inference_mode()
def test_a_slot_whose_row_left_before_its_fault_was_read_is_clean_for_the_next(decoder):
    slots, (first, second) = Slots(decoder, NUM_SLOTS), long_questions()
    slots.admit([2], [first[0]], [first[1]], [()])
    slots.look()
    slots._buffers.cache.values[0, 2] = torch.nan
    assert slots.step() == 1
    notes = slots.note()
    slots.release(2)
    assert slots.read(notes) == [[]] * NUM_SLOTS
    admit(slots, [2], [second])
    found = slots.look()[2]
    while slots.num_live:
        slots.step()
        found += slots.look()[2]
    assert found == alone(decoder, second)[0]


def long_questions():
    """Two questions whose answers take several steps."""
    return [
        (prompt, settings.model_copy(update={"max_new_tokens": 200}), adapter)
        for prompt, settings, adapter in questions(2, 4, ENDS)
    ]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_product_of_a_row_is_the_same_among_any_others(dtype):
    x, weight, bias = torch.randn(130, 96), torch.randn(40, 96), torch.randn(40)
    x, weight, bias = x.to(dtype), weight.to(dtype), bias.to(dtype)
    whole = multiply_separately(x, weight, bias)
    for rows in (1, 2, 3, 7, 16, 64, 129):
        assert torch.equal(multiply_separately(x[:rows], weight, bias), whole[:rows])
    assert torch.allclose(whole, x @ weight.T + bias, atol=1e-3 if dtype == torch.float32 else 1)


def test_adapters_that_cannot_stand_beside_others_are_refused():
    from peft import LoraConfig, get_peft_model

    model = load_base_model(GLM_TINY, dtype=torch.float32)
    target = ["query_key_value"]
    for config, words in (
        (LoraConfig(target_modules=target, use_dora=True), "more than plain LoRA"),
        (LoraConfig(target_modules=target, bias="lora_only"), "biases of its own"),
    ):
        adapted = get_peft_model(model, config)
        with pytest.raises(UserError, match=f"adapter odd: .*{words}.*glmtune merge"):
            MixedAdapters().add(adapted, "odd")
        adapted.unload()
    MixedAdapters().add(attach_lora(model), "plain")
