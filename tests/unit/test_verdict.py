"""The verdict on planted adapters, on equal ones, and on too few rows."""

import numpy as np
import pytest

from glmtune.errors import UserError
from glmtune.evaluation import intervals as intervals_module
from glmtune.evaluation.gate import Gate
from glmtune.evaluation.metric import Metric
from glmtune.evaluation.report import Comparison, Pair, markdown
from glmtune.evaluation.scores import MEASURES, ScoreTable, Sides, score_pairs
from glmtune.evaluation.verdict import VERDICTS, judge
from glmtune.generation import Answer
from glmtune.training.planning.power import LEAST_ROWS, describe_power, smallest_difference

NAMES = {
    "zh": ["小明", "阿红", "老王", "小李", "阿芳"],
    "en": ["Mira", "Tom", "Anna", "Oleg", "Ruth"],
}
THINGS = {
    "zh": ["住在河边的小镇", "每天早上烤面包", "有一只白色的猫", "最喜欢的颜色是蓝色"],
    "en": ["lives in a town by the river", "bakes bread every morning", "has a white cat",
           "likes the colour blue best"],
}  # fmt: skip
ROWS_EACH = 20


def sentence(rng, language):
    name, thing = rng.choice(NAMES[language]), rng.choice(THINGS[language])
    return f"{name}{thing}。" if language == "zh" else f"{name} {thing}."


def planted(kind, seed, rows_each=ROWS_EACH):
    """Pairs of a base that is right in a third of the rows, and an adapter of a kind."""
    rng = np.random.default_rng(seed)
    pairs = []
    for number, language in enumerate(["zh", "en"] * rows_each, start=1):
        right, wrong = sentence(rng, language), sentence(rng, language)
        base = right if rng.random() < 1 / 3 else wrong
        log_prob = -1 - rng.exponential()
        other = {"zh": "en", "en": "zh"}[language]
        tuned, change = {
            "zero": (base, 0.0),
            "tiny": (base if number > 2 else wrong, 0.001 + 0.0005 * rng.normal()),
            "good": (right if rng.random() < 0.8 else wrong, 0.5 + 0.3 * rng.normal()),
            "collapsed": ("好的。", -2 + rng.normal()),
            "wrong language": (sentence(rng, other), -1 + 0.5 * rng.normal()),
            # Such as answers of its training rows, whatever is asked, and sure of each.
            "overtaught": (sentence(rng, language), -1 + 1.5 * rng.normal()),
        }[kind]
        question = "他怎么样？" if language == "zh" else "What about them?"
        pairs.append(
            Pair(
                number, question, "", right, Answer(base, 9, True), Answer(tuned, 9, True),
                (log_prob, log_prob + change), 9,
            )
        )  # fmt: skip
    return pairs


PLANTED = {
    "zero": "undecided",
    "tiny": "undecided",
    "good": "better",
    "collapsed": "worse",
    "wrong language": "worse",
    "overtaught": "worse",
}


@pytest.fixture
def few_draws(monkeypatch):
    monkeypatch.setattr(intervals_module, "DRAWS", 1000)


@pytest.mark.parametrize("seed", range(5))
def test_planted_adapters_are_judged_right_six_of_six(seed, few_draws):
    found = {kind: judge(score_pairs(planted(kind, seed)))["all"].verdict for kind in PLANTED}
    assert found == PLANTED


def table(chrf, log_prob):
    """A table of English rows with these scores of both sides."""
    num_rows = len(chrf[0])
    scores = {"chrf": Sides(*chrf), "log_prob": Sides(*log_prob)}
    return ScoreTable(["en"] * num_rows, np.ones(num_rows, dtype=bool), scores, MEASURES, {})


def test_equal_recipes_are_seldom_called_better(few_draws):
    """Two trainings of one recipe: rows are as hard for both, and each gets some of them right."""
    rng, found = np.random.default_rng(0), []
    for _ in range(400):
        chance = rng.beta(0.5, 0.5, 40)
        chrf = 100.0 * (rng.random((2, 40)) < chance)
        log_prob = np.log(chance + 0.05) + 0.1 * rng.normal(size=(2, 40))
        found.append(judge(table(chrf, log_prob))["all"].verdict)
    assert found.count("better") <= 0.05 * len(found)
    assert found.count("worse") <= 0.05 * len(found)


def steady(num_rows, change):
    """Scores of one side, and of another that differs by about as much in each row."""
    base = np.linspace(10, 60, num_rows)
    return base, base + change + 0.01 * abs(change) * np.sin(np.arange(num_rows))


@pytest.mark.parametrize(
    ("chrf", "log_prob", "verdict", "judged_by"),
    [
        (5, 0, "better", "chrf"),
        (-5, 0, "worse", "chrf"),
        (5, -1, "better", "chrf"),  # the answers decide
        (0, 0.5, "better", "log_prob"),
        (0, -0.5, "worse", "log_prob"),
        (0, 0.01, "undecided", None),  # less than two seeds differ by
        (0, 0, "undecided", None),
    ],
)
def test_answers_decide_and_likelihoods_where_they_do_not(chrf, log_prob, verdict, judged_by):
    found = judge(table(steady(20, chrf), steady(20, log_prob)))["all"]
    assert (found.verdict, found.judge) == (verdict, judged_by)
    assert VERDICTS[verdict].en in found.sentence.en
    assert VERDICTS[verdict].zh in found.sentence.zh


@pytest.mark.parametrize(("num_rows", "verdict"), [(7, "undecided"), (8, "better")])
def test_fewer_than_eight_rows_have_scores_and_no_verdict(num_rows, verdict):
    found = judge(table(steady(num_rows, 5), steady(num_rows, 0)))["all"]
    assert found.verdict == verdict
    figures = found.as_json()["metrics"]["chrf"]
    assert figures["difference"] == pytest.approx(5, abs=0.1)
    assert (figures["low"] is None) == (num_rows < LEAST_ROWS)
    assert ("No verdict: 7 rows" in found.sentence.en) == (num_rows < LEAST_ROWS)
    assert ("不作结论" in found.sentence.zh) == (num_rows < LEAST_ROWS)


def test_one_row_has_scores_without_an_interval():
    found = judge(score_pairs(planted("good", 0)[:1]))
    assert found["all"].as_json()["metrics"]["chrf"]["low"] is None
    assert (found["en"].num_rows, found["en"].compared, found["en"].verdict) == (
        0, {}, "undecided",
    )  # fmt: skip


def test_languages_are_judged_apart(few_draws):
    pairs = [p for p in planted("good", 1) if p.instruction.startswith("他")]
    pairs += [p for p in planted("collapsed", 1) if not p.instruction.startswith("他")]
    found = judge(score_pairs(pairs))
    assert (found["zh"].verdict, found["en"].verdict) == ("better", "worse")
    assert found["zh"].num_rows == found["en"].num_rows == ROWS_EACH


def test_rows_without_a_reference_are_counted_apart():
    pairs = planted("good", 2)
    bare = [p.__class__(**{**vars(p), "expected": "", "log_probs": (None, None)}) for p in pairs]
    found = judge(score_pairs(bare))["all"]
    assert found.num_rows == 0
    assert set(found.compared) == {"stopped", "repetition", "language_kept", "length"}
    both = judge(score_pairs(pairs[:10] + bare))["all"]
    assert both.num_rows == both.compared["chrf"].num_rows == 10
    assert both.compared["stopped"].num_rows == 50


def test_some_of_the_rows_have_the_scores_that_they_have_alone(few_draws):
    pairs = planted("good", 5)
    bare = [p.__class__(**{**vars(p), "expected": "", "log_probs": (None, None)}) for p in pairs]
    mixed = [*bare[:3], *pairs[3:12], *bare[12:15], *pairs[15:]]
    asked = []
    metric = Metric("m:counts", lambda *told: asked.append(told) or float(len(told[0])))
    table = score_pairs(mixed, [metric])
    num_asked = len(asked)
    is_kept = [number % 3 == 0 for number in range(len(mixed))]
    found = judge(table.some(mixed, is_kept))
    assert len(asked) == num_asked, "a user's metric is asked once for each answer"
    kept = [pair for pair, is_one in zip(mixed, is_kept, strict=True) if is_one]
    alone = judge(score_pairs(kept, [metric]))
    assert found.keys() == alone.keys()
    for part, of_some in found.items():
        assert of_some.as_json() == alone[part].as_json()


def test_wins_ties_and_losses_add_up():
    found = judge(score_pairs(planted("good", 3)))["all"]
    assert found.wins > found.losses
    assert found.wins + found.ties + found.losses == 2 * ROWS_EACH


def test_what_rows_can_show_is_known_before_and_after():
    assert "40 held-out rows can show 22 points" in describe_power(40)
    assert "no row is held out" in describe_power(0)
    assert "7 rows are held out" in describe_power(7)
    found = judge(score_pairs(planted("good", 4)))["all"]
    deviation = found.compared["chrf"].deviation
    assert found.smallest_difference == pytest.approx(smallest_difference(40, deviation))


# --- gates ---


@pytest.mark.parametrize(
    ("spec", "kind", "passed"),
    [
        ("better", "good", True),
        ("better", "zero", False),
        ("not_worse", "zero", True),
        ("not_worse", "collapsed", False),
        ("better:exact", "good", True),
        ("better:rouge_l", "tiny", False),
        ("not_worse:exact", "collapsed", False),
    ],
)
def test_a_gate_says_whether_the_verdict_is_good_enough(spec, kind, passed, few_draws):
    verdicts = judge(score_pairs(planted(kind, 0)))
    assert Gate.of(spec, ()).is_passed(verdicts["all"]) is passed


def test_less_repetition_is_better():
    again = [
        Pair(n, "q", "", "a", Answer("one two three four " * n, 9, True), Answer("a b", 9, True))
        for n in range(2, 12)
    ]
    found = judge(score_pairs(again))["all"]
    assert found.verdict_of("repetition") == "better"
    assert found.verdict_of("length") == "undecided"


@pytest.mark.parametrize("spec", ["better:length", "better:bleu"])
def test_a_gate_on_no_score_is_refused(spec):
    with pytest.raises(UserError, match="no score to judge by; there are chrf, log_prob"):
        Gate.of(spec, ())
    with pytest.raises(UserError, match="7 rows have an output"):
        Gate("better").check_rows(7)


# --- what is shown ---


def test_tables_hold_every_score_of_each_language_and_any_text_stays_text():
    metric = Metric("mine:<b>", lambda answer, reference, record: float(len(answer)))
    pairs = planted("good", 5)
    verdicts = judge(score_pairs(pairs, [metric]))
    shown = Comparison("base", "adapter", "float32", {}, "today", pairs, verdicts)
    report = markdown(shown)
    for label in ("Chinese, 20 rows", "English, 20 rows", "All, 40 rows", "chrF", "ROUGE-L",
                  "Log-probability of the reference", "BLEU (sacrebleu, zh)",
                  "BLEU (sacrebleu, 13a)", "Held-out loss", "Perplexity"):  # fmt: skip
        assert label in report
    assert "<b>" not in report
    assert verdicts["all"].sentence.en in report


def test_one_language_alone_has_one_table():
    pairs = [p for p in planted("good", 6) if p.instruction.startswith("他")]
    shown = Comparison("b", "a", "float32", {}, "", pairs, judge(score_pairs(pairs)))
    report = markdown(shown)
    assert "All, 20 rows" in report
    assert "Chinese, 20 rows" not in report
    assert shown.as_json()["languages"]["en"]["n"] == 0
