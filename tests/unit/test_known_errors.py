"""The twenty known errors: found in whatever wraps them, and explained as they should be."""

import re
import types

import pytest

from glmtune import cli
from glmtune.config import DoctorConfig
from glmtune.config.flags import split_arguments
from glmtune.doctor import run
from glmtune.doctor.explain import errors_page, explain, find_known
from glmtune.doctor.known_errors import KNOWN_ERRORS
from glmtune.errors import UserError

SHORT_FORMS = [
    ("AttributeError: 'ChatGLMTokenizer' object has no attribute 'tokenizer'", 0),
    ("ValueError: 130000 is not in list", 4),
    ("ValueError: 130004 is not in list", 4),
    ("Target modules {'v_proj', 'q_proj'} not found in the base model.", 6),
    ("AttributeError: property 'eos_token' of 'ChatGLMTokenizer' object has no setter", 7),
    ("JSON parse error: Column(/instruction) changed from string to array in row 7", 8),
    ("ModuleNotFoundError: No module named 'cpm_kernels'", 11),
    ("ImportError: This modeling file requires the following packages that were not found in your"
     " environment: icetk. Run `pip install icetk`", 11),
    ("_pickle.UnpicklingError: invalid load key, 'v'.", 13),
    ("SafetensorError: Error while deserializing header: HeaderTooLarge", 13),
    ("size mismatch for lm_head.weight: copying a param with shape torch.Size([150528, 4096])", 14),
    ("\"LayerNormKernelImpl\" not implemented for 'Half'", 15),
    ("{'loss': 0.0, 'grad_norm': nan, 'learning_rate': 9e-05, 'epoch': 0.1}", 16),
    ("(MaxRetryError(\"HTTPSConnectionPool(host='huggingface.co', port=443): Max retries", 18),
    ("The repository for chatglm3-6b contains custom code which must be executed to correctly", 19),
]  # fmt: skip


def test_there_are_twenty():
    assert len(KNOWN_ERRORS) == 20
    assert len({known.message for known in KNOWN_ERRORS}) == 20


@pytest.mark.parametrize("known", KNOWN_ERRORS, ids=lambda known: known.message[:30])
def test_a_message_is_known_and_no_other(known):
    assert find_known(known.message) == [known]
    log = f"Traceback (most recent call last):\n  File 'x.py', line 1\n{known.message}\n\nbye"
    assert find_known(log) == [known]
    wrapped = re.sub(r"(.{30,}?) ", r"\1\n    ", known.message)
    assert find_known(wrapped) == [known]


@pytest.mark.parametrize("text, number", SHORT_FORMS)
def test_other_forms_of_a_message(text, number):
    assert find_known(text) == [KNOWN_ERRORS[number]]


@pytest.mark.parametrize(
    "text",
    [
        *["", "ValueError: 7 is not in list", "No module named 'x'", "can't set attribute 'x'"],
        *["{'loss': 0.05, 'grad_norm': 0.8}", "FileNotFoundError: 'config.json'"],
    ],
)
def test_unknown_messages(text):
    assert find_known(text) == []


@pytest.mark.parametrize("known", KNOWN_ERRORS, ids=lambda known: known.message[:30])
def test_an_explanation_is_in_both_languages_with_a_command_that_exists(known):
    text = explain(known)
    assert re.search(r"[a-z]{3} [a-z]+ ", known.cause)
    assert len(re.findall(r"[\u4e00-\u9fff]", known.cause_zh)) > 10
    assert known.cause in text
    assert known.cause_zh in text
    assert known.command in text
    assert re.fullmatch(r"([\w.-]+/[\w.-]+#\d+(, )?)+", known.threads)
    for line in re.findall(r"glmtune (.+?)(?: &&|$)", known.command):
        words = line.split()
        if "import" in words[0] or words[0].startswith("as"):
            continue
        verb = " ".join(words[:2]) if " ".join(words[:2]) in cli.VERBS else words[0]
        if verb in cli.VERBS:
            split_arguments(verb, words[len(verb.split()) :])  # refuses unknown flags


def test_the_page_is_in_step(root):
    page = (root / "docs" / "errors.md").read_text(encoding="utf-8")
    assert page == errors_page(), "run: glmtune doctor --errors > docs/errors.md"


def test_explain_takes_text_a_file_or_stdin(tmp_path, monkeypatch, capsys):
    known = KNOWN_ERRORS[4]
    (tmp_path / "log.txt").write_text(f"step 1\n{known.message}\n")
    monkeypatch.setattr("sys.stdin", types.SimpleNamespace(read=lambda: known.message))
    for text in (known.message, str(tmp_path / "log.txt"), "-"):
        assert cli.main(["doctor", "--explain", text]) == 0
        out = capsys.readouterr().out
        assert known.cause in out
        assert known.cause_zh in out
    assert cli.main(["doctor", "--explain", "nothing known"]) == 2
    assert "none of the twenty errors" in capsys.readouterr().err


def test_errors_are_listed(capsys):
    assert cli.main(["doctor", "--errors"]) == 0
    assert capsys.readouterr().out == errors_page()


def test_a_verb_that_meets_a_known_error_says_what_mends_it(monkeypatch, capsys):
    def fail(settings):
        raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setitem(cli.VERBS, "validate", fail)
    assert cli.main(["validate", "x.json"]) == 1
    trace, _, err = capsys.readouterr().err.partition("RuntimeError: CUDA out of memory")
    assert trace.startswith("Traceback")
    assert "--gradient_checkpointing true" in err
    assert "显存" in err
    monkeypatch.setitem(cli.VERBS, "validate", lambda _: {}["unknown"])
    with pytest.raises(KeyError):
        cli.main(["validate", "x.json"])
    assert capsys.readouterr().err == ""


def test_an_error_text_that_is_a_name_too_long_for_a_file():
    with pytest.raises(UserError, match="none of the twenty"):
        run.doctor(DoctorConfig(explain="x" * 5000))
