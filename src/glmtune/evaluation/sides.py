"""Answer records with one loaded model on one side or several: without its adapter, and with it."""

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

from tqdm import tqdm

from glmtune.config.settings import JudgingSettings
from glmtune.data.questions import Question
from glmtune.evaluation.answers import AnswerFile
from glmtune.evaluation.asked import Asked
from glmtune.evaluation.references import References
from glmtune.generation import Decoder, answer_batch
from glmtune.generation.streaming import check_stop_strings
from glmtune.hardware import memory_gib
from glmtune.runlog import Progress

ModelSides = Mapping[str, Callable[[], AbstractContextManager[Any]]]
"""A side's name in the file of answers -> what the model is put into while that side answers, such
as its `disable_adapter`."""


def answer_sides(
    model: Any,
    tokenizer: Any,
    sides: ModelSides,
    file: AnswerFile,
    todo: Sequence[Question],
    asked: Asked,
    settings: JudgingSettings,
    device: Any,
    shows_progress: bool = True,
) -> dict[str, float]:
    """Answer records on each side with the same random numbers, and score their references.

    Args:
        model: in evaluation mode.
        tokenizer: of the model.
        sides: at least one.
        file: gets a line for each record: each side's answer under its name, and `reference`.
        todo: the records that have no line yet.
        asked: all records.
        settings: how they are answered.
        device: that answers.
        shows_progress: as a bar on a terminal, else as lines.

    Returns:
        What it took: records, seconds, tokens of the answers, and the most memory that was held.

    Raises:
        UserError: a prompt cannot be encoded, a stop string cannot occur, or the file cannot be
            written.
    """
    encoded = asked.prompts(model, tokenizer, todo, settings.max_new_tokens)
    check_stop_strings(settings.stop_strings or (), tokenizer)
    # Before the decoders, see `References`.
    num_all = len(file.lines) + len(todo)
    references = References(model, asked.references(tokenizer, num_all), sides)
    decoders: dict[str, Decoder] = {}
    for name, enter in sides.items():
        with enter():
            first = next(iter(decoders.values()), None)
            decoders[name] = Decoder.of(model, settings, device, beside=first)
    size, started, num_tokens = settings.per_device_eval_batch_size, time.monotonic(), 0
    bar = tqdm(
        total=num_all,
        initial=len(file.lines),
        desc=settings.verb,
        unit="record",
        disable=not (shows_progress and sys.stderr.isatty()),
    )
    times = {1: "", 2: " twice"}.get(len(sides), f" {len(sides)} times")
    lines = Progress(num_all, len(file.lines), f"records answered{times}")
    with file, bar:
        for start in range(0, len(todo), size):
            batch = encoded[start : start + size]
            answers = {}
            for name, enter in sides.items():
                with enter():
                    answers[name] = answer_batch(model, tokenizer, batch, settings, decoders[name])
            for place, record in enumerate(todo[start : start + size]):
                line: dict[str, Any] = {side: of[place]._asdict() for side, of in answers.items()}
                if scored := references.of(len(file.lines)):
                    line["reference"] = scored
                file.append(record, line)
                num_tokens += sum(of[place].num_tokens for of in answers.values())
            bar.update(len(batch))
            if bar.disable and shows_progress:
                lines.tell(len(file.lines))
    return {
        "records": len(todo),
        "seconds": time.monotonic() - started,
        "tokens": num_tokens,
        "peak_memory_gib": memory_gib(device),
    }


def add_costs(costs: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """What several calls of `answer_sides` took together."""
    whole = {key: sum(cost[key] for cost in costs) for key in ("records", "seconds", "tokens")}
    return whole | {"peak_memory_gib": max(cost["peak_memory_gib"] for cost in costs)}
