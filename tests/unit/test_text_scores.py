"""Scores of answers: equal to those of the libraries and commands that they name."""

import json
import subprocess
import sys

import pytest
from rouge_score.rouge_scorer import RougeScorer

from glmtune.evaluation import text_scores
from glmtune.evaluation.text_scores import (
    corpus_scores,
    language_of,
    language_of_record,
    repeated_share,
    score_text,
    units,
    word_scores,
)

ZH = [
    ("我喜欢吃苹果和香蕉。", "我喜欢吃苹果。"),
    ("今天下雨，\n不出门。", "今天天气很好，我们去公园。"),
]
EN = [("The cat sat on a mat.", "A cat is on the mat."), ("Yes, it's fine.", "It is fine, yes.")]


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("你好", "zh"), ("Hello there", "en"), ("用 Python 写一个函数", "zh"),
        ("42", None), ("", None),
        ("Translate 你好 into three languages", "en"), ("Привет", "en"), ("。！", None),
    ],
)  # fmt: skip
def test_the_language_of_a_text(text, language):
    assert language_of(text) == language


def test_an_answer_should_have_the_language_of_its_reference():
    assert language_of_record("Translate into Chinese: hello", "你好") == "zh"
    assert language_of_record("一加一等于几？", "2") == "zh"
    assert language_of_record("1 + 1", "2") == "en"


@pytest.mark.parametrize(("language", "pairs"), [("zh", ZH), ("en", EN)])
def test_corpus_scores_are_those_of_sacrebleus_command(language, pairs, tmp_path):
    answers, references = zip(*pairs, strict=True)
    files = []
    for name, texts in (("said", answers), ("right", references)):
        files.append(tmp_path / name)
        lines = (" ".join(text.split()) + "\n" for text in texts)
        files[-1].write_text("".join(lines), encoding="utf-8")
    tokenizer = {"zh": "zh", "en": "13a"}[language]
    command = [sys.executable, "-m", "sacrebleu", str(files[1]), "-i", str(files[0]),
               "-m", "bleu", "chrf", "-tok", tokenizer, "-w", "6"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    bleu, chrf = (entry["score"] for entry in json.loads(done.stdout))
    found = corpus_scores(answers, references, language)
    assert found == pytest.approx({f"bleu_{tokenizer}": bleu, "chrf": chrf}, abs=1e-4)


@pytest.mark.parametrize(("language", "pair"), [("zh", ZH[0]), ("zh", ZH[1]), ("en", EN[0])])
def test_rouge_l_is_that_of_rouge_score_on_characters_or_words(language, pair):
    class Units:
        def tokenize(self, text):
            return units(text)

    scorer = RougeScorer(["rougeL"], tokenizer=Units())
    wanted = scorer.score(pair[1], pair[0])["rougeL"].fmeasure
    assert score_text(*pair, language).rouge_l == pytest.approx(100 * wanted)


def test_units_are_characters_of_chinese_and_words_of_other_text():
    assert units("我用Python3写Ａ。 It's ok") == [
        "我", "用", "python3", "写", "a", "。", "it", "'", "s", "ok",
    ]  # fmt: skip


def test_a_right_answer_and_an_empty_one():
    right = score_text(" 好的。 ", "好的。", "zh")
    assert (right.exact, right.rouge_l, right.language_kept) == (100, 100, 100)
    assert right.chrf == pytest.approx(100)
    empty = score_text("", "好的。", "zh")
    assert (empty.exact, empty.chrf, empty.rouge_l, empty.language_kept) == (0, 0, 0, 0)
    without = score_text("好的。", " ", "zh")
    assert (without.exact, without.chrf, without.rouge_l) == (None, None, None)


@pytest.mark.parametrize(
    ("answer", "language", "kept"),
    [("好的", "zh", 100), ("Sure.", "zh", 0), ("42", "zh", 100), ("好的", "en", 0)],
)
def test_another_language_is_seen(answer, language, kept):
    assert score_text(answer, "", language).language_kept == kept


def test_repetition_counts_ngrams_that_came_before():
    assert score_text("好的好的好的好的", "", "zh").repetition == pytest.approx(60)
    assert score_text("一二三四五六七八", "", "zh").repetition == 0
    assert repeated_share([1, 2, 3]) == 0


# --- the publisher's formula ---


def test_words_are_scored_as_the_publishers_script_does():
    """compute_metrics of ptuning/main.py, written out for one row."""
    import jieba
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
    from rouge_chinese import Rouge

    answer, reference = ZH[0]
    cut = [" ".join(jieba.cut(text)) for text in (answer, reference)]
    wanted = {
        f"legacy_{name.replace('-', '_')}": 100 * value["f"]
        for name, value in Rouge().get_scores(*cut)[0].items()
    }
    smooth = SmoothingFunction().method3
    bleu = sentence_bleu([list(reference)], list(answer), smoothing_function=smooth)
    wanted["legacy_bleu_4"] = 100 * bleu
    found = word_scores([answer], [reference])
    assert {name: found[name] for name in wanted} == pytest.approx(wanted)
    assert set(found) - set(wanted) == {"rouge_1_jieba", "rouge_2_jieba", "rouge_l_jieba"}
    assert word_scores(["", "。"], ["好的。", "好。"])["legacy_rouge_1"] == 0


def test_without_its_packages_there_are_no_word_scores(monkeypatch):
    def missing():
        raise ImportError("no jieba")

    monkeypatch.setattr(text_scores, "_word_scorers", missing)
    assert word_scores(["好"], ["好"]) is None
