"""Thoughts before answers: kept, dropped or text, as the base's chat template has it."""

import json
from pathlib import Path

import pytest
from glm_folders import toy_tiktoken, write_folder

from glmtune.cli import main
from glmtune.config.settings import TokenizeSettings
from glmtune.data.conversations import IGNORED
from glmtune.data.dataset import load_dataset
from glmtune.data.formats import FORMATS
from glmtune.data.questions import read_questions
from glmtune.data.tokenizing import tokenize
from glmtune.errors import UserError
from glmtune.evaluation.probes import record_probes
from glmtune.generation.prompts import prompt_ids
from glmtune.models.glm.encoder import of_folder
from glmtune.models.glm.template import check_template
from glmtune.models.resolve import GLM_TINY
from glmtune.models.special_names import mark

# As GLM-Z1's: what stands before a thought's end is left out, and a prompt opens one.
THINKS = (
    "[gMASK]<sop>{% for m in messages %}<|{{ m.role }}|>\n{{ m.content.split('</think>')[-1] }}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n<think>{% endif %}"
)


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def open_toy(folder, template):
    data = toy_tiktoken()
    return of_folder(write_folder(folder, "glm4-0414", data, template=template, vocab_size=70_000))


@pytest.fixture(scope="module")
def thinker(tmp_path_factory):
    return open_toy(tmp_path_factory.mktemp("thinker"), THINKS)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return open_toy(tmp_path_factory.mktemp("plain"), None)


def talk(*turns):
    """Questions, and answers with a thought in a field or, as a pair with True, in the text."""
    messages = []
    for turn in turns:
        if isinstance(turn, str):
            messages.append({"role": "user", "content": turn})
            continue
        thought, answer, *inside = turn
        said = f"<think>{thought}</think>\n{answer}" if inside else answer
        messages.append({"role": "assistant", "content": said})
        if not inside and thought is not None:
            messages[-1]["reasoning_content"] = thought
    return {"messages": messages}


def run(encoder, *rows, **settings):
    Path("a.jsonl").write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    tokenize(TokenizeSettings(jsonl_path="a.jsonl", save_path="rows", **settings), encoder, "base")
    names = {id_: name for name, id_ in encoder.ids.items()}

    def read(ids):
        pieces = [
            names.get(i) or bytes.decode(encoder.byte_pairs.decode([i]).encode()) for i in ids
        ]
        return "".join(pieces)

    rows = load_dataset("rows")[0].to_pylist()
    return [
        (read(row["input_ids"]), read([i for i in row["labels"] if i != IGNORED])) for row in rows
    ]


TWO = talk("q", ("t", "a"), "r", ("u", "b"))
HEAD = "[gMASK]<sop><|user|>\nq<|assistant|>\n"
A, B = "<think>\nt\n</think>\n\na", "<think>\nu\n</think>\n\nb"


@pytest.mark.parametrize("row", [TWO, talk("q", ("t", "a", True), "r", ("u", "b", True))])
@pytest.mark.parametrize(
    ("wish", "text", "taught", "told"),
    [
        (
            None, f"a<|user|>\nr<|assistant|>\n{B}", f"\n{B}<|user|>",
            ["1 thoughts kept", "1 earlier answers had a thought"],
        ),
        (
            "keep", f"{A}<|user|>\nr<|assistant|>\n{B}", f"\n{A}<|user|>\n{B}<|user|>",
            ["2 thoughts kept\n"],
        ),
        (
            "drop", "a<|user|>\nr<|assistant|>\nb", "\na<|user|>\nb<|user|>",
            ["2 answers had a thought before them, left out"],
        ),
    ],
)  # fmt: skip
def test_a_base_that_thinks_keeps_the_thought_behind_the_last_question(
    thinker, capsys, row, wish, text, taught, told
):
    """An earlier answer, whose thought the base never sees, is not taught without it."""
    settings = {"thoughts": wish} if wish else {}
    assert run(thinker, row, **settings) == [(f"{HEAD}{text}<|user|>", taught)]
    out = capsys.readouterr().out
    assert all(line in out for line in told)


def test_an_empty_thought_is_written_and_not_supervised(thinker, capsys):
    for inside in ((), (True,)):
        rows = run(thinker, talk("q", ("", "a", *inside)), talk("q", ("t", "a")))
        assert rows[0] == (f"{HEAD}<think>\n\n</think>\n\na<|user|>", "a<|user|>")
        assert "1 thoughts kept, 1 empty ones not supervised" in capsys.readouterr().out
    assert run(thinker, talk("q", (None, "a")))[0] == (f"{HEAD}a<|user|>", "\na<|user|>")


@pytest.mark.parametrize("format", ["messages", "sharegpt"])
def test_a_base_that_does_not_leaves_fields_out_and_text_in(plain, capsys, format):
    row = talk("q", ("t", "a"), "r", ("u", "b", True))
    if format == "sharegpt":
        turns = row["messages"]
        row = {
            "conversations": [
                {"from": {"user": "human", "assistant": "gpt"}[t["role"]], "value": t["content"]}
                | ({"reasoning_content": "t"} if "reasoning_content" in t else {})
                for t in turns
            ]
        }
    ((_, taught),) = run(plain, row)
    assert taught == "\na<|user|>\n<think>u</think>\nb<|user|>"
    out = capsys.readouterr().out
    assert "1 answers had a thought before them, left out" in out
    assert "1 answers begin with a thought, which is text to this base" in out
    ((_, taught),) = run(plain, row, thoughts="drop")
    assert taught == "\na<|user|>\nb<|user|>"
    assert "2 answers had a thought before them, left out" in capsys.readouterr().out


def test_thoughts_that_cannot_be_kept_are_refused(plain, capsys):
    with pytest.raises(UserError, match="thoughts keep: glm4-0414 knows no thoughts"):
        run(plain, TWO, thoughts="keep")
    Path("b.jsonl").write_text('{"instruction": "a", "output": "<think>x</think>b"}')
    for wish in ("keep", "drop"):
        line = ["tokenize", "b.jsonl", "--save_path", "rows", "--thoughts", wish]
        assert main([*line, "--base", str(GLM_TINY)]) == 2
        assert "b.jsonl: thoughts is for conversations" in capsys.readouterr().err
    Path("a.jsonl").write_text(json.dumps(TWO))
    line = ["tokenize", "a.jsonl", "--save_path", "rows", "--base", str(GLM_TINY)]
    assert main([*line, "--thoughts", "keep"]) == 2
    assert "thoughts keep: v1.1 knows no thoughts" in capsys.readouterr().err
    assert main(line) == 0
    assert "2 answers had a thought before them, left out" in capsys.readouterr().out


def test_what_users_write_is_no_thought(thinker, plain):
    row = talk("<think>x</think>q", (None, "see <think>y</think>"))
    for encoder in (thinker, plain):
        for wish in (None, "drop"):
            ((text, taught),) = run(encoder, row, **({"thoughts": wish} if wish else {}))
            assert "<|user|>\n<think>x</think>q<|assistant|>" in text
            assert taught == "\nsee <think>y</think><|user|>"


def test_a_thought_before_a_call(thinker, plain):
    call = {"function": {"name": "f", "arguments": {}}}
    asks = {"role": "assistant", "content": None, "reasoning_content": "t", "tool_calls": [call]}
    result = {"role": "tool", "content": "r"}
    row = {"messages": [*talk("q")["messages"], asks, result, *talk(("u", "b"))["messages"]]}
    called = "<|assistant|>f\n{}<|observation|>\nr<|assistant|>\n"
    thought = HEAD + "<think>\nt\n</think>\n\n" + called
    assert run(thinker, row)[0][0] == f"{thought}{B}<|user|>"
    head = HEAD.removesuffix("<|assistant|>\n")
    assert run(thinker, row, thoughts="drop")[0][0] == f"{head}{called}b<|user|>"
    assert run(plain, row)[0][0] == f"{head}{called.replace('f', 'f ')}b<|user|>"


def test_a_row_that_is_cut_keeps_the_thought_of_what_is_then_its_last_answer(thinker, capsys):
    row = talk("q", ("t", "a"), "r", ("u" * 200, "b"))
    ((text, taught),) = run(thinker, row, max_seq_length=60)
    assert (text, taught) == (f"{HEAD}{A}<|user|>", f"\n{A}<|user|>")
    assert "1 thoughts kept" in capsys.readouterr().out


def test_rows_begin_as_the_published_prompts_of_a_model_that_thinks(shared, tmp_path):
    """Earlier thoughts are gone, and the last answer goes on behind what opens its thought."""
    published = json.loads((shared / "golden" / "glm" / "chat_layouts.json").read_text())
    encoder = open_toy(tmp_path, published["families"]["glm_z1"]["template"])
    assert encoder.opens_thoughts
    assert "rows have its thought, or else the answer itself there" in check_template(encoder)[0]
    read, num_compared = FORMATS["messages"].read, 0
    for conversation in published["conversations"]:
        if conversation["name"] not in ("thinking_text", "reasoning", "reasoning_tool"):
            continue
        rendered = published["rendered"]["glm_z1"][conversation["name"]]
        Path("a.jsonl").write_text(json.dumps(conversation), encoding="utf-8")
        settings = TokenizeSettings(jsonl_path="a.jsonl", save_path="rows", max_seq_length=4096)
        tokenize(settings, encoder, "base")
        (row,) = load_dataset("rows")[0].to_pylist()
        prompts = [encoder.written_ids(mark(p, encoder.written_names)) for p in rendered["prompts"]]
        if conversation["name"] == "reasoning_tool":
            prompts = prompts[:1]  # what is thought before a call stays in the row
        assert row["input_ids"][: len(prompts[-1])] == prompts[-1]
        assert read(conversation).example.turns[1].text
        num_compared += 1
    assert num_compared == 3


INSIDE = talk("q", ("t", "a", True), "r", ("u", "b", True))


@pytest.mark.parametrize("base", ["thinker", "plain"])
def test_what_is_asked_and_converted_has_the_thoughts_of_rows(base, request, capsys):
    """Prompts of `infer` and `compare`, probes of `check`, and what `convert` wrote."""
    encoder = request.getfixturevalue(base)
    rows = [TWO, INSIDE, talk("q", ("", "a"))]
    run(encoder, *rows)
    trained = load_dataset("rows")[0].to_pylist()
    questions, _, _ = read_questions("a.jsonl")
    asked = prompt_ids(encoder, [question.asked for question in questions])
    probes = record_probes("a.jsonl", encoder, 3).probes
    for row, ids, probe in zip(trained, asked, probes, strict=True):
        assert row["input_ids"][: len(ids)] == ids
        assert len(ids) == row["seq_len"] + len(encoder.generation_ids)
        assert probe.prompt_ids + probe.answer_ids == row["input_ids"]
    assert bool(encoder.generation_ids) == (base == "thinker")
    capsys.readouterr()
    assert main(["convert", "--data_path", "a.jsonl", "--save_path", "b.jsonl"]) == 0
    assert "left out" not in capsys.readouterr().out
    run(encoder, *map(json.loads, Path("b.jsonl").read_text().splitlines()))
    assert load_dataset("rows")[0].to_pylist() == trained


def test_each_part_of_a_split_conversation_is_taught_its_thought(thinker, capsys):
    """Which stands behind the last question of the part."""
    (first, _), (second, taught) = run(thinker, TWO, max_seq_length=28, too_long="split")
    assert first == f"{HEAD}{A}<|user|>"
    assert second == f"[gMASK]<sop><|user|>\nr<|assistant|>\n{B}<|user|>"
    assert taught == f"\n{B}<|user|>"
    assert "2 thoughts kept\n" in capsys.readouterr().out


def test_a_thought_that_only_ends_is_one(thinker, plain, capsys):
    """Servers whose prompts end with <think> write answers that begin behind it."""
    row = {"messages": [*talk("q")["messages"], {"role": "assistant", "content": "t</think>\n\na"}]}
    assert run(thinker, row) == [(f"{HEAD}{A}<|user|>", f"\n{A}<|user|>")]
    assert "1 thoughts kept" in capsys.readouterr().out
    assert run(plain, row, thoughts="drop")[0][1] == "\na<|user|>"
    assert run(plain, row)[0][1] == "\nt</think>\n\na<|user|>"
    assert "1 answers begin with a thought, which is text to this base" in capsys.readouterr().out
    for text in ("the tag is </think>", "see <think>y</think> z"):
        assert run(thinker, talk("q", (None, text)))[0][1] == f"\n{text}<|user|>"
    call = {"function": {"name": "f", "arguments": '{"x": "</think> y"}'}}
    called = {"role": "assistant", "content": None, "tool_calls": [call]}
    row = {"messages": [*talk("q")["messages"], called]}
    assert "x" in run(thinker, row)[0][1]


@pytest.mark.parametrize(
    ("answer", "what"),
    [
        ({"content": "<think>half"}, "begins with <think>, and no </think> ends that thought"),
        ({"content": "<think>t</think>\n"}, "is a thought, and nothing is answered behind it"),
        (
            {"content": "<think>t</think>a", "reasoning_content": "u"},
            "has a thought in a field, and another one in its text",
        ),
    ],
)
@pytest.mark.parametrize("base", ["thinker", "plain"])
def test_a_thought_that_is_cut_alone_or_double_is_refused(base, request, answer, what):
    row = {"messages": [*talk("q")["messages"], {"role": "assistant"} | answer]}
    with pytest.raises(UserError, match=f'turn 2 of "messages" {what}'):
        run(request.getfixturevalue(base), row)
    if len(answer) == 1:
        record = {"instruction": "q", "output": answer["content"]}
        for row in (record, {"context": "q", "target": answer["content"]}):
            with pytest.raises(UserError, match=what):
                run(request.getfixturevalue(base), row)


@pytest.mark.parametrize("field", ["t", ""])
def test_a_thought_in_a_field_that_its_text_has_as_well_is_one(thinker, plain, field):
    row = talk("q", ("t", "a", True))
    row["messages"][1]["reasoning_content"] = field
    assert run(thinker, row) == [(f"{HEAD}{A}<|user|>", f"\n{A}<|user|>")]
    assert run(plain, row, thoughts="drop")[0][1] == "\na<|user|>"


def test_dropping_a_written_thought_before_a_call_leaves_no_empty_turn(plain):
    call = {"function": {"name": "f", "arguments": {}}}
    asks = {"role": "assistant", "content": "<think>t</think>", "tool_calls": [call]}
    row = {"messages": [*talk("q")["messages"], asks]}
    assert run(plain, row, thoughts="drop")[0][1] == "f \n{}<|observation|>"


@pytest.mark.parametrize("names", [("instruction", "output"), ("context", "target")])
def test_records_with_thoughts_are_conversations_to_a_base_that_thinks(
    thinker, plain, capsys, names
):
    """An empty thought is not supervised there either; elsewhere a thought is text."""
    rows = [
        dict(zip(names, ("q", text), strict=True))
        for text in ("<think>t</think>a", "<think>\n\n</think>\n\na", "a")
    ]
    assert run(thinker, *rows) == [
        (f"{HEAD}{A}<|user|>", f"\n{A}<|user|>"),
        (f"{HEAD}<think>\n\n</think>\n\na<|user|>", "a<|user|>"),
        (f"{HEAD}a<|user|>", "\na<|user|>"),
    ]
    assert "1 thoughts kept, 1 empty ones not supervised" in capsys.readouterr().out
    Path("a.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    tokenize(TokenizeSettings(jsonl_path="a.jsonl", save_path="rows"), plain, "base")
    assert "labels" not in load_dataset("rows")[0].column_names
    assert "2 answers begin with a thought, which is text to this" in capsys.readouterr().out
