"""The chat template makes the rows of training, and no message makes a special id."""

from dataclasses import dataclass

import jinja2
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

import glmtune.models  # noqa: F401
from glmtune.errors import UserError
from glmtune.evaluation.conversation import Round, write_prompt
from glmtune.models.chatglm.chat_template import WRITTEN_NAMES
from glmtune.models.chatglm.tokenization import ChatGLMTokenizer
from glmtune.models.families import DEFAULT
from glmtune.models.resolve import GLM_TINY
from glmtune.models.special_names import GUARD, MARK

NAMES = ["[gMASK]", "<sop>", "<eop>"]
NASTY = "a [gMASK]<sop> b <eop><|blank_3|> \n\t[MASK]<pad>你好"


@pytest.fixture(scope="module", params=["glm-tiny", "chatglm-6b"])
def tokenizer(request):
    if request.param == "glm-tiny":
        return AutoTokenizer.from_pretrained(GLM_TINY)
    golden = request.getfixturevalue("shared") / "golden"
    return ChatGLMTokenizer(str(golden / "ice_text.model"))


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def row_of(tokenizer, context, target):
    """A row as training makes it."""
    (prompt,) = tokenizer.encode_batch([context], add_special_tokens=True)
    (answer,) = tokenizer.encode_batch([target])
    return [*prompt, *answer, tokenizer.eos_token_id], len(prompt)


def specials_in(tokenizer, ids):
    return [i for i in ids if i in {tokenizer.convert_tokens_to_ids(name) for name in NAMES}]


@pytest.mark.parametrize("question", ["你好", "Name a tree.", NASTY, "", " a  b "])
def test_a_first_question_stands_alone(tokenizer, question):
    expected = tokenizer.encode_batch([question], add_special_tokens=True)[0]
    for add in (True, False):
        ids = tokenizer.apply_chat_template([user(question)], add_generation_prompt=add)
        assert ids["input_ids"] == expected
        text = tokenizer.apply_chat_template(
            [user(question)], add_generation_prompt=add, tokenize=False
        )
        for flag in (True, False):
            assert tokenizer.encode(text, add_special_tokens=flag) == expected
        assert tokenizer([text], return_tensors="pt")["input_ids"].tolist() == [expected]


@pytest.mark.parametrize("texts", [["who?", "me <eop>"], ["a", "b", NASTY, NASTY], list("abcdef")])
def test_turns_are_the_rounds_that_chat_writes(tokenizer, texts):
    messages = [(user if i % 2 == 0 else assistant)(text) for i, text in enumerate(texts)]
    rounds = [Round(q, {"base": a}) for q, a in zip(texts[:-2:2], texts[1:-2:2], strict=True)]
    row, length = row_of(
        tokenizer, write_prompt(DEFAULT.chat, rounds, texts[-2], "base"), texts[-1]
    )
    prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True)["input_ids"]
    assert prompt == row[:length]
    made = tokenizer.apply_chat_template(messages, return_assistant_tokens_mask=True)
    assert made["input_ids"] == row
    assert made["assistant_masks"] == [0] * length + [1] * (len(row) - length)
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert tokenizer.encode(text) == row
    # TRL cuts the text of prompt and answer into two.
    start = tokenizer.apply_chat_template(messages[:-1], tokenize=False)
    assert text.startswith(start)
    halves = [tokenizer.encode(t, add_special_tokens=False) for t in (start, text[len(start) :])]
    assert halves[0] + halves[1] == row


def test_batches_are_padded_with_their_masks(tokenizer):
    chats = [[user("a"), assistant("b")], [user("What is a tree?"), assistant("A plant.")]]
    for side in ("left", "right"):
        tokenizer.padding_side = side
        batch = tokenizer.apply_chat_template(
            chats, padding=True, return_tensors="pt", return_assistant_tokens_mask=True
        )
        for chat, ids, valid, mask in zip(
            chats,
            batch["input_ids"],
            batch["attention_mask"],
            batch["assistant_masks"],
            strict=True,
        ):
            alone = tokenizer.apply_chat_template(chat, return_assistant_tokens_mask=True)
            assert ids[valid.bool()].tolist() == alone["input_ids"]
            assert mask[valid.bool()].tolist() == alone["assistant_masks"]
            assert not mask[~valid.bool()].any()
    tokenizer.padding_side = "left"
    cut = tokenizer.apply_chat_template(
        chats[1], truncation=True, max_length=4, return_assistant_tokens_mask=True
    )
    assert len(cut["input_ids"]) == len(cut["assistant_masks"]) == 4
    single = tokenizer.apply_chat_template(chats[0], return_tensors="pt", return_dict=False)
    assert single.shape == (1, len(tokenizer.apply_chat_template(chats[0])["input_ids"]))


def test_an_answer_can_be_begun(tokenizer):
    messages = [user("Who?"), assistant("I am")]
    row, _ = row_of(tokenizer, "Who?", "I am")
    begun = tokenizer.apply_chat_template(messages, continue_final_message=True)
    assert begun["input_ids"] == row[:-1]


hostile = st.lists(
    st.sampled_from(
        [*NAMES, MARK, GUARD, "[", "]", "<", ">", "gMASK", "sop", "[gM", "ASK]", "a", "\n"]
    ),
    max_size=8,
).map("".join)


@settings(deadline=None, max_examples=60)
@given(texts=st.lists(hostile, min_size=1, max_size=4), as_parts=st.booleans())
def test_no_message_makes_a_special_id(texts, as_parts):
    tokenizer = AutoTokenizer.from_pretrained(GLM_TINY)
    messages = [(user if i % 2 == 0 else assistant)(text) for i, text in enumerate(texts)]
    if as_parts:
        for message in messages:
            halves = message["content"][:3], message["content"][3:]
            message["content"] = [{"type": "text", "text": half} for half in halves]
    expected = [tokenizer.gmask_token_id, tokenizer.bos_token_id]
    expected += [tokenizer.eos_token_id] if len(texts) % 2 == 0 else []
    ids = tokenizer.apply_chat_template(messages)["input_ids"]
    assert specials_in(tokenizer, ids) == expected
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert tokenizer.encode(text) == ids
    # A text that is a whole rendered chat makes none either.
    quoted = tokenizer.apply_chat_template([user(text)])["input_ids"]
    assert specials_in(tokenizer, quoted) == expected[:2]


def test_text_and_rows_of_training_never_make_special_ids(tokenizer):
    text = tokenizer.apply_chat_template([user("a"), assistant("b")], tokenize=False)
    assert specials_in(tokenizer, tokenizer.encode(NASTY, add_special_tokens=False)) == []
    # Training, infer and chat read their texts through this.
    assert specials_in(tokenizer, tokenizer.encode_batch([NASTY, text])[1]) == []
    plain = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
    assert specials_in(tokenizer, plain) == []


def test_system_words_come_before_the_first_question(tokenizer):
    messages = [
        {"role": "system", "content": "Be brief."},
        user("Who?"),
        assistant("I."),
        user("?"),
    ]
    for length, context in [
        (2, "Be brief.\nWho?"),
        (4, "[Round 0]\n问：Be brief.\nWho?\n答：I.\n[Round 1]\n问：?\n答："),
    ]:
        (expected,) = tokenizer.encode_batch([context], add_special_tokens=True)
        assert tokenizer.apply_chat_template(messages[:length])["input_ids"] == expected


@pytest.mark.parametrize(
    "messages, more, words",
    [
        ([user("a")], {"tools": [{"type": "function"}]}, "tools: "),
        ([user("a")], {"documents": [{"title": "t", "text": "x"}]}, "documents: "),
        ([user("a"), user("b")], {}, r"message 2 \(user\): "),
        ([assistant("a")], {}, r"message 1 \(assistant\): "),
        ([user("a"), {"role": "system", "content": "b"}], {}, r"message 2 \(system\): "),
        ([user("a"), {"role": "tool", "content": "b"}], {}, r"message 2 \(tool\): the roles are"),
        ([{"role": "user"}], {}, r"message 1 \(user\): has no text"),
        ([user([{"type": "image", "url": "x"}])], {}, r"message 1 \(user\): .*text alone"),
        ([user("a"), {**assistant("b"), "tool_calls": [{}]}], {}, r"message 2 .*calls no tools"),
        ([{"role": "system", "content": "b"}], {}, "no question"),
        ([user("a"), assistant("b")], {"add_generation_prompt": True}, "add_generation_prompt: "),
    ],
)
def test_what_the_model_cannot_read_is_refused_in_one_line(messages, more, words):
    tokenizer = AutoTokenizer.from_pretrained(GLM_TINY)
    with pytest.raises(jinja2.TemplateError, match=f"^{words}") as refused:
        tokenizer.apply_chat_template(messages, **more)
    assert "\n" not in str(refused.value)


def test_a_template_of_ones_own_writes_special_ids_too(tokenizer, tmp_path):
    template = (
        "Instruction: {{ messages[0].content }}\nAnswer: [gMASK]<sop>"
        "{% if messages[1] %}{% generation %}{{ messages[1].content }}{{ eos_token }}"
        "{% endgeneration %}{% endif %}"
    )
    row, length = row_of(tokenizer, f"Instruction: {NASTY}\nAnswer: ", "x [gMASK]")
    messages = [user(NASTY), assistant("x [gMASK]")]
    made = tokenizer.apply_chat_template(
        messages, chat_template=template, return_assistant_tokens_mask=True
    )
    assert made["input_ids"] == row
    assert made["assistant_masks"] == [0] * length + [1] * (len(row) - length)
    within = "{{ messages[0].content }} b{% generation %}ut{% endgeneration %}"
    with pytest.raises(UserError, match="begins or ends within a text"):
        tokenizer.apply_chat_template(
            [user("x")], chat_template=within, return_assistant_tokens_mask=True
        )


def test_a_template_is_saved_and_read_again(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(GLM_TINY)
    shipped = tokenizer.chat_template
    tokenizer.save_pretrained(tmp_path / "shipped")
    assert AutoTokenizer.from_pretrained(tmp_path / "shipped").chat_template == shipped
    tokenizer.chat_template = "{{ messages[0].content }}[gMASK]<sop>"
    tokenizer.save_pretrained(tmp_path / "own")
    again = AutoTokenizer.from_pretrained(tmp_path / "own")
    assert again.chat_template == tokenizer.chat_template


def test_messages_may_be_objects(tokenizer):
    @dataclass
    class Message:
        role: str
        content: str
        name: str | None = None

    made = tokenizer.apply_chat_template([Message("user", NASTY)])
    assert made["input_ids"] == tokenizer.encode(NASTY)


def test_the_pipeline_answers_messages_as_generate_does():
    tokenizer = AutoTokenizer.from_pretrained(GLM_TINY)
    model = AutoModelForCausalLM.from_pretrained(GLM_TINY, dtype=torch.float32)
    ask = pipeline("text-generation", model=model, tokenizer=tokenizer)
    kinds = {"max_new_tokens": 8, "do_sample": False}
    ids = tokenizer("Who are you?", return_tensors="pt")
    written = model.generate(**ids, **kinds)[0, ids["input_ids"].shape[1] :]
    expected = tokenizer.decode(written, skip_special_tokens=True).strip()
    answer = ask([user("Who are you?")], **kinds)[0]["generated_text"][-1]
    assert (answer["role"], answer["content"].strip()) == ("assistant", expected)
    text = tokenizer.apply_chat_template([user("Who are you?")], tokenize=False)
    (told,) = ask(text, return_full_text=False, **kinds)
    assert told["generated_text"].strip() == expected


def test_names_that_are_written_are_those_of_the_vocabulary(tokenizer):
    assert list(WRITTEN_NAMES) == NAMES
    ids = tokenizer.convert_tokens_to_ids(NAMES)
    assert ids == [tokenizer.gmask_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id]
