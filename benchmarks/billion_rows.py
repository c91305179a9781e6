"""What a row costs a run before its first step: bytes on disk and in memory, and seconds.

Each part of it is run on rows as long as Chinese alpaca rows, and a billion is extrapolated. Memory
is what numpy and Python allocate; `--whole true` runs the parts one after another, as a run does,
and shows what the process holds beside what it has mapped of the files.
With more than 200,000 rows, as by default, near-equal rows are looked for as among a billion.

    OMP_NUM_THREADS=1 python benchmarks/billion_rows.py FOLDER
    OMP_NUM_THREADS=1 python benchmarks/billion_rows.py FOLDER --rows 3000000 --whole true
"""

import argparse
import json
import multiprocessing
import threading
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import torch

from glmtune.bench.rows import random_rows
from glmtune.bench.timing import machine
from glmtune.data.arrow_files import file_name, read_dataset, write_file, write_lists
from glmtune.data.dataset import load_dataset
from glmtune.data.files import read_json_object
from glmtune.data.packing import plan_packs
from glmtune.data.split import group_rows, split_rows
from glmtune.data.token_rows import TokenRows
from glmtune.models.base_files import read_settings
from glmtune.models.families import family_of
from glmtune.models.loading import load_tokenizer
from glmtune.models.resolve import GLM_TINY
from glmtune.training.plan import epoch_order

PACK_LENGTH = 8192


def cost_of(task: Callable[[], Any]) -> tuple[dict[str, float], Any]:
    """CPU seconds of a task, its highest memory, and what of that is kept afterwards."""
    started = time.process_time()
    task()
    seconds = time.process_time() - started  # tracemalloc would slow it down
    tracemalloc.start()
    result = task()
    kept, highest = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return {"seconds": seconds, "kept": kept, "highest": highest}, result


def texts_of(rows: list[list[int]]) -> list[str]:
    """In place of a tokenizer's texts: as long as a Chinese row's, and all different."""
    return ["".join(chr(0x4E00 + i) for i in row) for row in rows]


def write_rows(path: Path, num_rows: int) -> int:
    """A data set of so many rows; returns its bytes."""
    rows = random_rows(read_settings(GLM_TINY), num_rows)
    ids, starts, prompts = (
        pa.array(numbers.astype(np.int32))
        for numbers in (rows.ids_T, rows.starts_R1, rows.prompt_lengths_R)
    )
    table = pa.table({"input_ids": pa.ListArray.from_arrays(starts, ids), "seq_len": prompts})
    path.mkdir()
    name = file_name(0, 1)
    write_lists(table.schema, path, [name], [write_file(table, path / name)])
    return (path / name).stat().st_size


def whole(num_rows: int, folder: Path) -> None:
    """Print what a process holds after each part, and at most in it."""
    path = folder / str(num_rows)
    writer = multiprocessing.get_context("spawn").Process(target=write_rows, args=(path, num_rows))
    writer.start()
    writer.join()
    process, highest, is_over = psutil.Process(), [0.0], threading.Event()

    def held() -> float:
        memory = process.memory_info()
        return (memory.rss - memory.shared) / num_rows

    def watch() -> None:
        while not is_over.wait(0.005):
            highest[0] = max(highest[0], held())

    config = read_settings(GLM_TINY)
    rule, tokenizer = family_of(config).row_rule(config), load_tokenizer(GLM_TINY)
    tokenizer.decode_batch([[5, 6]])
    before, started = held(), time.process_time()
    threading.Thread(target=watch).start()

    def tell(part: str) -> None:
        time.sleep(0.02)
        print(
            f"{part:20}{held() - before:8.1f} B a row, {highest[0] - before:8.1f} at most, "
            f"{1e6 * (time.process_time() - started) / num_rows:6.2f} us in all"
        )
        highest[0] = 0.0

    rows = TokenRows.from_table(read_dataset(path, read_json_object(path / "state.json")), rule)
    tell("open")
    rows.check_taught("rows")
    tell("supervised tokens")
    rows.check(config.vocab_size, "rows")
    tell("check of the ids")
    rows.digest()
    tell("digest")
    rows = replace(rows, groups_R=group_rows(rows, tokenizer.decode_batch))
    tell("near-equal rows")
    train, _ = rows.split(0.01, 0)
    tell("rows held out")
    ordered = train[epoch_order(len(train), 0, 0)]
    packs = plan_packs(rows.lengths_R, ordered, PACK_LENGTH)
    tell(f"{len(packs)} packs")
    is_over.set()


def costs(num_rows: int, folder: Path) -> dict[str, dict[str, float]]:
    """What each part costs for so many rows."""
    path, config = folder / str(num_rows), read_settings(GLM_TINY)
    found = {"rows on disk": {"kept": float(write_rows(path, num_rows))}}
    rule = family_of(config).row_rule(config)
    found["open"], rows = cost_of(
        lambda: TokenRows.from_table(load_dataset(str(path), rule)[0], rule)
    )
    found["supervised tokens"], _ = cost_of(
        lambda: TokenRows.from_table(load_dataset(str(path), rule)[0], rule).num_labels_R
    )
    found["check of the ids"], _ = cost_of(lambda: rows.check(config.vocab_size, "rows"))
    found["digest"], _ = cost_of(rows.digest)
    found["near-equal rows"], _ = cost_of(lambda: group_rows(rows, texts_of))
    found["rows held out"], _ = cost_of(lambda: split_rows(num_rows, 0.01, 0))
    lengths_R = rows.lengths_R

    def order() -> np.ndarray:
        epoch_order.cache_clear()
        return np.arange(num_rows)[epoch_order(num_rows, 0, 0)]

    found["order of an epoch"], ordered = cost_of(order)
    found["packs of an epoch"], packs = cost_of(lambda: plan_packs(lengths_R, ordered, PACK_LENGTH))
    return found | {
        "packs": {"kept": float(len(packs))},
        "tokens": {"kept": float(lengths_R.sum())},
    }


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, default=300_000)
    parser.add_argument("--whole", choices=["true", "false"], default="false")
    given = parser.parse_args()
    given.folder.mkdir(parents=True)
    print(json.dumps(machine(torch.device("cpu")) | {"rows": given.rows}))
    if given.whole == "true":
        whole(given.rows, given.folder)
        return
    print(f"{'part':20}{'kept B/row':>12}{'highest B/row':>15}{'us/row':>9}   a billion rows")
    for part, found in costs(given.rows, given.folder).items():
        kept, highest, seconds = (
            found.get(name, 0) / given.rows for name in ("kept", "highest", "seconds")
        )
        print(
            f"{part:20}{kept:12.3f}{highest:15.1f}{1e6 * seconds:9.2f}   {kept:,.1f} G kept, "
            f"{highest:,.0f} G at the highest, {1e9 * seconds / 3600:,.2f} hours"
        )


if __name__ == "__main__":
    main()
