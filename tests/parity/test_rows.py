"""Token rows equal those of the script of 2023: real tokenizer, whole path from records to disk."""

import json

import pytest

from glmtune.config import ConvertConfig, TokenizeConfig
from glmtune.data.convert import convert
from glmtune.data.dataset import load_dataset
from glmtune.data.tokenizing import tokenize
from glmtune.models.chatglm.tokenization import ChatGLMTokenizer


@pytest.fixture(scope="module")
def tokenizer(shared):
    return ChatGLMTokenizer(str(shared / "golden" / "ice_text.model"))


@pytest.mark.parametrize("skip_overlength", [False, True])
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_alpaca.json"])
def test_rows_are_those_of_the_original(shared, tokenizer, tmp_path, name, skip_overlength):
    golden = json.loads((shared / "golden" / name).read_text(encoding="utf-8"))["rows"]
    (max_seq_length,) = {row["max_seq_length"] for row in golden}
    records, jsonl, folder = (str(tmp_path / name) for name in ("a.json", "a.jsonl", "tokens"))
    with open(records, "w", encoding="utf-8") as file:
        json.dump([row["record"] for row in golden], file)

    convert(ConvertConfig(data_path=records, save_path=jsonl))
    config = TokenizeConfig(
        jsonl_path=jsonl,
        save_path=folder,
        max_seq_length=max_seq_length,
        skip_overlength=skip_overlength,
    )
    tokenize(config, tokenizer, "THUDM/chatglm-6b")

    expected = [
        {"input_ids": row["input_ids"], "seq_len": row["seq_len"]}
        for row in golden
        if not skip_overlength or len(row["input_ids"]) <= max_seq_length
    ]
    dataset, _ = load_dataset(folder)
    assert dataset.to_list() == expected
    assert 30 < len(expected) <= len(golden) == 40
