"""Reading rows: the place of each, what is wrong with it, and the real format of a file."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glmtune.cli import main
from glmtune.data import windows
from glmtune.data.records import BadRow, list_bad_rows, name_rows, read_alpaca, read_rows
from glmtune.errors import UserError

GOOD = '{"instruction": "说", "output": "好"}'


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def write(name: str, content: str | bytes) -> str:
        data = content.encode() if isinstance(content, str) else content
        (tmp_path / name).write_bytes(data)
        return name

    return write


def test_reads_a_list_with_rows_and_lines(write):
    path = write("a.json", '[\n{"instruction": "一",\n "output": "1"},\n\n' + GOOD + "]\n")
    (first, second), bad = read_alpaca(path)
    assert (first.instruction, first.input, first.output) == ("一", "", "1")
    assert (first.where, second.where) == ("a.json:2 (row 1)", "a.json:5 (row 2)")
    assert bad == []


def test_reads_json_lines_whatever_the_name(write):
    for name in ("a.jsonl", "a.json"):
        good, _ = read_alpaca(write(name, GOOD + "\r\n\n" + GOOD + "\n"))
        assert [(r.row, r.line) for r in good] == [(1, 1), (2, 3)]


def test_line_separators_inside_a_string_end_no_line(write):
    record = {"instruction": "a\u2028b\x85c", "output": "d"}
    good, _ = read_alpaca(write("a.jsonl", json.dumps(record, ensure_ascii=False) + "\n"))
    assert good[0].instruction == record["instruction"]


def test_a_byte_order_mark_is_simply_read(write):
    assert len(read_alpaca(write("a.json", "\ufeff[" + GOOD + "]"))[0]) == 1


def test_names_fields_nothing_reads(write):
    path = write("a.json", '[{"instruction": "a", "system": "", "output": "b", "id": 7}]')
    assert read_alpaca(path)[0][0].unused == ("system", "id")


strings = st.text(st.characters(exclude_categories=["Cs"]))


@given(
    st.lists(
        st.fixed_dictionaries(
            {"instruction": strings, "output": strings}, optional={"input": strings}
        ),
        min_size=1,
    ),
    st.sampled_from([None, 1]),
    st.booleans(),
)
def test_reads_back_any_records(tmp_path_factory, rows, indent, ascii_only):
    path = tmp_path_factory.mktemp("data") / "a.json"
    path.write_text(json.dumps(rows, indent=indent, ensure_ascii=ascii_only), encoding="utf-8")
    good, bad = read_alpaca(str(path))
    assert not bad
    assert [(r.instruction, r.input, r.output) for r in good] == [
        (row["instruction"], row.get("input", ""), row["output"]) for row in rows
    ]
    lines = path.read_text(encoding="utf-8").split("\n")
    assert all("{" in lines[record.line - 1] for record in good)


@pytest.mark.parametrize(
    "row, complaint",
    [
        ('{"instruction": "a"}', 'a.json:3 (row 2): field "output" is missing, the row has ["inst'),
        ('{"output": "a", "input": ""}', 'field "instruction" is missing'),
        ('{"instruction": 7, "output": "a"}', 'field "instruction" is 7 (a number), not a string'),
        ('{"instruction": "a", "input": 7, "output": "a"}', 'field "input" is 7 (a number), not'),
        (
            '{"instruction": "a", "output": null}',
            'field "output" is null (null), not a string',
        ),
        ('{"instruction": "a", "output": ["b"]}', 'field "output" is ["b"] (a list), not a string'),
        ('{"instruction": "a", "output": "\\ud83d"}', 'field "output" holds \\ud83d, half of a ch'),
        ("[1]", "[1] (a list) is not a record"),
        ('"text"', '"text" (a string) is not a record'),
    ],
)
def test_a_bad_row_fails_or_is_skipped_and_listed(write, row, complaint):
    path = write("a.json", f"[{GOOD},\n\n{row},\n{GOOD}]")
    with pytest.raises(UserError) as error:
        read_alpaca(path)
    assert complaint in str(error.value)
    assert "--on_bad_row skip" in str(error.value)
    assert "\n" not in str(error.value)
    good, bad = read_alpaca(path, "skip")
    assert [record.row for record in good] == [1, 3]
    assert [(b.row, b.line) for b in bad] == [(2, 3)]
    assert complaint.removeprefix("a.json:3 (row 2): ") in bad[0].reason


def test_the_first_bad_row_is_told_and_the_others_are_named(write):
    bad = '{"instruction": "a"}'
    path = write("a.jsonl", "\n".join([GOOD, bad, GOOD, bad, "{", GOOD]))
    with pytest.raises(UserError, match=r"^a.jsonl:2 \(row 2\): .* \(bad as well: rows 4-5\)$"):
        read_alpaca(path)


def test_a_broken_json_line_is_a_bad_row(write):
    path = write("a.jsonl", GOOD + '\n{"instruction": "a" "output"}\n' + GOOD)
    with pytest.raises(UserError, match=r"^a.jsonl:2 \(row 2\): not JSON \(.* at column 21\)"):
        read_alpaca(path)
    good, bad = read_alpaca(path, "skip")
    assert (len(good), [b.where for b in bad]) == (2, ["a.jsonl:2 (row 2)"])


@pytest.mark.parametrize(
    "content, complaint",
    [
        ("", "a.json: the file is empty"),
        (" \n", "a.json: the file is empty"),
        ("[]", "a.json: holds no row"),
        ('{"data": [' + GOOD + "]}", 'a.json: JSON, but an object with the keys ["data"], not a l'),
        ("42", "a.json: JSON, but a number, not a list"),
        ("null", "a.json: JSON, but null, not a list"),
        ("<!DOCTYPE html><html>", "a.json: a web page, not JSON"),
        ("some words\na,b", "a.json:1 (row 1): not JSON"),
        ("[" + GOOD + "\n" + GOOD + "]", "a.json:2: not JSON (a comma or ] is missing"),
        ("[" + GOOD + "\n,]", "a.json:2: not JSON (a comma stands before the closing ]"),
        ("[" + GOOD + ",\n{'a': 1}]", "a.json:2: not JSON (Expecting property name"),
        ("[" + GOOD + ",\n" + GOOD[:30], "a.json:2: "),
        ("[" + GOOD + ",\n", "a.json:2: the list ends early, the file is cut off"),
        ("[" + GOOD, "a.json:1: the list ends early, the file is cut off"),
        ("[" + GOOD + "]\n[]", "a.json:2: not JSON (text follows the closing ]"),
        ("[" * 100_000, "a.json:1: not JSON (nested too deeply)"),
        ("[" + "9" * 5000 + "]", "a.json:1 (row 1): not JSON (a number too long)"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "a.json:1: a Git-LFS poi"),
    ],
)
@pytest.mark.parametrize("on_bad_row", ["fail", "skip"])
def test_a_file_that_is_no_list_of_records(write, content, complaint, on_bad_row):
    with pytest.raises(UserError) as error:
        read_alpaca(write("a.json", content), on_bad_row)
    assert str(error.value).startswith(complaint)
    assert "\n" not in str(error.value)


CHINESE = '[\n{"instruction": "一二三四", "output": "一种说明。"}]'


@pytest.mark.parametrize(
    "data, place, likely",
    [
        (
            CHINESE.encode("gbk"),
            "a.json:2 (row 1): not UTF-8 at byte 19 of the row,",
            "likely GBK;",
        ),
        (CHINESE.encode("utf-16"), "a.json:1: not UTF-8 at byte 0,", "likely UTF-16;"),
        (CHINESE.encode("utf-16-le"), "a.json:1: not UTF-8 at byte 1,", "likely UTF-16LE;"),
        (CHINESE.encode("utf-16-be"), "a.json:1: not UTF-8 at byte 0,", "likely UTF-16BE;"),
        (CHINESE.encode("utf-32"), "a.json:1: not UTF-8 at byte 0,", "likely UTF-32;"),
        (
            '[{"instruction": "a café"}]'.encode("latin-1"),
            "at byte 22 of the row,",
            "likely CP1252;",
        ),
        (CHINESE.encode()[:-7], "a.json:2: the list ends early", "cut off"),
        (
            '[{"instruction": "a \ud83d\ude00"}]'.encode("utf-8", "surrogatepass"),
            "at byte 19 of the row,",
            "a few bytes are damaged or cut off; download it again or fix that place",
        ),
        (bytes(range(256)), "not UTF-8 at byte 0,", "binary data"),
    ],
)
def test_another_encoding_is_named_with_its_byte(write, data, place, likely):
    with pytest.raises(UserError) as error:
        read_alpaca(write("a.json", data))
    assert place in str(error.value)
    assert likely in str(error.value)


@pytest.mark.parametrize(
    "encoding", ["gbk", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "cp1252"]
)
@pytest.mark.parametrize("lines", [False, True])
def test_the_encoding_that_is_named_is_the_one_that_reads(write, capsys, encoding, lines):
    """The encoding that the refusal names works with every verb that reads rows."""
    text = "a café, thé à la crème" if encoding == "cp1252" else "一二三四，五六七八"
    row = {"context": text, "target": text} if lines else {"instruction": text, "output": text}
    dumped = json.dumps(row, ensure_ascii=False)
    content = f"{dumped}\n" * 3 if lines else f"[{', '.join([dumped] * 3)}]"
    path = write("a.jsonl" if lines else "a.json", content.encode(encoding))
    read = ["tokenize", "--jsonl_path"] if lines else ["convert", "--data_path"]
    command = [*read, path, "--save_path", "out"]
    assert main(command) == 2
    words = capsys.readouterr().err.splitlines()[-1].replace(",", " ").split()
    fix = [words[at := words.index("--encoding")], words[at + 1]]
    assert main([*command, *fix]) == 0
    assert main(["validate", path]) == 2
    assert main(["validate", path, *fix]) == 0
    if not lines:
        (first, *_), _ = read_rows("out")
        assert (first.context, first.target) == (f"Instruction: {text}\nAnswer: ", text)
        answer = ["--base", "glm-tiny", "--max_new_tokens", "1", "--output_path", "x"]
        assert main(["infer", "--data_path", path, "--limit", "1", *answer, *fix]) == 0


def test_a_long_file_in_another_encoding(write, monkeypatch):
    """No character is cut, wherever a window ends."""
    rows = [
        {"instruction": f"第{number}问：" + "汉字" * 40, "output": "答"} for number in range(300)
    ]
    path = write("a.json", json.dumps(rows, ensure_ascii=False).encode("gbk"))
    for window in (99, 1000, 1 << 16):
        monkeypatch.setattr(windows, "WINDOW_BYTES", window)
        assert [record.instruction for record in read_alpaca(path, encoding="gbk")[0]] == [
            row["instruction"] for row in rows
        ]


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "utf-16"])
def test_an_encoding_that_is_not_the_files(write, encoding):
    path = write("a.json", CHINESE.encode("gbk"))
    with pytest.raises(UserError, match=f"^a.json: not {encoding} near byte "):
        read_alpaca(path, encoding=encoding)


def test_an_encoding_that_nobody_knows(write, capsys):
    path = write("a.json", f"[{GOOD}]")
    for name in ("gbkk", "base64"):
        assert main(["validate", path, "--encoding", name]) == 2
        assert f"encoding '{name}' is not known; try gbk" in capsys.readouterr().err


@pytest.mark.parametrize("end", [",\n", ",\r\n", " , \n"])
def test_lines_that_end_in_the_commas_of_a_list(write, end):
    for last in ("", "\n", end):
        good, bad = read_alpaca(write("a.jsonl", end.join([GOOD] * 3) + last))
        assert [record.line for record in good] == [1, 2, 3]
        assert not bad
    path = write("a.jsonl", f"{GOOD},\n{GOOD},,\n,\n{GOOD}")
    good, bad = read_alpaca(path, "skip")
    assert ([record.row for record in good], [row.row for row in bad]) == ([1, 4], [2, 3])


def test_an_unreadable_path(write, tmp_path):
    for path in ("missing.json", write("a.json", GOOD) + "/b.json"):
        with pytest.raises(UserError, match="cannot be read"):
            read_alpaca(path)


def test_reads_rows_of_context_and_target(write):
    row = '{"context": "问", "target": ""}'
    rows, _ = read_rows(write("a.jsonl", row + "\n" + row))
    assert [(r.context, r.target, r.where) for r in rows] == [
        ("问", "", "a.jsonl:1 (row 1)"),
        ("问", "", "a.jsonl:2 (row 2)"),
    ]


@pytest.mark.parametrize("on_bad_row", ["fail", "skip"])
def test_the_file_of_another_step_is_recognised(write, on_bad_row):
    converted = write("a.jsonl", '{"context": "a", "target": "b"}\n' * 2)
    with pytest.raises(UserError, match=r"a.jsonl:1 .* a context/target row .*one kind in a file"):
        read_alpaca(converted, on_bad_row)
    with pytest.raises(UserError, match=r"b.json:1 .* an alpaca record.* `glmtune convert` writes"):
        read_rows(write("b.json", f"[{GOOD}]"), on_bad_row)


@pytest.mark.parametrize(
    "rows, limit, text",
    [
        ([3], None, "row 3"),
        ([3, 7, 8, 9], None, "rows 3, 7-9"),
        ([1, 3, 5, 6, 9], 2, "rows 1, 3 and 3 more"),
        ([1, 2, 3], 1, "rows 1-3"),
    ],
)
def test_names_rows_for_a_person(rows, limit, text):
    assert name_rows(rows, limit) == text


def test_every_bad_row_is_named_however_many():
    bad = [BadRow("a.json", row, row, "no") for row in range(1, 31)]
    lines = list_bad_rows(bad, limit=2)
    assert lines == ["a.json:1 (row 1): no", "a.json:2 (row 2): no", "and 28 more: rows 3-30"]


VALID = f"[\n{GOOD},\n{GOOD}]".encode()


@given(st.integers(0, len(VALID)), st.integers(0, 20), st.binary(max_size=20))
def test_a_damaged_file_is_read_or_refused_in_one_line(tmp_path_factory, at, length, damage):
    path = tmp_path_factory.mktemp("data") / "a.json"
    path.write_bytes(VALID[:at] + damage + VALID[at + length :])
    good, told = [], ""
    try:
        good, _ = read_alpaca(str(path), "skip")
    except UserError as error:
        told = str(error)
    assert bool(good) != bool(told)
    assert "\n" not in told
    told.encode()  # it can be printed


def test_lines_and_list_agree_on_published_records(shared):
    path = str(shared / "data" / "alpaca_data_zh.json")
    good, bad = read_alpaca(path)
    with open(path, encoding="utf-8") as file:
        assert len(good) == len(json.load(file)) == 20_000
    assert not bad
