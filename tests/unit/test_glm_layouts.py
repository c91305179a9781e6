"""Rows and prompts of the younger family, beside those that the published code makes."""

import json

import pytest
from glm_folders import encoder_of, toy_tiktoken, write_folder

from glmtune.data import templates
from glmtune.data.conversations import Example
from glmtune.errors import UserError
from glmtune.models.glm.conversations import Turn
from glmtune.models.glm.encoder import of_folder
from glmtune.models.glm.layouts import LAYOUTS, numbered_rounds

# Rows are cut there by the official code.
LIMIT = 769
EMPTY = "the published tokenizer drops a message without text, role and all"
FORGED = "the published template turns a spelled role token into the token"
EMPTIES = {"system_empty", "user_empty", "assistant_empty"}
FORGERIES = {"lookalike_user", "lookalike_prefix", "lookalike_answer"}
AT_START = "the official rows join an answer's first newlines with the one behind the role"


@pytest.fixture(scope="module")
def encoders(shared, tmp_path_factory):
    root = tmp_path_factory.mktemp("glm")
    return lambda variant: encoder_of(shared, root, variant)


@pytest.fixture(scope="module")
def recorded(shared):
    golden = shared / "golden" / "glm"
    names = ("rows_chatglm3", "rows_glm4", "chat_layouts")
    return {name: json.loads((golden / f"{name}.json").read_text()) for name in names}


def turns_of(row):
    """The messages of a recorded row; None where it has tools or their results."""
    record = row["record"]
    messages = record.get("messages") or record["conversations"]
    plain = all(m["role"] in ("system", "user", "assistant") for m in messages)
    if not plain or "tools" in json.dumps(record) or any(m.get("metadata") for m in messages):
        return None
    return [Turn(m["role"], m["content"]) for m in messages]


def prompts_of(turns):
    """What stands before each answer."""
    return [turns[:i] for i, turn in enumerate(turns) if turn.role == "assistant" and i]


@pytest.mark.parametrize(
    ("variant", "rows", "prompts", "faulty", "least"),
    [
        ("chatglm3", "rows_chatglm3", "prompts", {}, 49),
        ("glm4", "rows_glm4", "prompts_remote", {EMPTY: EMPTIES}, 47),
        (
            "glm4-0414",
            "rows_glm4",
            "prompts_0414",
            {FORGED: FORGERIES},
            46,
        ),
    ],
)  # fmt: skip
def test_prompts_are_the_published_ones(variant, rows, prompts, faulty, least, encoders, recorded):
    encoder = encoders(variant)
    num_equal, differ = 0, []
    for row in recorded[rows]["rows"]:
        if (turns := turns_of(row)) is None or not row[prompts]:
            continue
        ours = [encoder.conversation_ids(before) for before in prompts_of(turns)]
        if ours[: len(row[prompts])] == row[prompts][: len(ours)]:
            num_equal += len(ours)
        else:
            differ.append(row["name"])
    assert set(differ) == set().union(*faulty.values())
    assert num_equal >= least


def last_row(encoder, turns, end=None):
    """A row whose last answer is supervised: ids, and labels."""
    rule = encoder.row_rule
    prompt = encoder.conversation_ids(turns[:-1])
    answer = rule.answer(encoder.encode_batch([turns[-1].text])[0])
    answer[-1] = end or answer[-1]
    return prompt + answer, [-100] * len(prompt) + answer


@pytest.mark.parametrize(
    ("variant", "rows", "key", "end", "faulty", "least"),
    [
        ("chatglm3", "rows_chatglm3", "finetune_hf", None, {}, 30),
        ("glm4", "rows_glm4", "first", 151329, {EMPTY: EMPTIES}, 28),
        ("glm4-0414", "rows_glm4", "each", None, {AT_START: {"spaces_around"}}, 30),
    ],
)
def test_rows_are_the_published_ones(variant, rows, key, end, faulty, least, encoders, recorded):
    """A whole row of one answer; of several answers the ids, and the labels of the last."""
    encoder = encoders(variant)
    num_equal, differ = 0, set()
    for row in recorded[rows]["rows"]:
        turns, official = turns_of(row), row[key]
        if not turns or len(turns) < 2 or turns[-1].role != "assistant":
            continue
        if isinstance(row.get("right"), dict) and key == "each":
            official = row["right"]
        if row["name"].startswith("loss_") or len(official["input_ids"]) >= LIMIT:
            continue  # flags of messages are not part of a row rule
        ids, labels = last_row(encoder, turns, end)
        answers = sum(turn.role == "assistant" for turn in turns)
        start = 0 if answers == 1 else labels.count(-100)
        if (ids, labels[start:]) == (official["input_ids"], official["labels"][start:]):
            num_equal += 1
        else:
            differ.add(row["name"])
    assert differ == set().union(*faulty.values())
    assert num_equal >= least


@pytest.mark.parametrize("variant", ["chatglm3", "glm4", "glm4-0414"])
def test_contexts_become_the_published_prompts(variant, encoders, recorded):
    """Earlier rounds as `convert` writes them, and a bare question."""
    encoder, num_compared = encoders(variant), 0
    prompts = {"chatglm3": "prompts", "glm4": "prompts_remote", "glm4-0414": "prompts_0414"}
    for row in recorded["rows_chatglm3" if variant == "chatglm3" else "rows_glm4"]["rows"]:
        turns = turns_of(row)
        if turns is None or row["name"] in EMPTIES | FORGERIES:
            continue
        texts = [turn.text for turn in turns]
        if [turn.role for turn in turns] != ["user", "assistant"] * (len(turns) // 2):
            continue
        history = list(zip(texts[:-2:2], texts[1:-2:2], strict=True))
        write = encoder.layout.chat.write
        (ids,) = encoder.encode_contexts([write(history, texts[-2])])
        if row[prompts[variant]]:
            assert encoder.row_rule.prompt(ids) == row[prompts[variant]][-1], row["name"]
            num_compared += 1
    assert num_compared >= 15


def test_alpaca_records_become_questions(encoders):
    encoder = encoders("chatglm3")
    contexts = [templates.alpaca("翻译", "cat"), templates.alpaca("Why?"), "Why?"]
    asked = encoder.encode_batch(contexts, add_special_tokens=True)
    questions = ["翻译\ncat", "Why?", "Why?"]
    assert asked == [encoder.conversation_ids([Turn("user", text)]) for text in questions]
    assert (
        encoder.encode_batch(["Why?"], add_special_tokens=True, max_length=7)[0][:3] == asked[2][:3]
    )
    assert len(encoder.encode_batch(contexts, add_special_tokens=True, max_length=7)[0]) == 7
    assert encoder.encode_batch(["one two three"], max_length=2)[0] == asked_text(encoder)[:2]


def asked_text(encoder):
    return encoder.encode_batch(["one two three"])[0]


def test_rounds_of_chatglm2(encoders, recorded):
    """Text of the published code, from the first round on; the ids are those of the text."""
    rendered = recorded["chat_layouts"]["rendered"]["chatglm2"]
    encoder, num_compared = encoders("chatglm2"), 0
    for conversation in recorded["chat_layouts"]["conversations"]:
        texts = [m["content"] for m in conversation["messages"]]
        for round_, prompt in enumerate(rendered.get(conversation["name"], {}).get("prompts", [])):
            history = list(zip(texts[: 2 * round_ : 2], texts[1 : 2 * round_ : 2], strict=True))
            assert numbered_rounds(history, texts[2 * round_]) == prompt
            (ids,) = encoder.encode_batch(
                [encoder.layout.chat.write(history, texts[2 * round_])], add_special_tokens=True
            )
            assert ids == [64790, 64792, *encoder.encode_batch([prompt])[0]]
            num_compared += 1
    assert num_compared >= 27


def test_rules_without_a_vocabulary_are_those_with_one(encoders):
    for variant in ("chatglm2", "chatglm3", "glm4", "glm4-0414"):
        encoder = encoders(variant)
        assert encoder.row_rule == LAYOUTS[variant].row_rule()
        assert encoder.ids == LAYOUTS[variant].specials
        assert encoder.stop_ids == LAYOUTS[variant].stop_ids


def test_published_ids():
    """As generation_config.json and the published code have them."""
    assert {name: layout.stop_ids for name, layout in LAYOUTS.items()} == {
        "chatglm2": (2,),
        "chatglm3": (2, 64795, 64797),
        "glm4": (151329, 151336, 151338),
        "glm4-0414": (151329, 151336, 151338),
        "glm-edge": (59246, 59253, 59255),
    }
    rule = LAYOUTS["glm-edge"].row_rule()
    assert rule.prompt([7]) == [59253, 7, 59254]
    assert rule.answer([7]) == [7, 59253]
    assert (rule.pad_id, rule.stops) == (59246, (59246, 59255))
    rule = LAYOUTS["chatglm2"].row_rule()
    assert (rule.prompt([7]), rule.answer([7])) == ([64790, 64792, 7], [7, 2])


def test_a_chat_keeps_what_a_context_says():
    for layout in LAYOUTS.values():
        chat = layout.chat
        for history, question in (([], "你好"), ([("a", "b"), ("c\n", "d")], "e")):
            assert templates.conversation_of(chat.write(history, question)) == (history, question)
        assert all(mark not in chat.polish(mark) for mark in chat.marks)
    assert LAYOUTS["chatglm3"].chat.polish(" [[训练时间]]起\n") == "2023年起"


def test_rounds_are_questions_and_answers_by_turns(tmp_path, encoders):
    encoder = encoders("chatglm2")
    for roles, place in ((["system", "user"], "message 1"), (["user", "user"], "message 2")):
        with pytest.raises(UserError, match=place):
            encoder.conversation_ids([Turn(role, "a") for role in roles])
    with pytest.raises(UserError, match="no question"):
        encoder.conversation_ids([])
    (ids,) = encoder.encode_batch(["[Round 1]\n\n问：a\n\n答：b"])
    assert encoder.conversation_ids([Turn("user", "a"), Turn("assistant", "b")])[2:] == ids


def test_system_messages_come_first_in_one_layout_alone(tmp_path):
    turns = [Turn("user", "a"), Turn("system", "b")]
    written = {}
    for variant in ("glm4", "glm4-0414"):
        rows = {"padded_vocab_size": 70_000} if variant == "glm4" else {"vocab_size": 70_000}
        folder = write_folder(tmp_path / variant, variant, toy_tiktoken(), **rows)
        encoder = of_folder(folder)
        written[variant] = [
            name for id_ in encoder.conversation_ids(turns) for name in encoder.ids
            if encoder.ids[name] == id_ and name.startswith("<|")
        ]  # fmt: skip
    assert written["glm4"] == ["<|user|>", "<|system|>", "<|assistant|>"]
    assert written["glm4-0414"] == ["<|system|>", "<|user|>", "<|assistant|>"]


def test_a_text_of_several_conversations_is_encoded_once(tmp_path, monkeypatch):
    encoder = of_folder(write_folder(tmp_path, "glm4", toy_tiktoken(), padded_vocab_size=70_000))
    talk = Example((Turn("system", "Be short."), Turn("user", "Hi"), Turn("assistant", "Hello")))
    other = talk._replace(turns=(*talk.turns, Turn("user", "Hi"), Turn("assistant", "Again")))
    examples = [talk.supervise("each"), other.supervise("each"), talk.supervise("last")]
    alone = [encoder.encode_examples([example])[0] for example in examples]
    given, encode = [], encoder.encode_plain

    def record(texts, num_threads=None):
        given.extend(texts)
        return encode(texts, num_threads)

    monkeypatch.setattr(encoder, "encode_plain", record)
    assert encoder.encode_examples(examples) == alone
    assert sorted(given) == ["Again", "Be short.", "Hello", "Hi"]
