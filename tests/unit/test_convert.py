"""alpaca -> JSON lines: what is written and reported, and what an error leaves unchanged."""

import json
import os

import pytest

from glmtune.config.settings import ConvertSettings
from glmtune.data import files
from glmtune.data.convert import convert
from glmtune.errors import UserError

RECORDS = [
    {"instruction": "列出三原色", "input": "", "output": "红、黄、蓝"},
    {"instruction": "翻译", "input": "你好", "output": "hello\n\u2028"},
    {"instruction": "沉默", "output": ""},
]


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write(records: list) -> str:
    with open("a.json", "w", encoding="utf-8") as file:
        json.dump(records, file, ensure_ascii=False, indent=1)
    return "a.json"


def test_writes_readable_rows_in_order(capsys):
    summary = convert(ConvertSettings(data_path=write(RECORDS), save_path="new/a.jsonl"))
    with open("new/a.jsonl", encoding="utf-8", newline="") as file:
        lines = file.read().split("\n")
    assert lines[0] == '{"context": "Instruction: 列出三原色\\nAnswer: ", "target": "红、黄、蓝"}'
    assert [json.loads(line)["target"] for line in lines[:-1]] == [
        "红、黄、蓝",
        "hello\n\u2028",
        "",
    ]
    assert lines[-1] == ""
    assert (summary.num_written, summary.empty_outputs) == (3, [3])
    assert "3 records read, 3 rows written" in capsys.readouterr().out


def test_tells_of_skipped_rows_and_unused_fields(capsys):
    data_path = write([*RECORDS, {"instruction": "a"}, RECORDS[0] | {"id": []}])
    config = ConvertSettings(data_path=data_path, save_path="a.jsonl", on_bad_row="skip")
    summary = convert(config)
    assert (summary.num_written, [bad.row for bad in summary.bad_rows]) == (4, [4])
    told = capsys.readouterr().out
    assert "5 records read, 4 rows written" in told
    assert 'a.json:16 (row 4): field "output" is missing' in told
    assert 'with a field "id", which is not used' in told


def test_an_error_leaves_the_earlier_file_and_nothing_else():
    convert(ConvertSettings(data_path=write(RECORDS), save_path="a.jsonl"))
    before = open("a.jsonl", "rb").read()  # noqa: SIM115
    write([*RECORDS, {"output": "b"}])
    with pytest.raises(UserError, match='field "instruction" is missing'):
        convert(ConvertSettings(data_path="a.json", save_path="a.jsonl"))
    assert open("a.jsonl", "rb").read() == before  # noqa: SIM115
    assert sorted(os.listdir()) == ["a.json", "a.jsonl"]


@pytest.mark.parametrize("save_path", ["folder", "a.json/b.jsonl", "pipe"])
def test_an_unwritable_path_is_told_in_one_line(save_path):
    os.mkdir("folder")
    os.mkfifo("pipe")  # an example of a special file; a broken check could destroy a real one
    with pytest.raises(UserError, match=f"^{save_path}: ") as error:
        convert(ConvertSettings(data_path=write(RECORDS), save_path=save_path))
    assert "\n" not in str(error.value)
    assert sorted(os.listdir()) == ["a.json", "folder", "pipe"]


def test_a_full_disk_leaves_nothing_half_written(monkeypatch):
    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "replace", refuse)
    with pytest.raises(UserError, match=r"cannot be written \(No space left on device\)"):
        convert(ConvertSettings(data_path=write(RECORDS), save_path="a.jsonl"))
    assert os.listdir() == ["a.json"]


def test_a_symbolic_link_keeps_pointing_at_what_is_replaced():
    os.mkdir("elsewhere")
    os.symlink("elsewhere/real.jsonl", "a.jsonl")
    convert(ConvertSettings(data_path=write(RECORDS), save_path="a.jsonl"))
    assert os.path.islink("a.jsonl")
    assert os.path.getsize("elsewhere/real.jsonl") > 0
