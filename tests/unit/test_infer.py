"""`infer`: what it prints and writes, and how it resumes."""

import json
import shutil
from pathlib import Path

import pytest

from glmtune.cli import main
from glmtune.config.settings import InferSettings
from glmtune.errors import UserError
from glmtune.evaluation.infer import infer
from glmtune.generation import answers

SAMPLING = {"do_sample": True, "temperature": 2.0, "top_p": 0.9}


@pytest.fixture
def run(answering):
    return lambda **changes: infer(InferSettings(**(answering | changes)))


@pytest.fixture
def path(answering):
    return Path(answering["adapter"], "answers.jsonl")


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_each_record_gets_a_line_and_is_printed_as_in_2023(run, path, records_file, capsys):
    summary = run(print_form="original", print_limit=None)
    records = json.loads(records_file.read_text(encoding="utf-8"))
    lines = read(path)
    assert [line["row"] for line in lines] == [1, 2, 3, 4, 5]
    for record, line in zip(records, lines, strict=True):
        assert {name: line[name] for name in record} == record
        assert line["answer"]
        assert line["num_tokens"] == 6
        assert line["stopped"] is False
    assert "给出三个" in path.read_text(encoding="utf-8"), "no \\u escapes"

    printed = capsys.readouterr().out
    expected = (
        "Instruction: Describe a crepe\nInput: thin | <b>flat</b>\n"
        f"Answer: {lines[1]['answer']}\n### 2.Answer:\n A pancake.\n\n"
    )
    assert expected in printed
    assert printed.startswith(
        f"Instruction: 给出三个 保持健康的 秘诀。\nAnswer: {lines[0]['answer']}\n"
    )
    assert "5 records answered" in printed
    assert "30 tokens," in printed
    assert "tokens/s" in printed
    assert (summary.num_new, summary.num_tokens, summary.num_stopped) == (5, 30, 0)


def test_the_verb_says_whose_text_is_whose(run, path, capsys):
    run(print_limit=2)
    lines = read(path)
    printed = capsys.readouterr().out
    assert printed.startswith(
        "record 1\n"
        "  Instruction: 给出三个 保持健康的 秘诀。\n"
        f"  Model:       {lines[0]['answer']}\n"
        "  Expected:    多吃水果。\n"
        "               多睡觉。\n\n"
        "record 2\n"
        "  Instruction: Describe a crepe\n"
        "  Input:       thin | <b>flat</b>\n"
        f"  Model:       {lines[1]['answer']}\n"
        "  Expected:    A pancake.\n\n"
        "and 3 more, which are written (--print_limit none prints all)\n"
    )
    assert len(lines) == 5


def test_what_is_not_expected_is_not_printed(run, capsys):
    run(print_limit=None)
    printed = capsys.readouterr().out
    assert printed.count("record ") == 5
    assert printed.count("Expected:") == 4, "one record has no output"
    assert "more, which are written" not in printed


def test_ten_are_printed_unless_told_otherwise(run, records_file, capsys):
    records = json.loads(records_file.read_text(encoding="utf-8"))
    records_file.write_text(json.dumps(records * 3), encoding="utf-8")
    run()
    printed = capsys.readouterr().out
    assert (printed.count("\nrecord "), "and 5 more, which are written" in printed) == (9, True)
    run(overwrite_output=True, print_limit=0)
    printed = capsys.readouterr().out
    assert printed.startswith("and 15 more")


QUESTIONS_ALONE = [
    {"instruction": "What colour is the sky?", "input": ""},
    {"instruction": "天空是什么颜色？", "output": None},
    {"instruction": "Name a tree.", "input": "green", "output": ""},
]


def test_questions_need_no_output(run, path, records_file, capsys):
    records_file.write_text(json.dumps(QUESTIONS_ALONE), encoding="utf-8")
    run()
    assert [line["output"] for line in read(path)] == ["", "", ""]
    assert "Expected:" not in capsys.readouterr().out
    assert "nothing was left to do" in str(run()), "and the file is known again"


def test_records_without_question_or_with_numbers_are_refused(run, records_file):
    for broken in ({"input": "a"}, {"instruction": "a", "output": 3}):
        records_file.write_text(json.dumps([*QUESTIONS_ALONE, broken]), encoding="utf-8")
        with pytest.raises(UserError, match="row 4"):
            run()


def test_without_an_adapter_the_base_answers(run, path, tmp_path, monkeypatch):
    run()
    tuned = read(path)
    monkeypatch.chdir(tmp_path)
    run(adapter=None)
    base = read(tmp_path / "answers.jsonl")
    assert [line["row"] for line in base] == [1, 2, 3, 4, 5]
    assert [line["answer"] for line in base] != [line["answer"] for line in tuned]


def test_a_run_folder_means_its_newest_checkpoint(run, path, answering, tmp_path):
    run()
    for step in (2, 10):
        shutil.copytree(answering["adapter"], tmp_path / "run" / f"checkpoint-{step}")
    run(adapter=str(tmp_path / "run"))
    written = tmp_path / "run" / "answers.jsonl"
    assert written.read_bytes() == path.read_bytes()
    settings = json.loads((tmp_path / "run" / "answers.settings.json").read_text(encoding="utf-8"))
    assert settings["adapter"] == "run/checkpoint-10"
    assert settings["base"] == "chatglm-6b-tiny"
    assert str(tmp_path) not in json.dumps(settings), "no private path travels"


@pytest.mark.parametrize("sampling", [{}, SAMPLING])
@pytest.mark.parametrize("kept", [1, 3])
def test_a_resumed_run_equals_an_unbroken_one(run, path, sampling, kept):
    run(**sampling)
    unbroken = path.read_bytes()
    lines = unbroken.splitlines(keepends=True)
    # The file is cut within the next line, inside a Chinese character or just before the end.
    cut = lines[kept][: lines[kept].find("一".encode()[:1]) + 1 or -1]
    path.write_bytes(b"".join(lines[:kept]) + cut)
    summary = run(**sampling)
    assert path.read_bytes() == unbroken
    assert summary.num_new == 5 - kept


def test_lines_are_written_as_batches_finish(run, path, monkeypatch, capsys):
    answer_batch, calls = answers.answer_batch, []

    def break_off(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            assert len(read(path)) == 2, "the first batch is on disk before the second begins"
            raise KeyboardInterrupt
        return answer_batch(*arguments)

    monkeypatch.setattr(answers, "answer_batch", break_off)
    with pytest.raises(KeyboardInterrupt):
        run()
    assert len(read(path)) == 2
    assert "2 answers are kept; run the same command again" in capsys.readouterr().err


def test_the_limit_can_grow(run, path, capsys):
    run(limit=2)
    assert len(read(path)) == 2
    run(limit=4)
    assert len(read(path)) == 4
    before = path.read_bytes()
    run()
    assert path.read_bytes().startswith(before)
    capsys.readouterr()
    run(limit=3)
    assert len(read(path)) == 5
    assert "nothing was left to do" in capsys.readouterr().out


@pytest.mark.parametrize("sampling", [{}, SAMPLING])
def test_the_batch_size_may_change(run, path, sampling):
    run(**sampling)
    whole = path.read_bytes()
    path.write_bytes(whole[: whole.index(b"\n") + 1])
    run(**sampling, per_device_eval_batch_size=3)
    assert path.read_bytes() == whole


@pytest.mark.parametrize(
    "changes, told",
    [
        ({"max_new_tokens": 7}, "max_new_tokens 6, this run has 7"),
        ({"repetition_penalty": 1.2}, "repetition_penalty not set, this run has 1.2"),
        (SAMPLING, "do_sample False, this run has True"),
        ({"num_beams": 2}, "num_beams 1, this run has 2"),
    ],
)
def test_answers_of_other_settings_do_not_mix(run, path, changes, told):
    run(limit=2)
    before = path.read_bytes()
    with pytest.raises(UserError, match=told) as error:
        run(**changes)
    assert "--overwrite_output true" in str(error.value)
    assert path.read_bytes() == before
    run(**changes, overwrite_output=True)
    assert len(read(path)) == 5


def test_answers_of_an_adapter_trained_on_do_not_mix(run, answering):
    run(limit=2)
    other = Path(answering["adapter"], "adapter_config.json")
    settings = json.loads(other.read_text(encoding="utf-8"))
    other.write_text(json.dumps(settings | {"lora_alpha": 64}), encoding="utf-8")
    with pytest.raises(UserError, match="adapter_sha256"):
        run()


def test_answers_to_other_records_do_not_mix(run, path, records_file):
    run(limit=3)
    records = json.loads(records_file.read_text(encoding="utf-8"))
    records[1]["output"] = "changed"
    records_file.write_text(json.dumps(records), encoding="utf-8")
    with pytest.raises(
        UserError, match=r"answers.jsonl:2: is no answer to .*records.json:1 \(row 2"
    ):
        run()
    records_file.write_text(json.dumps(records[:1]), encoding="utf-8")
    with pytest.raises(UserError, match="more records than the 1 of this run"):
        run()


def test_a_file_of_unknown_origin_is_not_touched(run, path):
    path.write_text("notes\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"no answers.settings.json beside it"):
        run()
    assert path.read_text(encoding="utf-8") == "notes\n"


@pytest.mark.parametrize("damage", [b"{\n", b"3\n", b"\xff\n"])
def test_a_damaged_line_is_named(run, path, damage):
    run(limit=1)
    path.write_bytes(path.read_bytes() + damage)
    with pytest.raises(UserError, match=r"answers.jsonl:2: "):
        run()


def test_damaged_settings_are_named(run, path):
    run(limit=1)
    path.with_suffix(".settings.json").write_text("[1", encoding="utf-8")
    with pytest.raises(UserError, match=r"answers.settings.json: not a JSON object"):
        run()


def test_a_path_that_cannot_be_written_is_told_before_a_model_is_loaded(
    run, records_file, monkeypatch
):
    monkeypatch.setattr(
        "glmtune.evaluation.answers.load_base_model", lambda *_, **__: pytest.fail("loaded")
    )
    for path in (records_file / "answers.jsonl", records_file.parent):
        with pytest.raises(UserError, match=f"{path}: cannot be written"):
            run(output_path=str(path))


def test_bad_rows_can_be_left_out(run, path, records_file, capsys):
    records = json.loads(records_file.read_text(encoding="utf-8"))
    del records[1]["instruction"]
    records_file.write_text(json.dumps(records), encoding="utf-8")
    with pytest.raises(UserError, match="row 2"):
        run()
    assert not path.exists()
    run(on_bad_row="skip")
    assert [line["row"] for line in read(path)] == [1, 3, 4, 5]
    assert "skipped" in capsys.readouterr().err


def test_a_record_beyond_the_positions_leaves_no_file(run, path, records_file):
    records = [{"instruction": "long " * 300, "output": "x"}]
    records_file.write_text(json.dumps(records), encoding="utf-8")
    with pytest.raises(UserError, match=r"records.json:1 \(row 1\): the prompt has"):
        run()
    assert not path.exists()


@pytest.fixture
def with_long_ones(records_file):
    """Records of which the second and the fourth are too long for the tiny model."""
    records = [{"instruction": f"question {n}", "output": "x"} for n in range(1, 6)]
    for n in (1, 3):
        records[n]["input"] = "long " * 300
    records_file.write_text(json.dumps(records), encoding="utf-8")


@pytest.mark.usefixtures("with_long_ones")
def test_records_beyond_the_positions_are_told_before_the_model_is_loaded(run, monkeypatch):
    monkeypatch.setattr("glmtune.evaluation.answers.load_base_model", None)
    with pytest.raises(UserError) as told:
        run()
    line = str(told.value)
    assert "records.json:1 (row 2): the prompt has 307 tokens" in line
    assert "(1 more cannot be asked either)" in line
    assert "--on_bad_row skip" in line


@pytest.mark.usefixtures("with_long_ones")
def test_records_beyond_the_positions_are_left_out_on_demand(run, path, capsys):
    run(on_bad_row="skip")
    assert [line["row"] for line in read(path)] == [1, 3, 5]
    told = capsys.readouterr().err
    assert "skipped" in told
    assert "(row 4): the prompt has 307 tokens" in told
    assert "nothing was left to do" in str(run(on_bad_row="skip")), "the file is known again"
    run(limit=1, overwrite_output=True)
    assert len(read(path)) == 1, "what is not asked for is not in the way"


def test_a_file_of_records_beyond_the_positions_alone_is_refused(run, records_file):
    records_file.write_text(json.dumps([{"instruction": "long " * 300}]), encoding="utf-8")
    with pytest.raises(UserError, match="no row can be asked"):
        run(on_bad_row="skip")


def test_infer_command_answers_and_refuses(answering, path, capsys):
    flags = [text for name, value in answering.items() for text in (f"--{name}", str(value))]
    assert main(["infer", *flags, "--limit", "1", "--num_beams", "2"]) == 0
    assert len(read(path)) == 1
    assert main(["infer", *flags]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert "num_beams" in error
