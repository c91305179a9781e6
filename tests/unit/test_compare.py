"""`compare`: base and tuned answers from one model, resumable, as three files."""

import json
from pathlib import Path

import pytest
import torch

from glmtune.cli import main
from glmtune.config.settings import CompareSettings, InferSettings
from glmtune.errors import UserError
from glmtune.evaluation.compare import compare
from glmtune.evaluation.infer import infer


@pytest.fixture
def run(answering):
    return lambda **changes: compare(
        CompareSettings(**(answering | {"general_set": False} | changes))
    )


@pytest.fixture
def folder(answering):
    return Path(answering["adapter"], "compare")


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("sampling", [{}, {"do_sample": True, "seed": 7}])
def test_both_sides_are_what_infer_answers(run, folder, answering, tmp_path, sampling):
    comparison = run(**sampling)
    for side, adapter in (("base", None), ("tuned", answering["adapter"])):
        output = tmp_path / f"{side}.jsonl"
        changes = sampling | {"adapter": adapter, "output_path": str(output)}
        infer(InferSettings(**(answering | changes)))
        answers = [line["answer"] for line in read(output)]
        assert answers == [line[side]["text"] for line in read(folder / "compare.jsonl")]
        assert answers == [getattr(pair, side).text for pair in comparison.pairs]
    assert comparison.num_different > 0, "the adapter must matter"


def test_the_three_files_tell_the_same(run, folder, capsys):
    comparison = run(limit=3)
    lines = read(folder / "compare.jsonl")
    assert [line["row"] for line in lines] == [1, 2, 3]
    page = (folder / "compare.html").read_text(encoding="utf-8")
    report = (folder / "compare.md").read_text(encoding="utf-8")
    for line in lines:
        for side in ("base", "tuned"):
            assert line[side]["text"] in report
    for text in ("chatglm-6b-tiny", "output_zh", "max_new_tokens 6", "给出三个 保持健康的 秘诀。"):
        assert text in page
    assert comparison.verdict.en in page
    assert comparison.verdict.en in capsys.readouterr().out
    assert {path.name for path in folder.iterdir()} == {
        *("compare.html", "compare.md", "compare.json", "compare.jsonl", "compare.settings.json"),
        *("compare.strange.jsonl", "compare.strange.settings.json"),
    }


def test_a_resumed_comparison_equals_an_unbroken_one(run, folder):
    run()
    names = ("compare.jsonl", "compare.md")
    whole = {name: (folder / name).read_text(encoding="utf-8") for name in names}
    path = folder / "compare.jsonl"
    path.write_bytes(path.read_bytes()[:-100])
    run()
    assert path.read_text(encoding="utf-8") == whole["compare.jsonl"]
    without_time = [
        [line for line in text.splitlines() if "Date" not in line and "Answering" not in line]
        for text in ((folder / "compare.md").read_text(encoding="utf-8"), whole["compare.md"])
    ]
    assert without_time[0] == without_time[1]


def test_a_finished_comparison_loads_no_model(run, folder, monkeypatch):
    run()
    before = (folder / "compare.html").read_bytes()
    cost = json.loads((folder / "compare.json").read_text(encoding="utf-8"))["cost"]
    (folder / "compare.html").unlink()
    monkeypatch.setattr(
        "glmtune.evaluation.answers.load_base_model", lambda *_, **__: pytest.fail("loaded")
    )
    run()
    assert (folder / "compare.html").read_bytes() == before
    assert json.loads((folder / "compare.json").read_text(encoding="utf-8"))["cost"] == cost


def test_a_stop_string_that_cannot_occur_is_refused(run):
    with pytest.raises(UserError, match="stop string ''"):
        run(stop_strings=("",))


def test_an_adapter_without_effect_is_told(run, answering, capsys):
    path = Path(answering["adapter"], "adapter_model.bin")
    weights = torch.load(path, weights_only=True)
    torch.save({name: 1e-4 * tensor for name, tensor in weights.items()}, path)
    assert run().num_different == 0
    assert "the adapter changes nothing here" in capsys.readouterr().out


def test_a_shorter_limit_shows_fewer(run, folder):
    run()
    comparison = run(limit=2)
    assert len(comparison.pairs) == 2
    assert len(read(folder / "compare.jsonl")) == 5


def test_answers_of_infer_are_not_gone_on_with(run, folder, answering):
    infer(InferSettings(**answering, output_path=str(folder / "compare.jsonl")))
    with pytest.raises(UserError, match="verb infer, this run has compare"):
        run()


def test_compare_command_writes_its_files(answering, tmp_path, capsys):
    given = answering | {"general_set": False}
    flags = [text for name, value in given.items() for text in (f"--{name}", str(value))]
    assert main(["compare", *flags, "--output_dir", str(tmp_path / "new" / "page")]) == 0
    assert "of 5 answers differ" in capsys.readouterr().out
    assert (tmp_path / "new" / "page" / "compare.html").is_file()
