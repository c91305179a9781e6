"""`engine ray` without Ray: rows read in parts are the rows, whatever the file is like.

What workers do is done here one after another; tests/recipes/test_ray.py has a Ray.
"""

import json
import pickle
from pathlib import Path

import pytest
from spread_files import dumps, records, report, tokens_of

from glmtune.cli import main, run
from glmtune.data import parts, spread_rows, tokenizing
from glmtune.data.parts import PartReader, cut


@pytest.fixture
def spread(monkeypatch):
    """Small parts, which one process works on in turn; what it gets and gives is copied."""
    num_parts = []

    def over(work, items):
        num_parts.append(len(items))
        for item in items:
            for result in pickle.loads(pickle.dumps(work))(item):
                yield pickle.loads(pickle.dumps(result))

    from contextlib import nullcontext

    monkeypatch.setattr("glmtune.spread.running_ray", lambda address: nullcontext())
    monkeypatch.setattr("glmtune.data.spread_rows.over", over)
    monkeypatch.setattr("glmtune.data.validation.spread_check.over", over)
    monkeypatch.setattr(parts, "PART_BYTES", 40_000)
    monkeypatch.setattr(spread_rows, "BYTES_BETWEEN_PLACES", 10_000)
    monkeypatch.setattr(spread_rows, "CHARACTERS_PER_STRETCH", 9_000)
    for name in ("ROWS_PER_BATCH", "CONVERSATIONS_PER_BATCH"):
        monkeypatch.setattr(tokenizing, name, 100)
    monkeypatch.setattr(tokenizing, "CHARACTERS_PER_BATCH", 5_000)
    monkeypatch.setattr(spread_rows, "CHARACTERS_PER_BATCH", 5_000)
    return num_parts


def talks(num=1500):
    for number in range(num):
        turns = [
            {"role": "user" if turn % 2 == 0 else "assistant", "content": f"{number} {turn} " * 3}
            for turn in range(2 * (1 + number % 3))
        ]
        yield {"messages": turns}


FILES = {
    "lines.jsonl": lambda: "\n".join(map(dumps, records())) + "\n",
    "blank.jsonl": lambda: "\n \n".join(map(dumps, records())) + "\n\n\n",
    "list.json": lambda: json.dumps([*records()], ensure_ascii=False),
    "pretty.json": lambda: json.dumps([*records()], ensure_ascii=False, indent=1),
    "talks.json": lambda: json.dumps([*talks()], ensure_ascii=False, indent=2),
    "texts.jsonl": lambda: "\n".join(dumps({"text": r["output"] * 9}) for r in records()),
    "rows.jsonl": lambda: "\n".join(
        dumps({"context": r["instruction"], "target": r["output"]}) for r in records()
    ),
    "earlier.jsonl": lambda: "\n".join(
        dumps(r | ({"history": [["你", "我"]]} if i == 2900 else {}))
        for i, r in enumerate(records())
    ),
    "huge.jsonl": lambda: "\n".join(
        dumps(r | {"output": "长" * 90_000} if i in (40, 41, 2000) else r)
        for i, r in enumerate(records())
    ),
    "traps.json": lambda: json.dumps(
        [{"instruction": '}, {"instruction": ' * 9000, "output": "a"}, *records()]
    ),
    "bad.jsonl": lambda: "\n".join(
        '{"instruction": 1}' if i % 701 == 9 else dumps(r) for i, r in enumerate(records())
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_tokens_are_those_of_the_local_engine(name, spread, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path(name).write_text(FILES[name](), encoding="utf-8")
    flags = ["--jsonl_path", name, "--on_bad_row", "skip"]
    local = tokens_of(capsys, "local", *flags)
    assert local[0] == 0
    assert tokens_of(capsys, "ray", *flags, "--engine", "ray") == local
    looked, encoded = spread
    assert looked > 3
    assert encoded > 3


@pytest.mark.parametrize("name", FILES)
def test_problems_are_those_of_the_local_engine(name, spread, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path(name).write_text(FILES[name](), encoding="utf-8")
    assert report(name) == report(name, "--engine", "ray")
    assert spread[0] > 3
    capsys.readouterr()


BROKEN = {
    "comma.json": ('}, {"instruction": "问题 2500', '} {"instruction": "问题 2500'),
    "row.json": ('"instruction": "问题 2500', '"instruction" "问题 2500'),
    "cut.json": ('"}]', ""),
    "first.json": ('"instruction": "问题 7:', '"instruction" "问题 7:'),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_list_is_told_as_by_the_local_engine(name, spread, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    lines = [dumps(r) for r in records()]
    lines[1200] = '{"instruction": "问题"}'
    text = "[" + ",\n".join(lines) + "]" if name == "row.json" else "[" + ", ".join(lines) + "]"
    broken = text.replace(*BROKEN[name])
    assert broken != text
    Path(name).write_text(broken, encoding="utf-8")
    assert report(name) == report(name, "--engine", "ray")
    capsys.readouterr()
    local = tokens_of(capsys, "local", "--jsonl_path", name)
    assert local[0] == 2
    assert tokens_of(capsys, "ray", "--jsonl_path", name, "--engine", "ray") == local


def test_several_files_and_rows_that_are_taken_twice(spread, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("lines.jsonl", "pretty.json", "rows.jsonl"):
        Path(name).write_text(FILES[name](), encoding="utf-8")
    recipe = {
        "datasets": [
            {"path": "lines.jsonl", "weight": 1.7},
            {"path": "pretty.json#900"},
        ],
        "replay": "rows.jsonl",
        "replay_share": 0.2,
        "zh_share": 0.5,
    }
    Path("recipe.yaml").write_text(json.dumps(recipe), encoding="utf-8")
    local = tokens_of(capsys, "local", "recipe.yaml")
    assert local[0] == 0
    assert tokens_of(capsys, "ray", "recipe.yaml", "--engine", "ray") == local


def test_a_folder_of_files_of_every_kind(spread, tmp_path, monkeypatch, capsys):
    import pyarrow as pa
    import pyarrow.parquet as pq

    monkeypatch.chdir(tmp_path)
    Path("many").mkdir()
    rows = [*records()]
    Path("many/a.jsonl").write_text("\n".join(map(dumps, rows[:1000])), encoding="utf-8")
    pq.write_table(pa.Table.from_pylist(rows[1000:2000]), "many/b.parquet")
    Path("many/c.json").write_text(json.dumps(rows[2000:], indent=1), encoding="utf-8")
    local = tokens_of(capsys, "local", "--jsonl_path", "many")
    assert local[0] == 0
    assert tokens_of(capsys, "ray", "--jsonl_path", "many", "--engine", "ray") == local
    assert report("many") == report("many", "--engine", "ray")
    capsys.readouterr()


def test_a_stopped_command_is_resumed(spread, tmp_path, monkeypatch, capsys):
    """By either engine, since both write the same files."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("glmtune.data.token_files.TOKENS_PER_FILE", 9000)
    Path("lines.jsonl").write_text(FILES["lines.jsonl"](), encoding="utf-8")
    flags = ["--jsonl_path", "lines.jsonl"]
    local = tokens_of(capsys, "local", *flags)
    made = spread_rows.encode

    def stops(*given):
        for number, batch in enumerate(made(*given)):
            if number == 17:
                raise KeyboardInterrupt
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr(spread_rows, "encode", stops)
        assert tokens_of(capsys, "ray", *flags, "--engine", "ray")[0] == 130
    code, out, notes, files = tokens_of(
        capsys, "ray", *flags, "--engine", "ray", "--resume", "true"
    )
    assert (code, out, files) == (local[0], local[1], local[3])
    assert "goes on after" in notes[0]


def test_a_cut_inside_of_a_text_makes_parts_void(tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "PART_BYTES", 1000)
    path = tmp_path / "traps.json"
    inner = [{"q": number} for number in range(500)]  # as if rows ended and began in a row
    rows = [{"q": inner}, *({"q": f"row {number}"} for number in range(500))]
    path.write_text(json.dumps(rows), encoding="utf-8")
    pieces = cut(str(path), None)
    first = PartReader(pieces[0], None)
    values = [value for _, batch in first for value in batch.values]
    assert values == rows[: len(values)]
    assert pieces[1].start < first.ended_at
    assert first.ended_at in [piece.start for piece in pieces]


def test_settings_without_effect_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    common = ["tokenize", "--jsonl_path", "a.jsonl", "--save_path", "b", "--base", "glm-tiny"]
    for more, told in (
        (["--ray_address", "10.0.0.1:6379"], "ray_address 10.0.0.1:6379 has no effect"),
        (["--engine", "ray", "--num_threads", "2"], "num_threads has no effect with engine ray"),
        (["--engine", "spark"], "engine"),
    ):
        assert main([*common, *more]) == 2
        assert told in capsys.readouterr().err


def test_without_ray_the_line_says_how_to_install_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("a.jsonl").write_text(dumps(next(records())), encoding="utf-8")
    monkeypatch.setattr("glmtune.spread.find_spec", lambda name: None)
    assert main(["validate", "a.jsonl", "--engine", "ray"]) == 2
    assert "pip install 'glmtune[ray]'" in capsys.readouterr().err
    assert run(["validate", "a.jsonl"]) == 0
