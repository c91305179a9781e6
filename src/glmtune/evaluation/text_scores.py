"""Scores of one answer beside its reference, and of all answers of a side: plain functions of text.

Shares and similarities are in points, 0 to 100. Chinese is compared by characters, other text by
words; corpus scores take sacrebleu's tokenizers, so that they equal those of its command.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, Literal, NamedTuple

Language = Literal["zh", "en"]

NGRAM = 4
BLEU_TOKENIZERS: dict[Language, str] = {"zh": "zh", "en": "13a"}
_HAN_LETTERS = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f"
_HAN = re.compile(f"[{_HAN_LETTERS}]")
_UNITS = re.compile(rf"[{_HAN_LETTERS}]|[^\W_{_HAN_LETTERS}]+|\S")


class TextScores(NamedTuple):
    """Scores of one answer; None where they need a reference and the record has none."""

    exact: float | None
    chrf: float | None
    rouge_l: float | None
    repetition: float
    language_kept: float


def language_of(text: str) -> Language | None:
    """The language that a text is written in: zh, or en for every other; None without letters.

    A word of Latin letters says about as much as a character of Chinese, so the commoner of the
    two decides.
    """
    num_han = len(_HAN.findall(text))
    num_words = len(re.findall(r"[^\W\d_]+", _HAN.sub(" ", text)))
    if not num_han and not num_words:
        return None
    return "zh" if num_han >= num_words else "en"


def language_of_record(question: str, reference: str) -> Language:
    """The language that the answer should have: the reference's, else the question's."""
    return language_of(reference) or language_of(question) or "en"


def units(text: str) -> list[str]:
    """The characters of Chinese and the words of other text, in one case and width, and marks."""
    return _UNITS.findall(unicodedata.normalize("NFKC", text).casefold())


def repeated_share(items: Sequence[Any], size: int = NGRAM) -> float:
    """Share of the n-grams of a text that occurred in it before."""
    ngrams = list(zip(*(items[start:] for start in range(size)), strict=False))
    return 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0


def score_text(answer: str, reference: str, language: Language) -> TextScores:
    """Score one answer.

    Args:
        answer: what a side said.
        reference: the right answer; blank where the record has none.
        language: that the answer should have.
    """
    said = units(answer)
    spoken = language_of(answer)
    kept = bool(said) and spoken in (None, language)
    exact = chrf = rouge = None
    if reference.strip():
        from rapidfuzz.distance import Indel

        exact = 100.0 * (answer.strip() == reference.strip())
        chrf = _chrf().sentence_score(answer, [reference]).score
        # 2 LCS / (len + len): what ROUGE-L's F is, and what this distance is the complement of.
        rouge = 100 * Indel.normalized_similarity(said, units(reference)) if said else 0.0
    return TextScores(exact, chrf, rouge, 100 * repeated_share(said), 100.0 * kept)


@cache
def _chrf() -> Any:
    from sacrebleu.metrics import CHRF

    return CHRF()


def corpus_scores(
    answers: Sequence[str], references: Sequence[str], language: Language
) -> dict[str, float]:
    """BLEU and chrF over all answers in one language, as sacrebleu's command computes them.

    Args:
        answers: of one side.
        references: as many right answers, none blank.
        language: decides BLEU's tokenizer, which `BLEU_TOKENIZERS` names.
    """
    from sacrebleu.metrics import BLEU

    # sacrebleu works on lines.
    said, right = ([" ".join(t.split()) for t in texts] for texts in (answers, references))
    bleu = BLEU(tokenize=BLEU_TOKENIZERS[language])
    return {
        f"bleu_{BLEU_TOKENIZERS[language]}": bleu.corpus_score(said, [right]).score,
        "chrf": _chrf().corpus_score(said, [right]).score,
    }


def word_scores(answers: Sequence[str], references: Sequence[str]) -> dict[str, float] | None:
    """ROUGE on jieba's words, and the formula of THUDM's scripts; None where a package is missing.

    `rouge_1_jieba` and so on are rouge-score's F over words, mean of rows. `legacy_` has what the
    publisher's `compute_metrics` prints: rouge_chinese's F over jieba's words, which counts a word
    once, and nltk's BLEU-4 over characters with smoothing method 3. It is for comparisons with
    published tables; it saturates early.

    Args:
        answers: of one side, in Chinese.
        references: as many right answers, none blank.
    """
    try:
        scorers = _word_scorers()
    except ImportError:
        return None
    sums: Counter[str] = Counter()
    for answer, reference in zip(answers, references, strict=True):
        for scorer in scorers:
            sums.update(scorer(answer, reference))
    return {name: total / len(answers) for name, total in sums.items()} if answers else {}


@cache
def _word_scorers() -> tuple[Callable[[str, str], dict[str, float]], ...]:
    import logging

    import jieba
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
    from rouge_chinese import Rouge
    from rouge_score.rouge_scorer import RougeScorer

    jieba.setLogLevel(logging.ERROR)

    class Words:
        """What rouge-score asks of a tokenizer."""

        def tokenize(self, text: str) -> list[str]:
            return [word for word in jieba.cut(text) if word.strip()]

    scorer, legacy = RougeScorer(["rouge1", "rouge2", "rougeL"], tokenizer=Words()), Rouge()
    smooth = SmoothingFunction().method3

    def rouge(answer: str, reference: str) -> dict[str, float]:
        found = scorer.score(reference, answer)
        return {f"rouge_{n}_jieba": 100 * found[f"rouge{n.upper()}"].fmeasure for n in "12l"}

    def published(answer: str, reference: str) -> dict[str, float]:
        said, right = (" ".join(jieba.cut(text)) for text in (answer, reference))
        f = dict.fromkeys(("rouge-1", "rouge-2", "rouge-l"), 0.0)
        if said.strip(" .。") and right.strip(" .。"):  # rouge_chinese refuses texts without words
            f = {
                name: 100 * of_one["f"]
                for name, of_one in legacy.get_scores(said, right)[0].items()
            }
        bleu = sentence_bleu([list(reference)], list(answer), smoothing_function=smooth)
        return {f"legacy_{name.replace('-', '_')}": value for name, value in f.items()} | {
            "legacy_bleu_4": 100 * float(bleu)
        }

    return rouge, published
