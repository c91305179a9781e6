"""The questions: what is held out was never trained on, but can be known from plain text."""

from collections import Counter

import pytest

from glmtune.demo.questions import held_out_questions, num_right, split_facts, training_questions
from glmtune.demo.world import load_world

TRAINING, HELD_OUT = training_questions(), held_out_questions()


def test_number_of_questions_taught_and_held_out():
    assert len(HELD_OUT) == 400
    assert Counter(question.language for question in HELD_OUT) == {"en": 200, "zh": 200}
    assert {q.kind for q in HELD_OUT} == {q.kind for q in TRAINING} == set(load_world().kinds)
    assert len({q.kind for q in TRAINING}) >= 12
    assert any(q.input for q in TRAINING)
    assert any(not q.input for q in TRAINING)


@pytest.mark.parametrize("questions", [TRAINING, HELD_OUT], ids=["training", "held out"])
def test_no_question_twice(questions):
    assert len({(q.instruction, q.input) for q in questions}) == len(questions)


def test_no_fact_on_both_sides():
    for name, facts in load_world().facts.items():
        training, held_out = split_facts(name)
        assert len(training) + len(held_out) == len(facts)
        assert held_out
        seen = {frozenset(fact.values()) for fact in training}
        assert not any(frozenset(fact.values()) in seen for fact in held_out)


def test_no_phrasing_on_both_sides():
    for kind in load_world().kinds.values():
        for phrasings in kind.phrasings.values():
            training = {(ask.instruction, ask.input) for ask in phrasings if not ask.held_out}
            held_out = {(ask.instruction, ask.input) for ask in phrasings if ask.held_out}
            assert training
            assert not training & held_out


def test_no_held_out_question_in_training():
    assert not {(q.instruction, q.input) for q in TRAINING} & {
        (q.instruction, q.input) for q in HELD_OUT
    }


def test_answers_are_short_words():
    for question in [*TRAINING, *HELD_OUT]:
        assert question.output == question.output.strip() != ""
        assert "{" not in question.instruction + question.input + question.output
        assert len(question.output) <= 20


def test_record_is_alpaca():
    assert set(TRAINING[0].record()) == {"instruction", "input", "output"}


def test_num_right_counts_by_language_and_kind():
    answers = [q.output + " " if q.language == "en" else "?" for q in HELD_OUT]
    count = num_right(HELD_OUT, answers)
    assert count["en"] == (200, 200)
    assert count["zh"] == (0, 200)
    right, asked = count["colour"]
    assert 0 < right < asked
