"""Rows and commands of the tests of `engine ray`: what an engine writes and says."""

import json
import random
from pathlib import Path

from glmtune.cli import main


def records(num=3000):
    draw = random.Random(0)
    for number in range(num):
        yield {
            "instruction": f"问题 {number}: " + "说" * draw.randrange(20),
            "input": "" if number % 3 else "}, {\"instruction\": 1}, {" * draw.randrange(3),
            "output": "" if number % 97 == 5 else "答案 <eop> " * draw.randrange(1, 12),
        }  # fmt: skip


def dumps(row):
    return json.dumps(row, ensure_ascii=False)


def written(folder):
    return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


def tokens_of(capsys, folder, *flags):
    command = ["tokenize", "--save_path", folder, "--base", "glm-tiny", *flags]
    code = main(command)
    told = capsys.readouterr()
    lines = [line for line in told.err.splitlines() if line.startswith(("error", "note"))]
    return code, told.out.replace(folder, "FOLDER"), lines, written(folder) if not code else None


def report(*arguments):
    code = main(["validate", *arguments, "--json_path", "report.json"])
    told = json.loads(Path("report.json").read_text(encoding="utf-8"))
    return code, told["problems"], told["files"], told["counts"]
