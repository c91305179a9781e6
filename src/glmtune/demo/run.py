"""`glmtune demo`: all stages on the tiny model in the package, and a page with the result.

Every stage is the verb that the 6B model's users call, with the same settings and files.
"""

import json
import os
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from glmtune.config.settings import (
    CompareSettings,
    ConvertSettings,
    DemoSettings,
    DialSettings,
    TokenizeSettings,
    TrainSettings,
)
from glmtune.data.convert import convert
from glmtune.data.files import new_file
from glmtune.data.tokenizing import tokenize
from glmtune.demo.folder import WRITTEN, claim_folder
from glmtune.demo.page import TITLE, score_panel
from glmtune.demo.questions import Asked, held_out_questions, num_right, training_questions
from glmtune.demo.recipe import RECIPE
from glmtune.demo.world import LANGUAGES
from glmtune.errors import program
from glmtune.evaluation.checkup import check_after_training
from glmtune.evaluation.compare import compare
from glmtune.evaluation.dial import dial
from glmtune.evaluation.page import html
from glmtune.evaluation.report import Text
from glmtune.models.loading import load_tokenizer
from glmtune.models.resolve import GLM_TINY, base_name
from glmtune.run_files import RECIPE_FILE
from glmtune.runlog import format_seconds, print_pairs
from glmtune.training.loop import train
from glmtune.tune.folder import print_stage

MAX_NEW_TOKENS = 16
QUESTIONS_PER_BATCH = 100
LOGGING_STEPS = 5

Count = dict[str, tuple[int, int]]
"""Language or kind of question -> (right, asked)."""


@dataclass(frozen=True)
class DemoResult:
    """The result of a demo."""

    page: Path
    base: Count
    tuned: Count
    seconds: dict[str, float] = field(compare=False)
    """Seconds by stage."""


def demo(settings: DemoSettings) -> DemoResult:
    """Train glm-tiny to answer questions about its toy world, and show the effect on a page.

    Raises:
        UserError: the folder holds other things or cannot be written, or the disk is full.
    """
    out = Path(settings.out)
    claim_folder(out)
    paths = {name: str(out / name) for name in WRITTEN}
    seconds: dict[str, float] = {}

    with _stage(1, "write records about a toy world, in Chinese and English", seconds):
        training, asked = training_questions(), _held_out(settings.limit)
        _write_records(paths["train.json"], training)
        _write_records(paths["questions.json"], asked)
        convert(ConvertSettings(data_path=paths["train.json"], save_path=paths["train.jsonl"]))
    with _stage(2, "tokenize", seconds):
        rows = TokenizeSettings(jsonl_path=paths["train.jsonl"], save_path=paths["train"])
        tokenize(rows, load_tokenizer(GLM_TINY), base_name(GLM_TINY))
    with _stage(3, "train a LoRA adapter", seconds):
        recipe = training_config(settings, paths["train"], paths["run"])
        check_up = partial(check_after_training, data_path=paths["questions.json"])
        run = train(recipe, at_end=check_up)
    if run.interrupted:
        raise KeyboardInterrupt
    with _stage(4, "turn the adapter down and up: what each scale gains and costs", seconds):
        # Before the comparison, whose page shows it.
        dial(
            DialSettings(
                adapter=paths["run"],
                data_path=paths["questions.json"],
                base=GLM_TINY,
                use_cpu=settings.use_cpu,
            )
        )
    with _stage(5, f"answer {len(asked)} questions that it never saw, before and after", seconds):
        comparison = compare(
            CompareSettings(
                data_path=paths["questions.json"],
                adapter=paths["run"],
                base=GLM_TINY,
                limit=None,
                max_new_tokens=MAX_NEW_TOKENS,
                per_device_eval_batch_size=QUESTIONS_PER_BATCH,
                use_cpu=settings.use_cpu,
            )
        )
    base = num_right(asked, [pair.base.text for pair in comparison.pairs])
    tuned = num_right(asked, [pair.tuned.text for pair in comparison.pairs])
    page = html(
        comparison,
        command="glmtune demo",
        title=TITLE,
        lead=_lead(base, tuned, len(training)),
        panels=[score_panel(base, tuned)],
    )
    with new_file(paths["demo.html"]) as file:
        file.write(page)
    result = DemoResult(out / "demo.html", base, tuned, seconds)
    _print_end(result, settings)
    return result


def training_config(settings: DemoSettings, dataset_path: str, output_dir: str) -> TrainSettings:
    """The demo's recipe, with the settings of the command line."""
    recipe = dict(RECIPE)
    if settings.max_steps is not None:
        recipe["max_steps"] = settings.max_steps
    recipe.setdefault("logging_steps", LOGGING_STEPS)
    return TrainSettings(
        **recipe,
        dataset_path=dataset_path,
        output_dir=output_dir,
        base=GLM_TINY,
        seed=settings.seed,
        use_cpu=settings.use_cpu,
        save_total_limit=1,
        # The recipe's steps have a fixed number of rows, and a model this small is not worth
        # compiling.
        layout="padded",
    )


@contextmanager
def _stage(number: int, what: str, seconds: dict[str, float]) -> Iterator[None]:
    print_stage(number, 5, what)
    started = time.monotonic()
    yield
    seconds[what] = time.monotonic() - started


def _held_out(limit: int) -> list[Asked]:
    """The first held-out questions, half in each language, in their mixed order."""
    left = dict.fromkeys(LANGUAGES, limit // len(LANGUAGES))
    chosen = []
    for question in held_out_questions():
        if left[question.language]:
            left[question.language] -= 1
            chosen.append(question)
    return chosen


def _write_records(path: str, questions: Sequence[Asked]) -> None:
    records = [question.record() for question in questions]
    with new_file(path) as file:
        file.write(json.dumps(records, ensure_ascii=False, indent=1) + "\n")


def _share(count: Count, languages: Sequence[str] = LANGUAGES) -> str:
    right, asked = (sum(count[language][i] for language in languages) for i in (0, 1))
    return f"{right / asked:.1%}"


def _lead(base: Count, tuned: Count, num_training: int) -> Text:
    asked = sum(base[language][1] for language in LANGUAGES)
    before, after = _share(base), _share(tuned)
    return Text(
        f"glm-tiny 原本只读过玩具世界的陈述句。用 {num_training:,} 条问答微调后，再考 {asked} 道"
        f"从未见过的题：答对率从 {before} 升到 {after}。",
        f"glm-tiny had only read plain sentences about a toy world. After LoRA on {num_training:,} "
        f"questions with answers, it was asked {asked} that it had never seen: {before} right "
        f"before, {after} after.",
    )


def activation() -> dict[str, str]:
    """How to make `glmtune` available by name in this terminal; empty if it is already."""
    if program() == "glmtune" or sys.prefix == sys.base_prefix:
        return {}
    place = Path(program()).parent
    how = f"{place}\\activate" if os.name == "nt" else f"source {shlex.quote(str(place))}/activate"
    return {"shorter": f"{how}, then glmtune is enough"}


def _print_end(result: DemoResult, settings: DemoSettings) -> None:
    out = Path(settings.out)
    print()
    names = {"zh": "in Chinese", "en": "in English"}
    scores = {
        language: [_share(count, [language]) for count in (result.base, result.tuned)]
        for language in names
    }
    print_pairs(
        f"Done in {format_seconds(sum(result.seconds.values()))}. Right answers, word for word:",
        {name: "base {}, tuned {}".format(*scores[language]) for language, name in names.items()},
    )
    run, questions = (shlex.quote(str(out / name)) for name in ("run", "questions.json"))
    recipe = shlex.quote(str(out / "run" / RECIPE_FILE))
    print(f"\nOpen the page in a browser: {result.page.absolute()}\n")
    print_pairs(
        "What to try next",
        {
            "ask it": f"{program()} infer --data_path {questions} --adapter {run} --limit 10",
            "check it": f"{program()} check {run} --data_path {questions}",
            "train it your way": f"{program()} train {recipe} --output_dir my-run --lora_rank 2",
            "the real one": f"{program()} tune YOUR_RECORDS.json --out tuned --base CHATGLM_6B",
            **activation(),
        },
    )
