"""`compare --without_replay`: what general rows saved, beside a run of the same rows alone."""

import json
import shutil
from pathlib import Path

import pytest

from glmtune.cli import main
from glmtune.models.resolve import GLM_TINY

LANGUAGES = ("zh", "en")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two runs of the same rows, with and without replay; the latter compared."""
    folder = tmp_path_factory.mktemp("saved")
    records = [{"instruction": f"Count {i}.", "output": "banana " * 3} for i in range(24)]
    (folder / "rows.json").write_text(json.dumps(records), encoding="utf-8")
    (folder / "asked.json").write_text(json.dumps(records[:3]), encoding="utf-8")
    general = []
    for language in LANGUAGES:
        path = Path(GLM_TINY, f"general_{language}.jsonl")
        general += path.read_text(encoding="utf-8").splitlines()[::17]
    (folder / "general.jsonl").write_text("\n".join(general), encoding="utf-8")
    texts = [json.loads(line) for line in general]
    own = [{"text": of["text"] + of["answer"]} for of in texts]
    (folder / "own.jsonl").write_text("\n".join(map(json.dumps, own)), encoding="utf-8")
    for name, flags in (
        ("with", ["--replay", folder / "own.jsonl", "--replay_share", "0.4"]),
        ("without", []),
    ):
        given = [folder / "rows.json", "--save_path", folder / f"rows-{name}", "--base", GLM_TINY]
        assert main(["tokenize", *map(str, [*given, *flags])]) == 0
        given = ["--dataset_path", folder / f"rows-{name}", "--output_dir", folder / name]
        given += ["--base", GLM_TINY, "--max_steps", 8, "--learning_rate", 1e-2]
        given += ["--lr_scheduler_type", "constant", "--lora_target", "all", "--layout", "padded"]
        given += ["--general_set", "false", "--report_to", "none", "--use_cpu", "true"]
        assert main(["train", *map(str, given)]) == 0
    assert compare(folder, "without") == 0
    return folder


def compare(folder, name, *flags):
    given = ["--adapter", folder / name, "--data_path", folder / "asked.json", "--base", GLM_TINY]
    given += ["--general_set", folder / "general.jsonl", "--max_new_tokens", 4]
    return main(["compare", *map(str, given), "--use_cpu", "true", *map(str, flags)])


def figures(folder, name):
    return json.loads((folder / name / "compare" / "compare.json").read_text(encoding="utf-8"))


def test_what_replay_saved_is_on_the_page(folder, capsys):
    capsys.readouterr()
    assert compare(folder, "with", "--without_replay", folder / "without") == 0
    found, other = figures(folder, "with"), figures(folder, "without")
    saved = found["replay_saved"]
    assert saved["without_replay"] == "without"
    for part in (*LANGUAGES, "all"):
        assert saved[part]["n"] == found["price"][part]["n"]
        assert saved[part]["without"] == other["price"][part]["after"]
        assert saved[part]["with"] == found["price"][part]["after"]
        assert saved[part]["low"] <= saved[part]["with"] - saved[part]["without"]
        assert saved[part]["with"] - saved[part]["without"] <= saved[part]["high"]
    assert saved["all"]["with"] > saved["all"]["without"] + 20
    assert other["replay_saved"] is None
    assert "less was lost with replay." in capsys.readouterr().out
    page = (folder / "with" / "compare" / "compare.html").read_text(encoding="utf-8")
    for text in ("What replay saved", "混入通用数据后保住了多少", "with replay", "without replay"):
        assert text in page
    assert "混入后损失更少" in (folder / "with" / "compare" / "compare.md").read_text("utf-8")


def refused(folder, capsys, name, *flags):
    capsys.readouterr()
    assert compare(folder, name, *flags) == 2
    return capsys.readouterr().err


def test_runs_that_say_nothing_of_replay_are_refused(folder, tmp_path, capsys):
    without = ("--without_replay", folder / "without")
    told = refused(folder, capsys, "without", *without)
    assert "is the adapter that is compared; name the run without replay" in told
    told = refused(folder, capsys, "without", "--without_replay", folder / "with")
    assert "its rows have replay among them; name a run without" in told
    told = refused(folder, capsys, "with", *without, "--general_set", "false")
    assert "without_replay compares general questions, and general_set is false" in told
    told = refused(folder, capsys, "with", *without, "--general_set", folder / "own.jsonl")
    assert "own.jsonl" in told
    told = refused(folder, capsys, "with", "--without_replay", tmp_path / "none")
    assert "none" in told


def test_a_run_that_was_not_compared_is_named_with_the_command(folder, tmp_path, capsys):
    run = tmp_path / "uncompared"
    shutil.copytree(folder / "without", run, ignore=shutil.ignore_patterns("compare"))
    told = refused(folder, capsys, "with", "--without_replay", run)
    assert f"run glmtune compare --adapter {run} first" in told


def test_a_run_without_replay_has_nothing_that_was_saved(folder, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(folder / "without", other)
    weights = other / "adapter_model.safetensors"
    shutil.copy(folder / "with" / weights.name, weights)
    told = refused(folder, capsys, "without", "--without_replay", other)
    assert "its rows have no replay among them, so nothing was saved by it" in told


def test_a_run_of_another_base_is_refused(folder, tmp_path, capsys):
    base, other = tmp_path / "base", tmp_path / "other"
    shutil.copytree(GLM_TINY, base)
    shutil.copytree(folder / "without", other)
    for name in ("adapter_config.json", "recipe.yaml"):
        text = (other / name).read_text(encoding="utf-8")
        (other / name).write_text(text.replace(str(GLM_TINY), str(base)), encoding="utf-8")
    capsys.readouterr()
    flags = ["--adapter", folder / "with", "--data_path", folder / "asked.json"]
    flags += ["--without_replay", other, "--use_cpu", "true"]
    assert main(["compare", *map(str, flags)]) == 2
    assert f"is of the base {base}, and adapter {folder / 'with'} of" in capsys.readouterr().err
