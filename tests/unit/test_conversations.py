"""Whole conversations as rows with labels, beside those that the published code makes."""

import json

import pytest
from glm_folders import encoder_of, toy_tiktoken, write_folder

from glmtune.config.settings import TokenizeSettings
from glmtune.data.conversation_rows import encode_conversations
from glmtune.data.conversations import (
    ASSISTANT,
    IGNORED,
    OBSERVATION,
    SYSTEM,
    USER,
    EncodedExample,
    Example,
    Turn,
    check_turns,
    encode_rounds,
    rounds_of,
)
from glmtune.data.flaws import Flaw
from glmtune.data.formats import FORMATS
from glmtune.data.records import Conversation
from glmtune.models.chatglm.encoder import RowEncoder
from glmtune.models.glm.encoder import of_folder
from glmtune.models.special_names import mark

READ = FORMATS["messages"].read
ASKED = (Turn(USER, "问"), Turn(ASSISTANT, "答"), Turn(USER, "再问"), Turn(ASSISTANT, "再答"))


@pytest.fixture(scope="module")
def encoders(shared, tmp_path_factory):
    root = tmp_path_factory.mktemp("glm")
    return lambda variant: encoder_of(shared, root, variant)


def recorded(shared, name):
    return json.loads((shared / "golden" / "glm" / f"{name}.json").read_text())["rows"]


def encoded(encoder, record, learn="each"):
    (row,) = encoder.encode_examples([READ(record).example.supervise(learn)])
    return row


def right_of(row, official):
    """What a row should be; None where the published code has no way of making it."""
    right = row.get("right", official)
    found = row[official] if isinstance(right, str) else right
    return None if "raises" in found else (found["input_ids"], found["labels"])


def test_chatglm3_rows_and_labels_are_the_right_ones(shared, encoders):
    encoder, num_equal = encoders("chatglm3"), 0
    for row in recorded(shared, "rows_chatglm3"):
        ids, labels = right_of(row, "preprocess_utils")
        ours = encoded(encoder, row["record"])
        # The recorded rows are cut at a limit, which is another module's work.
        assert (ours.input_ids[: len(ids)], ours.labels[: len(ids)]) == (ids, labels), row["name"]
        assert len(ours.input_ids) == len(ids) or len(ids) in (769, 2048), row["name"]
        num_equal += len(ours.input_ids) == len(ids)
    assert num_equal >= 44


def test_glm4_0414_rows_and_labels_are_the_right_ones(shared, encoders):
    """All but those with tools that are no functions, for which the layout has no words."""
    encoder, num_equal, without = encoders("glm4-0414"), 0, set()
    for row in recorded(shared, "rows_glm4"):
        if row["name"] == "tools_on_user":
            with pytest.raises(Flaw, match="stand in a turn of role user; move them to"):
                READ(row["record"])
            continue
        ours, right = encoded(encoder, row["record"]), right_of(row, "each")
        if isinstance(ours, Flaw) or right is None:
            without.add(row["name"])
            assert "has no name of a function" in str(ours)
            continue
        ids, labels = right
        assert (ours.input_ids[: len(ids)], ours.labels[: len(ids)]) == (ids, labels), row["name"]
        num_equal += len(ours.input_ids) == len(ids)
    assert without == {"python_tool", "browser_and_cogview"}
    assert num_equal >= 46


def test_glm4_rows_are_those_of_its_first_published_code_but_for_their_end(shared, encoders):
    """Which was an id that generation does not stop at; a message without text it drops."""
    encoder, num_equal, differ = encoders("glm4"), 0, set()
    for row in recorded(shared, "rows_glm4"):
        text, first = json.dumps(row["record"]), row["first"]
        if "raises" in first or '"tools"' in text or "observation" in text:
            continue
        if len(first["input_ids"]) >= 1024 or '"loss"' in text:
            continue
        ours = encoded(encoder, row["record"])
        ends_with_answer = row["record"]["messages"][-1]["role"] == ASSISTANT
        ids, labels = ([*first[k][:-1], 151336] for k in ("input_ids", "labels"))
        if not ends_with_answer:
            labels[-1] = IGNORED
        if (ours.input_ids, ours.labels) == (ids, labels):
            num_equal += 1
        else:
            differ.add(row["name"])
    assert differ == {"system_empty", "user_empty", "assistant_empty"}
    assert num_equal >= 28


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy") / "glm4"
    return of_folder(write_folder(folder, "glm4", toy_tiktoken(), padded_vocab_size=70_000))


@pytest.mark.parametrize(
    ("learn", "marks", "supervised"),
    [
        ("each", (None, None), [True, True]),
        ("each", (False, None), [False, True]),
        ("last", (None, None), [False, True]),
        ("last", (True, False), [False, False]),
        ("marked", (None, None), [False, False]),
        ("marked", (True, False), [True, False]),
    ],
)
def test_answers_are_supervised_as_asked_and_never_what_a_row_takes_out(learn, marks, supervised):
    turns = [t._replace(supervised=m) for t, m in zip(ASKED[1::2], marks, strict=True)]
    example = Example((ASKED[0], turns[0], ASKED[2], turns[1])).supervise(learn)
    assert [turn.supervised for turn in example.turns] == [
        False, supervised[0], False, supervised[1]
    ]  # fmt: skip


def test_only_answers_are_supervised_whatever_other_turns_say():
    turns = (Turn(SYSTEM, "a", "", True), Turn(USER, "b", "", True), Turn(ASSISTANT, "c"))
    example = Example((*turns, Turn(OBSERVATION, "d", "", True), Turn(ASSISTANT, "e")))
    assert [t.supervised for t in example.supervise("each").turns] == [
        False, False, True, False, True
    ]  # fmt: skip


def test_what_ends_an_answer_is_supervised_with_it(toy):
    (row,) = toy.encode_examples([Example(ASKED).supervise("last")])
    (each,) = toy.encode_examples([Example(ASKED).supervise("each")])
    assistant, user = toy.ids["<|assistant|>"], toy.ids["<|user|>"]
    assert row.input_ids == each.input_ids
    assert row.prompt_length == max(i for i, t in enumerate(row.input_ids) if t == assistant) + 1
    assert row.labels == [IGNORED] * row.prompt_length + row.input_ids[row.prompt_length :]
    assert row.labels[-1] == user
    assert [each.num_answers, row.num_answers] == [2, 1]
    first_end = each.input_ids.index(user, 4)
    assert each.labels[first_end] == user
    assert row.labels[first_end] == IGNORED


def test_a_row_that_ends_in_a_call_ends_with_the_role_of_its_result(toy):
    turns = (Turn(USER, "q"), Turn(ASSISTANT, "{}", "find"))
    (row,) = toy.encode_examples([Example(turns).supervise("each")])
    assert row.input_ids[-1] == row.labels[-1] == toy.ids["<|observation|>"]


def test_tools_are_refused_by_a_layout_that_knows_none(tmp_path):
    folder = write_folder(tmp_path, "glm-edge", toy_tiktoken(), vocab_size=70_000)
    found = of_folder(folder).encode_examples([Example(ASKED, ({"name": "find"},)), Example(ASKED)])
    assert "tools, which neither glm-edge nor the folder's chat template knows" in str(found[0])
    assert isinstance(found[1], EncodedExample)


@pytest.mark.parametrize("template", [None, "glm_edge", "glm4_0414"])
def test_a_call_without_tools_is_refused_as_tools_are(template, shared, tmp_path):
    """GLM-Edge's template leaves a result out, so a call would be taught that is never answered."""
    file = shared / "golden" / "glm" / "chat_layouts.json"
    text = template and json.loads(file.read_text())["families"][template]["template"]
    write_folder(tmp_path, "glm-edge", toy_tiktoken(), template=text, vocab_size=70_000)
    turns = (Turn(USER, "q"), Turn(ASSISTANT, "{}", "find"), Turn(OBSERVATION, "42"))
    for example in (Example((*turns, Turn(ASSISTANT, "a"))), Example(turns[:2])):
        (found,) = of_folder(tmp_path).encode_examples([example.supervise("each")])
        if template == "glm4_0414":
            assert isinstance(found, EncodedExample)
        else:
            assert str(found).startswith("a call of a tool, which neither glm-edge nor the")


def test_the_published_template_of_glm_edge_writes_no_tools(shared, tmp_path):
    """A system message with tools would lose them there; a template that names them is followed."""
    published = json.loads((shared / "golden" / "glm" / "chat_layouts.json").read_text())[
        "families"
    ]
    tools = ({"name": "find"},)
    for template, is_refused in (("glm_edge", True), ("glm4_0414", False)):
        folder, text = tmp_path / template, published[template]["template"]
        write_folder(folder, "glm-edge", toy_tiktoken(), template=text, vocab_size=70_000)
        (found,) = of_folder(folder).encode_examples([Example(ASKED, tools).supervise("each")])
        assert isinstance(found, Flaw) == is_refused
        assert not is_refused or str(found).startswith("tools, which neither glm-edge nor the")


def without_observations(ids, labels, encoder):
    """Labels in which no result of a tool is supervised, nor the role that follows it."""
    roles = {encoder.ids[f"<|{role}|>"] for role in (SYSTEM, USER, ASSISTANT, OBSERVATION)}
    is_result, right = False, []
    for id_, label in zip(ids, labels, strict=True):
        right.append(IGNORED if is_result else label)
        is_result = id_ == encoder.ids["<|observation|>"] if id_ in roles else is_result
    return right


def test_glm4_rows_with_tools_are_those_of_its_first_published_code(shared, encoders):
    """But for their end, and for results, which that code supervises."""
    encoder, num_equal = encoders("glm4"), 0
    for row in recorded(shared, "rows_glm4"):
        text, first = json.dumps(row["record"]), row["first"]
        if "raises" in first or not ('"tools"' in text or "observation" in text):
            continue
        if row["name"] in ("tools_on_user", "python_tool", "browser_and_cogview"):
            continue
        # A result without a text is dropped there, role and all, and so is an answer.
        turns = [m for m in row["record"]["messages"] if m["content"] or "tools" in m]
        ours = encoded(encoder, {"messages": turns})
        ids, labels = first["input_ids"], list(first["labels"])
        if '"loss"' in text or len(ids) >= 1024:
            assert ours.input_ids[: len(ids) - 1] == ids[:-1], row["name"]
            continue
        right = without_observations(ids, labels, encoder)
        assert ours.input_ids[:-1] == ids[:-1], row["name"]
        assert ours.labels[:-1] == right[:-1], row["name"]
        num_equal += 1
    assert num_equal >= 7


@pytest.mark.parametrize(
    ("template", "variant"),
    [("glm4_chat", "glm4"), ("glm4_0414", "glm4-0414"), ("glm_z1", "glm4-0414")],
)
def test_tools_are_written_as_the_folders_chat_template_does(template, variant, shared, tmp_path):
    published = json.loads((shared / "golden" / "glm" / "chat_layouts.json").read_text())
    text, num_equal = published["families"][template]["template"], 0
    size = {"padded_vocab_size" if variant == "glm4" else "vocab_size": 70_000}
    folder = write_folder(tmp_path, variant, toy_tiktoken(), template=text, **size)
    encoder = of_folder(folder)
    for conversation in published["conversations"]:
        if not conversation["name"].startswith("tool_"):
            continue
        full = published["rendered"][template][conversation["name"]]["full"]
        messages = conversation["messages"]
        if template == "glm4_chat":  # it leaves an answer without a text out
            messages = [m for m in messages if m["content"] or "tool_calls" in m]
        row = encoded(encoder, conversation | {"messages": messages})
        assert row.input_ids[:-1] == encoder.written_ids(mark(full, encoder.written_names))
        num_equal += 1
    assert num_equal >= 4


def test_a_tool_that_the_folders_template_leaves_out_is_refused(shared, tmp_path):
    published = json.loads((shared / "golden" / "glm" / "chat_layouts.json").read_text())
    found = {}
    for template, variant in (("glm4_chat", "glm4"), ("glm4_0414", "glm4-0414")):
        text = published["families"][template]["template"]
        size = {"padded_vocab_size" if variant == "glm4" else "vocab_size": 70_000}
        folder = tmp_path / template
        encoder = of_folder(write_folder(folder, variant, toy_tiktoken(), template=text, **size))
        tools = [({"type": "python"},), ({"name": "f"},), ({"type": "unheard of"},)]
        rows = encoder.encode_examples([Example(ASKED, t).supervise("each") for t in tools])
        found[template] = [isinstance(row, Flaw) for row in rows]
    assert found == {"glm4_chat": [False, False, True], "glm4_0414": [True, False, True]}


def test_chatglm2_and_chatglm_write_rounds_whose_last_answer_is_supervised(shared, encoders):
    v1 = RowEncoder(str(shared / "golden" / "ice_text.model"))
    texts = {
        v1: "[Round 0]\n问：简短\n问\n答：答\n[Round 1]\n问：再问\n答：",
        encoders(
            "chatglm2"
        ): "[Round 1]\n\n问：简短\n问\n\n答：答\n\n[Round 2]\n\n问：再问\n\n答：",
    }
    for encoder, text in texts.items():
        rule = encoder.row_rule
        example = Example((Turn(SYSTEM, "简短"), *ASKED)).supervise("each")
        (row,) = encoder.encode_examples([example])
        prompt = rule.prompt(encoder.encode_batch([text])[0])
        answer = rule.answer(encoder.encode_batch(["再答"])[0])
        assert row.input_ids == prompt + answer
        start = len(prompt) - rule.prompt_sees_all
        assert row.labels == [IGNORED] * start + row.input_ids[start:]
        assert row.prompt_length == len(prompt)
        assert row.num_answers == (1 if encoder is v1 else 2), "of one token, none is supervised"
    (bare,) = v1.encode_examples([Example(ASKED[:2]).supervise("each")])
    assert bare.input_ids[: bare.prompt_length] == v1.row_rule.prompt(v1.encode_batch(["问"])[0])


def test_earlier_answers_of_chatglm2_are_supervised_within_the_text_of_the_rounds(encoders):
    """But for the first token, before which the model writes a blank, and their ends."""
    encoder = encoders("chatglm2")
    answers = ["Oak, ash\n\nand 松树 🌳.", "A\u00a0b  c", "答：x\n\n[Round 9]", "the last one"]
    turns = [
        turn
        for number, answer in enumerate(answers)
        for turn in (Turn(USER, f"问 {number}?"), Turn(ASSISTANT, answer))
    ]
    (row,) = encoder.encode_examples([Example(tuple(turns)).supervise("each")])
    (plain,) = encoder.encode_examples([Example(tuple(turns)).supervise("last")])
    assert row.input_ids == plain.input_ids
    assert row.num_answers == 4
    labels = row.labels[: row.prompt_length]
    assert row.labels[row.prompt_length :] == plain.labels[row.prompt_length :]
    is_run = [label != IGNORED for label in labels]
    starts = [i for i, is_one in enumerate(is_run) if is_one and not is_run[i - 1]]
    ends = [i + 1 for i, is_one in enumerate(is_run) if is_one and not is_run[i + 1]]
    for answer, start, end in zip(answers[:3], starts, ends, strict=True):
        whole = encoder.sp.decode(row.input_ids[start - 1 : end])
        assert whole == answer, "the token before it is the answer's first"
        assert encoder.sp.decode(row.input_ids[end : end + 2]) == "\n\n"
    turns[1] = turns[1]._replace(supervised=False)
    (row,) = encoder.encode_examples([Example(tuple(turns)).supervise("each")])
    assert row.num_answers == 3
    assert row.labels[: starts[1]] == [IGNORED] * starts[1]


def test_answers_of_chatglm2_whose_tokens_do_not_tell_their_places_are_rows_of_their_own(encoders):
    turns = (Turn(USER, "a \u2581 b"), Turn(ASSISTANT, "ok then"), *ASKED[2:])
    (row,) = encoders("chatglm2").encode_examples([Example(turns).supervise("each")])
    assert row.num_answers == 1, "conversation_rows gives the other one a row"


def test_typed_special_tokens_of_chatglm2_hide_the_places_of_earlier_answers(encoders):
    """They stand for no text, so that each answer gets a row, in which they are their ids."""
    encoder = encoders("chatglm2")
    turns = (Turn(USER, "a [MASK] b"), Turn(ASSISTANT, "ok then"), *ASKED[2:])
    plain, typed = (Conversation(Example(t), "a", row, row) for row, t in enumerate((ASKED, turns)))
    settings = TokenizeSettings(jsonl_path="a", save_path="b", allow_special=True)
    rows = encode_conversations([plain, typed], encoder, settings)
    assert rows.several == {1: 2}
    assert len(rows.seq_len) == 3, "one of the conversation without any, two of the other"
    found = rows.as_token_rows(encoder.row_rule)
    (mask,) = encoder.special_names["[MASK]"]
    assert [mask in found[row] for row in range(3)] == [False, True, True]
    for row, answer in ((1, "ok then"), (2, "再答")):
        taught = [int(i) for i in found[row][found.prompt_lengths_R[row] :]]
        assert taught == encoder.row_rule.answer(encoder.encode_batch([answer])[0])
        assert found.num_labels_R[row] == len(taught)
    encoder.allow_special = False
    assert (
        encode_conversations(
            [typed], encoder, settings.model_copy(update={"allow_special": False})
        ).several
        == {}
    )


@pytest.mark.parametrize(
    ("example", "what"),
    [
        (Example(ASKED, ({"name": "find"},)), "tools, which this base knows none of"),
        (Example((*ASKED, Turn(OBSERVATION, "x"))), "tools, which this base knows none of"),
        (Example((*ASKED[:2], Turn(SYSTEM, "x"), *ASKED[2:])), "turns of the roles"),
        (Example(ASKED[1:]), "turns of the roles"),
        (Example(ASKED[:1]), "turns of the roles"),
    ],
)
def test_a_family_without_roles_refuses_what_it_cannot_write(example, what, word_tokenizer):
    with pytest.raises(Flaw, match=what):
        rounds_of(example)
    found = encode_rounds(word_tokenizer, [example, Example(ASKED)], lambda h, q: q)
    assert what in str(found[0])
    assert isinstance(found[1], EncodedExample)


def test_a_question_without_an_answer_at_the_end_is_left_out_of_rounds():
    assert rounds_of(Example((*ASKED, Turn(USER, "x")))) == ([("问", "答")], "再问", "再答")


def test_an_answer_that_is_not_supervised_has_no_labels(word_tokenizer):
    turns = (ASKED[0], ASKED[1]._replace(supervised=False))
    example = Example(turns).supervise("each")
    (row,) = encode_rounds(word_tokenizer, [example], lambda h, q: q)
    assert row.num_answers == 0
    assert set(row.labels) == {IGNORED}


def test_turns_that_follow_each_other_pass_the_check():
    calls = (ASKED[0], Turn(ASSISTANT, ""), Turn(ASSISTANT, "{}", "f"), Turn(OBSERVATION, ""))
    check_turns([("here", turn) for turn in (*calls, ASKED[1], *ASKED[2:])])
