"""Rows that are encoded many at once, beside a plain loop over one text after another."""

from itertools import pairwise
from types import SimpleNamespace

import pytest
from glm_folders import encoder_of, toy_tiktoken, write_folder
from hypothesis import example, given, settings
from hypothesis import strategies as st

from glmtune.config.settings import TokenizeSettings
from glmtune.data.conversation_rows import encode_conversations
from glmtune.data.conversations import ASSISTANT, IGNORED, USER, Example, Turn
from glmtune.data.records import Conversation, Row
from glmtune.data.tokenizing import encode_rows
from glmtune.models.chatglm.encoder import RowEncoder
from glmtune.models.chatglm.vocabulary import replace_blanks
from glmtune.models.glm.byte_pair_encoder import tokenizer_of_tiktoken
from glmtune.models.glm.encoder import of_folder
from glmtune.models.glm.layouts import LAYOUTS

LIMIT = 40
ODD = (
    "a", "Why", " 17", "你好", "，", " ", " " * 90, "\n", "\r\n", "\t", "[gMASK]", "<sop>", "sop",
    "<|user|>", "<|assistant|>", "</s>", "<n>", "<|blank_3|>", "😀", "e\u0301", "\ufeff", "\u3000",
    "\0", "0" * 300, "长" * 700,
)  # fmt: skip
TEXTS = st.lists(st.sampled_from(ODD), max_size=5).map("".join)
ROUNDS = st.lists(st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=3), min_size=1, max_size=5)


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    """GLM-4's two forms of a vocabulary, of bytes."""
    root, data = tmp_path_factory.mktemp("toy"), toy_tiktoken()
    plain = write_folder(root / "glm4", "glm4", data, padded_vocab_size=70_000)
    file = root / "tokenizer.json"
    data = tokenizer_of_tiktoken(data, file, LAYOUTS["glm4-0414"]).to_str().encode()
    joined = write_folder(root / "0414", "glm4-0414", data, name=file.name, vocab_size=70_000)
    return [of_folder(plain), of_folder(joined)]


@pytest.fixture(scope="module")
def pieces(shared, tmp_path_factory):
    return encoder_of(shared, tmp_path_factory.mktemp("glm"), "chatglm3")


def in_bulk(encoder, talks):
    """Ids and labels of conversations, all encoded at once."""
    rows = []
    for number, rounds in enumerate(talks, start=1):
        turns = [
            Turn(r, t) for pair in rounds for r, t in zip((USER, ASSISTANT), pair, strict=True)
        ]
        rows.append(Conversation(Example(tuple(turns)), "a.jsonl", number, number))
    wanted = TokenizeSettings(
        jsonl_path="a.jsonl", save_path="rows", max_seq_length=100_000, keep_empty=True
    )
    out = encode_conversations(rows, encoder, wanted)
    starts = out.starts.tolist()
    return [
        (out.input_ids[start:end].tolist(), out.labels[start:end].tolist())
        for start, end in pairwise(starts)
    ]


def one_by_one(encoder, rounds):
    """The same of one, message by message, each text encoded by itself."""

    def ids_of(text):
        if hasattr(encoder, "sp"):
            return encoder.sp.encode(text)
        encoder.byte_pairs.encode_special_tokens = True
        return encoder.byte_pairs.encode(text, add_special_tokens=False).ids

    ids = [encoder.ids[name] for name in encoder.layout.prefix]
    is_taught = [False] * len(ids)
    for role, text in [(r, t) for pair in rounds for r, t in zip(("user", "assistant"), pair)]:  # noqa: B905
        said = ids_of(f"\n{text}") if encoder.joins_newline else [*ids_of("\n"), *ids_of(text)]
        # What follows an answer is taught with it.
        is_taught += [role == "user" and len(is_taught) > len(encoder.layout.prefix)]
        is_taught += [role == "assistant"] * len(said)
        ids += [encoder.ids[f"<|{role}|>"], *said]
    ids.append(encoder.ids[encoder.layout.end])
    is_taught.append(True)
    return ids, [id_ if taught else IGNORED for id_, taught in zip(ids, is_taught, strict=True)]


@settings(max_examples=40)
@given(talks=ROUNDS)
def test_conversations_of_byte_pairs_are_those_of_the_loop(toys, talks):
    assert [encoder.joins_newline for encoder in toys] == [False, True]
    for encoder in toys:
        assert in_bulk(encoder, talks) == [one_by_one(encoder, rounds) for rounds in talks]


@settings(max_examples=30)
@given(talks=ROUNDS)
@example(talks=[[(text, text)] for text in ODD] * 2)  # enough for threads
def test_conversations_of_pieces_are_those_of_the_loop(pieces, talks):
    assert in_bulk(pieces, talks) == [one_by_one(pieces, rounds) for rounds in talks]


@settings(max_examples=40)
@given(pairs=st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=5))
@example(pairs=[(text, text) for text in ODD] * 3)
def test_contexts_and_targets_are_those_of_the_loop(chatglm, pairs):
    rows = [Row(*pair, "a.jsonl", n, n) for n, pair in enumerate(pairs, start=1)]
    wanted = TokenizeSettings(
        jsonl_path="a.jsonl", save_path="rows", max_seq_length=LIMIT, keep_empty=True
    )
    out = encode_rows(rows, chatglm.encoder, wanted)
    starts = out.starts.tolist()
    found = [
        (out.input_ids[start:end].tolist(), length)
        for start, end, length in zip(starts[:-1], starts[1:], out.seq_len, strict=True)
    ]
    expected = []
    for context, target in pairs:
        prompt, answer = (
            chatglm.encoder.sp.encode(replace_blanks(text)) for text in (context, target)
        )
        prompt = [*prompt[: LIMIT - 2], chatglm.gmask, chatglm.sop]
        answer = answer[:LIMIT] if len(answer) > LIMIT else [*answer, chatglm.eop]
        expected.append((prompt + answer, len(prompt)))
    assert found == expected


@pytest.fixture(scope="module")
def chatglm(shared):
    encoder = RowEncoder(str(shared / "golden" / "ice_text.model"))
    return SimpleNamespace(encoder=encoder, gmask=130001, sop=130004, eop=130005)
