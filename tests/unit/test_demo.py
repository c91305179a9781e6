"""The demonstration: its folder, its page, a short run and a full one."""

import json
import os
import re
import shutil
import time
from types import SimpleNamespace

import pytest
from pages import Page

from glmtune import cli
from glmtune.config.settings import DemoSettings
from glmtune.demo.folder import ABOUT, ABOUT_FILE, WRITTEN, claim_folder
from glmtune.demo.page import score_panel
from glmtune.demo.questions import held_out_questions
from glmtune.demo.recipe import RECIPE
from glmtune.demo.run import demo, training_config
from glmtune.errors import UserError
from glmtune.evaluation import dial
from glmtune.general import items

# --- the folder ---


def test_demo_takes_a_new_folder_and_the_same_again(tmp_path):
    out = tmp_path / "a" / "b"
    claim_folder(out)
    assert (out / ABOUT_FILE).read_text(encoding="utf-8") == ABOUT
    (out / "run").mkdir()
    (out / "run" / "old").write_text("x")
    (out / "demo.html").write_text("old")
    claim_folder(out)
    assert [path.name for path in out.iterdir()] == [ABOUT_FILE]
    assert all(name in ABOUT for name in WRITTEN if name != ABOUT_FILE)


@pytest.mark.parametrize("names", [["thesis.tex"], ["train.json"], [ABOUT_FILE, "thesis.tex"]])
def test_demo_refuses_a_folder_with_other_things(names, tmp_path):
    for name in names:
        (tmp_path / name).write_text(ABOUT if name == ABOUT_FILE else "mine")
    with pytest.raises(UserError, match=r"holds other things \((thesis|train)"):
        claim_folder(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)


def test_demo_refuses_a_folder_that_is_a_file(tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    assert cli.main(["demo", "--out", str(tmp_path / "file")]) == 2
    assert capsys.readouterr().err.startswith(f"error: --out: {tmp_path}/file cannot be used (")
    assert (tmp_path / "file").read_text() == "mine"


def test_demo_refuses_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "mkdir", refuse)
    with pytest.raises(UserError, match=r"cannot be used \(Permission denied\)"):
        claim_folder(tmp_path / "new")


def test_demo_refuses_a_full_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2**20))
    with pytest.raises(UserError, match="1 MB are free, but the demo takes at most 67 MB"):
        claim_folder(tmp_path / "new")
    assert not (tmp_path / "new").exists()


# --- settings ---


def test_demo_trains_by_its_recipe():
    config = training_config(DemoSettings(seed=7), "data", "run")
    scalars = {name: value for name, value in RECIPE.items() if name != "lora_target"}
    assert {name: getattr(config, name) for name in scalars} == scalars
    assert config.seed == 7
    short = training_config(DemoSettings(max_steps=3), "data", "run")
    assert short.max_steps == 3


# --- the page ---


def test_the_page_shows_the_share_of_right_answers():
    body = score_panel({"zh": (1, 200), "en": (0, 200)}, {"zh": (190, 200), "en": (200, 200)}).body
    assert re.findall(r"<b>(.*?)</b>", body) == ["0.5", "95.0", "0.0", "100.0"]
    assert 'width="95.00%"' in body


# --- the whole ---


@pytest.fixture
def few_general(monkeypatch):
    """Few general questions and scales: a short demo asks and dials as the whole one does."""
    read = items._read
    monkeypatch.setattr(items, "_read", lambda *args: read(*args)[:8])
    monkeypatch.setattr(dial, "SCALES", (0.0, 1.0))


def test_a_short_demo_writes_its_page_and_says_what_to_try_next(tmp_path, capsys, few_general):
    out = tmp_path / "demo"
    line = ["demo", "--out", str(out), "--max_steps", "3", "--limit", "6", "--use_cpu"]
    assert cli.main(line) == 0
    assert {path.name for path in out.iterdir()} == set(WRITTEN)
    printed = capsys.readouterr().out
    assert f"Open the page in a browser: {out}/demo.html" in printed
    assert "What to try next" in printed
    asked = f"6 records of {out}/questions.json"
    assert asked in printed, "the check-up asks what was held out"
    assert "this decides nothing" not in printed
    (command,) = re.findall(r"check it +\S*glmtune (.*)", printed)
    cli.main(command.split())
    assert asked in capsys.readouterr().out
    page = (out / "demo.html").read_text(encoding="utf-8")
    questions = json.loads((out / "questions.json").read_text(encoding="utf-8"))
    assert len(questions) == len(Page(page).data["rows"]) == 6
    assert sum(ask.language == "zh" for ask in held_out_questions()) == 200
    for words in (
        "Training loss",
        "训练损失",
        "Right answers",
        "答对的比例",
        "is recommended",
        "代价",
    ):
        assert words in page
    assert not re.search(r'(src|href)="|url\(|https?://', page), "the page needs nothing else"
    assert str(tmp_path) not in page
    before = (out / "run" / "metrics.jsonl").read_text()
    assert cli.main(line) == 0, "it starts anew in its own folder"
    losses = [
        [json.loads(record)["loss"] for record in text.splitlines()]
        for text in (before, (out / "run" / "metrics.jsonl").read_text())
    ]
    assert losses[0] == losses[1]


@pytest.mark.slow
def test_a_whole_demo_teaches_nine_answers_of_ten(tmp_path):
    started = time.process_time()  # other programs may use the cores
    result = demo(DemoSettings(out=str(tmp_path / "demo"), use_cpu=True))
    assert time.process_time() - started < 2 * 120
    for language in ("zh", "en"):
        for count, fits in ((result.base, lambda x: x <= 0.1), (result.tuned, lambda x: x >= 0.9)):
            right, asked = count[language]
            assert asked == 200
            assert fits(right / asked), (language, right)
