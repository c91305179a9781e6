"""glm-tiny's vocabulary: the layout of the published file, and any text survives it."""

import unicodedata

import pytest

from glmtune.data.templates import alpaca
from glmtune.demo.questions import held_out_questions
from glmtune.demo.world import passages
from glmtune.models.chatglm.tokenization import ChatGLMTokenizer
from glmtune.models.chatglm.vocabulary import SPECIALS, VOCAB_FILE
from glmtune.models.resolve import GLM_TINY


@pytest.fixture(scope="module")
def tokenizer():
    return ChatGLMTokenizer(f"{GLM_TINY}/{VOCAB_FILE}")


def test_pieces_are_laid_out_as_in_the_published_file(tokenizer):
    names = [tokenizer.sp.id_to_piece(i) for i in range(tokenizer.vocab_size)]
    assert names[:5] == ["<unk>", "<s>", "</s>", "<pad>", "<n>"]
    tail = [*SPECIALS, "<|tab|>", *(f"<|blank_{n}|>" for n in range(2, 81))]
    tail += [f"<0x{value:02X}>" for value in range(256)]
    assert names[-len(tail) :] == tail
    assert len(set(names)) == len(names)
    assert tokenizer.revision == "v1.1"


def test_same_order_as_the_published_file(tokenizer, shared):
    published = ChatGLMTokenizer(str(shared / "golden" / VOCAB_FILE))
    ours, theirs = tokenizer.get_vocab(), published.get_vocab()
    assert all(ours[name] == theirs[name] for name in ("<unk>", "<s>", "</s>", "<pad>", "<n>"))
    distance = theirs["[MASK]"] - ours["[MASK]"]
    for name in (*SPECIALS, "<|tab|>", "<|blank_80|>", "<0x00>", "<0xFF>"):
        assert theirs[name] - ours[name] == distance
        kinds = [
            (t.sp.is_control(i), t.sp.is_byte(i), t.sp.is_unknown(i))
            for t, i in ((tokenizer, ours[name]), (published, theirs[name]))
        ]
        assert kinds[0] == kinds[1]


@pytest.mark.parametrize(
    "text",
    [
        "给出三个保持健康的建议。",
        "Give three tips.",
        "鱉🙂\ttab\n\nand  two",
        "a = b[0] // {c}",
        "ÀÉ ñ",
    ],
)
def test_any_text_survives(tokenizer, text):
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids) == unicodedata.normalize("NFKC", text)


def test_text_of_the_demo_takes_few_tokens(tokenizer):
    for passage in passages(seed=9, count=300):
        ids = tokenizer.encode(passage.text, add_special_tokens=False)
        assert tokenizer.decode(ids) == unicodedata.normalize("NFKC", passage.text)
        assert not any(tokenizer.sp.is_byte(i) for i in ids)
    template = tokenizer.tokenize(alpaca("", ""))
    assert template == ["▁Instruction", ":", "<n>", "Answer", ":"] or len(template) <= 6
    for question in held_out_questions():
        assert len(tokenizer.encode(question.output, add_special_tokens=False)) <= 8
