"""`infer`, `evaluate` and `ledger` with `engine ray`: each worker loads the model, once.

Records go out in whole batches, the same ones that one process would answer, so that answers are
the same; they come back in their order.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from glmtune.config.settings import EvaluateSettings, InferSettings
from glmtune.data.questions import Question
from glmtune.data.token_rows import TokenRows
from glmtune.evaluation.answers import AnswerFile, ModelChoice
from glmtune.evaluation.asked import Asked
from glmtune.evaluation.references import GROUP
from glmtune.evaluation.sides import Answering, write_lines
from glmtune.generation import Answer, Decoder, Prompt, answer_in_batches, encode_prompts
from glmtune.generation.streaming import check_stop_strings
from glmtune.spread import over_models, running_ray


def answers_of(
    subject: ModelChoice, prompts: Sequence[Prompt], settings: InferSettings, size: int
) -> Iterator[Answer]:
    """Answers to prompts, in their order; see `generation.generate_answers`."""
    make = partial(_make_answering, replace(subject), settings, size)
    length = _whole_batches(size)
    chunks = [prompts[start : start + length] for start in range(0, len(prompts), length)]
    with running_ray(settings.ray_address):
        yield from over_models(make, chunks, on_gpu=subject.device.type == "cuda")


def _whole_batches(size: int) -> int:
    """Records of an item of work: whole batches, at least as many as are scored at a time."""
    return size * -(-GROUP // size)


def _make_answering(
    subject: ModelChoice, settings: InferSettings, size: int
) -> Callable[[Sequence[Prompt]], Iterable[Answer]]:
    model, tokenizer = subject.load()
    check_stop_strings(settings.stop_strings or (), tokenizer)
    decoder = Decoder.of(model, settings, subject.device)

    def answer(prompts: Sequence[Prompt]) -> Iterator[Answer]:
        encoded = encode_prompts(model, tokenizer, prompts, settings.max_new_tokens)
        return answer_in_batches(model, tokenizer, encoded, settings, size, decoder)

    return answer


def answer_side(
    subject: ModelChoice,
    file: AnswerFile,
    todo: Sequence[Question],
    asked: Asked,
    settings: EvaluateSettings,
    scores: bool,
) -> dict[str, float]:
    """Answer and score the records of one side, and write their lines; see `answer_sides`.

    Args:
        subject: base and adapter.
        file: gets the lines.
        todo: records that have none.
        asked: all records.
        settings: how they are answered.
        scores: whether any has a reference.
    """
    first = len(file.lines)
    make = partial(_make_side, replace(subject), asked, settings, scores, first + len(todo))
    length = _whole_batches(settings.per_device_eval_batch_size)
    items = [(first + start, todo[start : start + length]) for start in range(0, len(todo), length)]
    with running_ray(settings.ray_address):
        batches = over_models(make, items, on_gpu=subject.device.type == "cuda")
        return write_lines(batches, ["answer"], file, todo, settings, subject.device)


def _make_side(
    subject: ModelChoice, asked: Asked, settings: EvaluateSettings, scores: bool, num_all: int
) -> Callable[[tuple[int, Sequence[Question]]], Iterable[list[dict[str, Any]]]]:
    model, tokenizer = subject.load(computes=scores)
    one = {"answer": nullcontext}
    answering = Answering(model, tokenizer, one, num_all, asked, settings, subject.device)
    return lambda item: answering.lines(answering.prompts(item[1]), item[0])


def losses_of(
    subject: ModelChoice,
    rows: TokenRows,
    parts: Sequence[np.ndarray],
    address: str | None,
    score: Callable[[Any, TokenRows, np.ndarray], tuple[np.ndarray, np.ndarray]],
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The losses of some rows, adapter off and on, part by part.

    Args:
        subject: base and adapter.
        rows: all rows.
        parts: the numbers of those to score.
        address: see `spread.check_ray`.
        score: takes the model, all rows and the numbers of some.
    """
    make = partial(_make_scoring, replace(subject), rows, score)
    with running_ray(address):
        yield from over_models(make, parts, on_gpu=subject.device.type == "cuda")


def _make_scoring(
    subject: ModelChoice, rows: TokenRows, score: Callable[..., Any]
) -> Callable[[np.ndarray], Iterable[Any]]:
    from glmtune.models.families import family_of
    from glmtune.models.packed import base_of

    model, _ = subject.load(computes=True)
    rule = family_of(base_of(model).config).row_rule(model.config)
    ruled = replace(rows, rule=rule)
    return lambda part: [score(model, ruled, part)]
