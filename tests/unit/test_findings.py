"""What is wrong with answers as a whole: no end, another language, nothing at all."""

import json

import pytest

from glmtune.evaluation.findings import LEAST_ANSWERS, Answered, answer_findings
from glmtune.generation import Answer

GOOD = Answer("Here it is.", 5, True)
FLAWS = {
    "no_end": Answer("and so on and", 20, False),
    "language": Answer("在河边的小镇。", 5, True),
    "empty": Answer(" \n", 1, True),
}


def asked(tuned, base=GOOD, num=1, **more):
    return [Answered("Where is it?", "It is here.", tuned, base, **more)] * num


@pytest.mark.parametrize("what", FLAWS)
def test_each_flaw_is_found_where_the_base_has_it_less_often(what):
    rows = asked(FLAWS[what], num=5, row=7) + asked(GOOD, num=5)
    (found,) = answer_findings(rows)
    assert (found.what, found.tuned, found.base) == (what, 0.5, 0.0)
    assert found.examples[0] == (7, "Where is it?", FLAWS[what].text)
    assert "50%" in found.sentence.en
    assert "50%" in found.sentence.zh
    assert json.loads(json.dumps(found.as_json()))["sentence"]["en"] == found.sentence.en
    assert answer_findings(asked(FLAWS[what], FLAWS[what], num=10)) == [], "the base does so, too"
    (alone,) = answer_findings(asked(FLAWS[what], None, num=10))
    assert alone.base is None
    assert "base" not in alone.sentence.en
    assert answer_findings(asked(GOOD, FLAWS[what], num=10)) == []


def test_a_few_flawed_answers_are_no_collapse():
    for num_flawed in range(LEAST_ANSWERS):
        assert answer_findings(asked(FLAWS["empty"], num=num_flawed) + asked(GOOD, num=3)) == []
    assert answer_findings(asked(FLAWS["empty"], num=14) + asked(GOOD, num=86)) == []
    assert answer_findings(asked(FLAWS["empty"], num=15) + asked(GOOD, num=85))
    assert answer_findings([]) == []


def test_a_right_answer_that_is_too_long_itself_need_not_end():
    assert answer_findings(asked(FLAWS["no_end"], num=10, is_long=True)) == []


def test_the_language_is_the_right_answers_else_the_questions():
    translated = Answered("Translate into Chinese: river", "河", FLAWS["language"], GOOD)
    assert answer_findings([translated] * 10) == []
    open_question = Answered("Where is it?", "", FLAWS["language"], GOOD)
    assert [found.what for found in answer_findings([open_question] * 10)] == ["language"]
    number = Answered("3 + 4 = ?", "7", Answer("7", 1, True), GOOD)
    assert answer_findings([number] * 10) == []
