"""`glmtune bench startup`: CPU time of each verb until its work begins, beside `import torch`.

User and system time of the process and its threads are counted, because wall time depends on what
else the machine does. Every round runs each case once, and one `import torch`.
"""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from glmtune.config.settings import BenchStartupSettings
from glmtune.data.jsonlines import append_json, check_appendable
from glmtune.errors import UserError
from glmtune.runlog import print_pairs

NUM_ROWS = 100
TINY = "--base glm-tiny"
MISTAKE, LIGHT, ROWS, MODEL = 0.35, 0.5, 1.0, 3.0
"""The targets, as multiples of `import torch`."""


class Case(NamedTuple):
    """A command line, and how to see that its work has begun."""

    name: str
    target: float
    arguments: str
    """Run in a folder with the files that `_prepare` writes."""
    until: str | None = None
    """Text of the output line at which the process is killed; None waits for its end."""
    says: str = ""
    """Its standard input."""
    rc: int = 0


INFER = (
    f"infer --data_path rows.json --output_path new.jsonl {TINY} --use_cpu true --max_new_tokens 1 "
    "--limit 1"
)
CHAT = f"chat {TINY} --use_cpu true --max_new_tokens 1"
TYPED = "你好\n/exit\n"
TRAIN = f"train --dataset_path tokens {TINY} --use_cpu true"
CASES = (
    Case("mistake: flag", MISTAKE, "train --lerning_rate 1", rc=2),
    Case("mistake: recipe", MISTAKE, "train bad.yaml", rc=2),
    Case("mistake: rows", MISTAKE, "tokenize --jsonl_path no --save_path new " + TINY, rc=2),
    Case("mistake: data set", MISTAKE, "train --dataset_path no --output_dir new " + TINY, rc=2),
    Case("mistake: base", MISTAKE, "chat --base ./no", rc=2),
    Case("mistake: records", MISTAKE, "infer --data_path no " + TINY, rc=2),
    Case("mistake: adapter", MISTAKE, "merge --adapter no --save_path new " + TINY, rc=2),
    Case("validate", LIGHT, "validate rows.json"),
    Case("convert", LIGHT, "convert --data_path rows.json --save_path again.jsonl"),
    Case("plan", LIGHT, "plan --use_cpu true " + TINY),
    Case("plan: rows", LIGHT, "plan --use_cpu true --dataset_path tokens " + TINY),
    Case("tokenize", ROWS, "tokenize --jsonl_path rows.jsonl --save_path again " + TINY),
    Case("infer: a token", MODEL, INFER, until="record 1"),
    Case("infer: a token, adapter", MODEL, f"{INFER} --adapter adapter", until="record 1"),
    Case("chat: a token", MODEL, CHAT, until=">", says=TYPED),
    Case("chat: a token, adapter", MODEL, f"{CHAT} --adapter adapter", until=">", says=TYPED),
    Case(
        "train: a step",
        MODEL,
        f"{TRAIN} --output_dir new --logging_steps 1 --max_steps 9",
        until="step 1/",
    ),
)


@dataclass(frozen=True)
class Startup:
    """The result of one case."""

    cpu_seconds: float
    """The median of the rounds."""
    multiple: float
    """The median ratio of its time to that of `import torch` in the same round."""
    target: float


def bench_startup(settings: BenchStartupSettings) -> dict[str, Any]:
    """Measure and print; return the record, and append it to `json_path`.

    Raises:
        UserError: a JSON file that cannot be written, or a command that fails.
    """
    check_appendable(settings.json_path)
    rounds: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory(prefix="glmtune-") as place:
        _prepare(Path(place))
        for number in range(settings.repeats):
            print(f"round {number + 1} of {settings.repeats}", flush=True)
            torch = _cpu_seconds([sys.executable, "-c", "import torch"], Path(place), 0)
            rounds.append({"torch": torch} | {c.name: _measure(c, Path(place)) for c in CASES})
    found = {
        case.name: Startup(
            median(times[case.name] for times in rounds),
            median(times[case.name] / times["torch"] for times in rounds),
            case.target,
        )
        for case in CASES
    }
    record = _surroundings() | {
        "repeats": settings.repeats,
        "torch_cpu_seconds": median(times["torch"] for times in rounds),
        "startup": {name: asdict(startup) for name, startup in found.items()},
    }
    pairs = {name: _words(startup) for name, startup in found.items()}
    torch_words = f"`import torch`, {record['torch_cpu_seconds']:.2f} s"
    print_pairs(f"CPU time of a process, beside {torch_words}, on {record['device']}", pairs)
    if settings.json_path:
        append_json(record, settings.json_path)
    return record


def _prepare(place: Path) -> None:
    """Write what the cases take: records, rows, token rows, an adapter and an invalid recipe."""
    sentences = [{"instruction": f"Say {i}.", "output": f"It is {i}."} for i in range(NUM_ROWS)]
    (place / "rows.json").write_text(json.dumps(sentences), encoding="utf-8")
    (place / "bad.yaml").write_text("max_steps: [", encoding="utf-8")
    for line in (
        "convert --data_path rows.json --save_path rows.jsonl",
        f"tokenize --jsonl_path rows.jsonl --save_path tokens {TINY}",
        f"{TRAIN} --output_dir adapter --max_steps 1",
    ):
        _measure(Case("prepare", 0, line), place)


def _measure(case: Case, place: Path) -> float:
    command = [sys.executable, "-m", "glmtune", *case.arguments.split()]
    with tempfile.TemporaryDirectory(dir=place) as folder:  # each run starts in a new folder
        for name in ("rows.json", "rows.jsonl", "tokens", "adapter", "bad.yaml"):
            if (place / name).exists():
                os.symlink(place / name, Path(folder, name))
        where = place if case.name == "prepare" else Path(folder)
        return _cpu_seconds(command, where, case.rc, case.until, case.says)


def _cpu_seconds(
    command: list[str], place: Path, rc: int, until: str | None = None, says: str = ""
) -> float:
    """User and system time of a process, to its end or to a line of its output.

    Raises:
        UserError: it does not end with `rc`, or has no such line.
    """
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    with tempfile.TemporaryFile() as typed:
        typed.write(says.encode())
        typed.seek(0)
        process = subprocess.Popen(
            command,
            cwd=place,
            env=environment,
            stdin=typed,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
        )
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if until is not None and until in line:
            process.kill()
            break
    process.stdout.close()
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    ended = any(until in line for line in lines) if until else process.returncode == rc
    if not ended:
        last = (lines or ["no output"])[-1].strip()
        raise UserError(f"{' '.join(command)}: does not reach its work ({last})")
    return used.ru_utime + used.ru_stime


def _surroundings() -> dict[str, Any]:
    import torch

    from glmtune.bench.timing import machine

    return machine(torch.device("cpu")) | {"cores": os.cpu_count()}


def _words(startup: Startup) -> str:
    met = "met" if startup.multiple <= startup.target else "MISSED"
    return (
        f"{startup.cpu_seconds:6.2f} s {startup.multiple:6.2f} x "
        f"(target {startup.target:g} x: {met})"
    )
