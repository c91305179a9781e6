"""`evaluate`: base and adapters on the same rows, from one loaded base, resumable side by side."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from glmtune.adapters import find_adapter
from glmtune.cli import main
from glmtune.config.settings import EvaluateSettings
from glmtune.errors import UserError
from glmtune.evaluation import evaluate as module
from glmtune.evaluation import source_run
from glmtune.evaluation.answers import ModelChoice
from glmtune.evaluation.evaluate import name_adapters
from glmtune.models.resolve import GLM_TINY
from glmtune.run_files import WEIGHTS_FILE


@pytest.fixture(scope="module")
def adapters(taught, tmp_path_factory):
    """The adapter that memorised the rows, and one whose update has the other sign."""
    folder = tmp_path_factory.mktemp("adapters")
    for name in ("good", "turned"):
        shutil.copytree(taught / "adapter", folder / name)
    path = folder / "turned" / WEIGHTS_FILE
    weights = load_file(path)
    save_file({name: -w if "lora_B" in name else w for name, w in weights.items()}, path)
    return folder


@pytest.fixture
def run(taught, adapters, tmp_path):
    """Evaluate with flags; gives exit code and evaluate.json."""

    def evaluate(*names, flags=()):
        line = ["--data_path", str(taught / "rows.json"), "--output_dir", str(tmp_path / "out")]
        if names:
            line += ["--adapter", ",".join(str(adapters / name) for name in names)]
        line += ["--base", GLM_TINY, "--use_cpu", "true", "--max_new_tokens", "12", *flags]
        code = main(["evaluate", *line])
        path = tmp_path / "out" / "evaluate.json"
        return code, json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    return evaluate


def compared(adapter, taught, folder):
    line = ["--data_path", str(taught / "rows.json"), "--output_dir", str(folder)]
    line += ["--base", GLM_TINY, "--use_cpu", "true", "--max_new_tokens", "12"]
    assert main(["compare", *line, "--adapter", str(adapter), "--general_set", "false"]) == 0
    return json.loads((folder / "compare.json").read_text(encoding="utf-8"))["languages"]


def test_each_adapter_is_judged_beside_the_base_as_compare_judges_it(
    run, adapters, taught, tmp_path, capsys
):
    code, found = run("good", "turned")
    assert code == 0
    assert list(found["sides"]) == ["base", "good", "turned"]
    assert found["cost"]["records"] == 3 * found["rows"] == 48
    for name, verdict in (("good", "better"), ("turned", "worse")):
        languages = found["sides"][name]["languages"]
        assert languages["all"]["verdict"] == verdict
        # Base and adapter are those of `compare`, number for number.
        assert languages == compared(adapters / name, taught, tmp_path / name)
    of_base = found["sides"]["base"]["languages"]
    of_good = found["sides"]["good"]["languages"]
    for part in ("zh", "en", "all"):
        for metric, of in of_base[part]["metrics"].items():
            assert of["mean"] == of_good[part]["metrics"][metric]["base"]
    out = capsys.readouterr().out
    assert "Chinese, 8 rows with a reference" in out
    assert "Better (chrF +" in out
    report = (tmp_path / "out" / "evaluate.md").read_text(encoding="utf-8")
    assert "| turned |" in report


def test_another_adapter_later_costs_its_own_answers_only(run, tmp_path, spy):
    calls = spy(module, "answer_sides")
    _, alone = run()
    assert list(alone["sides"]) == ["base"]
    _, with_one = run("good")
    _, with_two = run("good", "turned")
    assert [len(call.args[4]) for call in calls] == [16, 16, 16]
    assert with_two["sides"]["good"] == with_one["sides"]["good"]
    assert with_two["sides"]["base"] == alone["sides"]["base"]
    calls.clear()
    _, again = run("good", "turned")
    assert (calls, again["cost"]) == ([], None)
    assert again["sides"] == with_two["sides"]
    # Half of a file is gone on with.
    path = tmp_path / "out" / "turned.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text("".join(lines[:5]), encoding="utf-8")
    _, resumed = run("good", "turned")
    assert [len(call.args[4]) for call in calls] == [11]
    assert resumed["sides"] == again["sides"]


def test_answers_with_other_settings_are_not_gone_on_with(run, capsys):
    run("good", flags=["--limit", "2"])
    code, _ = run("good", flags=["--limit", "2", "--repetition_penalty", "1.5"])
    assert code == 2
    assert "repetition_penalty" in capsys.readouterr().err


def test_few_rows_have_scores_and_no_verdict(run, capsys):
    code, found = run("good", flags=["--limit", "3"])
    assert code == 0
    assert found["sides"]["good"]["languages"]["all"]["verdict"] == "undecided"
    assert "too few rows" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ([], "data_path has to name a file of rows"),
        (["--adapter", "{0}/good,{0}/good", "--data_path", "{1}"], "is named twice"),
        (["--adapter", "{0}/good"], "no recipe.yaml says which rows its run held out"),
        (["--adapter", "{0}/good,{0}/none", "--data_path", "{1}"], "no such folder"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_in_one_line(flags, told, adapters, taught, capsys):
    texts = [flag.format(adapters, taught / "rows.json") for flag in flags]
    assert main(["evaluate", "--base", GLM_TINY, *texts]) == 2
    err = capsys.readouterr().err
    assert told in err
    assert err.count("\n") == 1


def test_adapters_of_one_name_are_told_apart_by_their_folders(tmp_path):
    paths = [tmp_path / name for name in ("a/run", "b/run", "c/base", "c/other", "d/checkpoint-9")]
    for path in paths:
        path.mkdir(parents=True)
    assert list(name_adapters(paths)) == ["a/run", "b/run", "c/base", "other", "d/checkpoint-9"]
    with pytest.raises(UserError, match="named twice"):
        name_adapters([paths[0], tmp_path / "a" / ".." / "a" / "run"])


def test_an_adapter_of_another_run_may_have_seen_the_rows(monkeypatch, tmp_path, capsys):
    runs = {"one": {"seed": 1}, "same": {"seed": 1}, "other": {"seed": 2}, "unknown": None}
    monkeypatch.setattr(
        source_run,
        "_identity",
        lambda path: {"data sha256": "x"} | runs[path.name] if runs[path.name] else {},
    )
    module._tell_of_other_runs({name: tmp_path / name for name in runs})
    err = capsys.readouterr().err
    assert [name in err for name in ("same:", "other:", "unknown:")] == [False, True, True]


def test_the_first_adapter_of_several_names_the_base(adapters):
    named = str(adapters / "good"), str(adapters / "turned")
    settings = EvaluateSettings(data_path="rows.json", adapter=named, base=GLM_TINY)
    assert ModelChoice.of(settings).adapter == find_adapter(named[0])


def test_a_base_is_as_it_was_after_an_adapter_was_on_it(adapters):
    """One base serves all adapters, one after another."""
    settings = EvaluateSettings(data_path="r", adapter=(str(adapters / "good"),), base=GLM_TINY)
    subject = ModelChoice.of(settings)
    alone = ModelChoice.of(EvaluateSettings(data_path="r", base=GLM_TINY))
    base, _ = alone.load()
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    subject.attach(base).unload()
    assert all(tensor.equal(before[name]) for name, tensor in base.state_dict().items())
    assert alone.attach(base) is base
