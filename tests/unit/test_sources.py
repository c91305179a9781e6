"""dataset_info.json as LLaMA-Factory has it, and folders of files."""

import json
import os

import datasets
import pytest

from glmtune.cli import main
from glmtune.data.row_files import look_through
from glmtune.data.sources import find_source
from glmtune.errors import UserError

PLAIN = [{"instruction": f"q{i}", "input": "i" * (i % 2), "output": f"a{i}"} for i in range(5)]
NAMED = [{"ask": f"q{i}", "more": "m", "reply": f"a{i}", "old": [["x", "y"]]} for i in range(3)]
TALKS = [
    {
        "dialog": [
            {"who": "SYS", "said": "be brief"},
            {"who": "ME", "said": "weather?"},
            {"who": "CALL", "said": '{"name": "f", "arguments": {}}'},
            {"who": "RESULT", "said": "sunny"},
            {"who": "YOU", "said": "Sunny."},
        ],
        "functions": '[{"name": "f"}]',
        "id": 7,
    }
]
TALKS_ENTRY = {
    "file_name": "talks.jsonl",
    "formatting": "sharegpt",
    "columns": {"messages": "dialog", "tools": "functions"},
    "tags": {
        "role_tag": "who",
        "content_tag": "said",
        "user_tag": "ME",
        "assistant_tag": "YOU",
        "observation_tag": "RESULT",
        "function_tag": "CALL",
        "system_tag": "SYS",
    },
}
NAMED_ENTRY = {
    "file_name": "named.json",
    "columns": {"prompt": "ask", "query": "more", "response": "reply", "history": "old"},
}


@pytest.fixture(autouse=True)
def _data(tmp_path, monkeypatch):
    """A folder of files beside which a list will stand."""
    monkeypatch.chdir(tmp_path)
    data = tmp_path / "data"
    (data / "parts").mkdir(parents=True)
    (data / "plain.json").write_text(json.dumps(PLAIN), encoding="utf-8")
    (data / "named.json").write_text(json.dumps(NAMED), encoding="utf-8")
    (data / "talks.jsonl").write_text(json.dumps(TALKS[0]), encoding="utf-8")
    (data / "parts" / "2.jsonl").write_text(json.dumps(PLAIN[2]), encoding="utf-8")
    (data / "parts" / "1.json").write_text(json.dumps(PLAIN[:2]), encoding="utf-8")
    (data / "parts" / ".hidden").write_text("?", encoding="utf-8")


def listed(entry, name="mine", **others):
    """The path of an entry in a list that has it, and others."""
    with open("data/dataset_info.json", "w", encoding="utf-8") as file:
        json.dump({name: entry, **others}, file)
    return f"data/dataset_info.json#{name}"


def contexts(path):
    return [row.context for row in look_through(path).rows()]


def test_columns_that_are_not_named_have_the_names_of_alpaca():
    assert contexts(listed({"file_name": "plain.json"})) == contexts("data/plain.json")
    assert len(contexts("data/dataset_info.json#mine")) == 5


def test_columns_have_the_names_of_the_list(capsys):
    file = look_through(listed(NAMED_ENTRY))
    first = next(file.rows())
    assert [(turn.role, turn.text) for turn in first.example.turns] == [
        ("user", "x"),
        ("assistant", "y"),
        ("user", "q0\nm"),
        ("assistant", "a0"),
    ]
    assert first.where == "data/named.json:1 (row 1)"
    fewer = {key: name for key, name in NAMED_ENTRY["columns"].items() if key != "history"}
    assert not look_through(listed(NAMED_ENTRY | {"columns": fewer})).has_turns
    told = capsys.readouterr().err
    assert 'columns that dataset_info.json does not name are left out: ["old"]' in told


def test_turns_of_openai_may_have_tags_too():
    tags = {k: v for k, v in TALKS_ENTRY["tags"].items() if k != "function_tag"}
    talk = {"dialog": [turn for turn in TALKS[0]["dialog"] if turn["who"] in ("SYS", "ME", "YOU")]}
    with open("data/talks.jsonl", "w", encoding="utf-8") as file:
        json.dump(talk, file)
    columns = {"messages": "dialog"}
    entry = TALKS_ENTRY | {"formatting": "openai", "tags": tags, "columns": columns}
    file = look_through(listed(entry))
    (row,) = file.rows()
    assert file.format == "messages"
    assert [(turn.role, turn.text) for turn in row.example.turns] == [
        ("system", "be brief"),
        ("user", "weather?"),
        ("assistant", "Sunny."),
    ]


def test_turns_have_the_tags_of_the_list():
    file = look_through(listed(TALKS_ENTRY))
    (row,) = file.rows()
    assert [(turn.role, turn.text) for turn in row.example.turns] == [
        ("system", "be brief"),
        ("user", "weather?"),
        ("assistant", "{}"),
        ("observation", "sunny"),
        ("assistant", "Sunny."),
    ]
    assert row.example.tools == ({"name": "f"},)
    assert file.format == "sharegpt"


def test_a_list_may_name_a_folder_and_fewer_rows(capsys):
    path = listed({"file_name": "parts"})
    assert contexts(path) == contexts("data/plain.json")[:3]
    os.mkdir("data/parts/more")
    assert contexts("data/parts") == contexts(path)
    assert "data/parts: folders inside it are not read: more" in capsys.readouterr().err
    os.mkdir("data/none")
    with pytest.raises(UserError, match="data/none: a folder without a file of rows"):
        contexts("data/none")
    assert [row.where for row in look_through(path).rows()] == [
        "data/parts/1.json:1 (row 1)",
        "data/parts/1.json:1 (row 2)",
        "data/parts/2.jsonl:1 (row 3)",
    ]
    assert len(contexts(listed({"file_name": "plain.json", "num_samples": 2}))) == 2
    assert len(contexts(listed({"file_name": "plain.json", "num_samples": 9}))) == 5
    assert "num_samples is 9, and there are 4 rows fewer" in capsys.readouterr().err
    assert find_source(path).digest != find_source("data/parts").digest


def test_a_folder_of_datasets_is_read_by_its_own_list():
    rows = datasets.Dataset.from_list(PLAIN)
    rows.save_to_disk("data/saved", num_shards=2)
    assert contexts("data/saved") == contexts("data/plain.json")
    datasets.DatasetDict(train=rows, test=rows.select([0])).save_to_disk("data/splits")
    with pytest.raises(UserError, match="holds the splits train, test; name one of them as data/s"):
        contexts("data/splits")
    assert len(contexts("data/splits/test")) == 1
    assert len(contexts(listed({"file_name": "splits"}))) == 5
    assert len(contexts(listed({"file_name": "splits", "split": "test"}))) == 1


@pytest.mark.parametrize(
    ("entry", "told"),
    [
        ({"hf_hub_url": "a/b"}, "has hf_hub_url, and rows are read from files: download them"),
        ({"ms_hub_url": "a/b"}, "has ms_hub_url, and rows"),
        ({"script_url": "a"}, "has script_url, and rows"),
        ({"cloud_file_name": "s3://a"}, "has cloud_file_name, and rows"),
        ({"file_name": "plain.json", "ranking": True}, "has ranking: pairs of a better and a w"),
        ({"file_name": "plain.json", "colums": {}}, "has colums, which is not known; take it out"),
        ({"file_name": "plain.json", "formatting": "x"}, "formatting is x; only alpaca, sharegpt"),
        ({"formatting": "alpaca"}, "file_name is null, not a name"),
        ({"file_name": "plain.json", "num_samples": 0}, "num_samples is 0; write a number"),
        ({"file_name": "plain.json", "split": "test"}, "split is test, and data/plain.json is a"),
        (
            NAMED_ENTRY | {"columns": {"prompt": "ask", "images": "i"}},
            "columns has images, which is not taught; take it out",
        ),
        (NAMED_ENTRY | {"columns": {"prompt": "ask"}}, 'columns has no "response"; add'),
        (NAMED_ENTRY | {"tags": {"user_tag": "u"}}, "tags has user_tag, which alpaca rows do not"),
        (TALKS_ENTRY | {"tags": {"usr_tag": "u"}}, "tags has usr_tag, which sharegpt rows do not"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(entry, told):
    with pytest.raises(UserError) as error:
        look_through(listed(entry))
    assert str(error.value).startswith("data/dataset_info.json: mine")
    assert told in str(error.value)


def test_names_that_match_nothing_are_refused():
    path = listed(NAMED_ENTRY, other={})
    with pytest.raises(UserError, match="lists no data set your, only mine, other; name one of"):
        look_through("data/dataset_info.json#your")
    with pytest.raises(UserError, match=r"lists the data sets mine, other; name one .* as data/"):
        look_through("data/dataset_info.json")
    with pytest.raises(UserError, match="is listed as alpaca, and format is messages; leave"):
        look_through(path, "messages")
    for column in ("system", "history"):
        columns = NAMED_ENTRY["columns"] | {column: "sys"}
        with pytest.raises(UserError, match=f'no column is named "sys", as columns.{column} in'):
            look_through(listed(NAMED_ENTRY | {"columns": columns}))
    wrong = TALKS_ENTRY | {"tags": {"role_tag": "by"}}
    with pytest.raises(UserError, match=r'row 1\): turn 1 of "dialog" has no "by", it has \["who"'):
        look_through(listed(wrong))
    with pytest.raises(UserError, match=r"data/no.json: cannot be read"):
        look_through(listed({"file_name": "no.json"}))


def test_every_verb_reads_them(capsys):
    path = listed({"file_name": "parts"})
    assert main(["validate", path, "data/plain.json"]) == 0
    told = capsys.readouterr().out
    assert "data/parts/1.json: alpaca, 2 rows" in told
    assert "data/parts/2.jsonl: alpaca, 1 rows" in told
    assert main(["convert", "--data_path", path, "--save_path", "rows.jsonl"]) == 0
    line = ["--jsonl_path", path, "--base", "glm-tiny"]
    assert main(["tokenize", *line, "--save_path", "tokens"]) == 0
    assert len(datasets.load_from_disk("tokens")) == 3
    assert main(["inspect", *line, "--limit", "1"]) == 0
    assert "data/parts/1.json:1 (row 1)" in capsys.readouterr().out
    assert main(["validate", "data/dataset_info.json#no"]) == 2
    assert "lists no data set no, only mine" in capsys.readouterr().out
