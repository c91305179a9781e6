"""The original's recipe at full size on one GPU, with random weights: no download.

    python benchmarks/recipe_6b.py --data DATA.json --vocab ice_text.model --out FOLDER

Writes a 6B checkpoint in the published layout (8 float16 .bin shards), then runs the project's own
commands on it: convert, tokenize, 50 steps of the original recipe, 10 more from the checkpoint, and
a few answers of base and tuned weights. Prints one JSON line with times, real tokens/s and peak
memory.
"""

import argparse
import json
import platform
import time
from pathlib import Path

import peft
import torch
import transformers

from glmtune.adapters import load_adapter
from glmtune.cli import main as glmtune
from glmtune.hardware import GIB
from glmtune.models.chatglm.configuration import ChatGLMConfig
from glmtune.models.chatglm.random_init import write_random_model
from glmtune.models.loading import load_base_model

STEPS, MORE_STEPS = 50, 10


def run(*arguments: str) -> float:
    """One command of the project; returns its seconds."""
    torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    status = glmtune(list(arguments))
    assert status == 0, f"{arguments[0]} ended with {status}"
    return time.perf_counter() - start


def peak_gib() -> float:
    """Peak allocated memory since the last command began."""
    return round(torch.cuda.max_memory_allocated() / GIB, 2)


def read_metrics(folder: Path) -> list[dict]:
    """The records of a run that hold a loss."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [record for record in map(json.loads, lines) if "loss" in record]


def main() -> None:
    """Run it all and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True, help="an alpaca file")
    parser.add_argument("--vocab", type=Path, required=True, help="ice_text.model of revision v1.1")
    parser.add_argument("--out", type=Path, required=True, help="folder for everything written")
    settings = parser.parse_args()
    folder = settings.out
    base, rows, output = folder / "chatglm-6b", folder / "rows", folder / "output"
    figures: dict = {
        "gpu": torch.cuda.get_device_name(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
    }

    start = time.perf_counter()
    write_random_model(base, ChatGLMConfig(), settings.vocab, device="cuda")
    torch.cuda.empty_cache()
    figures["write_checkpoint_s"] = round(time.perf_counter() - start, 1)

    jsonl = str(folder / "data.jsonl")
    model = ["--base", str(base)]
    figures["convert_s"] = run("convert", "--data_path", settings.data, "--save_path", jsonl)
    figures["tokenize_s"] = run(
        "tokenize", "--jsonl_path", jsonl, "--save_path", str(rows), "--max_seq_length", "200",
        "--skip_overlength", "true", *model,
    )  # fmt: skip
    recipe = [
        "train", "--dataset_path", str(rows), "--lora_rank", "8",
        "--per_device_train_batch_size", "6", "--gradient_accumulation_steps", "1",
        "--save_total_limit", "2", "--learning_rate", "1e-4", "--fp16", "false",
        "--remove_unused_columns", "false", "--output_dir", str(output),
        "--lr_scheduler_type", "constant", "--logging_steps", "10", "--save_steps", str(STEPS),
        "--report_to", "none", *model,
    ]  # fmt: skip
    figures["train_s"] = run(*recipe, "--max_steps", str(STEPS))
    figures["train_peak_gib"] = peak_gib()
    metrics = read_metrics(output)
    figures["loss"] = [round(record["loss"], 4) for record in metrics]
    speeds = sorted(record["tokens_per_second"] for record in metrics[2:])
    figures["real_tokens_per_second_median"] = round(speeds[len(speeds) // 2])
    more = ["--max_steps", str(STEPS + MORE_STEPS), "--resume_from_checkpoint", "true"]
    figures["resume_s"] = run(*recipe, *more)
    assert (output / f"checkpoint-{STEPS + MORE_STEPS}" / "adapter_model.safetensors").is_file()

    recompute = ["--output_dir", str(folder / "recompute"), "--gradient_checkpointing", "true"]
    run(*recipe, *recompute, "--max_steps", "20")
    figures["train_recompute_peak_gib"] = peak_gib()
    figures["compare_s"] = run(
        "compare", "--data_path", settings.data, "--adapter", str(output), "--limit", "6",
        "--max_new_tokens", "48", *model,
    )  # fmt: skip

    torch.cuda.empty_cache()
    start = time.perf_counter()
    tuned = load_adapter(load_base_model(str(base), device="cuda"), str(output))
    figures["load_base_and_adapter_s"] = round(time.perf_counter() - start, 1)
    figures["dtype"] = str(tuned.dtype)
    print(json.dumps({key: value if not isinstance(value, float) else round(value, 2)
                      for key, value in figures.items()}))  # fmt: skip


if __name__ == "__main__":
    main()
