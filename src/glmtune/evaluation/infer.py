"""Answer rows of any format with the tuned weights, or with the base's."""

import sys
import time
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from glmtune.config.settings import InferSettings
from glmtune.data.questions import Question, shown_question
from glmtune.errors import visible
from glmtune.evaluation.answers import (
    AnswerFile,
    ModelChoice,
    fit_positions,
    prompt_of,
    read_questions,
)
from glmtune.generation import Answer, generate_answers

LINE_EVERY = 100
"""Records between two lines of progress, where there is no terminal for a bar."""


@dataclass(frozen=True)
class InferSummary:
    """The number of answers that this run added to the file."""

    output_path: Path
    num_answers: int
    """The number of answers in the file, earlier runs included."""
    num_new: int
    num_tokens: int
    num_stopped: int
    seconds: float

    def __str__(self) -> str:
        kept = f"{self.output_path}: {self.num_answers:,} answers"
        if not self.num_new:
            return f"{kept}, nothing was left to do"
        return (
            f"{self.num_new:,} records answered in {self.seconds:,.1f} s: "
            f"{self.num_tokens:,} tokens, {self.num_tokens / self.seconds:,.1f} tokens/s; "
            f"{self.num_stopped:,} answers stopped by themselves, "
            f"{self.num_new - self.num_stopped:,} reached max_new_tokens\n{kept}"
        )


def infer(settings: InferSettings) -> InferSummary:
    """Answer records, print some beside their original outputs, and write all as JSON lines.

    A line has `row`, the question, `output`, `answer`, `num_tokens` and `stopped`. The question is
    `instruction`, `input` and, if the record has them, `system` and `history`; or `messages` and
    `tools`; or `text`. Lines are written as batches finish, and a partial file is resumed.

    Raises:
        UserError: records, model, adapter or file of answers cannot be used; see `answers`.
    """
    records = read_questions(settings)
    subject = ModelChoice.of(settings)
    if settings.on_bad_row == "skip":
        records = fit_positions(records, settings, subject.base)
    file = AnswerFile(
        Path(settings.output_path or Path(settings.adapter or "", "answers.jsonl")),
        records,
        {"verb": "infer"} | subject.identity() | settings.in_effect() | settings.own_answers(),
        overwrite=settings.overwrite_output,
        elsewhere="--output_path",
    )
    size = settings.per_device_eval_batch_size
    batch_size = None if settings.engine == "vllm" else subject.batch_to_fill(size)
    todo = file.to_answer(settings.limit, batch_size)
    answers: list[Answer] = []
    start = time.perf_counter()
    if todo:
        if settings.on_bad_row == "fail":
            fit_positions(todo, settings, subject.base)
        prompts = [prompt_of(record) for record in todo]
        if settings.engine == "ray":
            from glmtune.evaluation.spread_answers import answers_of

            stream = answers_of(subject, prompts, settings, size)
        elif settings.engine == "vllm":
            from glmtune.evaluation import vllm_answers

            stream = vllm_answers.answers_of(subject, prompts, settings)
        else:
            model, tokenizer = subject.load()
            stream = generate_answers(model, tokenizer, prompts, settings, size, subject.device)
        start = time.perf_counter()
        form = labelled if settings.print_form == "labels" else as_in_2023
        num_printed = len(todo) if settings.print_limit is None else settings.print_limit
        bar = tqdm(
            total=len(todo), desc="infer", unit="record", disable=not sys.stderr.isatty(), delay=1
        )
        with file, bar:
            for record, answer in zip(todo, stream, strict=True):
                file.append(record, {"answer": answer.text} | _counts(answer))
                answers.append(answer)
                if len(answers) <= num_printed:
                    shown = visible(form(record, answer.text, len(file.lines)))
                    bar.write(shown, file=sys.stdout)
                    sys.stdout.flush()
                elif bar.disable and len(answers) % LINE_EVERY == 0:
                    print(f"{len(answers):,} of {len(todo):,} records answered", flush=True)
                bar.update()
        if (num_more := len(answers) - num_printed) > 0:
            print(f"and {num_more:,} more, which are written (--print_limit none prints all)")
    summary = InferSummary(
        output_path=file.path,
        num_answers=len(file.lines),
        num_new=len(answers),
        num_tokens=sum(answer.num_tokens for answer in answers),
        num_stopped=sum(answer.stopped for answer in answers),
        seconds=time.perf_counter() - start,
    )
    print(summary)
    return summary


def labelled(record: Question, answer: str, number: int) -> str:
    """A record with the model's answer and the expected one, each under its label."""
    instruction, input = shown_question(record.fields)
    texts = {
        "Instruction": instruction,
        "Input": input,
        "Model": answer,
        "Expected": record.expected,
    }
    width = max(map(len, texts)) + 2
    lines = [
        f"  {f'{name}:':<{width}}" + f"\n{' ' * (width + 2)}".join(text.strip().splitlines())
        for name, text in texts.items()
        if text.strip() or name == "Model"
    ]
    return "\n".join([f"record {number}", *lines, ""])


def as_in_2023(record: Question, answer: str, number: int) -> str:
    """A record and its answer in the layout of the 2023 script, the original output below."""
    asked = record.asked if isinstance(record.asked, str) else shown_question(record.fields)[0]
    return f"{asked}{answer}\n### {number}.Answer:\n {record.expected}\n\n"


def _counts(answer: Answer) -> dict[str, int | bool]:
    return {"num_tokens": answer.num_tokens, "stopped": answer.stopped}
