"""Answer the same rows with base and tuned weights, from one loaded model, and judge both."""

import sys
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from tqdm import tqdm

from glmtune.config.settings import CompareSettings
from glmtune.data.files import new_file, write_json
from glmtune.data.questions import Question
from glmtune.errors import note
from glmtune.evaluation.answers import AnswerFile, ModelChoice
from glmtune.evaluation.asked import Asked
from glmtune.evaluation.gate import Gate
from glmtune.evaluation.metric import load_metric
from glmtune.evaluation.page import html
from glmtune.evaluation.references import References
from glmtune.evaluation.report import Comparison, Pair, markdown
from glmtune.evaluation.scores import score_pairs
from glmtune.evaluation.verdict import judge
from glmtune.generation import Decoder, answer_batch
from glmtune.generation.streaming import check_stop_strings
from glmtune.hardware import memory_gib
from glmtune.runlog import Progress


def compare(settings: CompareSettings) -> Comparison:
    """Answer records with the adapter off and on, score both sides, and say which is better.

    Both answers to a record are drawn with the same random numbers, so that every difference comes
    from the adapter. `compare.jsonl` is written as batches finish, and a partial one is resumed;
    `compare.json`, `compare.md` and `compare.html` are made from it.

    Raises:
        UserError: records, model, adapter or output folder cannot be used, see `answers` and
            `asked`; a metric cannot be imported or fails; too few rows for the gate.
    """
    metrics = [load_metric(spec) for spec in settings.metric or ()]
    gate = Gate.of(settings.gate, metrics)
    subject = ModelChoice.of(settings)
    asked = Asked.of(settings, subject)
    records = asked.records[: settings.limit]
    if len(records) < len(asked.records):
        note(f"{len(records):,} of {len(asked.records):,} records are asked (--limit none: all)")
    if gate:
        gate.check_rows(sum(bool(record.expected.strip()) for record in records))
    folder = Path(settings.output_dir or Path(settings.adapter, "compare"))
    file = AnswerFile(
        folder / "compare.jsonl",
        asked.records,
        {"verb": "compare"} | subject.identity() | settings.in_effect(),
        overwrite=settings.overwrite_output,
        elsewhere="--output_dir",
    )
    size = settings.per_device_eval_batch_size
    todo = file.to_answer(settings.limit, size if subject.is_batch_sensitive else None)
    cost = answer_both(file, todo, asked, settings, subject) if todo else None

    pairs = [Pair.from_line(line) for line in file.lines[: settings.limit]]
    table = score_pairs(pairs, metrics)
    verdicts = judge(table)
    if not table.has_word_scores:
        note("no ROUGE on words: pip install 'glmtune[scores]' adds it, and THUDM's formula")
    comparison = Comparison(
        base=file.settings["base"],
        adapter=file.settings["adapter"],
        dtype=file.settings["dtype"],
        settings=settings.in_effect(),
        date=datetime.fromtimestamp(file.path.stat().st_mtime).strftime("%Y-%m-%d %H:%M"),
        pairs=pairs,
        verdicts=verdicts,
        cost=cost,
        passes_gate=gate is None or gate.is_passed(verdicts["all"]),
    )
    write_json(comparison.as_json(), str(folder / "compare.json"))
    for name, write in (("compare.md", markdown), ("compare.html", html)):
        with new_file(str(folder / name)) as output:
            output.write(write(comparison))
    print(*comparison.summary(), sep="\n")
    if gate:
        print(f"gate {gate.spec}: {'passed' if comparison.passes_gate else 'not passed'}")
    names = "compare.html, compare.md, compare.json, compare.jsonl"
    print(f"written: {folder}/{names}")
    return comparison


def answer_both(
    file: AnswerFile,
    todo: Sequence[Question],
    asked: Asked,
    settings: CompareSettings,
    subject: ModelChoice,
) -> dict[str, float]:
    """Answer records with the adapter off and on, and score their references on both sides.

    Returns:
        What it took: seconds, tokens of the answers, and the most memory that was held.

    Raises:
        UserError: see `compare`.
    """
    asked.check_positions(todo, settings, subject.base)
    is_scored = any(record.expected.strip() for record in todo)
    model, tokenizer = subject.load(computes=is_scored)
    model.eval()
    encoded = asked.prompts(model, tokenizer, todo, settings.max_new_tokens)
    check_stop_strings(settings.stop_strings or (), tokenizer)
    # Before the decoders, see `References`.
    references = References(model, asked.references(tokenizer, settings.limit))
    tuned = Decoder.of(model, settings, subject.device)
    with model.disable_adapter():
        base = Decoder.of(model, settings, subject.device, beside=tuned)
    size, started, num_tokens = settings.per_device_eval_batch_size, time.monotonic(), 0
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
                line: dict[str, Any] = {side: answer._asdict() for side, answer in sides}
                if scored := references.of(len(file.lines)):
                    line["reference"] = scored
                file.append(record, line)
                num_tokens += sum(answer.num_tokens for answer in answers)
            bar.update(len(batch))
            if bar.disable:
                lines.tell(len(file.lines))
    return {
        "records": len(todo),
        "seconds": time.monotonic() - started,
        "tokens": num_tokens,
        "peak_memory_gib": memory_gib(subject.device),
    }
