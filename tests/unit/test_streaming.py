"""Streamed text adds up to the answer, and no part of it is changed later."""

import random
import re

import pytest

from glmtune.errors import UserError
from glmtune.generation.streaming import TextStream, check_stop_strings, cut_at_stop
from glmtune.models.chatglm.tokenization import ChatGLMTokenizer
from glmtune.models.loading import load_tokenizer
from glmtune.models.resolve import GLM_TINY

TEXTS = [
    "你好，世界！\n\n  def f(x):\n\treturn x < 3  # 😀🀄 ok\n" + " " * 83 + "end",
    "a<b <n> <|tab|> <|blank_7|> <|blank_ <|b| <<n>n> 𠮷𠮷",
    "  \n 前后都有空白 \n\n",
    "e\u0301 ﬁ ½ \u200b�� ok",
    "",
]


@pytest.fixture(scope="module", params=["glm-tiny", "ice_text"])
def tokenizer(request):
    if request.param == "glm-tiny":
        return load_tokenizer(GLM_TINY)
    shared = request.getfixturevalue("shared")
    return ChatGLMTokenizer(str(shared / "golden" / "ice_text.model"))


def byte_ids(tokenizer, text):
    return [tokenizer.convert_tokens_to_ids(f"<0x{value:02X}>") for value in text.encode()]


def rows(tokenizer):
    """Encoded texts, the same as byte pieces, and random ids, with invalid bytes among them."""
    yield from tokenizer.encode_batch(TEXTS)
    yield from (byte_ids(tokenizer, text) for text in TEXTS)
    chance = random.Random(0)
    bytes_ = byte_ids(tokenizer, "你😀é<n>|blank_3")
    for _ in range(200):
        mixed = [*bytes_, *(chance.randrange(tokenizer.vocab_size) for _ in range(8))]
        yield chance.choices(mixed, k=12)


def pieces(stream, ids, size):
    return [*(stream.push(ids[i : i + size]) for i in range(0, len(ids), size)), stream.end()]


@pytest.mark.parametrize("size", [1, 3, 8])
def test_the_pieces_add_up_to_the_answer(tokenizer, size):
    for ids in rows(tokenizer):
        text = tokenizer.decode(ids, skip_special_tokens=True).strip()
        text = re.sub("\ufffd{1,3}$", "", text).rstrip()  # half a character at the end
        assert "".join(pieces(TextStream(tokenizer), ids, size)) == text


def test_half_a_character_is_held_back(tokenizer):
    stream = TextStream(tokenizer)
    given = [stream.push([i]) for i in byte_ids(tokenizer, "好😀x")]
    assert given == ["", "", "好", "", "", "", "😀", "x"]


def test_half_a_character_at_the_end_is_not_shown(tokenizer):
    stream = TextStream(tokenizer)
    assert stream.push(byte_ids(tokenizer, "a好")[:-1]) == "a"
    assert stream.end() == ""


def test_half_a_name_is_held_back(tokenizer):
    stream = TextStream(tokenizer)
    given = [stream.push([i]) for i in byte_ids(tokenizer, "a<n>b<|x")]
    # A newline waits for what follows it: the answer's text ends without.
    assert given == ["a", "", "", "", "\nb", "", "", "<|x"]


def test_text_comes_soon(tokenizer):
    """Withholding everything until the end would pass the other tests."""
    (ids,) = tokenizer.encode_batch(["one two three four five six seven eight nine ten"])
    assert sum(bool(piece) for piece in pieces(TextStream(tokenizer), ids, 1)[:-1]) > len(ids) / 2


@pytest.mark.parametrize("stops", [("three",), ("e f", "three fo"), ("ten!", " seven ")])
@pytest.mark.parametrize("size", [1, 8])
def test_text_ends_before_the_first_stop_string(tokenizer, stops, size):
    text = "one two three four five six seven eight nine ten"
    (ids,) = tokenizer.encode_batch([text])
    stream = TextStream(tokenizer, stops)
    shown = "".join(stream.push(ids[i : i + size]) for i in range(0, len(ids), size))
    expected = cut_at_stop(text, stops)
    assert expected is not None
    assert stream.stopped
    assert shown == expected.strip()
    assert stream.end() == ""


def test_the_beginning_of_a_stop_string_is_held_back_and_given_in_the_end(tokenizer):
    stream = TextStream(tokenizer, ["xyz"])
    given = [stream.push([i]) for i in byte_ids(tokenizer, "axy")]
    assert given == ["a", "", ""]
    assert stream.end() == "xy"


@pytest.mark.parametrize("stop", ["。", "\n\n", "  ", "问:", "User:", "\t", "<", "😀"])
def test_stop_strings_that_can_occur(tokenizer, stop):
    check_stop_strings([stop], tokenizer)


@pytest.mark.parametrize("stop", ["", "<n>", "a<|blank_3|>", "问："])
def test_stop_strings_that_cannot_occur(tokenizer, stop):
    with pytest.raises(UserError, match="stop string"):
        check_stop_strings([stop], tokenizer)
