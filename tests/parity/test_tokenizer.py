"""The tokenizer against the recorded ids and texts of the published one."""

import json

import pytest

from glmtune.models.chatglm.tokenization import ChatGLMTokenizer


@pytest.fixture(scope="module")
def tokenizer(shared):
    return ChatGLMTokenizer(str(shared / "golden" / "ice_text.model"))


@pytest.fixture(scope="module", params=["tokenizer.json", "tokenizer_alpaca.json"])
def cases(shared, request):
    return json.loads((shared / "golden" / request.param).read_text(encoding="utf-8"))["cases"]


def test_encode(tokenizer, cases):
    for case in cases:
        assert tokenizer.encode(case["text"], add_special_tokens=False) == case["ids"]
        assert tokenizer.encode(case["text"]) == case["ids_with_special"]


def test_encode_batch_equals_one_by_one(tokenizer, cases):
    texts = [case["text"] for case in cases]
    assert tokenizer.encode_batch(texts) == [case["ids"] for case in cases]
    assert tokenizer.encode_batch(texts, add_special_tokens=True, num_threads=2) == [
        case["ids_with_special"] for case in cases
    ]


def test_decode_batch_leaves_special_ids_out(tokenizer, cases):
    rows = [[*case["ids_with_special"], tokenizer.eos_token_id] for case in cases]
    texts = [tokenizer.decode(case["ids"], skip_special_tokens=True) for case in cases]
    assert tokenizer.decode_batch(rows) == texts


def test_decode(tokenizer, cases):
    for case in cases:
        assert tokenizer.decode(case["ids"]) == case["decoded"]
        cleaned = tokenizer.decode(case["ids"], clean_up_tokenization_spaces=True)
        assert cleaned == case["decoded_with_clean_up"]


def test_special_ids(tokenizer, shared):
    special = json.loads((shared / "golden" / "tokenizer.json").read_text())["special"]
    names = {
        "mask": "mask_token_id",
        "gmask": "gmask_token_id",
        "bos": "bos_token_id",
        "eos": "eos_token_id",
        "pad": "pad_token_id",
        "unk": "unk_token_id",
    }
    assert {key: getattr(tokenizer, name) for key, name in names.items()} == {
        key: special[key] for key in names
    }
