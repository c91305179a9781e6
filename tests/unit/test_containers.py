"""Rows of every container are the same rows, and what is no file of rows is named in one line."""

import csv
import gzip
import io
import json
import tarfile
import zipfile

import datasets
import pyarrow as pa
import pytest
from pyarrow import parquet

from glmtune.data import tables
from glmtune.data.containers import read_batches
from glmtune.data.flaws import Flaw
from glmtune.data.records import read_alpaca
from glmtune.data.row_files import look_through
from glmtune.errors import UserError

RECORDS = [
    {"instruction": "说说007", "input": "007", "output": "NA"},
    {"instruction": 'a "b", c', "input": "", "output": "line\nline\r\n, 3"},
    {"instruction": "1.50", "input": "null", "output": "真的\t吗"},
]
TOOL = [{"name": "find", "parameters": {"type": "object"}}]
TALKS = [
    {
        "messages": [
            {"role": "user", "content": "q, \n"},
            {"role": "assistant", "content": 'a"'},
        ],
        "tools": None,
    },
    {
        "messages": [
            {"role": "user", "content": "z"},
            {"role": "assistant", "content": "y", "loss": False},
        ],
        "tools": json.dumps(TOOL),
    },
]


def as_json(rows):
    return json.dumps(rows, ensure_ascii=False).encode()


def as_lines(rows, end="\n"):
    return end.join(json.dumps(row, ensure_ascii=False) for row in rows).encode()


def as_csv(rows, delimiter=",", end="\r\n"):
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), delimiter=delimiter, lineterminator=end)
    writer.writeheader()
    for row in rows:
        cells = {k: v if isinstance(v, str) else json.dumps(v) for k, v in row.items() if v}
        writer.writerow(cells)
    return text.getvalue().encode()


def as_parquet(rows):
    file = io.BytesIO()
    parquet.write_table(pa.Table.from_pylist(rows), file, row_group_size=2)
    return file.getvalue()


def as_arrow(rows, new=pa.ipc.new_file):
    file = io.BytesIO()
    table = pa.Table.from_pylist(rows)
    with new(file, table.schema) as out:
        out.write_table(table, max_chunksize=2)
    return file.getvalue()


CONTAINERS = {
    "a.json": as_json,
    "a.jsonl": as_lines,
    "crlf.jsonl": lambda rows: as_lines(rows, "\r\n\r\n"),
    "bom.jsonl": lambda rows: b"\xef\xbb\xbf" + as_lines(rows),
    "a.csv": as_csv,
    "bom.csv": lambda rows: b"\xef\xbb\xbf" + as_csv(rows),
    "lf.csv": lambda rows: as_csv(rows, end="\n\n"),
    "a.tsv": lambda rows: as_csv(rows, "\t"),
    "tabs.csv": lambda rows: as_csv(rows, "\t"),
    "table": as_csv,
    "a.parquet": as_parquet,
    "a.arrow": as_arrow,
    "stream.arrow": lambda rows: as_arrow(rows, pa.ipc.new_stream),
}
PACKED = {
    "plain": lambda data: data,
    "gzip": gzip.compress,
    "two gzip members": lambda data: gzip.compress(data[:50]) + gzip.compress(data[50:]),
    "zstd": lambda data: pa.compress(data, "zstd", asbytes=True),
}


def values(path, encoding=None):
    return [value for batch in read_batches(str(path), encoding) for value in batch.values]


def lacking(rows):
    """Rows without what is null or empty, which tables have in every row."""
    return [
        {k: lacking(v) if isinstance(v, list) else v for k, v in row.items() if v not in (None, "")}
        for row in rows
    ]


@pytest.mark.parametrize("packing", PACKED)
@pytest.mark.parametrize("name", CONTAINERS)
def test_the_same_rows_come_out_of_every_container(tmp_path, name, packing):
    for rows in (RECORDS, TALKS):
        path = tmp_path / name
        path.write_bytes(PACKED[packing](CONTAINERS[name](rows)))
        assert lacking(values(path)) == lacking(rows)
    found = look_through(str(path))
    assert found.format == "messages"
    tools = [row.example.tools for row in found.rows()]
    assert tools == [(), tuple(TOOL)]
    assert [turn.supervised for row in found.rows() for turn in row.example.turns][-1] is False


@pytest.mark.parametrize("name", CONTAINERS)
def test_a_row_is_named_by_its_line_where_there_are_lines(tmp_path, name):
    path = tmp_path / name
    bad = RECORDS[0] | {"text": "y"}
    path.write_bytes(CONTAINERS[name]([*(row | {"text": ""} for row in RECORDS[:2]), bad]))
    (_, second), (bad,) = read_alpaca(str(path), "skip")
    where = bad.where.removeprefix(str(path))
    has_lines = not name.endswith((".parquet", ".arrow"))
    assert where.endswith("(row 3)")
    assert where.startswith(":" if has_lines else " ")
    assert second.where.startswith(f"{path}:") == has_lines
    if name == "a.csv":
        assert (second.line, bad.line) == (3, 6)  # lines 4 and 5 are the rest of the second


def test_a_table_in_another_encoding(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(gzip.compress(as_csv(RECORDS).decode().encode("gbk")))
    assert lacking(values(path, "gbk")) == lacking(RECORDS)
    path.write_bytes("instruction,output\r\n今天天气怎么样,今天天气很好\r\n".encode("gbk"))
    with pytest.raises(UserError, match=r"a.csv:2 \(row 1\): not UTF-8 .* pass --encoding GBK"):
        read_alpaca(str(path))
    path.write_bytes(as_csv(RECORDS).decode().encode("utf-16"))
    assert lacking(values(path, "utf-16")) == lacking(RECORDS)
    with pytest.raises(UserError, match=r"a.csv:1: .* --encoding UTF-16"):
        values(path)
    path.write_bytes("一个问题,它的回答\r\n你好,您好\r\n".encode("gbk"))
    with pytest.raises(UserError, match=r"a.csv:1: not UTF-8 .* --encoding GBK"):
        values(path)
    path.write_bytes(as_parquet(RECORDS))
    with pytest.raises(UserError, match="is Parquet, whose text is UTF-8 always; leave encoding"):
        values(path, "gbk")


def test_what_json_has_no_value_for_becomes_text(tmp_path):
    import datetime
    import decimal

    row = {
        "instruction": b"q",
        "output": "a",
        "at": datetime.datetime(2026, 1, 2),
        "price": decimal.Decimal("1.50"),
        "raw": {"bytes": b"\xff"},
        "map": [("k", 1)],
    }
    kind = pa.map_(pa.string(), pa.int64())
    table = pa.Table.from_pylist([row | {"map": None}])
    table = table.set_column(5, "map", pa.array([row["map"]], kind))
    parquet.write_table(table, tmp_path / "a.parquet")
    (found,) = values(tmp_path / "a.parquet")
    assert json.loads(json.dumps(found)) == row | {
        "instruction": "q",
        "at": "2026-01-02 00:00:00",
        "price": "1.50",
        "raw": {"bytes": "\udcff"},
        "map": {"k": 1},
    }


def test_text_of_a_conversation_may_be_python(tmp_path):
    (tmp_path / "a.csv").write_bytes(as_csv([{"messages": str(TALKS[0]["messages"])}]))
    assert values(tmp_path / "a.csv") == [{"messages": TALKS[0]["messages"]}]


def packed(name, content):
    data = io.BytesIO()
    if name.endswith("tar"):
        with tarfile.open(fileobj=data, mode="w") as archive:
            entry = tarfile.TarInfo("a.json")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    else:
        with zipfile.ZipFile(data, "w") as archive:
            archive.writestr("[Content_Types].xml" if name.endswith("xlsx") else "a.json", content)
    return data.getvalue()


GOOD_CSV = as_csv(RECORDS)
REFUSED = {
    "a gzip file that is cut off": (
        gzip.compress(as_lines(RECORDS))[:-9],
        "the gzip file is damaged or cut off",
    ),
    "a damaged gzip file": (
        gzip.compress(as_lines(RECORDS))[:-8] + bytes(8),
        "the gzip file is damaged or cut off (CRC check failed",
    ),
    "a zstd file that is cut off": (
        pa.compress(as_lines(RECORDS), "zstd", asbytes=True)[:-9],
        "the zstd file is damaged or cut off",
    ),
    "a Parquet file that is cut off": (
        as_parquet(RECORDS)[:-9],
        "the Parquet file is damaged or cut off",
    ),
    "a damaged Parquet file": (
        as_parquet(RECORDS)[:40] + bytes(80) + as_parquet(RECORDS)[120:],
        "the Parquet file is damaged or cut off",
    ),
    "an Arrow file that is cut off": (as_arrow(RECORDS)[:-9], "the Arrow file is damaged or cut"),
    "an Arrow stream that is cut off": (
        as_arrow(RECORDS, pa.ipc.new_stream)[:-30],
        "the Arrow file is damaged or cut off",
    ),
    "an Arrow stream without its end": (
        as_arrow(RECORDS, pa.ipc.new_stream)[:-8],
        "the Arrow file is cut off",
    ),
    "a zip archive": (
        packed("a.zip", as_json(RECORDS)),
        "is a zip archive, not a file of rows",
    ),
    "a workbook": (packed("a.xlsx", b"<xml/>"), "is an Excel workbook, not a file of rows; save"),
    "a tar archive": (packed("a.tar", as_json(RECORDS)), "is a tar archive, not a file of rows"),
    "a packed tar archive": (
        gzip.compress(packed("a.tar", as_json(RECORDS))),
        "is a tar archive, not a file of rows",
    ),
    "an xz file": (b"\xfd7zXZ\x00abc", "is an xz file, not a file of rows; unpack it"),
    "semicolons": (as_csv(RECORDS, ";"), ':1: its cells are separated by ";"; save it with commas'),
    "a column twice": (
        b"instruction,output,output\na,b,c\n",
        '2 of its columns are named "output"; give each its own name',
    ),
    "a missing column": (
        b"instruction,reply\na,b\nc,d\n",
        'no column is named "output", the table has ["instruction", "reply"]; rename the one that '
        'holds the answer to "output", or add it',
    ),
    "no names of columns": (
        "你好,您好\n谢谢,不客气\n".encode(),
        'no column is named "instruction", the table has ["你好", "您好"]; rename',
    ),
    "too few cells": (
        GOOD_CSV + b"a,b\r\n",
        ':7 (row 4): 2 cells, and the first line names 3 columns; write a text that holds ","',
    ),
    "too many cells": (GOOD_CSV + b"a,b,c,d\r\n", ":7 (row 4): 4 cells, and the first line names"),
    "quotes that do not match": (
        GOOD_CSV + b'"a" b,c,d\r\n',
        ":7: quotes that do not match (',' expected after '\"'); write a quote inside",
    ),
    "quotes without an end": (
        GOOD_CSV + b'"a,b,c\r\nd,e,f\r\n',
        ":7: quotes that do not match (unexpected end of data); write a quote",
    ),
    "nothing": (b"", "the file is empty"),
    "names alone": (b"instruction,output\n", "holds no row"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_wrong_with_a_file_is_one_line(tmp_path, what):
    content, told = REFUSED[what]
    path = tmp_path / "rows.csv"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        look_through(str(path))
    assert str(error.value).removeprefix(str(path)).removeprefix(": ").startswith(told)
    assert "\n" not in str(error.value)


def test_ragged_rows_may_be_skipped_and_rows_after_broken_quotes_may_not(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(GOOD_CSV + b"a,b\r\nx,,z\r\n" + b"p,q,r,,\r\n")
    found = look_through(str(path), on_bad_row="skip")
    assert [bad.row for bad in found.bad_rows] == [4]
    assert [row.row for row in found.rows()] == [1, 2, 3, 5, 6]
    path.write_bytes(GOOD_CSV + b'"a" b,c,d\r\nx,,z\r\n')
    with pytest.raises(UserError, match="quotes that do not match"):
        look_through(str(path), on_bad_row="skip")


def test_columns_without_a_name_are_those_of_spreadsheets(tmp_path):
    (tmp_path / "a.csv").write_bytes(b",instruction,output,,\n0,a,b,,\n1,c,d,,\n")
    assert values(tmp_path / "a.csv") == [
        {"": "0", "instruction": "a", "output": "b"},
        {"": "1", "instruction": "c", "output": "d"},
    ]
    assert look_through(str(tmp_path / "a.csv")).fields.unused == {"": 2}


def test_batches_bound_what_is_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "ROWS_PER_BATCH", 2)
    for name, write in (("a.csv", as_csv), ("a.parquet", as_parquet), ("a.arrow", as_arrow)):
        (tmp_path / name).write_bytes(write(RECORDS * 3))
        batches = list(read_batches(str(tmp_path / name)))
        assert {len(batch.values) for batch in batches} <= {1, 2}
        assert sum(batch.num_bytes for batch in batches) > 0
        assert not any(isinstance(v, Flaw) for batch in batches for v in batch.values)
        assert lacking(values(tmp_path / name)) == lacking(RECORDS * 3)


def test_files_that_datasets_writes_are_read(tmp_path):
    datasets.Dataset.from_list(RECORDS).save_to_disk(str(tmp_path / "saved"))
    (file,) = (tmp_path / "saved").glob("*.arrow")
    assert values(file) == RECORDS


@pytest.mark.parametrize("is_packed", [False, True])
@pytest.mark.parametrize("name", ["a.arrow", "a.parquet"])
def test_threads_of_pyarrow_never_need_python(tmp_path, monkeypatch, name, is_packed):
    """Else a command that a bad row ends aborts now and then, with 134 instead of 2."""
    opened = []
    for owner, function in ((pa.ipc, "open_file"), (parquet, "ParquetFile")):
        original = getattr(owner, function)

        def spy(source, *args, original=original):
            opened.append(type(source))
            return original(source, *args)

        monkeypatch.setattr(owner, function, spy)
    data = (as_arrow if name == "a.arrow" else as_parquet)(RECORDS)
    (tmp_path / name).write_bytes(gzip.compress(data) if is_packed else data)
    assert values(tmp_path / name) == RECORDS
    assert opened == [pa.OSFile]
