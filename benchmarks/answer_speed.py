"""Answers as `evaluate` makes them beside the decoder alone on the same batches, in CPU time.

    python benchmarks/answer_speed.py [--base FOLDER] [--questions 400] [--batch 100] [--runs 5]

The decoder alone gives ids; `evaluate` and `compare` give texts, write a line for each question and
make the decoder first. By turns, medians; on a GPU, whose time is not the process's, time on the
clock.
"""

import argparse
import json
import statistics
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

import torch

from glmtune.config.settings import EvaluateSettings
from glmtune.demo.questions import held_out_questions
from glmtune.evaluation.answers import AnswerFile, ModelChoice
from glmtune.evaluation.asked import Asked
from glmtune.evaluation.sides import answer_sides
from glmtune.generation import Decoder
from glmtune.models.resolve import GLM_TINY


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", default=GLM_TINY)
    parser.add_argument("--questions", type=int, default=400)
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--runs", type=int, default=5)
    given = parser.parse_args()
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        asked_file = folder / "questions.json"
        records = [question.record() for question in held_out_questions(given.questions)]
        bare = [{"instruction": record["instruction"]} for record in records]
        asked_file.write_text(json.dumps(bare, ensure_ascii=False), encoding="utf-8")
        settings = EvaluateSettings(
            base=given.base, data_path=str(asked_file), limit=None, max_new_tokens=32,
            per_device_eval_batch_size=given.batch,
        )  # fmt: skip
        subject = ModelChoice.of(settings)
        model, tokenizer = subject.load()
        asked = Asked.of(settings, subject)
        prompts = asked.prompts(model, tokenizer, asked.records, settings.max_new_tokens)
        num_tokens: dict[str, int] = {}

        def alone() -> int:
            decoder, num = Decoder.of(model, settings, subject.device), 0
            for start in range(0, len(prompts), given.batch):
                for step in decoder.stream(prompts[start : start + given.batch], settings):
                    num += sum(map(len, step))
            return num

        def evaluated() -> int:
            file = AnswerFile(
                folder / "answers.jsonl", asked.records, {}, overwrite=True, elsewhere=""
            )
            sides = {"base": nullcontext}
            one = model, tokenizer, sides, file, asked.records, asked, settings, subject.device
            return int(answer_sides(*one, shows_progress=False)["tokens"])

        seconds: dict[str, list[float]] = {"decoder": [], "evaluate": []}
        for run in range(given.runs + 1):
            for side, work in (("decoder", alone), ("evaluate", evaluated)):
                start = clock()
                num_tokens[side] = work()
                if run:  # the first warms up
                    seconds[side].append(clock() - start)
    # Of those that `evaluate` counts, an answer's end is none.
    assert num_tokens["evaluate"] <= num_tokens["decoder"]
    assert num_tokens["decoder"] <= num_tokens["evaluate"] + given.questions
    num = num_tokens["decoder"]
    speeds = {side: num / statistics.median(of) for side, of in seconds.items()}
    for side, speed in speeds.items():
        print(f"{side:8} {speed:10,.0f} tokens/s of {num:,}")
    print(f"evaluate / decoder {speeds['evaluate'] / speeds['decoder']:.3f}")


if __name__ == "__main__":
    main()
