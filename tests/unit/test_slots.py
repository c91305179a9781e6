"""Rows join and leave a running batch, and each answers as it does alone."""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import recorded_prompts

from glmtune.errors import UserError
from glmtune.generation import Decoder, GenerationSettings
from glmtune.generation import slots as room
from glmtune.generation.slots import Slots
from glmtune.models.loading import load_base_model

NUM_SLOTS = 3
KINDS = [
    GenerationSettings(max_new_tokens=24),
    GenerationSettings(max_new_tokens=1),
    GenerationSettings(max_new_tokens=7, repetition_penalty=1.3),
    GenerationSettings(max_new_tokens=16, do_sample=True, temperature=0.9, top_p=0.95, seed=1),
    GenerationSettings(max_new_tokens=12, do_sample=True, top_k=20, seed=2),
    GenerationSettings(max_new_tokens=20, do_sample=True, temperature=1.5, repetition_penalty=1.2),
    GenerationSettings(max_new_tokens=130),
    GenerationSettings(max_new_tokens=24, repetition_penalty=5.0),
]
STOPS = [[], [244, *range(300, 390)], list(range(500, 700))]


@pytest.fixture(scope="module")
def model(tiny_folder):
    return load_base_model(str(tiny_folder), dtype=torch.float32)


@pytest.fixture(scope="module")
def prompts(tiny_folder, model):
    return recorded_prompts(tiny_folder, model.config)


@pytest.fixture(scope="module")
def alone(model, prompts):
    """The answer to a prompt, given settings and stop ids, in a batch of its own."""

    @functools.cache
    def answer(prompt, kind, stops):
        stream = Decoder(model, STOPS[stops]).stream([prompts[prompt]], KINDS[kind])
        return [token for (more,) in stream for token in more]

    return answer


@pytest.fixture(params=[False, True], ids=["steps", "captured"])
def slots(model, monkeypatch, request):
    """Also with the step over all columns, which a GPU would capture."""
    decoder = Decoder(model, [])
    if request.param:
        captured = lambda slots, *given: functools.partial(slots._step, *given)
        monkeypatch.setattr(Slots, "_capture", captured)
        decoder.captures = True
    return Slots(decoder, NUM_SLOTS)


class Asked:
    """A prompt, its settings, and the tokens so far."""

    def __init__(self, slots, prompts):
        self.slots, self.prompts = slots, prompts
        self.in_slot, self.ended = {}, []

    def admit(self, slot, *questions):
        """Each question is (index of the prompt, of its settings, of its stop ids)."""
        self.slots.admit(
            slot,
            [self.prompts[prompt] for prompt, _, _ in questions],
            [KINDS[kind] for _, kind, _ in questions],
            [STOPS[stops] for _, _, stops in questions],
        )
        for place, question in enumerate(questions, start=slot):
            self.in_slot[place] = (question, [])
        self.look()

    def step(self, times=1):
        self.slots.step(times)
        self.look()

    def look(self):
        for slot, ids in enumerate(self.slots.look()):
            if slot in self.in_slot:
                self.in_slot[slot][1].extend(ids)
                if self.slots.rows[slot] is None:
                    self.ended.append(self.in_slot.pop(slot))
            else:
                assert ids == []

    def to_the_end(self):
        while self.slots.num_live:
            self.step()
        return self.ended


@pytest.mark.parametrize("joining", [(1, 0, 0), (2, 3, 1), (4, 6, 0)])
def test_a_row_that_joins_a_running_batch_answers_as_alone(slots, prompts, alone, joining):
    """The rows it joins do too: greedy ones, also beside a sampling row, and when buffers grow."""
    asked = Asked(slots, prompts)
    asked.admit(0, (3, 0, 0), (0, 0, 0))
    asked.step(5)
    asked.admit(2, joining)
    ended = asked.to_the_end()
    assert len(ended) == 3
    for question, ids in ended:
        assert ids == alone(*question)


def test_rows_of_one_batch_have_settings_of_their_own(slots, prompts, alone):
    asked = Asked(slots, prompts)
    for kinds in ((0, 3, 2), (5, 4, 0)):
        asked.admit(0, *((number, kind, number) for number, kind in enumerate(kinds)))
        asked.to_the_end()
    assert len(asked.ended) == 6
    for question, ids in asked.ended:
        assert ids == alone(*question)


def test_a_row_that_leaves_frees_its_slot(slots, prompts, alone):
    """After a sampling row and one with a penalty, later greedy rows have neither."""
    asked = Asked(slots, prompts)
    asked.admit(0, (0, 3, 0), (1, 3, 0), (3, 7, 0))
    asked.step(2)
    with pytest.raises(AssertionError, match="a slot is taken"):
        asked.admit(1, (3, 0, 0))
    for slot in (1, 2):
        slots.release(slot)
        del asked.in_slot[slot]
    asked.step()
    asked.admit(1, (4, 0, 0), (3, 0, 0))
    for question, ids in asked.to_the_end():
        assert ids == alone(*question)
    assert slots.rows == [None] * NUM_SLOTS


def test_greedy_rows_take_the_greedy_step_whoever_was_there_before(slots, prompts, monkeypatch):
    """Only batches with sampling rows sort the vocabulary."""
    asked = Asked(slots, prompts)
    asked.admit(0, (0, 3, 0))
    asked.to_the_end()
    monkeypatch.setattr(room, "choose", lambda *_: pytest.fail("nobody draws"))
    asked.admit(0, (0, 0, 0), (1, 0, 0))
    asked.to_the_end()


def test_no_row_passes_its_end_or_makes_others_wait(slots, prompts):
    asked = Asked(slots, prompts)
    asked.admit(0, (0, 2, 0), (1, 0, 0))
    slots.step(100)
    assert [len(ids) for ids in slots.look()] == [6, 6, 0]
    slots.step(100)
    assert [len(ids) for ids in slots.look()] == [0, 17, 0]
    assert not slots.num_live


def test_after_scores_that_are_not_finite_all_slots_are_free(slots, prompts, alone, model):
    asked = Asked(slots, prompts)
    asked.admit(0, (0, 0, 0), (1, 0, 0))
    weight = model.transformer.layers[0].mlp.dense_4h_to_h.weight.data
    before = weight[0, 0].item()
    weight[0, 0] = torch.nan
    with pytest.raises(UserError, match="not finite"):
        asked.step()
    weight[0, 0] = before
    assert slots.rows == [None] * NUM_SLOTS
    asked = Asked(slots, prompts)
    asked.admit(0, (0, 0, 0))
    assert asked.to_the_end() == [((0, 0, 0), alone(0, 0, 0))]


QUESTIONS = st.tuples(
    st.integers(0, 4), st.integers(0, len(KINDS) - 1), st.integers(0, len(STOPS) - 1)
)


@given(
    turns=st.lists(
        st.one_of(
            st.tuples(st.just("admit"), st.lists(QUESTIONS, min_size=1, max_size=NUM_SLOTS)),
            st.tuples(st.just("step"), st.integers(1, 9)),
            st.tuples(st.just("release"), st.integers(0, NUM_SLOTS - 1)),
        ),
        max_size=12,
    )
)
@settings(max_examples=40, deadline=None)
def test_rows_that_come_and_go_answer_as_alone(model, prompts, alone, turns):
    asked = Asked(Slots(Decoder(model, []), NUM_SLOTS), prompts)
    left = []
    for turn, what in turns:
        free = [slot for slot, row in enumerate(asked.slots.rows) if row is None]
        if turn == "step" and asked.slots.num_live:
            asked.step(what)
        elif turn == "release":
            asked.slots.release(what)
            left += [asked.in_slot.pop(what)] if what in asked.in_slot else []
        elif turn == "admit" and free:
            num_free = next((n for n in range(len(free)) if free[0] + n != free[n]), len(free))
            asked.admit(free[0], *what[:num_free])
    for question, ids in asked.to_the_end():
        assert ids == alone(*question)
    for question, ids in left:
        assert ids == alone(*question)[: len(ids)]
