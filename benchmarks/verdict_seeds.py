"""Two trainings of one recipe that differ in their seed alone: how far apart are their scores?

Trains the demo's recipe with several seeds, scores each adapter on the demo's held-out questions,
and prints every pair's difference with its interval, and the verdict on it.

    python benchmarks/verdict_seeds.py FOLDER --max_steps 60 --num_seeds 9
"""

import argparse
import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np

from glmtune.cli import main as glmtune
from glmtune.config.settings import DemoSettings
from glmtune.demo.questions import held_out_questions, training_questions
from glmtune.demo.run import training_config
from glmtune.evaluation.report import Pair
from glmtune.evaluation.scores import score_pairs
from glmtune.evaluation.verdict import judge
from glmtune.models.resolve import GLM_TINY
from glmtune.training.loop import train


def compared(folder: Path, seed: int, max_steps: int | None, num_rows: int) -> list[Pair]:
    """The held-out questions, answered by base and an adapter of this seed."""
    run = folder / f"run-{max_steps or 'all'}-{seed}"
    if not (run / "adapter_model.safetensors").is_file():
        settings = DemoSettings(seed=seed, max_steps=max_steps, use_cpu=True)
        train(training_config(settings, str(folder / "train"), str(run)))
    flags = ["--data_path", str(folder / "questions.json"), "--adapter", str(run)]
    more = ["--limit", str(num_rows), "--max_new_tokens", "16", "--use_cpu", "true"]
    base = ["--base", str(GLM_TINY), "--per_device_eval_batch_size", "100"]
    assert glmtune(["compare", *flags, *more, *base]) == 0
    lines = (run / "compare" / "compare.jsonl").read_text(encoding="utf-8").splitlines()
    return [Pair.from_line(json.loads(line)) for line in lines]


def tell(name: str, pairs: list[Pair]) -> str:
    """Print what a pair of sides differs by; gives the verdict."""
    found = judge(score_pairs(pairs))["all"]
    parts = []
    for measure in ("chrf", "log_prob"):
        compared = found.compared[measure]
        assert compared.interval is not None
        mean, low, high = compared.interval[:3]
        parts.append(f"{measure} {mean:+.3f} [{low:+.3f}, {high:+.3f}] sd {compared.deviation:.2f}")
    print(f"{name}: {'; '.join(parts)}: {found.verdict}")
    return found.verdict


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--max_steps", type=int)
    parser.add_argument("--num_seeds", type=int, default=4)
    parser.add_argument("--num_rows", type=int, default=200)
    given = parser.parse_args()
    folder = given.folder
    folder.mkdir(parents=True, exist_ok=True)
    for name, questions in (("train", training_questions()), ("questions", held_out_questions())):
        records = [question.record() for question in questions]
        (folder / f"{name}.json").write_text(json.dumps(records), encoding="utf-8")
    if not (folder / "train").exists():
        paths = [str(folder / name) for name in ("train.json", "train.jsonl", "train")]
        assert glmtune(["convert", "--data_path", paths[0], "--save_path", paths[1]]) == 0
        rows = ["--jsonl_path", paths[1], "--save_path", paths[2], "--base", str(GLM_TINY)]
        assert glmtune(["tokenize", *rows]) == 0
    sides = [
        compared(folder, seed, given.max_steps, given.num_rows) for seed in range(given.num_seeds)
    ]
    for seed, pairs in enumerate(sides):
        tell(f"base, seed {seed}", pairs)
    found = []
    for one, other in itertools.permutations(range(given.num_seeds), 2):
        pairs = [
            replace(b, base=a.tuned, log_probs=(a.log_probs[1], b.log_probs[1]))
            for a, b in zip(sides[one], sides[other], strict=True)
        ]
        found.append(tell(f"seed {one}, seed {other}", pairs))
    shares = {word: found.count(word) for word in sorted(set(found))}
    print(f"{len(found)} ordered pairs over {given.num_rows} rows: {shares}")
    print(f"{np.mean([word == 'better' for word in found]):.1%} are called better")


if __name__ == "__main__":
    main()
