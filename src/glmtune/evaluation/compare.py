"""Answer the same rows with base and tuned weights, from one loaded model, and judge both."""

import json
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from glmtune.config.settings import CompareSettings
from glmtune.data.eval_sets import HELD_OUT
from glmtune.data.files import new_file, read_text, write_json
from glmtune.errors import UserError, note
from glmtune.evaluation.answers import AnswerFile, ModelChoice
from glmtune.evaluation.asked import Asked
from glmtune.evaluation.collapse import Collapse, Sides, Taught
from glmtune.evaluation.findings import Answered, Finding, answer_findings
from glmtune.evaluation.gate import Gate
from glmtune.evaluation.general import BothScores, GeneralFile
from glmtune.evaluation.language_matrix import TrainedLanguages
from glmtune.evaluation.metric import load_metric
from glmtune.evaluation.page import html
from glmtune.evaluation.probes import spread
from glmtune.evaluation.replay_savings import Saved, find_run_without
from glmtune.evaluation.report import Comparison, Pair, markdown
from glmtune.evaluation.run_facts import RunFacts
from glmtune.evaluation.scores import ScoreTable, score_pairs
from glmtune.evaluation.sides import ModelSides, add_costs, answer_sides
from glmtune.evaluation.source_run import find_rows, find_template
from glmtune.evaluation.verdict import PartVerdict, judge
from glmtune.general.items import find_general
from glmtune.run_files import COMPARE_FOLDER, COMPARE_PAGE

ANSWERS, STRANGE_ANSWERS = "compare.jsonl", "compare.strange.jsonl"
MOST_AGREEMENTS = 64
"""Answers of which each two are compared with each other."""


def compare(settings: CompareSettings) -> Comparison:
    """Answer records with the adapter off and on, score both sides, and say which is better.

    Both answers to a record are drawn with the same random numbers, so that every difference comes
    from the adapter. Questions of our own are answered as well, since a collapse shows there.
    `compare.jsonl` and `compare.strange.jsonl` are written as batches finish, and partial ones are
    resumed; `compare.json`, `compare.md` and `compare.html` are made from them.

    Raises:
        UserError: records, model, adapter or output folder cannot be used, see `answers` and
            `asked`; a metric cannot be imported or fails; too few rows for the gate.
    """
    metrics = [load_metric(spec) for spec in settings.metric or ()]
    gate = Gate.of(settings.gate, metrics)
    subject = ModelChoice.of(settings)
    general = find_general(settings.general_set, subject.base)
    identity, without = subject.identity(), None
    if settings.without_replay and general:
        without = find_run_without(settings, subject, identity, general)
    asked = Asked.of(settings, subject)
    records = asked.first(settings.limit)
    if gate:
        gate.check_rows(sum(bool(record.expected.strip()) for record in records))
    assert subject.adapter is not None, "CompareSettings requires one"
    strange = Asked.strange(subject.tokenizer, find_template(subject.adapter))
    folder = Path(settings.output_dir or Path(settings.adapter, COMPARE_FOLDER))
    answers_depend_on = {"verb": "compare"} | identity | settings.in_effect()
    file, strange_file = (
        AnswerFile(
            folder / name,
            of.records,
            answers_depend_on,
            overwrite=settings.overwrite_output,
            elsewhere="--output_dir",
        )
        for name, of in ((ANSWERS, asked), (STRANGE_ANSWERS, strange))
    )
    general_file = None
    if general:
        anew = settings.overwrite_output
        general_file = GeneralFile(folder, general, identity, overwrite=anew)
    files = [(strange, strange_file, None), (asked, file, settings.limit)]
    cost = _answer(settings, subject, files, general_file)

    run = asked.run or find_rows(subject.adapter, subject.tokenizer)
    taught = Taught.of(subject.tokenizer, run) if run else None
    pairs = [Pair.from_line(line) for line in file.lines[: settings.limit]]
    strange_pairs = [Pair.from_line(line) for line in strange_file.lines]
    table = score_pairs(pairs, metrics)
    verdicts = judge(table)
    if not table.has_word_scores:
        note("no ROUGE on words: pip install 'glmtune[scores]' adds it, and THUDM's formula")
    comparison = Comparison(
        base=file.settings["base"],
        adapter=file.settings["adapter"],
        dtype=file.settings["dtype"],
        settings=settings.in_effect(),
        date=file.date,
        pairs=pairs,
        verdicts=verdicts,
        sets=_judge_sets(pairs, table, asked),
        collapse=_find_collapse(pairs, strange_pairs, taught, settings.max_new_tokens),
        trained_on=TrainedLanguages.of(run, subject.tokenizer) if run else None,
        price=general_file.price if general_file else None,
        saved=_saved(general_file, without),
        cost=cost or _cost_of(folder / "compare.json"),
        passes_gate=gate is None or gate.is_passed(verdicts["all"]),
        chrf=table.of_rows("chrf"),
        run=RunFacts.of(subject.adapter),
    )
    write_json(comparison.as_json(), str(folder / "compare.json"))
    for name, write in (("compare.md", markdown), (COMPARE_PAGE, html)):
        with new_file(str(folder / name)) as output:
            output.write(write(comparison))
    print(*comparison.summary(), sep="\n")
    if gate:
        print(f"gate {gate.spec}: {'passed' if comparison.passes_gate else 'not passed'}")
    names = f"{COMPARE_PAGE}, compare.md, compare.json, {ANSWERS}, {STRANGE_ANSWERS}"
    print(f"written: {folder}/{names}")
    return comparison


def _answer(
    settings: CompareSettings,
    subject: ModelChoice,
    files: Sequence[tuple[Asked, AnswerFile, int | None]],
    general: GeneralFile | None,
) -> dict[str, float] | None:
    """Answer what has no answer yet, and score the general set if it has not been.

    Args:
        settings: how it is answered.
        subject: base and adapter.
        files: questions, the file of their answers, and how many of them are asked.
        general: the general set and its scores, if it is asked.

    Returns:
        What answering took; None where there was nothing to answer.
    """
    size = subject.batch_to_fill(settings.per_device_eval_batch_size)
    todo = [(asked, file, file.to_answer(limit, size)) for asked, file, limit in files]
    todo = [(asked, file, records) for asked, file, records in todo if records]
    is_priced = general is None or general.scores is not None
    if not todo and is_priced:
        return None
    for asked, _, records in todo:
        asked.check_positions(records, settings, subject.base)
    scores = any(record.expected.strip() for _, _, records in todo for record in records)
    model, tokenizer = subject.load(computes=scores or not is_priced)
    if general and not is_priced:  # before the decoders, see `References`
        general.measure(model.eval(), tokenizer)
    if not todo:
        return None
    sides: ModelSides = {"base": model.disable_adapter, "tuned": nullcontext}
    costs = []
    for asked, file, records in todo:
        one = model, tokenizer, sides, file, records, asked, settings, subject.device
        costs.append(answer_sides(*one, shows_progress=file.path.name == ANSWERS))
    return add_costs(costs)


def _saved(general: GeneralFile | None, without: tuple[str, BothScores] | None) -> Saved | None:
    """What replay saved beside a run without it, if one was named."""
    if without is None or general is None or general.scores is None:
        return None
    name, scores = without
    return Saved(general.price_of(scores.tuned, general.scores.tuned), name)


def _judge_sets(pairs: Sequence[Pair], table: ScoreTable, asked: Asked) -> dict[str, PartVerdict]:
    """The verdict on each set of held-out rows, where there are several."""
    if asked.run is None:
        return {}
    rows = asked.run.rows
    names = {int(row) + 1: name for name, of_set in rows.eval_sets.items() for row in of_set}
    set_N = [names.get(pair.number, HELD_OUT) for pair in pairs]
    found = dict.fromkeys(set_N)
    if len(found) < 2:
        return {}
    in_sets = {name: [of == name for of in set_N] for name in found}
    return {name: judge(table.some(pairs, is_in_N))["all"] for name, is_in_N in in_sets.items()}


def _cost_of(path: Path) -> dict[str, float] | None:
    """What the answers of an earlier command took, from its compare.json."""
    try:
        return json.loads(read_text(str(path)))["cost"]
    except (OSError, UserError, ValueError, TypeError, KeyError):  # there was none
        return None


def _find_collapse(
    pairs: Sequence[Pair],
    strange: Sequence[Pair],
    taught: Taught | None,
    max_new_tokens: int,
) -> list[Finding]:
    """What is wrong with the tuned answers to the records and to questions of our own."""
    asked = [pairs[place] for place in spread(len(pairs), MOST_AGREEMENTS)]
    of_strange, of_task = (
        Sides(
            [pair.question for pair in some],
            [pair.expected for pair in some],
            [pair.tuned.text for pair in some],
            [pair.base.text for pair in some],
            rows,
        )
        for some, rows in ((strange, ()), (asked, [pair.number for pair in asked]))
    )
    found = Collapse.of(of_strange, of_task, taught)
    answered = [
        Answered(
            pair.question,
            pair.expected,
            pair.tuned,
            pair.base,
            pair.number,
            is_long=pair.num_reference_tokens > max_new_tokens,
        )
        for pair in pairs
    ]
    return [*found.findings, *answer_findings(answered)]
