"""`glmtune tokenize` beside the loops that it replaces, one row after the other: time, and ids.

    pip install --target old --no-deps transformers==4.38.2 tokenizers==0.15.2 \
        huggingface_hub==0.25.2
    python benchmarks/row_by_row.py alpaca_data_zh.json BASE CODE --old old [--talks] [--runs 3]

BASE is a folder with a vocabulary, CODE one with the published `tokenization_chatglm.py` of that
model. Without --talks, BASE is ChatGLM-6B, and the loop is that of the original's
tokenize_dataset_rows.py. With it, BASE is ChatGLM3-6B, rows are conversations of two questions and
two answers, and the loop is that of the official fine-tuning: a message after the other. Both sides
run by turns, each in a process of its own: theirs is timed without its imports, ours is the whole
call, with reading, writing and card, but for the histogram, which they lack. Of both, CPU time and
time on the clock.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa

LIMIT = 4096


def write_rows(source: str, path: str, talks: bool) -> None:
    """Write the records as lines of context and target, or two of them as a conversation."""
    records = json.loads(Path(source).read_text(encoding="utf-8"))
    asked = [
        f"{r['instruction']}\n{r['input']}" if r["input"] else r["instruction"] for r in records
    ]
    with open(path, "w", encoding="utf-8") as file:
        for place, record in enumerate(records):
            earlier = (place - 1) % len(records)
            messages = [
                {"role": "user", "content": asked[earlier]},
                {"role": "assistant", "content": records[earlier]["output"] or "-"},
                {"role": "user", "content": asked[place]},
                {"role": "assistant", "content": record["output"] or "-"},
            ]
            context = f"Instruction: {record['instruction']}\n"
            context += f"Input: {record['input']}\n" if record["input"] else ""
            row = {"context": context + "Answer: ", "target": record["output"]}
            row = {"messages": messages} if talks else row
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def loop(path: str, base: str, code: str, talks: bool) -> list[list[int]]:
    """Encode row after row with the published tokenizer."""
    sys.path.insert(0, str(Path(code).resolve()))
    from tokenization_chatglm import ChatGLMTokenizer

    names = ("ice_text.model", "tokenizer.model")
    vocabulary = next(str(Path(base, name)) for name in names if Path(base, name).is_file())
    sizes = {} if talks else {"num_image_tokens": 0}
    tokenizer = ChatGLMTokenizer(vocabulary, **sizes)
    encoded = []
    mark()
    with open(path, encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            if talks:
                ids = tokenizer.get_prefix_tokens()
                for message in row["messages"]:
                    ids = ids + tokenizer.build_single_message(
                        message["role"], "", message["content"]
                    )
                ids.append(tokenizer.eos_token_id)
            else:
                ids = tokenizer.encode(row["context"], max_length=LIMIT, truncation=True)
                ids = ids + tokenizer.encode(
                    row["target"], max_length=LIMIT, truncation=True, add_special_tokens=False
                )
                ids = [*ids, tokenizer.eos_token_id]
            encoded.append(ids)
    table = pa.table({"input_ids": pa.array(encoded, pa.list_(pa.int32()))})
    with pa.ipc.new_stream(f"{path}.loop.arrow", table.schema) as stream:
        stream.write_table(table)
    mark()
    return encoded


def ours(path: str, base: str) -> list[list[int]]:
    """What glmtune tokenize does after its imports."""

    from glmtune.config.settings import TokenizeSettings
    from glmtune.data import tokenizing
    from glmtune.models.base_files import load_row_tokenizer

    tokenizer = load_row_tokenizer(base)
    settings = TokenizeSettings(
        jsonl_path=path, save_path=f"{path}.rows", max_seq_length=LIMIT, keep_empty=True
    )
    tokenizing.plot_lengths = lambda *_, **__: None
    mark()
    tokenizing.tokenize(settings, tokenizer, "base")
    mark()
    files = sorted(Path(f"{path}.rows").glob("*.arrow"))
    return [ids for f in files for ids in pa.ipc.open_stream(f).read_all()["input_ids"].to_pylist()]


MARKS: list[tuple[float, float]] = []


def mark() -> None:
    """Take the time."""
    MARKS.append((time.process_time(), time.perf_counter()))


def measure(side: str, given: argparse.Namespace, path: str) -> tuple[float, float, np.ndarray]:
    """CPU time, time on the clock and ids of one side, in a process of its own."""
    line = [sys.executable, __file__, path, given.base, given.code, "--side", side]
    line += ["--talks"] if given.talks else []
    environment = os.environ | ({"PYTHONPATH": given.old} if side == "loop" else {})
    subprocess.run(line, env=environment, check=True, stdout=subprocess.DEVNULL)
    found = np.load(f"{path}.npz")
    return float(found["seconds"][0]), float(found["seconds"][1]), found["ids"]


def main() -> None:
    """Measure both sides by turns, compare the ids, and print a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source")
    parser.add_argument("base")
    parser.add_argument("code")
    parser.add_argument("--old")
    parser.add_argument("--talks", action="store_true")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--side", choices=["loop", "ours"])
    given = parser.parse_args()
    if given.side:
        path = given.source
        rows = (
            ours(path, given.base)
            if given.side == "ours"
            else loop(path, given.base, given.code, given.talks)
        )
        seconds = np.subtract(MARKS[1], MARKS[0])
        np.savez(f"{path}.npz", seconds=seconds, ids=np.concatenate([*rows, [len(rows)]]))
        return
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/rows.jsonl"
        write_rows(given.source, path, given.talks)
        runs = [
            (measure("loop", given, path), measure("ours", given, path)) for _ in range(given.runs)
        ]
    times = np.array([[side[:2] for side in run] for run in runs])  # run, side, CPU or clock
    loop_cpu, loop_clock, our_cpu, our_clock = np.median(times, axis=0).ravel().round(2).tolist()
    ratios = np.median(times[:, 0] / times[:, 1], axis=0).round(1).tolist()
    print(
        json.dumps(
            {
                "rows": "talks" if given.talks else "alpaca",
                "same_ids": all(np.array_equal(a[2], b[2]) for a, b in runs),
                "loop": {"cpu_s": loop_cpu, "clock_s": loop_clock},
                "glmtune": {"cpu_s": our_cpu, "clock_s": our_clock},
                "times_less": {"cpu": ratios[0], "clock": ratios[1]},
            }
        )
    )


if __name__ == "__main__":
    main()
