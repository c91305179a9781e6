"""Streaming rows: bulk and row-by-row reading give the same, within bounded memory."""

import json
import tracemalloc

import pytest

from glmtune.data import containers, windows
from glmtune.data.flaws import Flaw

ROW = '{"instruction": "说", "output": "好"}'


@pytest.fixture
def read(tmp_path):
    """Write a file and read it: (line, value or kind of flaw) of rows, then what is between."""

    def read(content: str | bytes, name: str = "a.json") -> tuple[list, list]:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        rows, between = [], []
        for batch in containers.read_batches(str(path)):
            values = [v.kind if isinstance(v, Flaw) else v for v in batch.values]
            rows += zip(batch.lines, values, strict=True)
            between += [(line, fault.what) for _, line, fault in batch.between]
        return rows, between

    return read


@pytest.fixture
def no_reference(monkeypatch):
    """Fail if anything is read row by row."""
    monkeypatch.setattr(windows, "_Reference", lambda: None)


@pytest.mark.parametrize(
    "text",
    [
        ROW + "\n" + ROW + "\n",
        '{"a": "\\"", "b": "\\\\"}\r\n{"a": "\\\\\\"", "b": [{"c": "d"}, 1, null]}\n',
        '{"a": {}, "b": "},\\n{"}\n' * 2000,
    ],
)
def test_lines_without_flaw_are_read_at_once(read, no_reference, text):
    rows, between = read(text)
    lines = text.splitlines()
    assert rows == [(number, json.loads(line)) for number, line in enumerate(lines, start=1)]
    assert not between


@pytest.mark.parametrize("indent", [None, 1])
def test_a_list_is_read_at_once_but_for_its_end(read, spy, indent):
    records = [{"a": f"{number}}}", "b": ["{"]} for number in range(5000)]
    calls = spy(windows._Reference, "parse")
    text = "\n\n" + json.dumps(records, indent=indent)
    rows, between = read(text)
    assert [value for _, value in rows] == records
    assert len(calls) < 3000  # the last window, of a list of more than two
    assert not between
    if indent:
        assert [line for line, _ in rows] == list(range(4, 4 + 6 * 5000, 6))


@pytest.mark.parametrize(
    "row, kind",
    [
        ('{"a": 1, "a": 2}', "repeated field"),
        ('{"a": {"b": "x", "b": ["y"]}}', "repeated field"),
        ('{"a": "x", "\\u0061": "x"}', "repeated field"),
        ('{"a": "' + "\0" + '"}', "control character"),
        ("\ufeff{}", "control character"),
        ('{"a": ' + "[" * 100_000 + "}", "nesting"),
        ('{"a": "\\ud83d"', "syntax"),
        ("nul", "syntax"),
    ],
)
@pytest.mark.parametrize("start, between, end", [("", "\n", ""), ("[", ",\n", "]")])
def test_each_flaw_is_named_between_good_rows(read, row, kind, start, between, end):
    rows, _ = read(start + between.join([ROW, row, ROW]) + end)
    assert rows == [(1, json.loads(ROW)), (2, kind), (3, json.loads(ROW))]


@pytest.mark.parametrize("start, between, end", [("", "\n", ""), ("[", ",\n", "]")])
@pytest.mark.parametrize("once_twice", ["", ', "n": 1, "n": 1'])
def test_how_deep_is_too_deep_is_no_matter_of_the_stack(read, once_twice, start, between, end):
    def row(depth):
        return f'{{"a": {"[" * (depth - 1)}"]"{"]" * (depth - 1)}{once_twice}}}'

    deep = [row(256), row(257), row(900), '{"a": ' + "[" * 900 + "\x1b"]
    text = start + between.join([*deep, ROW]) + end
    rows, _ = read(text)
    kinds = [value if isinstance(value, str) else "read" for _, value in rows]
    assert kinds == ["repeated field" if once_twice else "read", *["nesting"] * 3, "read"]

    def from_deeper(depth):
        return from_deeper(depth - 1) if depth else read(text)

    assert from_deeper(200)[0] == rows


def test_a_number_of_too_many_digits(read):
    rows, between = read(f'[{ROW}, {{"a": {"9" * 5000}}}, {ROW}]')
    assert [value for _, value in rows] == [json.loads(ROW), "syntax", json.loads(ROW)]
    assert not between


def test_a_half_character_is_a_value_as_in_json(read):
    assert read('{"a": "\\ud83d"}\n{}')[0][0] == (1, {"a": "\ud83d"})
    assert read("[NaN]")[0][0][0] == 1


def test_mixed_encodings_are_told_row_by_row(read):
    lines = [ROW.encode(), ROW.encode("gbk"), ROW.encode("latin-1", "replace") + b"\xff", b"{}"]
    assert [value for _, value in read(b"\n".join(lines))[0]] == [
        json.loads(ROW),
        "encoding",
        "encoding",
        {},
    ]


@pytest.mark.parametrize(
    "text, num_rows, between",
    [
        ("[{} {}]", 2, [(1, "not JSON (a comma or ] is missing between two rows)")]),
        ("[{},\n,{}]", 2, [(2, "not JSON (a comma stands where a row should)")]),
        ("[{},\n]", 1, [(2, "not JSON (a comma stands before the closing ])")]),
        ("[{}]\n[{}]", 2, [(2, "not JSON (text follows the closing ])")]),
        ("[{},\n[{}]", 2, [(2, "not JSON (a [ stands before a row)")]),
        ("[{}", 1, [(1, "the list ends early, the file is cut off")]),
        ("[", 0, [(1, "the list ends early, the file is cut off")]),
        ('[{}"}, {}]', 2, [(1, "not JSON (a comma or ] is missing between two rows)")]),
    ],
)
def test_a_broken_list_is_read_past_its_fault(read, text, num_rows, between):
    rows, faults = read(text)
    assert ([value for _, value in rows], faults) == ([{}] * num_rows, between)


@pytest.mark.parametrize("start, between, end", [("", "\n", "\n"), ("[", ",\n", "]")])
def test_too_long_a_row_is_passed_over(read, monkeypatch, start, between, end):
    monkeypatch.setattr(windows, "WINDOW_BYTES", 100)
    monkeypatch.setattr(windows, "MAX_ROW_BYTES", 1000)
    long = json.dumps({"a": "x" * 5000})
    rows, faults = read(start + between.join([ROW, long, ROW, long, ROW]) + end)
    good = json.loads(ROW)
    assert rows == [(1, good), (2, "too long"), (3, good), (4, "too long"), (5, good)]
    assert not faults


@pytest.mark.parametrize("is_list", [True, False])
def test_memory_does_not_grow_with_the_file(tmp_path, is_list):
    path = tmp_path / "a.json"
    start, between, end = ("[", ", ", "]") if is_list else ("", "\n", "\n")
    path.write_text(start + between.join([ROW] * 300_000) + end, encoding="utf-8")
    assert path.stat().st_size > 10e6
    tracemalloc.start()
    num_rows = sum(len(batch.values) for batch in containers.read_batches(str(path)))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert num_rows == 300_000
    assert peak < 3e6


def test_rows_that_hold_objects_are_read_in_bulk(tmp_path, monkeypatch):
    """Told apart by their first name, they need no second reading row by row."""
    rows = [{"turns": [{"a": i}, {"a": "},{"}], "id": [{"turns": i}]} for i in range(300)]
    path = tmp_path / "a.json"
    path.write_text(json.dumps(rows, indent=1))
    expected = [row for batch in containers.read_batches(str(path)) for row in batch.values]
    lines = [line for batch in containers.read_batches(str(path)) for line in batch.lines]
    assert expected == rows
    assert lines == list(range(2, 2 + 15 * 300, 15))
    by_row = []
    once = windows.List._read_by_row

    def read_by_row(self, window, at_end):
        by_row.append(len(window))
        return once(self, window, at_end)

    monkeypatch.setattr(windows, "WINDOW_BYTES", 1 << 12)
    monkeypatch.setattr(windows.List, "_read_by_row", read_by_row)
    again = [row for batch in containers.read_batches(str(path)) for row in batch.values]
    assert again == rows
    assert len(by_row) <= 2
