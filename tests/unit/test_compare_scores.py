"""`compare` on a real adapter: verdict, files, gate, held-out rows, and what it refuses."""

import json
import math

import pytest
from safetensors.torch import load_file, save_file
from toys import QUESTIONS

from glmtune.cli import main
from glmtune.data.split import split_rows
from glmtune.evaluation.probes import STRANGE_QUESTIONS
from glmtune.models.resolve import GLM_TINY
from glmtune.run_files import WEIGHTS_FILE

NO_PRICE = ("--general_set", "false")


@pytest.fixture
def run(taught, tmp_path):
    """Compare with flags; gives exit code and compare.json."""

    def compare(*flags, **paths):
        named = {
            "data_path": taught / "rows.json",
            "adapter": taught / "adapter",
            "output_dir": tmp_path / "out",
            "base": GLM_TINY,
        } | paths
        settings = [
            text for name, value in named.items() if value for text in (f"--{name}", str(value))
        ]
        code = main(
            ["compare", *settings, "--use_cpu", "true", "--max_new_tokens", "12", *NO_PRICE, *flags]
        )
        path = tmp_path / "out" / "compare.json"
        return code, json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    return compare


def test_a_good_adapter_is_called_better_in_each_language(run, tmp_path, capsys):
    code, found = run("--gate", "better")
    assert code == 0
    for part, num_rows in (("zh", 8), ("en", 8), ("all", 16)):
        of = found["languages"][part]
        assert (of["n"], of["verdict"], of["judged_by"]) == (num_rows, "better", "chrf")
        assert of["smallest_difference"] > 0
        for name in ("exact", "chrf", "rouge_l", "log_prob"):
            metric = of["metrics"][name]
            assert metric["base"] < metric["tuned"]
            assert 0 < metric["low"] <= metric["difference"] <= metric["high"]
            assert metric["difference"] == pytest.approx(metric["tuned"] - metric["base"])
        loss = of["corpus"]["tuned"]["loss"]
        assert of["corpus"]["tuned"]["perplexity"] == pytest.approx(math.exp(loss))
    assert {"price", "collapse", "cost"} <= found.keys()
    assert found["cost"]["records"] == 16 + len(STRANGE_QUESTIONS)
    assert found["cost"]["tokens"] > 0
    out = capsys.readouterr().out
    assert "Better: over 16 rows chrF changes by +" in out
    assert "gate better: passed" in out
    page = (tmp_path / "out" / "compare.html").read_text(encoding="utf-8")
    assert found["sentence"]["zh"] in page
    assert "<table>" in page
    assert "32 questions answered twice" in page
    lines = (tmp_path / "out" / "compare.jsonl").read_text(encoding="utf-8").splitlines()
    scored = [json.loads(line)["reference"] for line in lines]
    sums = {side: sum(of[side] for of in scored) for side in ("base", "tuned")}
    num_tokens = sum(of["num_tokens"] for of in scored)
    for side, total in sums.items():
        corpus = found["languages"]["all"]["corpus"][side]
        assert corpus["loss"] == pytest.approx(-total / num_tokens)


def test_an_adapter_turned_round_is_called_worse_and_fails_the_gate(run, taught, tmp_path):
    """With the sign of its update changed it makes the answers less likely."""
    folder = tmp_path / "turned"
    folder.mkdir()
    for file in (taught / "adapter").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    weights = load_file(folder / WEIGHTS_FILE)
    turned = {name: -w if "lora_B" in name else w for name, w in weights.items()}
    save_file(turned, folder / WEIGHTS_FILE)
    code, found = run("--gate", "not_worse", adapter=folder)
    assert code == 1
    assert found["languages"]["all"]["verdict"] == "worse"


def test_few_rows_have_scores_and_no_verdict(run, capsys):
    code, found = run("--limit", "5")
    assert code == 0
    assert found["languages"]["all"]["verdict"] == "undecided"
    assert found["languages"]["all"]["metrics"]["chrf"]["tuned"] > 50
    assert "No verdict: 5 rows have a reference, and 8 are the least" in capsys.readouterr().out
    code, _ = run("--limit", "5", "--gate", "better")
    assert code == 2
    assert "5 rows have an output to compare with" in capsys.readouterr().err


def test_rows_without_an_output_are_answered_and_not_judged(run, tmp_path, capsys):
    path = tmp_path / "bare.json"
    path.write_text(json.dumps([{"instruction": asked} for asked, _ in QUESTIONS]))
    code, found = run(data_path=path)
    assert code == 0
    assert found["languages"]["all"]["n"] == 0
    assert set(found["languages"]["all"]["metrics"]) == {
        "stopped", "repetition", "language_kept", "length",
    }  # fmt: skip
    assert "answers differ" in capsys.readouterr().out


def test_a_metric_of_ones_own_stands_beside_ours(run, tmp_path, monkeypatch):
    (tmp_path / "metrics_of_a_user.py").write_text(
        "def names_mira(answer, reference, record):\n    return 'Mira' in answer\n"
        "def fails(answer, reference, record):\n    raise RuntimeError('no luck')\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    code, found = run("--metric", "metrics_of_a_user:names_mira", "--gate", "better:names_mira")
    assert code == 0
    assert found["languages"]["en"]["metrics"]["names_mira"]["tuned"] == 1.0
    (tmp_path / "out" / "compare.json").unlink()
    code, found = run("--metric", "metrics_of_a_user:fails")
    assert (code, found) == (2, None)


# --- held-out rows ---


@pytest.fixture(scope="module")
def trained(taught, tmp_path_factory):
    """A run of two steps that held five rows out."""
    folder = tmp_path_factory.mktemp("trained")
    rows, run = str(folder / "rows"), str(folder / "run")
    base = ["--base", GLM_TINY]
    convert = ["--data_path", str(taught / "rows.json"), "--save_path", str(folder / "rows.jsonl")]
    assert main(["convert", *convert]) == 0
    assert (
        main(["tokenize", "--jsonl_path", str(folder / "rows.jsonl"), "--save_path", rows, *base])
        == 0
    )
    train = ["--dataset_path", rows, "--output_dir", run, "--max_steps", "1", "--use_cpu", "true"]
    assert main(["train", *train, *base, "--eval_ratio", "0.5", "--report_to", "none"]) == 0
    return folder


def test_rows_that_the_run_held_out_are_asked_by_default(run, trained, taught, tmp_path):
    code, found = run(data_path=None, adapter=trained / "run")
    assert code == 0
    assert found["languages"]["all"]["n"] == 8
    trained_on = {part: 8 - found["languages"][part]["n"] for part in ("zh", "en")}
    assert found["trained_on"] == {"rows": 8, "counted": 8} | trained_on
    page = (tmp_path / "out" / "compare.html").read_text(encoding="utf-8")
    languages = "Chinese {:.0%}, English {:.0%}".format(*(n / 8 for n in trained_on.values()))
    for words in ("16 rows, ", "50% held out", "1 step, ", "24 questions answered", languages):
        assert words in page, "the page says what was trained, and what it took"
    held_out = split_rows(len(QUESTIONS), 0.5, 42)[1]
    # The same numbers as of a file that holds these rows.
    records = json.loads((taught / "rows.json").read_text(encoding="utf-8"))
    chosen = trained / "chosen.json"
    chosen.write_text(json.dumps([records[row] for row in held_out]), encoding="utf-8")
    _, again = run("--overwrite_output", "true", data_path=chosen, adapter=trained / "run")
    for name in ("log_prob", "chrf", "length"):
        one, other = (of["languages"]["all"]["metrics"][name] for of in (found, again))
        assert one["base"] == pytest.approx(other["base"], abs=1e-4)
        assert one["tuned"] == pytest.approx(other["tuned"], abs=1e-4)


def test_without_held_out_rows_a_file_is_asked_for(run, trained, taught, tmp_path, capsys):
    code, _ = run(data_path=None)
    assert code == 2
    assert "no recipe.yaml says which rows its run held out; name a file" in capsys.readouterr().err
    recipe = trained / "run" / "recipe.yaml"
    text = recipe.read_text(encoding="utf-8")
    for old, new, told in (
        ("eval_ratio: 0.5", "eval_ratio: 0.0", "eval_ratio 0, so the run held no row out"),
        (f"dataset_path: {trained}/rows", "dataset_path: /nowhere", "name a file of rows with"),
    ):
        assert old in text
        recipe.write_text(text.replace(old, new), encoding="utf-8")
        code, _ = run(data_path=None, adapter=trained / "run")
        assert code == 2
        assert told in capsys.readouterr().err
    recipe.write_text(text, encoding="utf-8")
    assert not (tmp_path / "out").exists()
