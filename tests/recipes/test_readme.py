"""The commands of the READMEs and the guides, run in a new folder on a file of our own."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from glmtune.cli import main

ROOT = Path(__file__).resolve().parents[2]
READMES = ("README.md", "README.zh.md")
# Each in both languages; their commands use the files that the README's commands write.
GUIDES = (
    "docs/data.md",
    "docs/training.md",
    "docs/answers.md",
    "docs/verdict.md",
    "docs/after.md",
    "docs/cards.md",
)
# Their commands are tests and benchmarks, of which most take minutes.
PAGES_OF_TESTS = ("docs/reliability.md", "docs/peers.md")
# Each has a Chinese page beside it.
OTHERS = (
    "docs/many.md",
    "docs/tune.md",
    "docs/memory.md",
    "docs/architecture.md",
    "docs/models.md",
    "docs/published.md",
    "docs/export.md",
    "docs/serving.md",
    "docs/share.md",
    "docs/scaling.md",
)
TRANSLATED = (READMES[0], *GUIDES, *PAGES_OF_TESTS, *OTHERS)
COMMAND = re.compile(r"^(python \w+\.py|glmtune) .+", re.MULTILINE)
# Fewer steps and answers than on a real base: enough to see that the command runs.
SHORTER = {
    "--max_steps 52000": "--max_steps 2",
    "--max_steps 200": "--max_steps 2",
    "--out tuned_en": "--out tuned_en --limit 1 --max_new_tokens 8",
    "recipes/": f"{ROOT}/recipes/",
}
# Commands that have tests of their own, because they take minutes, or ask for input.
ELSEWHERE = ("glmtune demo", "glmtune chat", "glmtune bench")
RECORDS = [
    {"instruction": "说出一种水果。", "input": "", "output": "苹果。"},
    {"instruction": "Name a colour.", "input": "", "output": "Red."},
    {"instruction": "翻译成英文。", "input": "你好", "output": "Hello"},
] * 4


def fenced(page):
    """The content of a page's fenced blocks, line continuations joined."""
    text = (ROOT / page).read_text(encoding="utf-8")
    blocks = re.findall(r"^```(?:bash|sh)?\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return "".join(blocks).replace("\\\n", " ")


def commands(readme):
    """The commands in the fenced blocks of a README."""
    found = COMMAND.finditer(fenced(readme))
    return [re.sub(r" +", " ", match[0]).split(" #")[0] for match in found]


def shell_lines(page):
    """All shell commands in the fenced blocks of a page, without their comments."""
    starts = ("python ", "glmtune ", "time ", "make ", "source ", ".venv", "torchrun ", "GLMTUNE_")
    lines = [line.split(" #")[0].strip() for line in fenced(page).splitlines()]
    return [line for line in lines if line.startswith(starts)]


def chinese(page):
    return page.replace(".md", ".zh.md")


@pytest.mark.parametrize("page", TRANSLATED)
def test_english_and_chinese_pages_have_the_same_commands(page):
    assert shell_lines(page) == shell_lines(chinese(page))


@pytest.mark.parametrize("page", TRANSLATED)
def test_english_and_chinese_pages_name_the_same_functions_and_flags(page):
    """Code in the text of a page, where it is neither a placeholder nor prose."""
    both = []
    for name in (page, chinese(page)):
        text = re.sub(r"^```.*?^```", "", (ROOT / name).read_text("utf-8"), flags=re.M | re.S)
        both.append(sorted(re.findall(r"`([a-z_]\w*(?:\.\w+)+|[A-Za-z]\w*_\w+|--\w+)`", text)))
    assert both[0] == both[1]


@pytest.mark.parametrize("page", TRANSLATED)
def test_english_and_chinese_pages_have_the_same_sections_and_numbers(page):
    """A number that only one language has was forgotten in the other."""
    both = []
    for name in (page, chinese(page)):
        text = (ROOT / name).read_text(encoding="utf-8")
        text = re.sub(r"\]\([^)]*\)|`[^`]*`", "", text)
        numbers = sorted(re.findall(r"\d+(?:[,.]\d+)*", text.replace(" %", "%")))
        both.append((len(re.findall(r"^## ", text, re.MULTILINE)), numbers))
    assert both[0] == both[1]


@pytest.mark.parametrize("readme", READMES)
def test_the_cards_of_the_readme_are_those_of_the_page(readme):
    """tests/unit/test_run_speed.py computes the page's table again."""
    page = "docs/cards.zh.md" if "zh" in readme else "docs/cards.md"
    rows = (ROOT / page).read_text(encoding="utf-8").splitlines()
    shown = re.findall(r"^\| \d+ \| (?:RTX|H).*$", (ROOT / readme).read_text("utf-8"), re.MULTILINE)
    assert len(shown) == 5
    assert set(shown) <= set(rows)


def test_the_readme_is_short():
    assert len((ROOT / READMES[0]).read_text(encoding="utf-8").split()) <= 900


def test_commands_of_the_readme_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GLMTUNE_MODEL", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    data = tmp_path / "data"
    data.mkdir()
    for language in ("zh", "en"):
        text = json.dumps(RECORDS, ensure_ascii=False)
        (data / f"alpaca_data_{language}.json").write_text(text, encoding="utf-8")
    old = ROOT / "tests" / "golden" / "chatglm-6b-tiny" / "adapter_peft_0_2_plain"
    shutil.copytree(old, tmp_path / "adapter_2023")
    for command in dict.fromkeys(line for page in (READMES[0], *GUIDES) for line in commands(page)):
        if command.startswith(ELSEWHERE):
            continue
        for long, short in SHORTER.items():
            command = command.replace(long, short)
        program, *arguments = shlex.split(command)
        if program == "python":
            script = [sys.executable, str(ROOT / arguments[0]), *arguments[1:]]
            done = subprocess.run(
                script, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, check=False
            )
            assert done.returncode == 0, f"{command}: {done.stderr.decode()[-1500:]}"
        else:
            # A check-up after two steps finds an adapter that changes next to nothing.
            assert main(arguments) in ((0, 1) if arguments[0] in ("check", "tune") else (0,)), (
                command
            )


@pytest.mark.parametrize("readme", [*TRANSLATED, *map(chinese, TRANSLATED)])
def test_links_of_the_readme_lead_somewhere(readme):
    text = (ROOT / readme).read_text(encoding="utf-8")
    folder = (ROOT / readme).parent
    for target in re.findall(r"\]\((?!https?:)([^)#]+)[^)]*\)", text):
        assert (folder / target).exists(), target


@pytest.mark.parametrize("page", PAGES_OF_TESTS)
def test_files_that_the_commands_of_a_page_name_exist(page):
    named = " ".join(line for line in fenced(page).splitlines() if line.startswith("python"))
    named = re.sub(
        r"(\S*)\{([\w,]+)\}(\S*)",
        lambda m: " ".join(m[1] + name + m[3] for name in m[2].split(",")),
        named,
    )
    files = re.findall(r"(?:tests|benchmarks|tools)/[\w/]+\.py", named)
    assert files
    assert not [file for file in files if not (ROOT / file).is_file()]


def test_the_commands_that_measure_reading_run(tmp_path):
    (tmp_path / "alpaca_data_zh.json").write_text(json.dumps(RECORDS), encoding="utf-8")
    lines = [x for x in fenced(PAGES_OF_TESTS[0]).splitlines() if x.startswith("python benchmarks")]
    assert len(lines) == 2
    for line in lines:
        _, script, *arguments = shlex.split(line.replace(" 2000", " 2"))
        command = [sys.executable, str(ROOT / script), *arguments]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, check=False)
        assert done.returncode == 0, done.stderr.decode()[-1500:]


@pytest.mark.parametrize("line", [line for line in shell_lines("docs/models.md") if "plan" in line])
def test_plans_of_the_page_on_models(line, capsys):
    """Its other commands are run with tiny models, in test_glm_verbs.py."""
    assert main(shlex.split(line)[1:]) == 0
    assert "fits" in capsys.readouterr().out
