"""Token rows equal those of the script of 2023: real tokenizer, whole path from records to disk.

One difference: that script supervised the end token also after a cut answer.
"""

import json

import pytest

from glmtune.config.settings import ConvertSettings, TokenizeSettings
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

    convert(ConvertSettings(data_path=records, save_path=jsonl))
    config = TokenizeSettings(
        jsonl_path=jsonl,
        save_path=folder,
        max_seq_length=max_seq_length,
        skip_overlength=skip_overlength,
    )
    tokenize(config, tokenizer, "THUDM/chatglm-6b")

    lengths = map(len, tokenizer.encode_batch([row["target"] for row in golden]))
    is_cut = [length > max_seq_length for length in lengths]
    expected = [
        {"input_ids": row["input_ids"][:-1] if cut else row["input_ids"], "seq_len": row["seq_len"]}
        for row, cut in zip(golden, is_cut, strict=True)
        if not skip_overlength or len(row["input_ids"]) <= max_seq_length
    ]
    table, card = load_dataset(folder)
    assert table.to_pylist() == expected
    assert len(card.rows_cut["target"]) == (0 if skip_overlength else sum(is_cut))
    assert sum(is_cut) == (6 if name == "tokenizer_alpaca.json" else 0)
    assert 30 < len(expected) <= len(golden) == 40
