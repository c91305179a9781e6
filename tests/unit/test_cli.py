"""The command line: verbs, exit codes, the root scripts, and how fast it answers."""

import json
import os
import subprocess
import sys
import types

import pytest

from glmtune import __version__, cli, early
from glmtune.config.settings import (
    SETTINGS,
    CompareSettings,
    ConvertSettings,
    EvaluateSettings,
    InferSettings,
    MergeSettings,
    ReplayRowsSettings,
    TrainSettings,
    ValidateSettings,
)
from glmtune.errors import UserError, note

SCRIPTS = {
    "cover_alpaca2jsonl.py": "convert",
    "tokenize_dataset_rows.py": "tokenize",
    "finetune.py": "train",
    "infer.py": "infer",
}


def python(*arguments: str, cwd, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python in a fresh process that finds glmtune where this one does."""
    source = os.path.dirname(os.path.dirname(cli.__file__))
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": source} | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


FINISHED = types.SimpleNamespace(interrupted=False, passes_gate=True)


@pytest.fixture
def room(monkeypatch):
    """Replace a module that a verb calls; returns the list of its calls' arguments."""
    calls = []
    for name in (name for name in vars(early) if name.startswith("check_")):
        monkeypatch.setattr(early, name, lambda _: None)  # what the verbs name is not there

    def replace(module: str, **functions) -> list:
        def recorder(name, result):
            def record(*arguments, **_):
                calls.append((name, *arguments))
                return result

            return record

        fake = types.ModuleType(module)
        for name, result in functions.items():
            setattr(fake, name, recorder(name, result))
        monkeypatch.setitem(sys.modules, module, fake)
        return calls

    return replace


# --- verbs ---


@pytest.mark.parametrize(
    "line, module, function, config",
    [
        (
            "validate a b --held_out c",
            "glmtune.data.validation",
            "validate",
            ValidateSettings(files=("a", "b"), held_out="c"),
        ),
        (
            "convert --data_path a --save_path b",
            "glmtune.data.convert",
            "convert",
            ConvertSettings(data_path="a", save_path="b"),
        ),
        (
            "train --dataset_path a --output_dir b --fp16 false",
            "glmtune.training.loop",
            "train",
            TrainSettings(dataset_path="a", output_dir="b"),
        ),
        (
            "infer --data_path a --adapter b",
            "glmtune.evaluation.infer",
            "infer",
            InferSettings(data_path="a", adapter="b"),
        ),
        (
            "compare --data_path a --adapter b",
            "glmtune.evaluation.compare",
            "compare",
            CompareSettings(data_path="a", adapter="b"),
        ),
        (
            "replay-rows a",
            "glmtune.evaluation.replay_rows",
            "write_replay_rows",
            ReplayRowsSettings(save_path="a"),
        ),
        (
            "evaluate --data_path a --adapter b,c",
            "glmtune.evaluation.evaluate",
            "evaluate",
            EvaluateSettings(data_path="a", adapter=("b", "c")),
        ),
        (
            "merge --adapter a --save_path b",
            "glmtune.adapters",
            "merge_adapter",
            MergeSettings(adapter="a", save_path="b"),
        ),
    ],
)
def test_a_verb_hands_its_config_on(line, module, function, config, room):
    calls = room(module, **{function: FINISHED})
    assert cli.main(line.split()) == 0
    assert [call[:2] for call in calls] == [(function, config)]


def test_an_error_keeps_where_it_is_and_its_fix_however_long_its_line():
    assert str(UserError("a.json:1: x; mend it")) == "a.json:1: x; mend it"
    line = str(UserError(f"a.json:1: {'x' * 99_999}; mend it"))
    assert line.startswith("a.json:1: xxx")
    assert line.endswith("xxx; mend it")
    assert len(line) < 5000


def test_what_cannot_be_printed_is_told_as_escapes(capsys):
    assert str(UserError("全角　空格: 'a\nb\x1b[31m'; mend it")) == (
        r"全角　空格: 'a\nb\x1b[31m'; mend it"
    )
    assert str(UserError("a.json: '\ud83d'; mend it")) == r"a.json: '\ud83d'; mend it"
    note("a.json: '\ud83d'")
    assert capsys.readouterr().err == "note: a.json: '\\ud83d'\n"


def test_training_ends_with_a_check_up(room, monkeypatch):
    given = {}
    fake = types.ModuleType("glmtune.training.loop")
    fake.train = lambda config, **more: given.update(more) or FINISHED
    monkeypatch.setitem(sys.modules, fake.__name__, fake)
    room("glmtune.evaluation.checkup", check_after_training=None)
    checkup = sys.modules["glmtune.evaluation.checkup"]
    assert cli.main(["train", "--dataset_path", "a", "--output_dir", "b"]) == 0
    assert given == {"at_end": checkup.check_after_training}


@pytest.mark.parametrize("is_good", [True, False])
def test_findings_are_exit_codes(room, is_good):
    room("glmtune.evaluation.checkup", check=types.SimpleNamespace(is_fine=is_good))
    room("glmtune.training.faults.replay", replay=is_good)
    for line in ("check a", "replay a"):
        assert cli.main(line.split()) == (0 if is_good else 1)


def test_tokenize_finds_model_and_tokenizer(room):
    calls = room("glmtune.models.resolve", resolve_base="folder", base_name="name")
    room("glmtune.models.base_files", load_row_tokenizer="tokenizer")
    room("glmtune.data.tokenizing", tokenize=None)
    line = "tokenize --jsonl_path a --save_path b --base c"
    assert cli.main(line.split()) == 0
    assert calls[:3] == [
        ("resolve_base", "c"),
        ("load_row_tokenizer", "folder"),
        ("base_name", "folder"),
    ]
    assert calls[3][0] == "tokenize"
    assert calls[3][1].jsonl_path == "a"
    assert calls[3][2:] == ("tokenizer", "name")


def test_adapters_convert(room):
    calls = room("glmtune.adapters", convert_adapter=None)
    assert cli.main(["adapters", "convert", "old", "new"]) == 0
    assert cli.main(["adapters", "convert", "--old", "a", "--new", "b", "--to", "chatglm"]) == 0
    assert cli.main(["adapters", "convert", "a", "b", "--base", "c"]) == 0
    assert calls == [
        ("convert_adapter", "old", "new", "peft", None),
        ("convert_adapter", "a", "b", "chatglm", None),
        ("convert_adapter", "a", "b", "peft", "c"),
    ]


def test_a_recipe_and_a_flag(room, root):
    calls = room("glmtune.training.loop", train=FINISHED)
    recipe = str(root / "recipes" / "chatglm-6b-alpaca-zh.yaml")
    assert cli.main(["train", recipe, "--learning_rate", "2e-4"]) == 0
    ((_, config),) = calls
    assert (config.learning_rate, config.max_steps) == (2e-4, 52000)


# --- exit codes ---


def test_a_run_that_was_stopped_ends_as_ctrl_c_does(room):
    room("glmtune.training.loop", train=types.SimpleNamespace(interrupted=True))
    assert cli.main(["train", "--dataset_path", "a", "--output_dir", "b"]) == 130


def refuse(_):
    raise UserError("rows.jsonl:3: not JSON; mend the line")


def interrupt(_):
    raise KeyboardInterrupt


CONVERT = ["convert", "--data_path", "a", "--save_path", "b"]


def test_a_users_mistake(monkeypatch, capsys):
    monkeypatch.setitem(cli.VERBS, "convert", refuse)
    assert cli.main(CONVERT) == 2
    assert capsys.readouterr() == ("", "error: rows.jsonl:3: not JSON; mend the line\n")


def test_ctrl_c(monkeypatch, capsys):
    monkeypatch.setitem(cli.VERBS, "convert", interrupt)
    assert cli.main(CONVERT) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_a_programmers_mistake_is_not_hidden(monkeypatch):
    monkeypatch.setitem(cli.VERBS, "convert", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.main(CONVERT)


def test_a_pipe_of_somebody_else_is_not_hidden(monkeypatch):
    def lose_worker(_):
        raise BrokenPipeError

    monkeypatch.setitem(cli.VERBS, "convert", lose_worker)
    with pytest.raises(BrokenPipeError):
        cli.main(CONVERT)


def test_a_reader_that_leaves():
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "glmtune", "train", "--help"],
        env=os.environ | {"PYTHONPATH": os.path.dirname(os.path.dirname(cli.__file__))},
        stdout=writer,
        stderr=subprocess.PIPE,
        timeout=300,
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


def test_a_terminal_without_chinese(tmp_path):
    code = "from glmtune import cli; cli.overview = lambda: '你好'; print(cli.main([]))"
    done = python("-c", code, cwd=tmp_path, PYTHONIOENCODING="ascii")
    assert done.stdout == "\\u4f60\\u597d\n0\n"


@pytest.mark.parametrize(
    "line, words",
    [
        ("trian", "there is no verb 'trian'; did you mean train?"),
        ("zzz", "there is no verb 'zzz'; `glmtune --help` lists the verbs"),
        ("adapters", "did you mean adapters convert?"),
        ("help trian", "there is no verb 'trian'; did you mean train?"),
        ("adapters turn a b", "did you mean adapters convert?"),
        ("train --lora_rnk 8", "did you mean --lora_rank?"),
    ],
)
def test_unknown_words(line, words, capsys):
    assert cli.main(line.split()) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert words in err


# --- help ---


@pytest.mark.parametrize("arguments", [[], ["-h"], ["--help"], ["help"], ["--help", "train"]])
def test_overview_names_every_verb(arguments, capsys):
    assert cli.main(arguments) == 0
    text = capsys.readouterr().out
    assert all(f"\n  {verb} " in text for verb in cli.VERBS)


def test_every_verb_has_settings_that_know_it():
    assert list(cli.VERBS) == list(SETTINGS)
    assert all(settings.verb == verb for verb, settings in SETTINGS.items())


@pytest.mark.parametrize("verb", cli.VERBS)
def test_help_of_a_verb(verb, capsys):
    assert cli.main([*verb.split(), "--seed", "--help"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: glmtune {verb} ")
    assert cli.summary(verb) in text


@pytest.mark.parametrize("verb", cli.VERBS)
def test_help_before_a_verb_is_help_after_it(verb, capsys):
    texts = []
    for line in (["help", *verb.split()], [*verb.split(), "--help"]):
        assert cli.main(line) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]


@pytest.mark.parametrize("line", ["{} --help", "{} -h", "help {}"])
@pytest.mark.parametrize("group", ["adapters", "bench"])
def test_help_of_a_group_names_its_verbs_alone(group, line, capsys):
    assert cli.main(line.format(group).split()) == 0
    text = capsys.readouterr().out
    listed = [verb for verb in cli.VERBS if f"\n  {verb} " in text]
    assert listed == [verb for verb in cli.VERBS if verb.startswith(f"{group} ")]
    assert f"`glmtune {group} VERB --help`" in text


@pytest.mark.parametrize("word", ["--version", "version"])
def test_version(word, capsys):
    assert cli.main([word]) == 0
    assert capsys.readouterr().out == f"glmtune {__version__}\n"


def test_help_answers_in_0_3_s(tmp_path):
    def seconds_of_children():  # CPU time, since other programs may use the cores
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    resource = pytest.importorskip("resource")
    before = seconds_of_children()
    for _ in range(5):
        assert python("-m", "glmtune", "--help", cwd=tmp_path).returncode == 0
    assert seconds_of_children() - before < 5 * 0.3


def test_first_lines_are_our_own(tmp_path):
    """No progress bar or warning of a library is among them; stderr has notes and loading lines."""
    record = {"instruction": "Who?", "input": "", "output": "x"}
    (tmp_path / "a.json").write_text(json.dumps([record] * 60))
    small = "--base glm-tiny --use_cpu true"
    for line in (
        "convert --data_path a.json --save_path a.jsonl",
        "tokenize --jsonl_path a.jsonl --save_path rows --base glm-tiny",
        f"train --dataset_path rows --output_dir run --max_steps 2 --report_to none {small}",
        f"infer --data_path a.json --adapter run --limit 2 --max_new_tokens 2 {small}",
        f"compare --data_path a.json --adapter run --max_new_tokens 2 {small} "
        "--per_device_eval_batch_size 2 --limit 60",
    ):
        done = python("-m", "glmtune", *line.split(), cwd=tmp_path, HF_HUB_OFFLINE="1")
        assert done.returncode == 0, done.stderr
        strange = [
            text
            for text in done.stderr.splitlines()
            if text and not text.startswith(("note: ", "loading glm-tiny"))
        ]
        assert strange == [], line
    progress = [text for text in done.stdout.splitlines() if "answered twice" in text]
    assert len(progress) <= 11
    assert all(text.endswith(" left") for text in progress[:-1])
    assert progress[-1] == "60 of 60 records answered twice"


def test_a_program_that_imports_it_keeps_its_libraries_as_they_are(tmp_path):
    code = "import glmtune.models, logging, datasets, transformers.utils.logging as t; " + (
        "assert t.is_progress_bar_enabled() and not datasets.are_progress_bars_disabled(); "
        "assert logging.getLogger('bitsandbytes.backends.cpu.ops').level == 0"
    )
    # As in a process in which no command has run.
    done = python("-c", code, cwd=tmp_path, HF_DATASETS_DISABLE_PROGRESS_BARS="0")
    assert done.returncode == 0, done.stderr


# --- the root scripts ---


@pytest.mark.parametrize("script", SCRIPTS)
def test_script_refuses_in_one_line(script, root, tmp_path):
    """From any folder, without glmtune installed or on PYTHONPATH."""
    done = python(str(root / script), "--no_such_flag", "1", cwd=tmp_path, PYTHONPATH="")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == (
        f"error: --no_such_flag is not a setting of {SCRIPTS[script]}; "
        f"`glmtune {SCRIPTS[script]} --help` lists its settings\n"
    )


@pytest.mark.parametrize("script", SCRIPTS)
def test_script_is_its_verb(script, root, tmp_path):
    done = python(str(root / script), "--help", cwd=tmp_path, PYTHONPATH="")
    assert done.returncode == 0
    assert done.stdout.startswith(f"usage: glmtune {SCRIPTS[script]} ")


@pytest.mark.parametrize(
    "script, line",
    [
        ("cover_alpaca2jsonl.py", "--data_path a.json --save_path a.jsonl"),
        (
            "tokenize_dataset_rows.py",
            "--jsonl_path a.jsonl --save_path a --max_seq_length 200 --skip_overlength true",
        ),
        (
            "finetune.py",
            "--dataset_path a --lora_rank 8 --per_device_train_batch_size 6 "
            "--gradient_accumulation_steps 1 --max_steps 52000 --save_steps 1000 "
            "--save_total_limit 2 --learning_rate 1e-4 --fp16 false --remove_unused_columns false "
            "--logging_steps 50 --output_dir b",
        ),
        ("infer.py", "--data_path a.json --adapter b"),
    ],
)
def test_the_originals_flags_are_all_read(script, line, monkeypatch):
    configs = []
    monkeypatch.setitem(cli.VERBS, SCRIPTS[script], configs.append)
    assert cli.main([SCRIPTS[script], *line.split(), "--base", "base"]) == 0
    (config,) = configs
    assert config.base == "base"
