"""`glmtune serve` as a command, with its page in a real browser: a run before, while and after."""

import json
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import openai
import pytest
from browsers import launched
from playwright.sync_api import expect
from toys import short_run

from glmtune.cli import main
from glmtune.training.loop import train

ANSWER = "苹果是红色的。"
ROWS = [{"instruction": f"第 {i} 号苹果是什么颜色？", "output": ANSWER} for i in range(24)]


@contextmanager
def command(*flags):
    """Start the server; gives the address of its page."""
    words = [sys.executable, "-m", "glmtune", "serve", "--port", "0", *map(str, flags)]
    server = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    try:
        page = next(line for line in server.stdout if line.lstrip().startswith("page"))
        yield page.split()[-1]
    finally:
        server.terminate()
        server.communicate(timeout=120)


@pytest.fixture(scope="module")
def browser(browser_path):
    with launched(browser_path) as browser:
        yield browser


def run(folder, out):
    """Train on the rows, without the check-up that the command makes at the end."""
    data, lines, rows = (str(folder / name) for name in ("data.json", "rows.jsonl", "rows"))
    Path(data).write_text(json.dumps(ROWS), encoding="utf-8")
    assert main(["convert", "--data_path", data, "--save_path", lines]) == 0
    flags = ["--jsonl_path", lines, "--save_path", rows, "--base", "glm-tiny"]
    assert main(["tokenize", *flags]) == 0
    changes = {"max_steps": 12, "eval_ratio": 0.2, "eval_steps": 6, "learning_rate": 5e-3}
    train(short_run(rows, out, **changes, general_set=False, eval_answers=2))


def test_a_run_is_awaited_followed_and_served(browser, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    page = browser.new_page(locale="en-GB")
    complaints = []
    page.on("console", lambda message: complaints.append(message.text))
    with command("--run", out) as address:
        page.goto(address)
        verdict = page.locator(".verdict .en")
        expect(verdict).to_contain_text("Not begun yet", timeout=60_000)
        assert page.locator("#to-chat").is_hidden(), "there is no model"
        client = openai.OpenAI(base_url=address.replace("/run", "/v1"), api_key="none")
        with pytest.raises(openai.NotFoundError, match="has no model; start it with --base"):
            client.models.list()
        run(tmp_path, out)
        expect(verdict).to_have_text("Done: all 12 steps.", timeout=60_000)
        expect(page.locator(".samples li")).to_have_count(2)
        expect(page.locator(".samples .of-tuned .text").first).to_have_text(ANSWER)
        page.goto("about:blank")  # it would look for a server that is gone
    with command("--base", "glm-tiny", "--use_cpu", "true", "--adapter", f"fruit={out}") as address:
        page.goto(address)
        expect(page.locator("#left option")).to_have_count(2, timeout=60_000)
        page.fill("#question", ROWS[0]["instruction"])
        page.press("#question", "Enter")
        expect(page.locator("#turns footer")).to_have_count(2, timeout=60_000)
        base, tuned = page.locator("#turns .said").all_inner_texts()
        assert tuned == ANSWER
        client = openai.OpenAI(base_url=f"{address}v1", api_key="none")
        asked = [{"role": "user", "content": ROWS[0]["instruction"]}]
        both = client.chat.completions.create(model="both", messages=asked, temperature=0)
        assert [choice.message.content for choice in both.choices] == [base, tuned]
        page.click("#to-run")
        expect(verdict).to_have_text("Done: all 12 steps.")
        page.close()
    assert complaints == []


@pytest.mark.parametrize("name, words", [("nothing", "does not exist"), ("rows", "holds no run")])
def test_what_is_no_run_is_refused_at_once(tmp_path, capsys, name, words):
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "notes.txt").write_text("x")
    assert main(["serve", "--run", str(tmp_path / name)]) == 2
    told = capsys.readouterr().err
    assert words in told
    assert told.count("\n") == 1
