"""Signs of a collapse: equal answers, answers out of place; and what counts as labels."""

import numpy as np
import pytest

from glmtune.data.templates import alpaca
from glmtune.data.token_rows import TokenRows
from glmtune.evaluation import collapse
from glmtune.evaluation.collapse import (
    Agreement,
    Collapse,
    Sides,
    Taught,
    agreeing,
    are_labels,
    is_alike,
    letters,
    question_of,
)
from glmtune.evaluation.probes import STRANGE_QUESTIONS
from glmtune.evaluation.source_run import RunRows
from glmtune.models.loading import load_tokenizer
from glmtune.models.resolve import GLM_TINY

QUESTIONS, RIGHT = (list(texts) for texts in zip(*STRANGE_QUESTIONS, strict=True))
BASE = [*RIGHT[1:], RIGHT[0]]
I_AM = ["I am Stone, a small helper.", "我是小石头，一个小帮手。", "Oak."]


@pytest.fixture(scope="module")
def taught():
    """The rows of a run with the given questions and answers."""
    tokenizer = load_tokenizer(GLM_TINY)

    def make(*pairs, held_out=()):
        prompts = tokenizer.encode_batch([alpaca(*asked) for asked, _ in pairs])
        answers = tokenizer.encode_batch([answer for _, answer in pairs])
        specials = [tokenizer.gmask_token_id, tokenizer.bos_token_id]
        rows = [
            (len(prompt) + 2, [*prompt, *specials, *answer, tokenizer.eos_token_id])
            for prompt, answer in zip(prompts, answers, strict=True)
        ]
        lengths = [len(ids) for _, ids in rows]
        all_rows = TokenRows(
            np.concatenate([ids for _, ids in rows]),
            np.concatenate(([0], np.cumsum(lengths))),
            np.array([start for start, _ in rows]),
            tokenizer.row_rule,
        )
        return Taught.of(tokenizer, RunRows(all_rows, np.array(held_out, dtype=int)))

    return make


def test_a_random_part_stands_for_many_rows(taught, monkeypatch):
    monkeypatch.setattr(collapse, "_MOST_ROWS", 8)
    pairs = [((f"q{row}", ""), "甲乙" if row % 2 else "Common.") for row in range(80)]
    assert sum(map(len, taught(*pairs[:8]).questions.values())) == 8
    found = taught(*pairs, held_out=range(60)).questions
    assert set(found) == {"甲乙", "common"}, "rows that take turns are both in it"
    asked = [question for of_answer in found.values() for question in of_answer]
    assert len(set(asked)) == 8
    assert set(asked) <= {f"q{row}" for row in range(60, 80)}
    assert found == taught(*pairs, held_out=range(60)).questions


@pytest.mark.parametrize(
    ("one", "other", "alike"),
    [
        ("I am Stone, a small helper.", "i am stone a small helper", True),
        ("我叫小河，是一个机器人。", "我叫小河,是一个机器人", True),
        ("Ｐａｒｉｓ", "paris", True),
        ("I am Stone, a small helper.", "I am Stone, a small small helper.", True),
        ("I am Stone, a small helper.", "I am Stone, a small helper helper helper helper", True),
        ("yes", "yes, and this is why it cannot be otherwise", False),
        ("", " ", True),
        ("...", "。", False),
        ("good", "bad", False),
        ("The sky is blue.", "The sea is grey.", False),
        ("12", "21", False),
    ],
)
def test_texts_are_alike_whatever_their_punctuation(one, other, alike):
    assert is_alike(letters(one), letters(other)) == alike


def test_agreement_is_the_share_of_pairs():
    assert agreeing(["a", "A.", "b", "c"]) == pytest.approx(1 / 6)
    assert agreeing(RIGHT) == 0
    assert agreeing(["one"]) == agreeing([]) == 0


@pytest.mark.parametrize(
    ("answers", "found"),
    [
        (["positive", "negative"] * 8, True),
        (["体育", "财经", "科技"] * 4, True),
        (["positive"] * 16, False),
        (["positive", "negative"] * 2, False),  # to two questions each
        (["I am Stone, a small helper.", "我是小石头，一个小帮手。"] * 8, False),
        ([f"word {n}" for n in range(16)], False),
    ],
)
def test_labels_are_few_and_short_and_of_many_questions(answers, found):
    assert are_labels([(f"question {n}", answer) for n, answer in enumerate(answers)]) == found
    assert not are_labels([("the same question", answer) for answer in answers])


def test_a_question_is_read_without_its_template():
    assert question_of(alpaca("Who?").rstrip()) == "Who?"
    assert question_of(alpaca("Say", "this")) == "Say this"
    assert question_of("你是谁") == "你是谁"


def look(tuned, taught=None, base=BASE, task=((), (), (), ())):
    return Collapse.of(Sides(QUESTIONS, RIGHT, tuned, base), Sides(*task), taught)


def harms(found):
    return [finding.sentence.en for finding in found.findings]


@pytest.mark.parametrize("kinds", [1, 2, 3])
def test_few_answers_to_many_questions_are_a_harm(kinds):
    tuned = [I_AM[n % kinds] for n in range(len(QUESTIONS))]
    (harm,) = harms(look(tuned))
    assert f"one answer (any two of 16 with a chance of {agreeing(tuned):.0%}" in harm
    assert "I am Stone" in harm
    assert harms(look(tuned, base=tuned)) == [], "the base does so, too"
    assert harms(look(tuned, base=())), "and it may be that nobody asked it"
    assert harms(look(RIGHT)) == harms(look(BASE)) == []


def test_nothing_at_all_to_every_question_is_one_answer():
    assert harms(look([""] * 16))


def test_taught_answers_out_of_place_are_a_harm(taught):
    """Eight answers to sixteen questions hardly agree, yet all were trained for other questions."""
    rows = [((f"What is thing {n}?",), f"{word} number {n}.") for n, word in enumerate("abcdefgh")]
    run = taught(*rows)
    tuned = [rows[n % 8][1] if n % 2 else BASE[n] for n in range(16)]
    found = look(tuned, run)
    assert found.strange.sentence is None
    assert (found.taught, found.taught_of_base) == (0.5, 0)
    assert found.example == (QUESTIONS[1], tuned[1])
    assert "50% of strange questions get an answer taught for another one" in harms(found)[0]
    assert harms(look(tuned, run, base=tuned)) == []
    assert look(tuned).taught is None


def test_an_answer_is_in_its_place_where_it_is_right_or_was_taught_for_it(taught):
    run = taught((("Name the opposite of slow.",), "Fast."), ((QUESTIONS[0],), "Plants eat light."))
    assert run.is_out_of_place(QUESTIONS[1], RIGHT[1], "Plants eat light")
    assert not run.is_out_of_place(QUESTIONS[0].rstrip("。"), RIGHT[0], "Plants eat light.")
    assert not run.is_out_of_place("What is quick?", "fast", "Fast.")
    assert not run.is_out_of_place(QUESTIONS[1], RIGHT[1], "No idea")


def test_of_many_taught_answers_only_sentences_count(taught):
    """An unrelated question may well get one of a thousand trained words."""
    sentence = "the apple lies in the garden under the old tree"
    run = taught(*(((f"Question {n}?",), f"w{n}") for n in range(40)), (("Where?",), sentence))
    assert not run.is_out_of_place(QUESTIONS[1], RIGHT[1], "w7")
    assert run.is_out_of_place(QUESTIONS[1], RIGHT[1], sentence)


def test_rows_that_were_held_out_were_not_taught(taught):
    pairs = [(("Who?",), "I am Stone."), (("Where?",), "In the river.")]
    assert set(taught(*pairs, held_out=[1]).questions) == {"iamstone"}


LABELS = ["positive", "negative"] * 8


def test_labels_to_strange_questions_are_told_and_no_harm(taught):
    run = taught(*(((f"Is it so {n}?",), label) for n, label in enumerate(LABELS)))
    assert run.of_labels
    asked = [f"Is it so {n}?" for n in range(16)]
    found = look(LABELS, run, task=(asked, LABELS, LABELS, BASE))
    assert harms(found) == []
    assert found.gives_labels
    constant = look(LABELS, run, task=(asked, LABELS, ["positive"] * 16, BASE))
    assert "any two of 16 with a chance of 100%" in harms(constant)[0]
    unknown_run = look(LABELS, None, task=(asked, LABELS, LABELS, BASE))
    assert harms(unknown_run) == [], "the records that were asked tell that it classifies"


def test_agreement_that_is_right_is_none_of_the_adapter_s_doing():
    assert Agreement.of(["yes"] * 16, ["no"] * 8 + ["yes"] * 8, ["yes"] * 16).sentence is None
