"""Measure the demonstration's effect: exact match on the held-out questions, base and tuned.

    python tools/measure_demo.py --model src/glmtune/models/glm-tiny --out build/measure --seeds 5

Everything goes through the package's own verbs, as in the demonstration: records, `convert`,
`tokenize`, `train` once a seed with the demonstration's recipe, answers. Further flags are settings
of `glmtune train` in the place of the recipe's, say `--learning_rate 1e-3`. Writes measure.json;
exit 1 when a score falls short.
"""

import argparse
import json
import sys
import time
from pathlib import Path

from glmtune.adapters import load_adapter
from glmtune.config.reading import read_config
from glmtune.config.settings import ConvertSettings, TokenizeSettings, TrainSettings
from glmtune.data.convert import convert
from glmtune.data.templates import alpaca
from glmtune.data.tokenizing import tokenize
from glmtune.demo.questions import Asked, held_out_questions, num_right, training_questions
from glmtune.demo.recipe import RECIPE
from glmtune.demo.world import LANGUAGES
from glmtune.generation import GenerationSettings, Prompt, generate_answers
from glmtune.models.loading import load_base_model, load_tokenizer
from glmtune.models.resolve import base_name
from glmtune.training.loop import train

MOST_FOR_BASE, LEAST_FOR_TUNED = 0.10, 0.90
MAX_NEW_TOKENS = 16


def main() -> int:
    """Read the flags, measure the base, then train and measure seed by seed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--seeds", type=int, default=5)
    flags, rest = parser.parse_known_args()
    given = {
        name.removeprefix("--"): value for name, value in zip(rest[::2], rest[1::2], strict=True)
    }
    settings = {name: str(value) for name, value in RECIPE.items()} | given
    data = _prepare(flags.model, flags.out)
    scores = {"base": _measure(flags.model, None)}
    print(f"base: {scores['base']}", flush=True)
    for seed in range(flags.seeds):
        run = flags.out / f"seed-{seed}"
        fixed = {"base": flags.model, "dataset_path": str(data), "output_dir": str(run)}
        config = read_config(TrainSettings, None, fixed | settings | {"seed": str(seed)})
        started = time.monotonic()
        train(config)
        seconds = round(time.monotonic() - started, 1)
        scores[f"seed {seed}"] = _measure(flags.model, run) | {"seconds": seconds}
        print(f"seed {seed}: {scores[f'seed {seed}']}", flush=True)
    text = json.dumps(scores, indent=1, ensure_ascii=False)
    (flags.out / "measure.json").write_text(text + "\n", encoding="utf-8")
    base, *tuned = scores.values()
    good = all(base[name] <= MOST_FOR_BASE for name in LANGUAGES) and all(
        score[name] >= LEAST_FOR_TUNED for score in tuned for name in LANGUAGES
    )
    print("as it should be" if good else "SHORT of what is asked")
    return 0 if good else 1


def _prepare(model: str, out: Path) -> Path:
    """Write the training records and turn them into token rows; returns the data folder."""
    out.mkdir(parents=True, exist_ok=True)
    records, rows, data = out / "train.json", out / "train.jsonl", out / "train"
    text = json.dumps([q.record() for q in training_questions()], ensure_ascii=False, indent=1)
    records.write_text(text, encoding="utf-8")
    convert(ConvertSettings(data_path=str(records), save_path=str(rows)))
    config = TokenizeSettings(jsonl_path=str(rows), save_path=str(data))
    tokenize(config, load_tokenizer(model), base_name(model))
    return data


def _measure(base: str, run: Path | None) -> dict[str, float | dict[str, str]]:
    """Share of right answers by language, and the kinds of question with wrong ones."""
    questions = held_out_questions()
    model = load_base_model(base)
    answers = _answers(model if run is None else load_adapter(model, run), base, questions)
    count = num_right(questions, answers)
    score: dict[str, float | dict[str, str]] = {
        name: round(count[name][0] / count[name][1], 4) for name in LANGUAGES
    }
    wrong = {
        name: f"{right}/{asked}"
        for name, (right, asked) in sorted(count.items())
        if name not in LANGUAGES and right < asked
    }
    return score if run is None else score | {"kinds with errors": wrong}


def _answers(model, base: str, questions: list[Asked]) -> list[str]:
    prompts = [Prompt(alpaca(q.instruction, q.input)) for q in questions]
    settings = GenerationSettings(max_new_tokens=MAX_NEW_TOKENS)
    written = generate_answers(model, load_tokenizer(base), prompts, settings, batch_size=50)
    return [answer.text for answer in written]


if __name__ == "__main__":
    sys.exit(main())
