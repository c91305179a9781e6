"""`glmtune evaluate`: the scores of a base and of any number of its adapters on the same rows."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from glmtune.adapters.find import find_adapter
from glmtune.config.settings import EvaluateSettings
from glmtune.data.files import new_file, write_json
from glmtune.data.questions import Question
from glmtune.errors import UserError, note
from glmtune.evaluation.answers import AnswerFile, ModelChoice, name_of_adapter
from glmtune.evaluation.asked import Asked
from glmtune.evaluation.metric import load_metric
from glmtune.evaluation.report import Pair, table_lines
from glmtune.evaluation.score_tables import CORPUS_LABELS, PART_NAMES
from glmtune.evaluation.scores import MEASURES, Part, score_pairs
from glmtune.evaluation.sides import add_costs, answer_sides
from glmtune.evaluation.source_run import same_held_out
from glmtune.evaluation.verdict import VERDICTS, PartVerdict, judge

BASE = "base"
COLUMNS = ("chrf", "log_prob", "exact", "rouge_l", "stopped")
"""The scores of a table; `evaluate.json` has all."""


@dataclass(frozen=True)
class Evaluation:
    """What each side scores, and whether it is better than the base."""

    base: str
    dtype: str
    settings: Mapping[str, Any]
    date: str
    num_rows: int
    sides: Mapping[str, Mapping[Part, PartVerdict]]
    """Name of a side, the base first -> language -> its scores beside the base's."""
    cost: Mapping[str, float] | None
    """What answering took; None where all answers were there before."""

    def as_json(self) -> dict[str, Any]:
        """The content of evaluate.json: each adapter as in compare.json, the base without."""
        found: dict[str, Any] = {}
        for name, verdicts in self.sides.items():
            if name == BASE:
                found[name] = {part: _alone(of) for part, of in verdicts.items()}
            else:
                found[name] = {part: of.as_json() for part, of in verdicts.items()}
        return {
            "base": self.base,
            "dtype": self.dtype,
            "settings": dict(self.settings),
            "date": self.date,
            "rows": self.num_rows,
            "sides": {name: {"languages": languages} for name, languages in found.items()},
            "cost": self.cost,
        }

    def tables(self) -> Iterator[tuple[str, list[list[str]]]]:
        """A title and the rows of a table for each language that has rows, and for all of them."""
        of_all = self.sides[BASE]["all"]
        for part, name in PART_NAMES.items():
            num = self.sides[BASE][part].num_rows
            if part != "all" and num in (0, of_all.num_rows):
                continue
            own = [measure for measure in of_all.compared if measure not in MEASURES]
            labels = [of_all.measures[key].label.en for key in (*COLUMNS, *own)]
            rows = [["", *labels, CORPUS_LABELS["loss"].en, "Beside the base"]]
            for side, verdicts in self.sides.items():
                rows.append([side, *_cells(verdicts[part], [*COLUMNS, *own], side == BASE)])
            yield f"{name.en}, {num:,} rows with a reference", rows

    def markdown(self) -> str:
        """The tables as Markdown."""
        lines = [f"# {self.base}", ""]
        for title, rows in self.tables():
            lines += [f"**{title}**", "", *table_lines(rows), ""]
        return "\n".join(lines)


def evaluate(settings: EvaluateSettings) -> Evaluation:
    """Answer rows with the base and each adapter, score them, and judge each beside the base.

    The base is loaded once, and adapters are put on it one after another. Each side has a file of
    answers, which is resumed, so that another adapter later costs its own answers only.
    `evaluate.json` and `evaluate.md` are made from these.

    Raises:
        UserError: rows, base, an adapter or the output folder cannot be used, or a metric fails.
    """
    metrics = [load_metric(spec) for spec in settings.metric or ()]
    adapters = name_adapters([find_adapter(name) for name in settings.adapter or ()])
    base = ModelChoice.of(settings)
    first = replace(base, adapter=next(iter(adapters.values()), None))
    asked = Asked.of(settings, first)
    if asked.probes:
        _tell_of_other_runs(adapters)
    records = asked.first(settings.limit)

    folder = Path(settings.output_dir or Path(first.adapter or "", "evaluate"))
    subjects = {BASE: replace(base, adapter=None)} | {
        name: replace(base, adapter=path) for name, path in adapters.items()
    }
    shaping = settings.in_effect() | settings.own_answers()
    files = {
        name: AnswerFile(
            folder / f"{name.replace('/', '-')}.jsonl",
            asked.records,
            {"verb": "evaluate"} | subject.identity() | shaping,
            overwrite=settings.overwrite_output,
            elsewhere="--output_dir",
        )
        for name, subject in subjects.items()
    }
    cost = _answer(files, subjects, asked, settings)
    lines = {name: file.lines[: settings.limit] for name, file in files.items()}
    sides = {
        name: judge(score_pairs(list(map(_pair, lines[BASE], of_side)), metrics))
        for name, of_side in lines.items()
    }
    found = Evaluation(
        base=files[BASE].settings["base"],
        dtype=files[BASE].settings["dtype"],
        settings=shaping,
        date=max(file.date for file in files.values()),
        num_rows=len(records),
        sides=sides,
        cost=cost,
    )
    write_json(found.as_json(), str(folder / "evaluate.json"))
    with new_file(str(folder / "evaluate.md")) as output:
        output.write(found.markdown())
    for title, rows in found.tables():
        print(title, *_aligned(rows), "", sep="\n")
    print(f"written: {folder}/evaluate.json, evaluate.md, and a file of answers for each side")
    return found


def name_adapters(paths: Sequence[Path]) -> dict[str, Path]:
    """Each adapter's name: its folder's, and as much of the path before it as tells it apart.

    Raises:
        UserError: one folder is named twice.
    """
    real = [path.resolve() for path in paths]
    if twice := next((path for path in real if real.count(path) > 1), None):
        raise UserError(f"adapter {twice}: is named twice; leave it out once")
    names = list(map(name_of_adapter, paths))
    for length in range(2, max((len(path.parts) for path in real), default=0)):
        clashing = {n for n in names if n.lower() == BASE or names.count(n) > 1}
        names = [
            "/".join(path.parts[-length:]) if name in clashing else name
            for name, path in zip(names, real, strict=True)
        ]
    return dict(zip(names, paths, strict=True))


def _tell_of_other_runs(adapters: Mapping[str, Path]) -> None:
    """Say which adapters may have been trained on the rows that the first one's run held out."""
    first, *others = adapters.items()
    for name, path in others:
        if not same_held_out(first[1], path):
            note(
                f"{name}: comes from another run than {first[0]}, whose held-out rows are asked: "
                "it may have been trained on them; --data_path FILE asks rows that neither saw"
            )


def _answer(
    files: Mapping[str, AnswerFile],
    subjects: Mapping[str, ModelChoice],
    asked: Asked,
    settings: EvaluateSettings,
) -> dict[str, float] | None:
    """Answer what has no answer yet, side by side; what it took, None where there was nothing."""
    size = settings.per_device_eval_batch_size
    todo: dict[str, Sequence[Question]] = {}
    for name, file in files.items():
        batch_size = None if settings.engine == "vllm" else subjects[name].batch_to_fill(size)
        todo[name] = file.to_answer(settings.limit, batch_size)
    todo = {name: records for name, records in todo.items() if records}
    if not todo:
        return None
    longest = max(todo.values(), key=len)
    asked.check_positions(longest, settings, subjects[BASE].base)
    scores = any(record.expected.strip() for record in longest)
    if settings.engine == "ray":
        from glmtune.evaluation.spread_answers import answer_side

        return add_costs(
            [
                answer_side(subjects[name], files[name], records, asked, settings, scores)
                for name, records in todo.items()
            ]
        )
    if settings.engine == "vllm":
        from glmtune.evaluation import vllm_answers

        return add_costs(vllm_answers.answer_sides(subjects, files, todo, asked, settings, scores))
    base, tokenizer = subjects[BASE].load(computes=scores)
    costs = []
    for name, records in todo.items():
        print(f"{name} answers {len(records):,} records", file=sys.stderr)
        model = subjects[name].attach(base)
        one = {"answer": nullcontext}
        device = subjects[name].device
        costs.append(
            answer_sides(model, tokenizer, one, files[name], records, asked, settings, device)
        )
        if subjects[name].adapter is not None:
            model.unload()
    return add_costs(costs)


def _pair(of_base: dict[str, Any], of_side: dict[str, Any]) -> Pair:
    """A record with the base's answer and a side's."""
    line = of_base | {"base": of_base["answer"], "tuned": of_side["answer"]}
    if scored := of_base.get("reference"):
        log_probs = {"base": scored["answer"], "tuned": of_side["reference"]["answer"]}
        line["reference"] = {"num_tokens": scored["num_tokens"]} | log_probs
    return Pair.from_line(line)


def _alone(of_base: PartVerdict) -> dict[str, Any]:
    """The base's entry in evaluate.json."""
    metrics = {
        name: {"mean": found.base, "n": found.num_rows} for name, found in of_base.compared.items()
    }
    return {"n": of_base.num_rows, "metrics": metrics, "corpus": of_base.corpus.get("base", {})}


def _cells(found: PartVerdict, names: Sequence[str], is_base: bool) -> list[str]:
    cells = []
    for name in names:
        compared, digits = found.compared.get(name), found.measures[name].digits
        cells.append(f"{compared.tuned:.{digits}f}" if compared else "")
    loss = found.corpus.get("tuned", {}).get("loss")
    cells.append("" if loss is None else f"{loss:.4g}")
    if is_base or not found.num_rows:
        return [*cells, ""]
    change = found.compared["chrf"].interval
    if change is None:
        return [*cells, "too few rows"]
    low, high = (f"{bound:+.1f}" for bound in (change.low, change.high))
    return [*cells, f"{VERDICTS[found.verdict].en} (chrF {low} to {high})"]


def _aligned(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *cells in rows:
        numbers = (cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True))
        yield "  ".join([first.ljust(widths[0]), *numbers]).rstrip()
