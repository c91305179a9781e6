"""Fields of rows: read by other names, kept as earlier rounds, noted or refused."""

import json
from pathlib import Path

import pytest

from glmtune.cli import main
from glmtune.config.settings import TokenizeSettings, ValidateSettings
from glmtune.data.templates import rounds
from glmtune.data.validation import validate
from glmtune.errors import UserError
from glmtune.evaluation.conversation import Round, write_prompt
from glmtune.models.families import DEFAULT

PLAIN = {"instruction": "Name a tree.", "input": "", "output": "Oak."}
EARLIER = [["图书馆几点开门?", "早上八点。"], ["周日呢?", "十点。"]]


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def write(*rows: object, name: str = "a.json") -> str:
        lines = (json.dumps(row, ensure_ascii=False) for row in rows)
        text = f"[{', '.join(lines)}]" if name.endswith(".json") else "\n".join(lines)
        (tmp_path / name).write_text(text, encoding="utf-8")
        return name

    return write


def convert(path: str, *flags: str) -> list[dict]:
    """Convert as a user would, and return the rows written."""
    assert main(["convert", "--data_path", path, "--save_path", "out.jsonl", *flags]) == 0
    with open("out.jsonl", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def refused(capsys, *arguments: str) -> str:
    """Run a verb that refuses, and return the line that says why."""
    assert main([*arguments]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "Traceback" not in line
    return line


def problems_of(path: str) -> dict[str, int]:
    try:
        return validate(ValidateSettings(files=(path,))).problems.counts
    except UserError:
        return {"refused": 1}


class TestHistory:
    ROW = PLAIN | {"instruction": "几点关门?", "history": EARLIER}
    SAID = ("图书馆几点开门?", "早上八点。", "周日呢?", "十点。", "几点关门?", "Oak.")

    def test_a_file_with_earlier_rounds_becomes_one_of_conversations(self, write, capsys):
        rows = convert(write(PLAIN, self.ROW, self.ROW | {"input": "只说数字"}))
        texts = [[turn["content"] for turn in row["messages"]] for row in rows]
        assert texts[0] == ["Name a tree.", "Oak."]
        assert texts[1] == [*self.SAID]
        assert texts[2] == [text.replace("关门?", "关门?\n只说数字") for text in self.SAID]
        roles = {tuple(turn["role"] for turn in row["messages"]) for row in rows}
        assert roles == {("user", "assistant"), ("user", "assistant") * 3}
        assert main(["validate", "a.json"]) == 0
        assert "2 with earlier rounds" in capsys.readouterr().out

    def test_earlier_rounds_are_what_chat_reads(self):
        earlier = [Round(question, {"base": answer}) for question, answer in EARLIER]
        assert rounds(EARLIER, "几点关门?") == write_prompt(
            DEFAULT.chat, earlier, "几点关门?", "base"
        )

    @pytest.mark.parametrize("empty", [[], None, ""])
    def test_an_empty_history_adds_nothing(self, write, empty):
        rows = convert(write(PLAIN | {"history": empty}))
        assert rows == [{"context": "Instruction: Name a tree.\nAnswer: ", "target": "Oak."}]

    @pytest.mark.parametrize(
        "history",
        [
            *["早上八点。", [["q"]], [["q", "a", "b"]], [["q", None]], ["q", "a"], {"q": "a"}, 7],
            [{"role": "user", "content": "q"}],
        ],
    )
    def test_what_is_no_list_of_rounds_is_refused(self, write, capsys, history):
        path = write(PLAIN, PLAIN | {"history": history})
        told = refused(capsys, "convert", "--data_path", path, "--save_path", "out.jsonl")
        assert 'a.json:1 (row 2): field "history" is' in told
        assert '[["earlier question", "its answer"], ...]' in told
        assert refused(capsys, "validate", path)
        # The fix in the line works:
        assert len(convert(write(PLAIN, PLAIN | {"history": [["q", "a"]]}))) == 2
        assert problems_of("a.json") == {}

    def test_the_same_question_after_other_rounds_is_no_repeat(self, write):
        other = self.ROW | {"history": [["超市几点开门?", "九点。"]]}
        assert problems_of(write(PLAIN, self.ROW, other)) == {}
        assert problems_of(write(self.ROW, other, self.ROW)) == {"duplicate": 1}

    def test_a_converted_file_holds_the_same_questions(self, write):
        path = write(self.ROW, PLAIN | {"history": [["q", "a"]], "input": "x"})
        convert(path)
        validation = validate(ValidateSettings(files=(path,), held_out="out.jsonl"))
        assert validation.problems.counts == {"leak": 2}

    def test_a_control_character_in_a_round_is_told(self, write):
        path = write(PLAIN | {"history": [["a\0b", "c"]]})
        assert problems_of(path) == {"control character in text": 1}

    def test_a_context_too_long_keeps_its_question(self, write, word_tokenizer):
        from glmtune.data.records import read_rows
        from glmtune.data.tokenizing import encode_rows

        context = rounds([(" ".join("1" * 30), "2")], "7 8 9")
        rows, _ = read_rows(write({"context": context, "target": "Oak."}, name="out.jsonl"))
        config = TokenizeSettings(jsonl_path="out.jsonl", save_path="rows", max_seq_length=8)
        out = encode_rows(rows, word_tokenizer, config)
        words = [word_tokenizer.encode_word(word) for word in rows[0].context.split()]
        assert out.input_ids[: out.seq_len[0]].tolist() == [*words[-6:], 1001, 1004]
        assert out.cut_contexts == [1]


@pytest.mark.parametrize(
    "row",
    [
        {"input": "对下联", "target": "秋月", "kind": "Couplet"},
        {"content": "对下联", "summary": "秋月"},
        {"prompt": "对下联", "response": "秋月", "history": []},
        {"prompt": "对下联", "completion": "秋月"},
        {"question": "对下联", "answer": "秋月", "id": 1},
        {"query": "对下联", "response": "秋月"},
        {"question": "对下联", "response": "秋月"},
        {"instruction": "对下联", "response": "秋月"},
        {"inputs": "对下联", "targets": "秋月"},
        {"instruction": "对下联", "input": None, "output": "秋月"},
    ],
)
class TestOtherNames:
    def test_are_read_and_said(self, write, capsys, row):
        rows = convert(write(row, row))
        assert rows == [{"context": "Instruction: 对下联\nAnswer: ", "target": "秋月"}] * 2
        told = capsys.readouterr().out
        for name in row:
            if name in ("kind", "id"):
                assert f'2 with a field "{name}", which is not used' in told
            elif name not in ("instruction", "input", "output", "history"):
                assert f'"{name}" read as' in told
        if "target" in row:
            assert '2 with "input" read as instruction, "target" read as output' in told

    def test_are_checked_in_bulk_and_one_by_one(self, write, capsys, row):
        other = {name: text for name, text in row.items() if name != "history"}
        other = {n: f"{text} 2" if isinstance(text, str) else text for n, text in other.items()}
        texts = []
        for spoil in ({}, {"history": []}):  # the second is looked at row by row
            validation = validate(ValidateSettings(files=(write(other, row | spoil, row),)))
            assert validation.problems.counts == {"duplicate": 1}
            assert validation.files[0].num_unusable == 0
            texts.append(validation.files[0].fields.lines())
        assert texts[0] == texts[1]
        assert any("read as" in line for line in texts[0]) == ("output" not in row)

    def test_tokenize_reads_them_as_it_reads_what_convert_wrote(self, write, row):
        path = write(row, name="a.jsonl")
        tokenize = ["tokenize", path, "--base", "glm-tiny", "--save_path"]
        assert main([*tokenize, "rows"]) == 0
        convert(path)
        assert (
            main(["tokenize", "out.jsonl", "--base", "glm-tiny", "--save_path", "as_before"]) == 0
        )
        rows, as_before = (
            Path(folder, "data-00000-of-00001.arrow").read_bytes()
            for folder in ("rows", "as_before")
        )
        assert rows == as_before


def test_a_context_beside_a_question_is_its_input(write, capsys):
    row = {
        "instruction": "几点?",
        "context": "图书馆八点开门。",
        "response": "八点",
        "category": "qa",
    }
    (written,) = convert(write(row))
    assert written["context"] == "Instruction: 几点?\nInput: 图书馆八点开门。\nAnswer: "
    assert '"context" read as input, "response" read as output' in capsys.readouterr().out


CONTENT = [
    ("system", "你是诗人"),
    ("system_prompt", "You are a poet."),
    ("context", "图书馆八点开门。"),
    ("text", "something else"),
    ("prompt", "Be brief."),
    ("answer", "Elm."),
    ("tools", [{"name": "search"}]),
    ("messages", [{"role": "user", "content": "a"}]),
    ("conversations", [{"from": "human", "value": "a"}]),
    ("reasoning", "Trees are ..."),
    ("System", "You are a poet."),
]


@pytest.mark.parametrize("name, value", CONTENT)
class TestContentThatNothingReads:
    @pytest.mark.parametrize("first", [PLAIN, {}])
    def test_is_refused_by_row_and_name(self, write, capsys, name, value, first):
        path = write(*filter(None, [first, PLAIN | {name: value}]))
        place = f'a.json:1 (row {1 + bool(first)}): field "{name}" is '
        if name == "system":  # which every verb reads
            assert main(["validate", path]) == 0
            assert {"role": name, "content": value} in convert(path)[-1]["messages"]
            return
        told = refused(capsys, "convert", "--data_path", path, "--save_path", "out.jsonl")
        assert place in told
        assert 'into "instruction" or "output", and take the field out' in told
        assert main(["validate", path]) == 2
        assert place in capsys.readouterr().out
        told = refused(capsys, "infer", "--data_path", path, "--base", "glm-tiny")
        assert place in told

    def test_is_skipped_on_demand_and_listed(self, write, capsys, name, value):
        path = write(PLAIN, PLAIN | {name: value})
        assert len(convert(path, "--on_bad_row", "skip")) == 1 + (name == "system")
        assert (
            name == "system" or f'a.json:1 (row 2): field "{name}" is ' in capsys.readouterr().out
        )

    def test_in_rows_of_context_and_target(self, write, capsys, name, value):
        if name in ("context", "prompt"):  # which make it a record
            name = "history"
        path = write({"context": "a", "target": "b", name: value}, name="a.jsonl")
        told = refused(capsys, "tokenize", "--jsonl_path", path, "--save_path", "rows")
        assert "a.jsonl:1 (row 1): " in told
        assert f'"{name}"' in told or "glmtune" in told
        assert main(["validate", path]) == 2

    @pytest.mark.parametrize("empty", ["", None, [], " "])
    def test_loses_nothing_where_it_is_empty(self, write, capsys, name, value, empty):
        assert len(convert(write(PLAIN | {name: empty}))) == 1
        assert problems_of("a.json") == {}


def test_the_row_once_more_is_no_content(write, capsys):
    text = "Below is ...\n### Instruction:\nName a tree.\n### Response:\nOak."
    assert len(convert(write(PLAIN | {"text": text}))) == 1
    assert '1 with a field "text", which is not used' in capsys.readouterr().out
    assert problems_of("a.json") == {}


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {"conversation": [{"human": "q", "assistant": "a"}]},
    ],
)
def test_a_conversation_among_records_is_refused_with_a_form_that_is_read(write, capsys, row):
    path = write(PLAIN, row)
    told = refused(capsys, "convert", "--data_path", path, "--save_path", "out.jsonl")
    assert "(row 2): a conversation in" in told
    assert "keep rows of one kind in a file, or write it as a record" in told
    assert problems_of("a.json") == {"refused": 1}
    form = told[told.index("{") : told.index("]}") + 2].replace(", ...", "")
    form = form.replace(": question", ': "q"').replace(": answer", ': "a"')
    (_, written) = convert(write(PLAIN, json.loads(form)))
    texts = [turn["content"] for turn in written["messages"]]
    assert texts == ["earlier question", "its answer", "q", "a"]


def test_a_missing_field_is_told_with_what_the_others_are_to_be_called(write, capsys):
    path = write({"asked": "Name a tree.", "said": "Oak."})
    for _ in "12":
        told = refused(capsys, "convert", "--data_path", path, "--save_path", "out.jsonl")
        new = told.rpartition('to "')[2].partition('"')[0]
        old = {"instruction": "asked", "output": "said"}[new]
        assert f"rename the one that holds the {'question' if old == 'asked' else 'answer'}" in told
        (row,) = json.loads(open(path, encoding="utf-8").read())  # noqa: SIM115
        write({new if name == old else name: text for name, text in row.items()})
    assert len(convert(path)) == 1


def test_fields_nothing_reads_are_said_by_every_reader(write, capsys):
    path = write(PLAIN | {"id": 1, "source": "x"}, PLAIN | {"id": 2})
    convert(path)
    assert main(["validate", path]) == 0
    told = capsys.readouterr().out
    assert told.count('2 with a field "id", which is not used') == 2
    assert told.count('1 with a field "source", which is not used') == 2
    write({"context": "a", "target": "b", "id": 1}, name="rows.jsonl")
    assert main(["tokenize", "--jsonl_path", "rows.jsonl", "--save_path", "rows"]) == 0
    assert '1 with a field "id", which is not used' in capsys.readouterr().out
    answer = ["--base", "glm-tiny", "--max_new_tokens", "2", "--output_path", "x.jsonl"]
    assert main(["infer", "--data_path", path, *answer]) == 0
    assert 'note: a.json: 2 with a field "id", which is not used' in capsys.readouterr().err
