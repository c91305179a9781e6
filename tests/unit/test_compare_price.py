"""The price in `compare`: figures, files, resuming, and what it refuses."""

import json
from pathlib import Path

import pytest

from glmtune.cli import main
from glmtune.evaluation.general import GENERAL_FILE
from glmtune.general.items import GeneralSet, find_general
from glmtune.models.resolve import GLM_TINY

RECORDS = [{"instruction": f"Who is {name}?", "output": name} for name in ("Mira", "Ben", "Tom")]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("price")
    (folder / "rows.json").write_text(json.dumps(RECORDS), encoding="utf-8")
    lines = Path(GLM_TINY, "general_en.jsonl").read_text(encoding="utf-8").splitlines()[::17]
    (folder / "few.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (folder / "other.jsonl").write_text("\n".join(lines[2:]), encoding="utf-8")
    (folder / "bad.jsonl").write_text("nonsense\n", encoding="utf-8")
    return folder


@pytest.fixture
def run(files, strange_adapter, tmp_path):
    """Compare with flags; gives the exit code and compare.json."""

    def compare(general, *flags):
        path = tmp_path / "out" / "compare.json"
        path.unlink(missing_ok=True)
        given = {"data_path": files / "rows.json", "adapter": strange_adapter, "base": GLM_TINY}
        given |= {"output_dir": tmp_path / "out", "general_set": general, "max_new_tokens": 4}
        words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
        code = main(["compare", *words, "--use_cpu", "true", *flags])
        return code, json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    return compare


def test_base_and_tuned_are_scored_and_every_output_says_it(run, files, tmp_path, capsys):
    code, found = run(files / "few.jsonl")
    assert code == 0
    price = found["price"]
    assert list(price) == ["en", "all"]
    assert price["en"] == price["all"]
    assert (price["en"]["n"], price["en"]["before"]) == (12, 100.0)
    assert price["en"]["log_prob"]["after"] < price["en"]["log_prob"]["before"]
    assert price["en"]["low"] <= price["en"]["after"] - 100.0 <= price["en"]["high"]
    assert price["en"]["kinds"].keys() >= {"colour", "story"}
    assert found["general_set"] == "few.jsonl"
    assert "The price: of 12 general questions (few.jsonl)" in capsys.readouterr().out
    for name in ("compare.md", "compare.html"):
        text = (tmp_path / "out" / name).read_text(encoding="utf-8")
        assert "各题型的代价" in text
        assert "故事" in text


def test_a_rerun_takes_the_price_that_is_kept(run, files, spy, tmp_path):
    from glmtune.evaluation import general

    calls = spy(general.BothScores, "of")
    _, first = run(files / "few.jsonl")
    _, again = run(files / "few.jsonl")
    assert (again["price"], len(calls)) == (first["price"], 1)
    # A damaged copy, another set, and new answers: each is scored anew.
    (tmp_path / "out" / GENERAL_FILE).write_text('{"made_with": 3}', encoding="utf-8")
    assert run(files / "few.jsonl")[1]["price"] == first["price"]
    assert len(calls) == 2
    _, other = run(files / "other.jsonl")
    assert (other["price"]["all"]["n"], len(calls)) == (10, 3)
    run(files / "other.jsonl", "--overwrite_output", "true")
    assert len(calls) == 4


def test_a_comparison_that_was_stopped_goes_on_with_the_same_price(run, files, tmp_path):
    _, whole = run(files / "few.jsonl")
    answers = tmp_path / "out" / "compare.jsonl"
    lines = answers.read_text(encoding="utf-8").splitlines(keepends=True)
    answers.write_text(lines[0], encoding="utf-8")
    (tmp_path / "out" / GENERAL_FILE).unlink()
    _, resumed = run(files / "few.jsonl")
    assert resumed["price"] == whole["price"]
    assert answers.read_text(encoding="utf-8") == "".join(lines)


def test_without_a_general_set_there_is_no_price(run, tmp_path, capsys):
    code, found = run("false")
    assert (code, found["price"], found["general_set"]) == (0, None, None)
    assert "The price" not in capsys.readouterr().out
    assert not (tmp_path / "out" / GENERAL_FILE).exists()


def test_the_set_of_the_bases_folder_is_asked_by_default(run, monkeypatch):
    from glmtune.evaluation import compare

    def a_few(wish, base):
        found = find_general(wish, base)
        return GeneralSet(found.items[::40], found.name)

    monkeypatch.setattr(compare, "find_general", a_few)
    _, found = run("true", "--limit", "1")
    assert found["general_set"] == "glm-tiny's own"
    assert found["price"]["zh"]["n"] + found["price"]["en"]["n"] == found["price"]["all"]["n"] == 11


@pytest.mark.parametrize("name", ["bad.jsonl", "nowhere.jsonl"])
def test_a_file_that_is_no_set_is_one_line(run, files, tmp_path, capsys, name):
    assert run(files / name)[0] == 2
    err = capsys.readouterr().err.splitlines()
    assert len([line for line in err if name in line]) == 1
    assert not (tmp_path / "out").exists()
