"""Damaged files of rows: whatever they contain, no row is lost, and errors are one line.

Files of our own rows are damaged at random and read in windows of many sizes. What must hold is
known without reading them: a row that was left alone is read, one that json reads has json's value,
and the report counts as many rows as the file has. For a long run, by name:
GLMTUNE_FUZZ_SECONDS=600 python -m pytest -m slow tests/unit/test_fuzz_rows.py
"""

import json
import os
import random
import time
from contextlib import suppress

import pytest

from glmtune.config.settings import ValidateSettings
from glmtune.data import containers, windows
from glmtune.data.flaws import Flaw
from glmtune.data.records import read_alpaca, read_rows
from glmtune.data.validation import validate
from glmtune.errors import UserError

TEXTS = [
    "",
    "好",
    "What is 1 + 1?",
    "{}",
    '},{"',
    "},\n{",
    "a\\",
    '"quoted"',
    "\n\n",
    "é\u2028",
    "[]",
    "😀",
]
MARKS = [
    "{",
    "}",
    "[",
    "]",
    ",",
    ":",
    '"',
    "\\",
    "\n",
    "\r",
    "\t",
    "0",
    "-1",
    "1e999",
    "NaN",
    "tru",
]
PIECES = [
    *[mark.encode() for mark in MARKS],
    *[b"\\u", b"\\ud800", b"\\u0000", b"},{", b"}\n{", b"[" * 1500, b'{"a":' * 1500, b"9" * 5000],
    *[
        b"\0",
        b"\x1b",
        b"\xff",
        b"\xc3",
        b"\xed\xa0\x80",
        b"\xef\xbb\xbf",
        "}，{".encode(),
        b" " * 99,
    ],
    *["中文".encode("gbk"), "中文".encode("utf-16"), b'"input": 7, ', b'"output": "again", ', b"<"],
]
NO_JSON = object()
BLANK = b" \t\r\n"
WINDOWS = (16, 100, 1000, 1 << 16)
LAYOUTS = ("lines", "crlf", "list", "pretty", "ascii")


def some_rows(rng: random.Random) -> list[dict]:
    names = rng.choice(
        [("instruction", "input", "output"), ("context", "target"), ("prompt", "response")]
    )
    rows = [{name: rng.choice(TEXTS) * rng.choice([1, 1, 9]) for name in names} for _ in range(9)]
    for number, row in enumerate(rows):
        row[names[0]] += f" {number}"
        if rng.random() < 0.1:
            row[rng.choice(names)] = rng.choice([7, None, True, ["x"], {"a": "b"}])
        if rng.random() < 0.1:
            extra = rng.choice(["extra", "extra", "history", "system", "context", "prompt"])
            row[extra] = rng.choice([None, 1.5, "x", {"a": [{"b": "c"}, {"d": 1}]}, [["q", "a"]]])
    return rows


def written(rows: list[dict], layout: str) -> list[bytes]:
    """The rows and what stands around them: text at even places, rows at odd ones."""
    dump = {"ensure_ascii": layout == "ascii", "indent": 1 if layout == "pretty" else None}
    texts = [json.dumps(row, **dump).encode() for row in rows]
    start, between, end = {
        "lines": (b"", b"\n", b"\n"),
        "crlf": (b"", b"\r\n", b"\r\n"),
        "list": (b"[", b", ", b"]"),
        "pretty": (b"[\n", b",\n", b"\n]\n"),
        "ascii": (b"[", b",\n  ", b"]"),
    }[layout]
    parts = [start]
    for text in texts:
        parts += [text, between]
    return [*parts[:-1], end]


def damaged(rng: random.Random, parts: list[bytes]) -> tuple[bytes, set[int]]:
    """Damage a file at one to three places; also return the rows that have none near them."""
    parts, spoilt = list(parts), set()
    for _ in range(rng.randint(1, 3)):
        place = rng.randrange(len(parts))
        part, at = parts[place], rng.randint(0, len(parts[place]))
        piece = rng.choice([*PIECES, b"", rng.randbytes(rng.randint(1, 9))])
        parts[place] = part[:at] + piece + part[at + rng.choice([0, 0, 1, 1, 5, 60]) :]
        spoilt |= {place - 1, place, place + 1}
    return b"".join(parts), set(range(1, len(parts), 2)) - spoilt


def read(path: str) -> tuple[list[tuple], list[tuple], str]:
    """Rows as (line, JSON or flaw), what is wrong between them, and what with the file."""
    rows, between = [], []
    try:
        for batch in containers.read_batches(path):
            rows += zip(batch.lines, map(plain, batch.values), strict=True)
            between += [(line, str(fault)) for _, line, fault in batch.between]
    except UserError as error:
        return rows, between, str(error)
    return rows, between, ""


def plain(value: object) -> str:
    return f"flaw: {value}" if isinstance(value, Flaw) else json.dumps(value)


def by_json(text: bytes, as_list: bool = False) -> object:
    """The value that json gives, or NO_JSON: no UTF-8, a field twice, or nested too deeply."""

    def once(pairs):
        if len(dict(pairs)) < len(pairs):
            raise ValueError
        return dict(pairs)

    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=once)
        rows = value if isinstance(value, list) and as_list else [value]
        return NO_JSON if any(depth(row) > windows.MAX_DEPTH for row in rows) else value
    except (ValueError, RecursionError):
        return NO_JSON


def depth(value: object) -> int:
    """How many lists and objects lie in each other."""
    level, found = [value], 0
    while level := [one for one in level if isinstance(one, (dict, list))]:
        found += 1
        level = [i for one in level for i in (one.values() if isinstance(one, dict) else one)]
    return found


def examine(rng: random.Random, folder, monkeypatch) -> None:
    """Damage one file and check the readers and the validator against what is known of it."""
    layout, rows = rng.choice(LAYOUTS), some_rows(rng)
    content, untouched = damaged(rng, parts := written(rows, layout))
    path, held_out, report = (str(folder / name) for name in ("a.json", "b.json", "report.json"))
    with open(held_out, "wb") as file:
        file.write(b"".join(parts))
    with open(path, "wb") as file:
        file.write(content)
    results = []
    for window in WINDOWS:
        monkeypatch.setattr(windows, "WINDOW_BYTES", window)
        results.append(read(path))
    found, between, complaint = results[-1]
    assert all(result == results[-1] for result in results), results
    assert "\n" not in complaint

    is_refused = complaint and ": JSON, but " not in complaint
    content = content.removeprefix(b"\xef\xbb\xbf")
    values = [value for _, value in found]
    if not is_refused:
        is_list = content.lstrip(BLANK).startswith(b"[")
        for place in untouched if is_list == (layout not in ("lines", "crlf")) else ():
            row = plain(json.loads(parts[place]))
            assert row in values, (row, found, between)
        if is_list:
            rows_by_json = by_json(content, as_list=True)
            if isinstance(rows_by_json, list) and "a [ stands" not in str(between):
                assert values == list(map(plain, rows_by_json))
                assert not between
            else:
                assert between or any(value.startswith("flaw: ") for value in values)
        else:
            lines = [line for line in content.split(b"\n") if line.strip(BLANK)]
            assert len(found) == len(lines)
            for (number, value), line in zip(found, lines, strict=True):
                assert content.split(b"\n")[number - 1] == line
                # Of a line taken out of a list.
                expected = by_json(line.rstrip(BLANK).removesuffix(b","))
                assert (
                    value.startswith("flaw: ") if expected is NO_JSON else value == plain(expected)
                )

    config = ValidateSettings(files=(path,), held_out=held_out, json_path=report)
    told_last = ""
    try:
        validate(config)
    except UserError as error:
        told_last = str(error)
    assert "\n" not in told_last
    with open(report, encoding="utf-8") as file:
        told = json.load(file)
    # In short windows the same is found.
    monkeypatch.setattr(windows, "WINDOW_BYTES", rng.choice([30, 100, 300]))
    with suppress(UserError):
        validate(config)
    monkeypatch.undo()
    with open(report, encoding="utf-8") as file:
        told_of_windows = json.load(file)
    assert sorted(map(json.dumps, told_of_windows["problems"])) == sorted(
        map(json.dumps, told["problems"])
    )
    assert told_of_windows["files"] == told["files"]
    checked = told["files"][0]
    problems = [p for p in told["problems"] if p["file"] == path]
    unusable = {p["row"] for p in problems if p["unusable"] and p["row"]}
    assert checked["rows"] == len(found)
    assert checked["unusable_rows"] == len(unusable)
    assert bool(is_refused) <= any(p["kind"] == "file" for p in problems)

    for read_strictly in (read_alpaca, read_rows):
        good, bad, refusal = [], [], ""
        try:
            good, bad = read_strictly(path, "skip")
        except UserError as error:
            refusal = str(error)
        assert "\n" not in refusal
        refusal.encode()  # it can be printed
        assert refusal or len(good) + len(bad) == len(found)
        assert refusal or not between
        if read_strictly is (read_alpaca if checked["format"] == "alpaca" else read_rows):
            # `tokenize` makes a conversation of a record with a system text, `convert` refuses it.
            spoken = {row.row for row in bad if 'field "system" is' in row.reason}
            assert refusal or {row.row for row in bad} - spoken == unusable - spoken


def test_damaged_files(tmp_path, monkeypatch, capsys):
    rng = random.Random(6)
    for _ in range(150):
        examine(rng, tmp_path, monkeypatch)


@pytest.mark.slow
def test_damaged_files_for_long(tmp_path, monkeypatch, capsys):
    seconds = float(os.environ.get("GLMTUNE_FUZZ_SECONDS", "60"))
    seed, slowest, start = random.randrange(2**32), 0.0, time.monotonic()
    num = 0
    while time.monotonic() < start + seconds:
        began = time.process_time()  # other programs may use the cores
        try:
            examine(random.Random(seed + num), tmp_path, monkeypatch)
        except Exception as error:
            raise AssertionError(f"seed {seed + num}") from error
        slowest = max(slowest, time.process_time() - began)
        num += 1
        capsys.readouterr()
    with capsys.disabled():
        print(f"\n{num} files in {seconds:.0f} s, the slowest in {slowest:.2f} s")
    assert slowest < 10
