"""What is asked of a row is, token by token, what training has before its answer, on any family."""

import json
from pathlib import Path

import pytest
import torch
from glm_folders import encoder_of, toy_tiktoken, write_folder

from glmtune.config.settings import TokenizeSettings
from glmtune.data.conversations import IGNORED, Example, Turn
from glmtune.data.dataset import load_dataset
from glmtune.data.flaws import Flaw
from glmtune.data.questions import read_questions
from glmtune.data.tokenizing import tokenize
from glmtune.generation import Decoder, EncodedPrompt, GenerationSettings
from glmtune.generation.prompts import prompt_ids
from glmtune.models.base_files import load_row_tokenizer
from glmtune.models.glm.encoder import of_folder
from glmtune.models.glm.tokenization import GLMTokenizer
from glmtune.models.loading import load_base_model
from glmtune.models.resolve import GLM_TINY

TALKS = [
    [("user", "你好 there"), ("assistant", "Hi.")],
    [("system", "Be brief."), ("user", "q\n"), ("assistant", " a "), ("user", "<|user|>"),
     ("assistant", "[gMASK] ok")],
]  # fmt: skip
FILES = {
    "messages": [
        {"messages": [{"role": role, "content": text} for role, text in talk]} for talk in TALKS
    ],
    "records": [{"instruction": "翻译", "input": "cat", "output": "猫"}],
    "history": [
        {"instruction": "翻译", "input": "cat", "output": "猫", "history": [["hi", "you"]]},
        {"instruction": "Why?", "output": "So."},
    ],
    "context/target": [{"context": "Why? ", "target": "So."}],
}


@pytest.fixture(
    scope="module", params=["glm-tiny", "toy glm4-0414", "chatglm2", "chatglm3", "glm4"]
)
def tokenizer(request, tmp_path_factory):
    root = tmp_path_factory.mktemp("tokenizer")
    if request.param == "glm-tiny":
        return load_row_tokenizer(str(GLM_TINY))
    if request.param.startswith("toy"):
        folder = write_folder(root / "toy", "glm4-0414", toy_tiktoken(), vocab_size=70_000)
        return of_folder(folder)
    return encoder_of(request.getfixturevalue("shared"), root, request.param)


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write(rows):
    lines = (json.dumps(row, ensure_ascii=False) for row in rows)
    Path("a.jsonl").write_text("\n".join(lines), encoding="utf-8")


@pytest.mark.parametrize("kind", FILES)
def test_a_prompt_is_what_training_has_before_the_last_answer(tokenizer, kind):
    write(FILES[kind])
    config = TokenizeSettings(jsonl_path="a.jsonl", save_path="rows", max_seq_length=400)
    tokenize(config, tokenizer, "base")
    table, card = load_dataset("rows")
    trained = {
        row: ids["input_ids"][: ids["seq_len"]]
        for row, ids in zip(card.source_rows().tolist(), table.to_pylist(), strict=True)
    }  # of the several rows of a conversation the last
    questions, _, _ = read_questions("a.jsonl")
    asked = prompt_ids(tokenizer, [question.asked for question in questions])
    assert {q.row: ids for q, ids in zip(questions, asked, strict=True)} == trained


def test_a_conversation_that_ends_with_a_question_is_asked_whole(tokenizer):
    talk = FILES["messages"][1]["messages"]
    question = {"role": "user", "content": "and now?"}
    answered = [*talk, question, {"role": "assistant", "content": "later"}]
    empty = [*talk, question, {"role": "assistant", "content": ""}]
    write([{"messages": turns} for turns in (answered, [*talk, question], empty)])
    questions, bad, _ = read_questions("a.jsonl")
    first, *others = prompt_ids(tokenizer, [question.asked for question in questions])
    assert not bad
    assert others == [first, first]
    assert [question.expected for question in questions] == ["later", "", ""]


def test_a_text_is_continued_behind_what_a_row_of_it_begins_with(tokenizer):
    write([{"text": "从前"}])
    ((question,), _, _) = read_questions("a.jsonl")
    (ids,) = prompt_ids(tokenizer, [question.asked])
    assert ids == [*tokenizer.row_rule.text_prefix, *tokenizer.encode_batch(["从前"])[0]]


def test_what_a_family_cannot_write_is_a_flaw_in_its_place():
    tokenizer = load_row_tokenizer(str(GLM_TINY))
    write([FILES["messages"][0], FILES["messages"][0] | {"tools": [{"name": "f"}]}])
    questions, _, _ = read_questions("a.jsonl")
    first, second = prompt_ids(tokenizer, [question.asked for question in questions])
    assert isinstance(first, list)
    assert isinstance(second, Flaw)


def test_a_text_behind_the_start_of_an_answer_is_continued_as_the_model_itself_would():
    """Of ChatGLM-6B, whose prompts end with <sop>: the decoder beside whole forward passes."""
    tokenizer = load_row_tokenizer(str(GLM_TINY))
    model = load_base_model(str(GLM_TINY), dtype=torch.float32)
    ids = [*tokenizer.row_rule.text_prefix, *tokenizer.encode_batch(["Name a"])[0]]
    wanted = list(ids)
    with torch.inference_mode():
        for _ in range(6):
            wanted.append(int(model(torch.tensor([wanted])).logits[0, -1].argmax()))
    settings = GenerationSettings(max_new_tokens=6)
    made = []
    for (more,) in Decoder(model, []).stream([EncodedPrompt(ids, 0)], settings):
        made += more
    assert made == wanted[len(ids) :]


def test_the_template_of_ours_teaches_what_rows_teach(tmp_path):
    """The role behind an earlier answer, too; TRL takes this mask (tests/peers/test_trl.py)."""
    folder = write_folder(tmp_path / "toy", "glm4-0414", toy_tiktoken(), vocab_size=70_000)
    tokenizer = GLMTokenizer.from_pretrained(folder)
    turns = [("user", "Who?"), ("assistant", "Me."), ("user", "Where?"), ("assistant", "Here.")]
    messages = [{"role": role, "content": text} for role, text in turns]
    chat = tokenizer.apply_chat_template(messages, return_assistant_tokens_mask=True)
    example = Example(tuple(Turn(*turn) for turn in turns)).supervise("each")
    (row,) = of_folder(folder).encode_examples([example])
    assert chat["input_ids"] == row.input_ids
    assert chat["assistant_masks"] == [int(label != IGNORED) for label in row.labels]
