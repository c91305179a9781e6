"""What a row costs a run before its first step: bytes on disk and in memory, and seconds.

Each part of it is run on rows as long as Chinese alpaca rows, and a billion is extrapolated. Memory
is what numpy and Python allocate; what Arrow does, which holds the rows of the files, is left out.
With more than 200,000 rows, as by default, near-equal rows are looked for as among a billion.

    OMP_NUM_THREADS=1 python benchmarks/billion_rows.py FOLDER
"""

import argparse
import json
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from glmtune.bench.rows import random_rows
from glmtune.bench.timing import machine
from glmtune.data.dataset import load_dataset
from glmtune.data.packing import plan_packs
from glmtune.data.split import group_rows, split_rows
from glmtune.data.token_rows import TokenRows
from glmtune.models.base_files import read_settings
from glmtune.models.families import family_of
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


def costs(num_rows: int, folder: Path) -> dict[str, dict[str, float]]:
    """What each part costs for so many rows."""
    import datasets

    config = read_settings(GLM_TINY)
    rows = random_rows(config, num_rows)
    columns = {
        "input_ids": [rows[row].astype(np.int32) for row in range(num_rows)],
        "seq_len": rows.prompt_lengths_R.astype(np.int32),
    }
    features = datasets.Features(
        input_ids=datasets.Sequence(datasets.Value("int32")), seq_len=datasets.Value("int32")
    )
    path = folder / str(num_rows)
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(str(path))
    del rows, columns
    size = sum(file.stat().st_size for file in path.glob("*.arrow"))
    found = {"rows on disk": {"kept": float(size)}}
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
    given = parser.parse_args()
    given.folder.mkdir(parents=True)
    print(json.dumps(machine(torch.device("cpu")) | {"rows": given.rows}))
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
