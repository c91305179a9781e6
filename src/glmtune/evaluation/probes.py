"""The questions that a check-up asks: held-out rows, records of the user's, or a few of our own."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from glmtune.config import CheckConfig, TrainConfig, read_config
from glmtune.data.dataset import load_dataset
from glmtune.data.records import read_alpaca
from glmtune.data.templates import alpaca, context_of
from glmtune.data.token_rows import TokenRows
from glmtune.errors import UserError, note
from glmtune.training.checkpoints import RECIPE_FILE
from glmtune.training.plan import split_rows

OWN_QUESTIONS = (
    ("用一句话解释什么是光合作用。", "植物利用阳光把二氧化碳和水变成有机物，并放出氧气。"),
    ("Explain photosynthesis in one sentence.",
     "Photosynthesis is how plants use sunlight to turn carbon dioxide and water into sugar."),
    ("给出三个保持健康的建议。", "均衡饮食，经常运动，保证充足的睡眠。"),
    ("Give three tips for staying healthy.", "Eat a balanced diet, exercise, and sleep enough."),
    ("把下面的句子翻译成英文：今天天气很好。", "The weather is very nice today."),
    ("Translate into Chinese: I like reading books.", "我喜欢读书。"),
    ("写出“高兴”的一个近义词。", "快乐。"),
    ("Name an antonym of \"fast\".", "Slow."),
)  # fmt: skip


class Probe(NamedTuple):
    """A question and its answer as the model reads them."""

    prompt_ids: list[int]
    """[GMASK] <sop> at the end."""
    answer_ids: list[int]
    """The end token included, unless the answer was cut."""


class Probes(NamedTuple):
    """What is asked, at least one, and where it comes from."""

    probes: list[Probe]
    source: str
    of_task: bool
    """Whether they are of what the adapter was trained for, or should be."""


def from_texts(tokenizer: Any, pairs: list[tuple[str, str]]) -> list[Probe]:
    """Contexts and their answers, whole."""
    prompts = tokenizer.encode_batch([context for context, _ in pairs], add_special_tokens=True)
    answers = tokenizer.encode_batch([answer for _, answer in pairs])
    end = tokenizer.eos_token_id
    return [Probe(p, [*a, end]) for p, a in zip(prompts, answers, strict=True)]


def own_probes(tokenizer: Any, limit: int) -> Probes:
    """Questions that come with this program, Chinese and English by turns."""
    pairs = [(alpaca(asked), answer) for asked, answer in OWN_QUESTIONS[:limit]]
    return Probes(from_texts(tokenizer, pairs), "questions that come with glmtune", of_task=False)


def held_out_probes(rows: TokenRows, held_out: np.ndarray, limit: int) -> Probes | None:
    """Rows that a run held out, evenly from all; None where there is none with an answer."""
    row_ids = held_out[rows.lengths_R[held_out] > rows.prompt_lengths_R[held_out]]
    if not len(row_ids):
        return None
    places = np.linspace(0, len(row_ids) - 1, min(limit, len(row_ids))).astype(int)
    halves = ((rows[row].tolist(), int(rows.prompt_lengths_R[row])) for row in row_ids[places])
    probes = [Probe(ids[:length], ids[length:]) for ids, length in halves]
    return Probes(probes, "rows that the run held out", of_task=True)


def choose_probes(config: CheckConfig, adapter: Path, tokenizer: Any) -> Probes:
    """What to ask an adapter.

    Records that are given; else rows that the adapter's run held out; else our own.

    Raises:
        UserError: the records cannot be read, or none of them has an answer.
    """
    if config.data_path:
        records, _ = read_alpaca(config.data_path)
        answered = [record for record in records if record.output.strip()]
        pairs = [(context_of(r.instruction, r.input, r.history), r.output) for r in answered]
        if not pairs:
            raise UserError(f"{config.data_path}: no record has an output to compare with")
        probes = from_texts(tokenizer, pairs[: config.limit])
        return Probes(probes, f"records of {config.data_path}", of_task=True)
    for folder in (adapter, adapter.resolve().parent):
        recipe = folder / RECIPE_FILE
        if recipe.is_file() and (of_run := _held_out(recipe, config.limit)):
            return of_run
    return own_probes(tokenizer, config.limit)


def _held_out(recipe: Path, limit: int) -> Probes | None:
    """Rows that a run held out; None where it held out none or its data are gone."""
    run = read_config(TrainConfig, "train", str(recipe), {})
    if not run.eval_ratio:  # spares the look at data that may have gone
        return None
    try:
        dataset, _ = load_dataset(run.dataset_path)
    except UserError as error:
        note(f"the run's rows cannot be had ({error})")
        return None
    _, held_out = split_rows(len(dataset), run.eval_ratio, run.seed)
    return held_out_probes(TokenRows.from_dataset(dataset), held_out, limit)
