"""Answer the same rows, of any format, with base and tuned weights, from one loaded model."""

import sys
from datetime import datetime
from pathlib import Path

from tqdm import tqdm

from glmtune.config.settings import CompareSettings
from glmtune.data.files import new_file
from glmtune.evaluation.answers import (
    AnswerFile,
    ModelChoice,
    fit_positions,
    prompt_of,
    read_questions,
)
from glmtune.evaluation.page import html
from glmtune.evaluation.report import Comparison, Pair, markdown
from glmtune.generation import Decoder, answer_batch, encode_prompts
from glmtune.generation.streaming import check_stop_strings
from glmtune.runlog import Progress


def compare(settings: CompareSettings) -> Comparison:
    """Answer records with the adapter off and on, and write the answers side by side.

    Both answers to a record are drawn with the same random numbers, so that every difference comes
    from the adapter. `compare.jsonl` is written as batches finish, and a partial one is resumed;
    `compare.md` and `compare.html` are made from it.

    Raises:
        UserError: records, model, adapter or output folder cannot be used; see `answers`.
    """
    records = read_questions(settings)
    subject = ModelChoice.of(settings)
    if settings.on_bad_row == "skip":
        records = fit_positions(records, settings, subject.base)
    folder = Path(settings.output_dir or Path(settings.adapter, "compare"))
    file = AnswerFile(
        folder / "compare.jsonl",
        records,
        {"verb": "compare"} | subject.identity() | settings.in_effect(),
        overwrite=settings.overwrite_output,
        elsewhere="--output_dir",
    )
    size = settings.per_device_eval_batch_size
    todo = file.to_answer(settings.limit, size if subject.is_batch_sensitive else None)
    if todo:
        if settings.on_bad_row == "fail":
            fit_positions(todo, settings, subject.base)
        model, tokenizer = subject.load()
        prompts = [prompt_of(record) for record in todo]
        encoded = encode_prompts(model, tokenizer, prompts, settings.max_new_tokens)
        check_stop_strings(settings.stop_strings or (), tokenizer)
        tuned = Decoder.of(model, settings, subject.device)
        with model.disable_adapter():
            base = Decoder.of(model, settings, subject.device, beside=tuned)
        num_all = len(file.lines) + len(todo)
        bar = tqdm(
            total=num_all,
            initial=len(file.lines),
            desc="compare",
            unit="record",
            disable=not sys.stderr.isatty(),
        )
        lines = Progress(num_all, len(file.lines), "records answered twice")
        with file, bar:
            for start in range(0, len(todo), size):
                batch = encoded[start : start + size]
                with model.disable_adapter():
                    of_base = answer_batch(model, tokenizer, batch, settings, base)
                of_tuned = answer_batch(model, tokenizer, batch, settings, tuned)
                answered = zip(todo[start : start + size], of_base, of_tuned, strict=True)
                for record, *answers in answered:
                    sides = zip(("base", "tuned"), answers, strict=True)
                    file.append(record, {side: answer._asdict() for side, answer in sides})
                bar.update(len(batch))
                if bar.disable:
                    lines.tell(len(file.lines))

    comparison = Comparison(
        base=file.settings["base"],
        adapter=file.settings["adapter"],
        dtype=file.settings["dtype"],
        settings=settings.in_effect(),
        date=datetime.fromtimestamp(file.path.stat().st_mtime).strftime("%Y-%m-%d %H:%M"),
        pairs=[Pair.from_line(line) for line in file.lines[: settings.limit]],
    )
    for name, write in (("compare.md", markdown), ("compare.html", html)):
        with new_file(str(folder / name)) as output:
            output.write(write(comparison))
    print(f"{comparison.verdict.en}\nwritten: {folder}/compare.html, compare.md, compare.jsonl")
    return comparison
