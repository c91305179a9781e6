"""The scores of both sides as tables, for the page and the Markdown."""

from collections.abc import Iterator, Mapping

from glmtune.evaluation.labels import Text
from glmtune.evaluation.scores import Part
from glmtune.evaluation.verdict import VERDICTS, PartVerdict, signed
from glmtune.training.planning.power import LEAST_ROWS

PART_NAMES: dict[Part, Text] = {
    "zh": Text("中文", "Chinese"),
    "en": Text("英文", "English"),
    "all": Text("全部", "All"),
}
_HEADINGS = (
    Text("得分", "Score"),
    Text("原模型", "Base"),
    Text("微调后", "Tuned"),
    Text("变化", "Change"),
    Text("95% 区间", "95 % interval"),
)
CORPUS_LABELS = {
    "loss": Text("留出数据的损失", "Held-out loss"),
    "perplexity": Text("困惑度", "Perplexity"),
    "chrf": Text("chrF（全体）", "chrF, corpus"),
    "bleu_zh": Text("BLEU（sacrebleu，zh）", "BLEU (sacrebleu, zh)"),
    "bleu_13a": Text("BLEU（sacrebleu，13a）", "BLEU (sacrebleu, 13a)"),
    "rouge_1_jieba": Text("ROUGE-1（jieba 分词）", "ROUGE-1 (jieba words)"),
    "rouge_2_jieba": Text("ROUGE-2（jieba 分词）", "ROUGE-2 (jieba words)"),
    "rouge_l_jieba": Text("ROUGE-L（jieba 分词）", "ROUGE-L (jieba words)"),
    "legacy_rouge_1": Text("ROUGE-1（THUDM 旧公式）", "ROUGE-1 (legacy)"),
    "legacy_rouge_2": Text("ROUGE-2（THUDM 旧公式）", "ROUGE-2 (legacy)"),
    "legacy_rouge_l": Text("ROUGE-L（THUDM 旧公式）", "ROUGE-L (legacy)"),
    "legacy_bleu_4": Text("BLEU-4（THUDM 旧公式）", "BLEU-4 (legacy)"),
}


def score_tables(verdicts: Mapping[Part, PartVerdict]) -> Iterator[tuple[Text, list[list[Text]]]]:
    """A title and the rows of a table for each language that has rows, and for all of them."""
    for part, found in verdicts.items():
        if part != "all" and found.num_rows in (0, verdicts["all"].num_rows):
            continue
        name, word = PART_NAMES[part], VERDICTS[found.verdict]
        few = found.num_rows < LEAST_ROWS
        title = Text(
            f"{name.zh}，{found.num_rows} 行{'' if few else f'：{word.zh}'}",
            f"{name.en}, {found.num_rows} rows{'' if few else f': {word.en}'}",
        )
        rows = [list(_HEADINGS)]
        for key, compared in found.compared.items():
            measure, interval = found.measures[key], compared.interval
            sides = (f"{side:.{measure.digits}f}" for side in (compared.base, compared.tuned))
            cells = [*sides, "", ""]
            if interval:
                mean, *bounds = (signed(value, measure.digits) for value in interval[:3])
                cells[2:] = mean, " … ".join(bounds)
            rows.append([measure.label, *(Text(cell, cell) for cell in cells)])
        for key in found.corpus.get("base", {}):
            of_both = (f"{found.corpus[side][key]:.4g}" for side in ("base", "tuned"))
            label = CORPUS_LABELS.get(key, Text(key, key))
            rows.append([label, *(Text(cell, cell) for cell in (*of_both, "", ""))])
        yield title, rows
