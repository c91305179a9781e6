"""`glmtune tune`: from a file to a verdict, interrupted and resumed, and what it refuses."""

import gc
import io
import json
import re
import shlex
import shutil
import signal
import weakref
from pathlib import Path
from unicodedata import normalize

import numpy as np
import pytest
import yaml
from pages import Page

from glmtune import cli
from glmtune.data.dataset import load_dataset
from glmtune.data.records import read_alpaca
from glmtune.data.split import split_rows
from glmtune.data.templates import context_of
from glmtune.demo.questions import training_questions
from glmtune.errors import UserError
from glmtune.models.loading import load_tokenizer
from glmtune.models.resolve import GLM_TINY
from glmtune.training import loop
from glmtune.tune import run as stages
from glmtune.tune.folder import Journal

STAGES = list(stages.STAGES)
FAST = ("--base", "glm-tiny", "--use_cpu", "--limit", "2", "--max_new_tokens", "4")
FAST += ("--general_set", "false")
RECORDS = [question.record() for question in training_questions()[:24]]


def write(path, records, encoding="utf-8"):
    path.write_text(json.dumps(records, ensure_ascii=False), encoding=encoding)
    return path


def tune(data, out, *flags, steps=4):
    return cli.main(
        ["tune", str(data), "--out", str(out), "--max_steps", str(steps), *FAST, *flags]
    )


def done_before(text):
    return re.findall(r"^\[\d/8\] (.+): done before$", text, re.MULTILINE)


def snapshot(folder):
    """The content of every file, by its name."""
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def data(tmp_path):
    return write(tmp_path / "data.json", RECORDS)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with a file of records, what `tune` made of it in tuned/, and what it printed."""
    folder = tmp_path_factory.mktemp("finished")
    write(folder / "data.json", RECORDS)
    with pytest.MonkeyPatch.context() as patch:
        printed = io.StringIO()
        patch.setattr("sys.stdout", printed)
        assert tune(folder / "data.json", folder / "tuned") == 0
    return folder, printed.getvalue()


@pytest.fixture
def tuned(finished, tmp_path, capsys):
    """The same in the test's own folder, whose paths the journal does not name."""
    shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
    capsys.readouterr()
    return tmp_path / "data.json", tmp_path / "tuned"


# --- the whole ---


def test_a_file_becomes_an_adapter_a_page_and_a_verdict(finished):
    folder, printed = finished
    out = folder / "tuned"
    assert {path.name for path in out.iterdir()} == {
        *("rows.jsonl", "rows", "questions.json", "run", "check.json", "compare"),
        *("tune.html", "tune.yaml", "stages.json"),
    }
    assert [line for line in STAGES if f"] {line}\n" in printed] == STAGES
    assert f"{out}/tune.html" in printed
    verdict = json.loads((out / "check.json").read_text(encoding="utf-8"))["verdict"]
    assert re.search(rf"^  check +{re.escape(verdict)}$", printed, re.MULTILINE)
    records = [json.loads(line) for line in (out / "run" / "metrics.jsonl").open()]
    loss = [record["eval_loss"] for record in records if "eval_loss" in record][-1]
    assert re.search(rf"^  held-out loss +{loss:.4f}$", printed, re.MULTILINE)
    page = (out / "tune.html").read_text(encoding="utf-8")
    for text in (f"{loss:.4f}", "Training loss", "训练损失", "Check-up", verdict):
        assert text in page
    assert len(Page(page).data["rows"]) == 1, "one row of 24 is held out"


def test_what_is_asked_is_what_was_held_out(finished):
    out = finished[0] / "tuned"
    tokenizer = load_tokenizer(GLM_TINY)
    table, card = load_dataset(str(out / "rows"), tokenizer.row_rule)
    rows = table.to_pylist()
    _, held_out = split_rows(len(rows), 0.05, 42)
    (asked,) = json.loads((out / "questions.json").read_text(encoding="utf-8"))
    text = tokenizer.decode(rows[int(held_out[0])]["input_ids"], skip_special_tokens=True)
    assert asked["instruction"] in text
    assert asked["output"] in text
    assert card.num_read == 24


def test_a_length_is_chosen_that_keeps_most_rows(finished):
    flags = load_dataset(str(finished[0] / "tuned" / "rows"))[1].flags
    assert flags["skip_overlength"] is True
    # Of 24 rows 23 are 95.8 %, 22 are 91.7 %.
    lengths = np.sort([len(row) for row in _all_rows(finished[0] / "data.json")])
    assert flags["max_seq_length"] == lengths[22]


def _all_rows(data):
    tokenizer = load_tokenizer(GLM_TINY)
    for record in read_alpaca(str(data))[0]:
        context = tokenizer.encode_batch([context_of(record.instruction, record.input)])[0]
        target = tokenizer.encode_batch([record.output])[0]
        rule = tokenizer.row_rule
        yield [*rule.prompt(context, 10**6), *target, *rule.end_ids]


def test_called_again_it_repeats_nothing(tuned, spy, capsys):
    calls = [spy(stages, verb) for verb in ("convert", "tokenize", "train", "check", "compare")]
    before = snapshot(tuned[1])
    assert tune(*tuned) == 0
    assert done_before(capsys.readouterr().out) == STAGES
    assert not any(calls)
    # The recipe names the folder, which was copied.
    changed = [path.name for path, content in snapshot(tuned[1]).items() if before[path] != content]
    assert changed == ["tune.yaml"]


def test_each_section_of_the_recipe_runs_alone(finished, tmp_path, capsys):
    recipe = str(finished[0] / "tuned" / "tune.yaml")
    sections = yaml.safe_load((finished[0] / "tuned" / "tune.yaml").read_text(encoding="utf-8"))
    assert list(sections) == [stage for stage in STAGES if stage != "hold out"]
    assert "per_device_train_batch_size" not in sections["train"], "given, it would forbid packs"
    elsewhere = {
        "convert": ("--save_path", str(tmp_path / "rows.jsonl")),
        "tokenize": ("--save_path", str(tmp_path / "rows")),
        "train": ("--output_dir", str(tmp_path / "run")),
        "check": ("--json_path", str(tmp_path / "check.json")),
        "compare": ("--output_dir", str(tmp_path / "compare")),
    }
    for verb in sections:
        assert cli.main([verb, recipe, *elsewhere.get(verb, ())]) == 0, verb
    out = finished[0] / "tuned"
    assert (tmp_path / "rows.jsonl").read_bytes() == (out / "rows.jsonl").read_bytes()
    for name in ("run/adapter_model.safetensors", "check.json"):
        assert (tmp_path / name).read_bytes() == (out / name).read_bytes()
    capsys.readouterr()
    assert cli.main(["train", recipe]) == 2
    assert "holds a run already" in capsys.readouterr().err


def test_the_commands_at_the_end_run_when_pasted(tuned, monkeypatch, capsys):
    assert tune(*tuned) == 0
    _, _, told = capsys.readouterr().out.partition("Next\n")
    lines = re.findall(r"glmtune ((?:chat|infer|merge|check) .*)", told)
    assert len(lines) == 4
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n"))
    for line in lines:
        shorter = ["--max_new_tokens", "2"] if not line.startswith("merge") else []
        assert cli.main([*shlex.split(line), *shorter]) == 0, line
    assert tune(*tuned) == 0, "what lies in the folder by now disturbs nothing"


@pytest.mark.parametrize("page", ["tune.md", "tune.zh.md"])
def test_the_commands_of_the_page_in_the_docs_are_the_same(page, root):
    assert _commands(root / "docs" / page) == _commands(root / "docs" / "tune.md") != []


def test_the_commands_of_the_page_in_the_docs_run(data, root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for command in _commands(root / "docs" / "tune.md"):
        words = command.replace("chatglm-6b", "glm-tiny").split()
        if words[0] in ("tune", "train"):
            words += ["--base", "glm-tiny", "--max_steps", "2", "--use_cpu"]
        if words[0] == "tune":
            words += ["--limit", "4", "--max_new_tokens", "2", "--learning_rate", "1e-3"]
        assert cli.main(words) == 0, command


def _commands(page):
    text = page.read_text(encoding="utf-8")
    return re.findall(r"^glmtune (.+)", "".join(re.findall(r"```bash\n(.*?)```", text, re.S)), re.M)


def test_the_trained_model_is_gone_when_the_base_is_loaded_again(data, tmp_path, monkeypatch):
    models, alive, fit, check = [], [], loop.fit, stages.check

    def watched_fit(run, model, *rest):
        models.append(weakref.ref(model))
        return fit(run, model, *rest)

    def watched_check(settings):
        alive.extend(model() is not None for model in models)
        return check(settings)

    monkeypatch.setattr(loop, "fit", watched_fit)
    monkeypatch.setattr(stages, "check", watched_check)
    gc.disable()  # which collects at any time
    try:
        assert tune(data, tmp_path / "tuned") == 0
    finally:
        gc.enable()
    assert alive == [False]


# --- broken off ---


def test_it_goes_on_after_a_break_in_any_stage(data, tmp_path, monkeypatch, spy, capsys):
    out = tmp_path / "tuned"
    verbs = [stage for stage in STAGES if stage != "hold out"]
    done = {verb: spy(stages, verb) for verb in verbs}
    for verb in verbs:
        with monkeypatch.context() as patch:
            patch.setattr(stages, verb, _interrupt)
            assert tune(data, out) == 130, verb
        assert out.exists() == (verb != "validate")
        is_told = "the same command resumes" in capsys.readouterr().err
        assert is_told == (verb != "validate"), "before, there is nothing to go on from"
    assert tune(data, out) == 0
    assert {verb: len(calls) for verb, calls in done.items()} == dict.fromkeys(verbs, 1)


def _interrupt(*_, **__):
    raise KeyboardInterrupt


def test_a_training_that_was_broken_off_ends_as_the_unbroken_one(
    finished, data, tmp_path, monkeypatch, capsys
):
    with monkeypatch.context() as patch:
        _stop_after(patch, steps=2)
        assert tune(data, tmp_path / "tuned") == 130
    assert (tmp_path / "tuned" / "run" / "checkpoint-2").is_dir()
    capsys.readouterr()
    assert tune(data, tmp_path / "tuned") == 0
    steps = re.findall(r"^step (\d)/4: loss", capsys.readouterr().out, re.MULTILINE)
    assert steps == ["3", "4"]
    for name in ("run/adapter_model.safetensors", "check.json", "questions.json"):
        unbroken = (finished[0] / "tuned" / name).read_bytes()
        assert (tmp_path / "tuned" / name).read_bytes() == unbroken


def _stop_after(patch, steps):
    taken, original = [], loop.train_step

    def step(*args, **settings):
        taken.append(1)
        if len(taken) == steps:
            signal.raise_signal(signal.SIGINT)
        return original(*args, **settings)

    patch.setattr(loop, "train_step", step)


def test_a_kill_between_the_last_step_and_the_note_of_it_costs_nothing(tuned, spy, capsys):
    path = tuned[1] / "stages.json"
    entries = json.loads(path.read_text(encoding="utf-8"))
    del entries["train"]["is_whole"]
    path.write_text(json.dumps(entries), encoding="utf-8")
    (tuned[1] / ".tune.html.123.tmp").write_text("half")
    trained = spy(stages, "train")
    assert tune(*tuned) == 0
    assert not trained
    assert not (tuned[1] / ".tune.html.123.tmp").exists()
    assert "train" not in done_before(capsys.readouterr().out)


def test_time_that_is_over_is_no_verdict(data, tmp_path, capsys):
    assert tune(data, tmp_path / "tuned", "--max_hours", "1e-9") == 1
    captured = capsys.readouterr()
    assert "the same command resumes the training" in captured.err
    assert "[7/8]" not in captured.out
    assert tune(data, tmp_path / "tuned") == 0


def test_what_is_missing_is_made_again(tuned, spy, capsys):
    (tuned[1] / "rows.jsonl").unlink()
    (tuned[1] / "tune.html").unlink()
    trained = spy(stages, "train")
    assert tune(*tuned) == 0
    assert not trained
    printed = capsys.readouterr().out
    redone = [stage for stage in STAGES if stage not in done_before(printed)]
    assert redone == ["convert", "compare"]


# --- what changed ---


def test_rows_or_settings_that_changed_are_refused_once_trained(tuned, capsys):
    data, out = tuned
    before = snapshot(out)
    assert tune(data, out, "--lora_rank", "4") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "lora_rank was not set, is 4" in error
    assert "--overwrite_output_dir true" in error
    write(data, RECORDS[:-1])
    assert tune(data, out) == 2
    assert "data has changed" in capsys.readouterr().err
    assert snapshot(out) == before


def test_told_to_it_trains_anew_and_goes_on_with_the_new_run(tuned, monkeypatch, capsys):
    anew = ("--lora_rank", "4", "--overwrite_output_dir")
    with monkeypatch.context() as patch:  # before the old run is gone
        patch.setattr(stages, "train", _interrupt)
        assert tune(*tuned, *anew) == 130
    with monkeypatch.context() as patch:
        _stop_after(patch, steps=2)
        assert tune(*tuned, *anew) == 130
    settings = json.loads((tuned[1] / "run/checkpoint-2/adapter_config.json").read_text())
    assert settings["r"] == 4
    capsys.readouterr()
    assert tune(*tuned, *anew) == 0
    steps = re.findall(r"^step (\d)/4: loss", capsys.readouterr().out, re.MULTILINE)
    assert steps == ["3", "4"]


def test_a_change_of_the_questions_repeats_the_comparison_alone(tuned, capsys):
    assert tune(*tuned, "--limit", "1", "--report_to", "none") == 0
    printed = capsys.readouterr().out
    assert done_before(printed) == STAGES[:-1]
    assert "compare, again: limit was 2, is 1" in printed


def test_another_general_set_repeats_the_comparison_alone(tuned, tmp_path, capsys):
    few, own = tmp_path / "few.jsonl", Path(GLM_TINY, "general_en.jsonl")
    for num in (9, 8):  # the file's content counts as well as its name
        lines = own.read_text(encoding="utf-8").splitlines()[:num]
        few.write_text("\n".join(lines), encoding="utf-8")
        assert tune(*tuned, "--general_set", str(few)) == 0
        assert done_before(capsys.readouterr().out) == STAGES[:-1]
        found = json.loads((tuned[1] / "compare" / "compare.json").read_text(encoding="utf-8"))
        assert found["price"]["all"]["n"] == num


@pytest.mark.parametrize(
    ("flags", "terminal", "desktop", "opened"),
    [
        (("--open_page", "true"), False, False, True),
        (("--open_page", "false"), True, True, False),
        ((), True, True, True),
        ((), True, False, False),
        ((), False, True, False),
    ],
)
def test_the_page_is_opened_where_there_is_a_desktop(
    flags, terminal, desktop, opened, tuned, monkeypatch, capsys
):
    pages = []
    monkeypatch.setattr("webbrowser.open", lambda uri: pages.append(uri) or False)
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setattr("sys.stdout.isatty", lambda: terminal, raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    monkeypatch.setenv("DISPLAY", ":0" if desktop else "")
    assert tune(*tuned, *flags) == 0
    assert pages == ([(tuned[1] / "tune.html").as_uri()] if opened else [])
    assert ("no browser" in capsys.readouterr().err) == opened


def test_another_adapter_is_judged_anew(tuned, capsys):
    data, out = tuned
    assert tune(data, out) == 0  # the recipe names this folder now
    line = ["train", str(out / "tune.yaml"), "--overwrite_output_dir", "--learning_rate", "1e-3"]
    assert cli.main(line) == 0
    capsys.readouterr()
    assert tune(data, out) == 0
    printed = capsys.readouterr().out
    assert "check, again: adapter has changed" in printed
    assert done_before(printed) == STAGES[:6]


def test_more_epochs_go_on_from_the_end(tuned, capsys):
    assert tune(*tuned, "--resume_anyway", steps=5) == 0
    printed = capsys.readouterr().out
    assert "train, again: max_steps was 4, is 5" in printed
    assert re.findall(r"^step (\d)/5: loss", printed, re.MULTILINE) == ["5"]


# --- small and strange files ---


def test_an_adapter_that_changes_nothing_is_exit_code_1(data, tmp_path, capsys):
    assert tune(data, tmp_path / "tuned", "--learning_rate", "1e-12", steps=1) == 1
    assert "changes nothing" in capsys.readouterr().out


@pytest.mark.parametrize("num_rows", [1, 3])
def test_a_few_rows(num_rows, tmp_path, capsys):
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in RECORDS[:num_rows]))
    assert tune(data, tmp_path / "tuned", "--learning_rate", "1e-3") in (0, 1)
    captured = capsys.readouterr()
    alone = num_rows == 1
    assert ("no row is held out, so the adapter is judged" in captured.err) == alone
    assert ("no row was held out" in captured.out) == alone
    assert len(json.loads((tmp_path / "tuned/questions.json").read_text())) == 1
    asked = "1 records of" if alone else "1 rows that the run held out"
    assert asked in captured.out


def test_bad_rows_are_left_out_where_that_is_asked_for(tmp_path, capsys):
    records = [{"instruction": 3, "output": "x"}, *RECORDS[:9]]
    records[4] = {"instruction": "empty?", "input": "", "output": ""}
    data = write(tmp_path / "data.json", [*records, {"instruction": "q"}], "gbk")
    flags = ("--encoding", "gbk", "--eval_ratio", "0.3")
    assert tune(data, tmp_path / "tuned", *flags) == 2
    assert not (tmp_path / "tuned").exists()
    assert tune(data, tmp_path / "tuned", *flags, "--on_bad_row", "skip") in (0, 1)
    captured = capsys.readouterr()
    assert "2 of 11 rows cannot be used" in captured.err
    assert "2 bad, skipped" in captured.out
    asked = json.loads((tmp_path / "tuned/questions.json").read_text(encoding="utf-8"))
    tokenizer = load_tokenizer(GLM_TINY)
    rows = load_dataset(str(tmp_path / "tuned" / "rows"), tokenizer.row_rule)[0].to_pylist()
    _, held_out = split_rows(len(rows), 0.3, 42)
    assert len(asked) == len(held_out) > 1
    for record, row in zip(asked, held_out, strict=True):
        text = tokenizer.decode(rows[int(row)]["input_ids"], skip_special_tokens=True)
        assert normalize("NFKC", record["instruction"]) in text
        assert record["output"] in text


# --- mistakes ---


@pytest.mark.parametrize(
    "content, flags, told",
    [
        (None, (), "data.json: cannot be read"),
        ("", (), "not every file can be used"),
        ("[]", (), "not every file can be used"),
        ("{nonsense", (), "cannot be used"),
        (
            '[{"instruction": "q", "input": "", "output": ""}]',
            (),
            "the answer or text of every row is empty",
        ),
        ('[{"instruction": "q", "input": ""}]', (), "1 of 1 rows cannot be used"),
        ('[{"instruction": "q"}]', ("--on_bad_row", "skip"), "data.json"),
        ('[{"messages": [{"role": "user", "content": "q"}]}]', (), "1 of 1 rows cannot be used"),
        ('[{"text": " "}]', (), "every row is empty"),
        (RECORDS, ("--lora_target", "nothing"), "lora_target"),
        (RECORDS, ("--base", "./nowhere"), "./nowhere is no folder"),
        (RECORDS, ("--lora_rank", "0"), "--lora_rank '0' should be a whole number"),
        (RECORDS, ("--dataset_path", "x"), "--dataset_path is a setting of train"),
        (RECORDS, ("--lora_rnak", "4"), "did you mean --lora_rank?"),
        (RECORDS, ("--encoding", "utf-16"), "not every file can be used"),
        (RECORDS, ("--layout", "padded", "--tokens_per_step", "128"), "layout is padded"),
    ],
)
def test_a_mistake_is_a_line_before_anything_is_written(content, flags, told, tmp_path, capsys):
    data = tmp_path / "data.json"
    if content is not None:
        data.write_text(content if isinstance(content, str) else json.dumps(content))
    assert tune(data, tmp_path / "tuned", *flags) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert told in lines[0]
    assert not (tmp_path / "tuned").exists()


def test_a_folder_of_others_is_left_alone(data, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("mine")
    assert tune(data, tmp_path / "mine") == 2
    assert "holds other things (thesis.tex)" in capsys.readouterr().err
    assert tune(data, data) == 2
    assert "out would overwrite data_path" in capsys.readouterr().err
    assert tune(data, tmp_path / "data.json" / "x") == 2
    assert "cannot be used" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.tex"]


def test_a_damaged_journal_is_a_line(tmp_path):
    (tmp_path / "stages.json").write_text('{"train": 3}')
    with pytest.raises(UserError, match=r"stages.json: is damaged"):
        Journal.of(tmp_path, STAGES)


def test_several_processes_are_refused(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert tune(data, tmp_path / "tuned") == 2
    assert "tune is one process" in capsys.readouterr().err


def test_what_cannot_fit_is_told_before_training(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(stages, "plan", lambda _: {"cannot_fit": True})
    assert tune(data, tmp_path / "tuned") == 2
    assert "memory: training does not fit here" in capsys.readouterr().err
    assert not (tmp_path / "tuned" / "run").exists()
