"""Adapters trained to be good, bad or nothing, on glm-tiny, and what `evaluate` says of them.

Each seed's base is one that has learned the demo's task in part, so that it can get worse as well
as better. Minutes a seed; run by name: pytest -m slow tests/recipes/test_planted_adapters.py
"""

import json
import random

import pytest

from glmtune.cli import main as glmtune
from glmtune.demo.questions import held_out_questions, training_questions
from glmtune.models.resolve import GLM_TINY

pytestmark = pytest.mark.slow
NUM_ROWS = 120
PLANTED = {
    "zero": "undecided",
    "tiny": "undecided",
    "good": "better",
    "collapsed": "worse",
    "wrong language": "worse",
    "overtaught": "worse",
}


def run(verb, *flags):
    assert glmtune([verb, *map(str, flags)]) == 0


def tokenized(folder, name, records):
    """Records as a folder of rows."""
    file = folder / f"{name}.json"
    file.write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    run("tokenize", file, "--save_path", folder / f"{name}.rows", "--base", GLM_TINY)
    return folder / f"{name}.rows"


def trained(folder, name, rows, base, seed, **settings):
    """An adapter of the demo's recipe, with other settings."""
    how = {"max_steps": 60, "learning_rate": 3e-3, "per_device_train_batch_size": 16}
    how |= {"lr_scheduler_type": "constant", "lora_target": "all", "lora_rank": 8, "seed": seed}
    how |= {"lora_alpha": 32, "lora_dropout": 0.0, "layout": "padded", "use_cpu": "true"}
    how |= {"general_set": "false", "report_to": "none"}
    flags = [part for name, value in (how | settings).items() for part in (f"--{name}", value)]
    run("train", "--dataset_path", rows, "--output_dir", folder / name, "--base", base, *flags)
    return folder / name


def planted_records(seed):
    """Rows of the demo, of one answer for all, in the other language, and eight rows alone."""
    asked = training_questions()
    random.Random(seed).shuffle(asked)
    task = [question.record() for question in asked[:2000]]
    languages = [question.language for question in asked[:2000]]
    swapped = {
        language: [row["output"] for row, of in zip(task, languages, strict=True) if of != language]
        for language in set(languages)
    }
    others = {language: iter(outputs * 20) for language, outputs in swapped.items()}
    return {
        "task": task,
        "collapsed": [row | {"output": task[0]["output"]} for row in task[:400]],
        "wrong language": [
            row | {"output": next(others[of])} for row, of in zip(task, languages, strict=True)
        ],
        "overtaught": task[:8],
    }


@pytest.mark.parametrize("seed", range(5))
def test_adapters_are_judged_right_six_of_six(seed, tmp_path):
    rows = {
        name: tokenized(tmp_path, name, records) for name, records in planted_records(seed).items()
    }
    half = trained(tmp_path, "half", rows["task"], GLM_TINY, seed, max_steps=30)
    base = tmp_path / "base"
    run("merge", "--base", GLM_TINY, "--adapter", half, "--output_dir", base)
    how = {
        "zero": ("task", {"learning_rate": 1e-30, "max_steps": 1}),
        "tiny": ("task", {"learning_rate": 1e-6, "max_steps": 2}),
        "good": ("task", {"max_steps": 200}),
        "collapsed": ("collapsed", {"max_steps": 40}),
        "wrong language": ("wrong language", {"max_steps": 60}),
        "overtaught": ("overtaught", {"max_steps": 150}),
    }
    adapters = [
        trained(tmp_path, name.replace(" ", "-"), rows[data], base, seed, **settings)
        for name, (data, settings) in how.items()
    ]
    questions = tmp_path / "questions.json"
    records = [question.record() for question in held_out_questions(2 * NUM_ROWS)[:NUM_ROWS]]
    questions.write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    flags = ["--data_path", questions, "--limit", "none", "--max_new_tokens", "16"]
    flags += ["--base", base, "--use_cpu", "true", "--per_device_eval_batch_size", "60"]
    flags += ["--output_dir", tmp_path / "evaluated"]
    run("evaluate", "--adapter", ",".join(map(str, adapters)), *flags)
    found = json.loads((tmp_path / "evaluated" / "evaluate.json").read_text(encoding="utf-8"))
    sides = found["sides"]
    verdicts = {
        name: sides[name.replace(" ", "-")]["languages"]["all"]["verdict"] for name in PLANTED
    }
    assert verdicts == PLANTED
