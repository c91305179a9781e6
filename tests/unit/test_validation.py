"""`glmtune validate`: every problem is reported with its place, and nothing else."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glmtune.cli import main
from glmtune.config.settings import ValidateSettings
from glmtune.data import windows
from glmtune.data.characters import CONTROL, survey
from glmtune.data.validation import validate
from glmtune.errors import UserError


def record(instruction="说出一种水果。", input="", output="苹果"):
    return {"instruction": instruction, "input": input, "output": output}


@pytest.fixture
def check(tmp_path, monkeypatch, capsys):
    """Write rows as JSON lines and validate them: (kind, line, row, field) of each problem."""
    monkeypatch.chdir(tmp_path)

    def check(*rows: object, **settings) -> list[tuple]:
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        (tmp_path / "a.jsonl").write_text("\n".join(lines), encoding="utf-8")
        try:
            validate(ValidateSettings(files=("a.jsonl",), json_path="r.json", **settings))
            refused = False
        except UserError:
            refused = True
        problems = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))["problems"]
        assert refused == any(problem["unusable"] for problem in problems)
        printed = capsys.readouterr().out
        for problem in problems:
            assert problem["kind"] in printed
            assert problem["file"] == "a.jsonl"
            assert problem["what"]
            assert problem["fix"]
        return [(p["kind"], p["line"], p["row"], p["field"]) for p in problems]

    return check


def test_a_clean_file(check, tmp_path):
    assert check(record(), record("Name a fruit.", "One.", "Apple")) == []
    report = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
    (file,) = report["files"]
    assert (file["rows"], file["unusable_rows"], file["format"]) == (2, 0, "alpaca")
    assert file["bytes"] == (tmp_path / "a.jsonl").stat().st_size
    letters = {"Chinese": 8, "English": 18, "other": 0}
    assert file["language_shares"] == pytest.approx({k: n / 26 for k, n in letters.items()})


@pytest.mark.parametrize(
    "row, kind, field",
    [
        ("{", "syntax", None),
        ('{"instruction": "a", "output": "b", "output": "c"}', "repeated field", "output"),
        ('"text"', "not a record", None),
        ({"instruction": "a"}, "missing field", "output"),
        ({"instruction": "a", "output": None}, "not a string", "output"),
        (record(output="\ud83d"), "half a character", "output"),
        (record(input="a\0b"), "control character in text", "input"),
        (record(output="a\x85b"), "control character in text", "output"),
        (record(output="a\ufffdb"), "lost character", "output"),
        (record("问", output=" \u3000"), "empty answer", None),
        (record("", output="答"), "empty question", None),
        (record("长" * 100_000), "very long", None),
        ({"context": "a", "target": "b"}, "other format", None),
    ],
)
@pytest.mark.parametrize("with_extra", [True, False])
def test_each_problem_is_told_with_its_place(check, row, kind, field, with_extra):
    extra = {"extra": 1} if with_extra else {}  # which no row is read with at once
    rows = record("Who?") | extra, "", row, record("Else?") | extra
    assert check(*rows) == [(kind, 3, 2, field)]


@pytest.mark.parametrize("value", [7, None, 1.5, True, ["a"], {"a": "b"}])
@pytest.mark.parametrize("field", ["context", "target"])
def test_a_field_of_context_and_target_that_is_no_text(check, field, value):
    row = {"context": "a", "target": "b"}
    assert check(row, row | {field: value}) == [("not a string", 2, 2, field)]
    assert check(row | {field: value}, row) == [("not a string", 1, 1, field)]


def test_an_input_may_be_missing(check):
    without = {"instruction": "说出一种水果。", "output": "苹果"}
    other = {"instruction": "Else?", "output": "No."}
    assert check(without, other) == []
    assert check(other, without, record()) == [("duplicate", 3, 3, None)]


def test_duplicates_are_told(check):
    assert check(
        record("Name a fruit."),
        record("name a  FRUIT"),
        record("Name a fruit."),
        record("Name a fruit.", output="pear"),
        record("说出，一种水果！"),
        record("说出一种水果"),
        record("name a  FRUIT"),
    ) == [
        ("near duplicate", 2, 2, None),
        ("duplicate", 3, 3, None),
        ("near duplicate", 6, 6, None),
        ("duplicate", 7, 7, None),
        ("contradiction", 4, 4, None),
    ]


@pytest.mark.parametrize(
    "signs", [("1 + 2", "1 - 2"), ("１", "２"), ("二〇", "二十"), ("a/b", "ab")]
)
def test_another_question_is_no_duplicate(check, signs):
    assert check(*map(record, signs)) == []


def test_duplicates_among_files_are_told(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text(json.dumps(record()), encoding="utf-8")
    validation = validate(ValidateSettings(files=("a.jsonl", "b.jsonl")))
    assert validation.problems.counts == {"duplicate": 1}
    assert "b.jsonl:1 (row 1): the same as a.jsonl:1 (row 1)" in capsys.readouterr().out


def test_rows_that_are_held_out_as_well_are_told(check, tmp_path):
    held_out = [record("Else?", output="No."), record("说出一种水果", "", "梨")]
    (tmp_path / "h.json").write_text(json.dumps(held_out), encoding="utf-8")
    assert check(record("Other?"), record(), held_out="h.json") == [("leak", 2, 2, None)]
    converted = {"context": "Instruction: 说出一种水果\nAnswer: ", "target": "桃"}
    assert check(converted, held_out="h.json") == [("leak", 1, 1, None)]
    (tmp_path / "h.json").write_text("[]", encoding="utf-8")
    assert check(record(), held_out="h.json") == []


@pytest.mark.parametrize("content", ["[]", "[\n]\n"])
def test_a_file_without_a_row_is_told(tmp_path, monkeypatch, capsys, content):
    monkeypatch.chdir(tmp_path)
    for name, text in (
        ("a.json", content),
        ("b.json", content),
        ("c.json", f"[{json.dumps(record())}]"),
    ):
        (tmp_path / name).write_text(text, encoding="utf-8")
    assert main(["validate", "a.json", "c.json", "b.json"]) == 2
    out = capsys.readouterr().out
    assert "a.json: holds no row; check" in out
    assert "b.json: holds no row; check" in out
    assert "no problem found" not in out
    assert main(["validate", "c.json", "--held_out", "a.json"]) == 0
    assert "note: a.json: holds no row, so nothing is compared with it" in capsys.readouterr().err


def test_the_last_line_sums_up_all_files(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").write_text(json.dumps(record()) + "\n{}", encoding="utf-8")
    assert main(["validate", "a.jsonl"]) == 2
    out, err = capsys.readouterr()
    assert "a.jsonl: alpaca, 2 rows, 1 usable, 1 not" in out
    assert err.startswith("error: 1 of 2 rows cannot be used; ")
    assert err.count("\n") == 1
    assert main(["validate", "a.jsonl", "missing.json", "--json_path", "no/such\0folder"]) == 2
    assert main(["validate", "missing.json"]) == 2
    out, err = capsys.readouterr()
    assert "missing.json: cannot be read (No such file or directory); check the path" in out
    assert err.endswith("error: not every file can be used; see above\n")


def test_a_file_of_something_else_is_told_among_the_rest(check, tmp_path, capsys):
    (tmp_path / "u.json").write_text("[]", encoding="utf-16")
    check(record())
    config = ValidateSettings(files=("u.json", "a.jsonl"), json_path="r.json")
    with pytest.raises(UserError, match="not every file can be used"):
        validate(config)
    report = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
    (problem,) = report["problems"]
    assert (problem["kind"], problem["file"], problem["line"]) == ("file", "u.json", 1)
    assert problem["what"] == "not UTF-8 at byte 0, likely UTF-16"
    assert [file["rows"] for file in report["files"]] == [0, 1]


def test_every_row_is_named_however_many(check, tmp_path, capsys):
    check(*["{}"] * 500, record())
    with pytest.raises(UserError):
        validate(ValidateSettings(files=("a.jsonl",)))
    assert "and in a.jsonl: rows 2-500\n" in capsys.readouterr().out


@given(st.text())
def test_a_survey_agrees_with_a_look_at_each_character(text):
    data = text.encode("utf-8", "ignore")
    text = data.decode()
    found = survey(data)
    assert found.num_controls == len(CONTROL.findall(text))
    han, latin, other = found.letters
    assert han == sum("\u4000" <= c <= "\u9fff" for c in text)
    narrow = [chr(ord(c) - 0xFEE0) if "！" <= c <= "～" else c for c in text]
    assert latin == sum(c.isascii() and c.isalpha() for c in narrow)
    assert other <= sum(ord(c) >= 0xC0 for c in text) - han
    kept = [c.lower() for c in narrow if c.isascii() and c.isalnum()]
    assert [c for c in found.bare.decode() if c.isascii() and c.isalnum()] == kept


def test_bare_text_keeps_letters_and_digits_alone():
    text = "“Hello”, Ｗorld — 你好，世界！（1+1＝２）\t【a_b】～"
    assert survey(text.encode()).bare.decode() == "helloworld你好世界1+1=2ab"


def test_report_is_the_same_in_windows_of_any_size(tmp_path, monkeypatch, capsys):
    rows = [json.dumps(record(f"问 {number}"), ensure_ascii=False) for number in range(3000)]
    rows[1500:1502] = ['{"instruction": ""}', rows[7]]
    rows[2000] = json.dumps(record("}, {" * 9000))  # as if rows ended and began in it
    for start, between, end in [("", "\n", "\n"), ("[", ",\n", "]")]:
        path = tmp_path / "a.json"
        path.write_text(start + between.join(rows) + end, encoding="utf-8")
        told = []
        for size in (1 << 16, 1 << 24, 100):
            monkeypatch.setattr(windows, "WINDOW_BYTES", size)
            config = ValidateSettings(files=(str(path),), json_path=str(tmp_path / "r.json"))
            with pytest.raises(UserError, match="1 of 3,000 rows cannot be used"):
                validate(config)
            report = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
            told.append((report["problems"], report["files"]))
        assert told[0] == told[1] == told[2]
        kinds = {problem["kind"]: problem["row"] for problem in told[0][0]}
        assert kinds == {"missing field": 1501, "duplicate": 1502}
