"""Answer alpaca records with the tuned weights, or with the base's."""

import time
from dataclasses import dataclass
from pathlib import Path

from glmtune.config import InferConfig
from glmtune.data.records import Record
from glmtune.evaluation.answers import AnswerFile, Subject, prompt_of, read_questions
from glmtune.generation import Answer, GenerationSettings, generate_answers


@dataclass(frozen=True)
class InferSummary:
    """What this run added to the file of answers."""

    output_path: Path
    num_answers: int
    """In the file, those of earlier runs included."""
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


def infer(config: InferConfig) -> InferSummary:
    """Answer records, print each beside its original output, and write them as JSON lines.

    A line has `row`, `instruction`, `input`, `output`, `answer`, `num_tokens` and `stopped`. Lines
    are written as batches finish, and a file that holds the first of them is gone on with.

    Raises:
        UserError: records, model, adapter or file of answers cannot be used; see `answers`.
    """
    records = read_questions(config)
    subject, settings = Subject.of(config), GenerationSettings.from_config(config)
    file = AnswerFile(
        Path(config.output_path or Path(config.model_path or "", "answers.jsonl")),
        records,
        {"verb": "infer"} | subject.identity() | settings.in_effect(),
        overwrite=config.overwrite_output,
        elsewhere="--output_path",
    )
    todo = records[len(file.lines) : config.limit]
    answers: list[Answer] = []
    start = time.perf_counter()
    if todo:
        model, tokenizer = subject.load()
        prompts = [prompt_of(record) for record in todo]
        batch_size = config.per_device_eval_batch_size
        stream = generate_answers(model, tokenizer, prompts, settings, batch_size, subject.device)
        start = time.perf_counter()
        with file:
            for record, answer in zip(todo, stream, strict=True):
                file.append(record, {"answer": answer.text} | _counts(answer))
                answers.append(answer)
                print(as_printed(record, answer.text, len(file.lines)), flush=True)
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


def as_printed(record: Record, answer: str, number: int) -> str:
    """A record and its answer in the layout of the 2023 script, the original output below."""
    return f"{prompt_of(record).text}{answer}\n### {number}.Answer:\n {record.output}\n\n"


def _counts(answer: Answer) -> dict[str, int | bool]:
    return {"num_tokens": answer.num_tokens, "stopped": answer.stopped}
