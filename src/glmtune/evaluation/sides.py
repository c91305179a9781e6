"""Answer records with one loaded model on one side or several: without its adapter, and with it."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

from tqdm import tqdm

from glmtune.config.settings import JudgingSettings
from glmtune.data.questions import Question
from glmtune.evaluation.answers import AnswerFile
from glmtune.evaluation.asked import Asked
from glmtune.evaluation.references import References
from glmtune.generation import Answer, Decoder, EncodedPrompt, answer_batch
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
    num_all = len(file.lines) + len(todo)
    answering = Answering(model, tokenizer, sides, num_all, asked, settings, device)
    batches = answering.lines(answering.prompts(todo), len(file.lines))
    names = [*sides]
    return write_lines(batches, names, file, todo, settings, device, shows_progress)


class Answering:
    """One loaded model that answers records on each side, and scores their references.

    Args:
        model: in evaluation mode.
        tokenizer: of the model.
        sides: at least one.
        num_all: how many of all records are answered, those with a line included.
        asked: all records.
        settings: how they are answered.
        device: that answers.

    Raises:
        UserError: a stop string cannot occur.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        sides: ModelSides,
        num_all: int,
        asked: Asked,
        settings: JudgingSettings,
        device: Any,
    ) -> None:
        check_stop_strings(settings.stop_strings or (), tokenizer)
        self._model, self._tokenizer, self._sides = model, tokenizer, sides
        self._asked, self._settings = asked, settings
        # Before the decoders, see `References`.
        self._references = References(model, asked.references(tokenizer, num_all), sides)
        self._decoders: dict[str, Decoder] = {}
        for name, enter in sides.items():
            with enter():
                first = next(iter(self._decoders.values()), None)
                self._decoders[name] = Decoder.of(model, settings, device, beside=first)

    def prompts(self, records: Sequence[Question]) -> list[EncodedPrompt]:
        """The ids that records are asked with; raises UserError where one cannot be encoded."""
        longest = self._settings.max_new_tokens
        return self._asked.prompts(self._model, self._tokenizer, records, longest)

    def lines(self, encoded: Sequence[EncodedPrompt], first: int) -> Iterator[list[dict[str, Any]]]:
        """What the file of answers says of each record, batch by batch.

        Args:
            encoded: the prompts of records that follow each other.
            first: the place of the first among all records.
        """
        size = self._settings.per_device_eval_batch_size
        for start in range(0, len(encoded), size):
            batch, answers = encoded[start : start + size], {}
            for name, enter in self._sides.items():
                with enter():
                    answers[name] = answer_batch(
                        self._model, self._tokenizer, batch, self._settings, self._decoders[name]
                    )
            yield [
                line_of(
                    {side: of[place] for side, of in answers.items()},
                    self._references.of(first + start + place),
                )
                for place in range(len(batch))
            ]


def line_of(answers: Mapping[str, Answer], scored: Mapping[str, Any] | None) -> dict[str, Any]:
    """What the file of answers says of a record.

    Args:
        answers: by side.
        scored: what its reference is scored with; None without one.
    """
    line: dict[str, Any] = {side: answer._asdict() for side, answer in answers.items()}
    return line | {"reference": scored} if scored else line


def write_lines(
    batches: Iterable[list[dict[str, Any]]],
    names: Sequence[str],
    file: AnswerFile,
    todo: Sequence[Question],
    settings: JudgingSettings,
    device: Any,
    shows_progress: bool = True,
) -> dict[str, float]:
    """Write lines as batches of them arrive; what it took, see `answer_sides`."""
    started, num_tokens, num_all = time.monotonic(), 0, len(file.lines) + len(todo)
    bar = tqdm(
        total=num_all,
        initial=len(file.lines),
        desc=settings.verb,
        unit="record",
        disable=not (shows_progress and sys.stderr.isatty()),
    )
    times = {1: "", 2: " twice"}.get(len(names), f" {len(names)} times")
    lines = Progress(num_all, len(file.lines), f"records answered{times}")
    records = iter(todo)
    with file, bar:
        for batch in batches:
            for line in batch:
                file.append(next(records), line)
                num_tokens += sum(line[name]["num_tokens"] for name in names)
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
