"""`glmtune tokenize` beside the published loops that it replaces, in one run: time, ids, labels.

    python benchmarks/row_by_row.py KIND RECORDS BASE SCRIPT PYTHON [--runs 5] [--num_proc 1]

| KIND | BASE, with the tokenizer code published in it | SCRIPT |
|---|---|---|
| original | ChatGLM-6B | tokenize_dataset_rows.py of mymusise/ChatGLM-Tuning |
| chatglm3 | ChatGLM3-6B | finetune_demo/finetune_hf.py of THUDM/ChatGLM3 |
| glm4 | GLM-4, with tokenizer.json and chat template | finetune/finetune.py of THUDM/GLM-4 |

RECORDS is a JSON list of alpaca records. `original` tokenises them as contexts and targets; for the
other two, each becomes a conversation of two questions and two answers. SCRIPT is run as it is: the
original's `read_jsonl` by `Dataset.from_generator` and `save_to_disk`, the demos' `DataManager` and
`process_batch` by `load_dataset` and `map`, whose number of processes their configuration sets.
PYTHON runs it, with the versions of transformers and datasets of its time.

Both sides run by turns, each in a process of its own. "work" is the time from the moment that
vocabulary and settings are loaded until the rows are on the disk; of ours with reading, checking,
counting and card, but not the histogram, which they lack. "command" is the whole process, imports
included. Of both, CPU time and time on the clock, and the most memory that one process held.
"encoder" is ours too: the library's own bulk encoding of all texts and nothing else, which says how
much could be gained at most.
"""

import argparse
import ast
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

LIMIT = 8192
SIDES = ("official", "ours", "encoder")
MARKS: list[tuple[float, float]] = []


def mark(*_: Any) -> None:
    """Take the time."""
    MARKS.append((sum(os.times()[:4]), time.perf_counter()))


def write_rows(records: str, path: str, kind: str) -> None:
    """Write the rows of a kind as JSON lines."""
    found = json.loads(Path(records).read_text(encoding="utf-8"))
    asked = [f"{r['instruction']}\n{r['input']}" if r["input"] else r["instruction"] for r in found]
    with open(path, "w", encoding="utf-8") as file:
        for place, record in enumerate(found):
            context = f"Instruction: {record['instruction']}\n"
            context += f"Input: {record['input']}\n" if record["input"] else ""
            row: dict[str, Any] = {"context": context + "Answer: ", "target": record["output"]}
            if kind != "original":
                turns = [
                    {"role": role, "content": text}
                    for i in (place - 1, place)
                    for role, text in [
                        ("user", asked[i]),
                        ("assistant", found[i]["output"].lstrip("\n") or "-"),
                    ]
                ]
                row = {"conversations" if kind == "chatglm3" else "messages": turns}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def run_original(script: str, path: str, base: str) -> list[str]:
    """The script of 2023, from the end of its loading on."""
    import datasets

    names: dict[str, Any] = {"__name__": "original"}
    exec(compile(Path(script).read_text(), script, "exec"), names)
    load = names["transformers"].AutoConfig.from_pretrained

    def load_and_mark(*given: Any, **more: Any) -> Any:
        config = load(*given, **more)  # what it loads last
        mark()
        return config

    names["transformers"].AutoConfig.from_pretrained = load_and_mark
    rows = datasets.Dataset.from_generator(lambda: names["read_jsonl"](path, LIMIT, base))
    rows.save_to_disk(f"{path}.official")
    mark()
    return [file["filename"] for file in rows.cache_files]


def run_demo(script: str, path: str, base: str, num_proc: int) -> list[str]:
    """The reading and the rows of an official fine-tuning demo, without its model."""
    import datasets
    import transformers

    wanted = {
        "DataConfig", "DataManager", "_load_datasets", "_resolve_path", "process_batch",
        "process_message",
    }  # fmt: skip
    tree = ast.parse(Path(script).read_text())
    tree.body = [
        node
        for node in tree.body
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name in wanted
    ]
    names: dict[str, Any] = {
        "torch": SimpleNamespace(cuda=SimpleNamespace(empty_cache=lambda: None))
    }
    header = (
        "import dataclasses as dc\nfrom pathlib import Path\nfrom typing import *\n"
        "from datasets import Dataset, DatasetDict, NamedSplit, Split, load_dataset\n"
        "PreTrainedTokenizer = object\n"
    )
    exec(header, names)
    exec(compile(tree, script, "exec"), names)
    tokenizer = transformers.AutoTokenizer.from_pretrained(base, trust_remote_code=True)
    given = {"tokenizer": tokenizer, "max_input_length": LIMIT, "max_output_length": LIMIT}
    if "process_message" in names:
        given["combine"] = False
    mark()
    config = names["DataConfig"](Path(path).name, num_proc=num_proc)
    rows = names["DataManager"](str(Path(path).parent), config).get_dataset(
        datasets.Split.TRAIN, functools.partial(names["process_batch"], **given)
    )
    mark()
    return [file["filename"] for file in rows.cache_files]


def run_ours(path: str, base: str) -> list[str]:
    """What `glmtune tokenize` does, but for the histogram."""
    from glmtune.imports import prepare_imports

    prepare_imports()  # as the command does
    from glmtune.config.settings import TokenizeSettings
    from glmtune.data import arrow_files, tokenizing  # noqa: F401
    from glmtune.models.base_files import load_row_tokenizer

    tokenizer = load_row_tokenizer(base)
    settings = TokenizeSettings(
        jsonl_path=path, save_path=f"{path}.rows", max_seq_length=LIMIT, keep_empty=True
    )
    tokenizing.plot_lengths = lambda *_, **__: None
    mark()
    tokenizing.tokenize(settings, tokenizer, "base")
    mark()
    return sorted(map(str, Path(f"{path}.rows").glob("*.arrow")))


def run_encoder(path: str, base: str) -> list[str]:
    """The bulk encoding of all texts of the rows, without what comes before and after."""
    from glmtune.imports import prepare_imports

    prepare_imports()
    from glmtune.models.base_files import load_row_tokenizer

    tokenizer = load_row_tokenizer(base)
    texts: list[str] = []
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        for value in json.loads(line).values():
            texts += [value] if isinstance(value, str) else [turn["content"] for turn in value]
    mark()
    tokenizer.encode_batch(texts)
    mark()
    return []


def measure(side: str, given: argparse.Namespace, path: str) -> dict[str, Any]:
    """Times and rows of one side, in a process of its own."""
    python = given.python if side == "official" else sys.executable
    line = [python, __file__, given.kind, path, given.base, given.script, given.python]
    line += ["--side", side, "--num_proc", str(given.num_proc)]
    with tempfile.TemporaryDirectory(dir=Path(path).parent) as folder:
        environment = os.environ | {"HF_HOME": folder, "HF_DATASETS_CACHE": f"{folder}/rows"}
        if side == "official":
            environment.pop("PYTHONPATH", None)
        start = time.perf_counter()
        child = subprocess.Popen(line, env=environment, stdout=-3, stderr=subprocess.PIPE)
        assert child.stderr is not None
        told = child.stderr.read().decode()
        _, status, used = os.wait4(child.pid, 0)
        seconds = time.perf_counter() - start
        child.returncode = os.waitstatus_to_exitcode(status)
        assert child.returncode == 0, told
        found = json.loads(Path(f"{path}.json").read_text())
        return {
            "work_cpu_s": found["cpu"],
            "work_clock_s": found["clock"],
            "command_cpu_s": used.ru_utime + used.ru_stime,
            "command_clock_s": seconds,
            "mb": used.ru_maxrss / 1e3,
            "rows": rows_of(found["files"]) if found["files"] else None,
        }


def rows_of(files: list[str]) -> dict[str, Any]:
    """The columns of a data set that both sides have."""
    import pyarrow as pa

    table = pa.concat_tables([pa.ipc.open_stream(file).read_all() for file in files])
    wide = {
        "input_ids": pa.list_(pa.int64()),
        "labels": pa.list_(pa.int64()),
        "seq_len": pa.int64(),
    }
    return {
        name: table[name].cast(kind).combine_chunks()
        for name, kind in wide.items()
        if name in table.column_names
    }


def main() -> None:
    """Measure both sides by turns, compare their rows, and print a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=["original", "chatglm3", "glm4"])
    for name in ("records", "base", "script", "python"):
        parser.add_argument(name)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--num_proc", type=int, default=1)
    parser.add_argument("--side", choices=SIDES)
    given = parser.parse_args()
    if given.side:
        path = given.records
        if given.side == "ours":
            files = run_ours(path, given.base)
        elif given.side == "encoder":
            files = run_encoder(path, given.base)
        elif given.kind == "original":
            files = run_original(given.script, path, given.base)
        else:
            files = run_demo(given.script, path, given.base, given.num_proc)
        cpu, clock = (after - before for before, after in zip(*MARKS, strict=True))
        Path(f"{path}.json").write_text(json.dumps({"cpu": cpu, "clock": clock, "files": files}))
        return
    import numpy as np

    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/rows.{'json' if given.kind == 'chatglm3' else 'jsonl'}"
        write_rows(given.records, path, given.kind)
        pairs = [{side: measure(side, given, path) for side in SIDES} for _ in range(given.runs)]
    official, ours = ([pair[side]["rows"] for pair in pairs] for side in ("official", "ours"))
    shared = sorted(official[0].keys() & ours[0].keys())
    differ = {
        place
        for name in shared
        for place, (theirs, mine) in enumerate(
            zip(official[0][name].to_pylist(), ours[0][name].to_pylist(), strict=True)
        )
        if theirs != mine
    }
    times = {
        side: {
            what: round(float(np.median([pair[side][what] for pair in pairs])), 2)
            for what in pairs[0][side]
            if what != "rows" and not (side == "encoder" and what[:4] != "work")
        }
        for side in SIDES
    }
    ratios = {
        what: round(float(np.median([p["official"][what] / p["ours"][what] for p in pairs])), 1)
        for what in times["ours"]
        if what != "mb"
    }
    print(
        json.dumps(
            {
                "kind": given.kind,
                "num_proc": given.num_proc,
                "rows": len(ours[0]["input_ids"]),
                "columns": shared,
                "rows_that_differ": len(differ),
                "first_that_differ": sorted(differ)[:5],
                "same_in_all_runs": all(rows == official[0] for rows in official)
                and all(rows == ours[0] for rows in ours),
                **times,
                "times_less": ratios,
            }
        )
    )


if __name__ == "__main__":
    main()
