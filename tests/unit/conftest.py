"""What tests share: a tokenizer for the tiny golden model, which has no vocabulary, and rows."""

import json
import shutil
import zlib

import datasets
import numpy as np
import pytest

from glmtune.config import TrainSettings
from glmtune.data.token_rows import TokenRows
from glmtune.models.chatglm.configuration import ChatGLMConfig
from glmtune.models.resolve import GLM_TINY


class WordTokenizer:
    """Numbers are their own ids, any other word has an id of its own by chance."""

    bos_token_id, eos_token_id, gmask_token_id, mask_token_id = 1004, 1005, 1001, 1000
    pad_token_id, vocab_size = 3, 1006

    def encode_batch(self, texts, *, add_special_tokens=False, max_length=None, num_threads=None):
        assert max_length is None
        specials = [self.gmask_token_id, self.bos_token_id] if add_special_tokens else []
        return [[self.encode_word(word) for word in text.split()] + specials for text in texts]

    @staticmethod
    def encode_word(word):
        return int(word) if word.isdecimal() else 4 + zlib.crc32(word.encode()) % 990

    def decode(self, ids, skip_special_tokens=False):
        kept = [i for i in ids if i < self.mask_token_id or not skip_special_tokens]
        return "".join(f" {i}" for i in kept)


@pytest.fixture(scope="session")
def word_tokenizer():
    return WordTokenizer()


@pytest.fixture(scope="session")
def march_vocabulary(shared):
    """The file of March 2023: the later one without the pieces that the code of then appended."""
    data, end = (shared / "golden" / "ice_text.model").read_bytes(), 0
    for _ in range(130_000):
        assert data[end] == 0x0A
        end += 2 + data[end + 1]
    rest = end
    while data[rest] == 0x0A:
        rest += 2 + data[rest + 1]
    without_byte_fallback = b"\x12\x03\x98\x02\x00"
    return data[:end] + data[rest:] + without_byte_fallback


RECORDS = [
    {"instruction": "给出三个 保持健康的 秘诀。", "input": "", "output": "多吃水果。\n多睡觉。"},
    {"instruction": "Describe a crepe", "input": "thin | <b>flat</b>", "output": "A pancake."},
    {"instruction": "三原色 是什么？", "input": "", "output": ""},
    {"instruction": "Name a synonym", "input": "quick", "output": "rapid"},
    {"instruction": "Say 一 二 三", "input": "", "output": "一二三"},
]


@pytest.fixture
def records_file(tmp_path):
    """Five records, Chinese and English."""
    path = tmp_path / "records.json"
    path.write_text(json.dumps(RECORDS, ensure_ascii=False), encoding="utf-8")
    return path


@pytest.fixture
def answering(tiny_folder, records_file, word_tokenizer, monkeypatch, tmp_path):
    """Settings with which the tiny model and its adapter of 2023 answer the five records."""
    monkeypatch.setattr("glmtune.evaluation.answers.load_tokenizer", lambda base: word_tokenizer)
    adapter = shutil.copytree(tiny_folder / "adapter_peft_0_2_plain", tmp_path / "output_zh")
    return {
        "data_path": str(records_file),
        "model_path": str(adapter),
        "chatglm_path": str(tiny_folder),
        "max_new_tokens": 6,
        "per_device_eval_batch_size": 2,
        "use_cpu": True,
    }


@pytest.fixture(scope="session")
def make_rows():
    """Token rows of so many text ids before [gMASK] and so many ids after <sop>, at random."""

    def make(shapes, config=None, seed=0):
        config = config or ChatGLMConfig()
        random = np.random.default_rng(seed)
        rows = []
        for text, answer in shapes:
            ids = random.integers(20_005, 100_000, text + answer).tolist()
            specials = [config.gmask_token_id, config.bos_token_id]
            rows.append({"input_ids": ids[:text] + specials + ids[text:], "seq_len": text + 2})
        return TokenRows.from_dataset(datasets.Dataset.from_list(rows))

    return make


@pytest.fixture(scope="session")
def toy_rows(tmp_path_factory):
    """A data set of 23 rows for glm-tiny, of very different lengths."""
    base = ChatGLMConfig.from_pretrained(GLM_TINY)
    random = np.random.default_rng(0)
    rows = []
    for _ in range(23):
        prompt, answer = (random.integers(10, 900, random.integers(1, 12)).tolist() for _ in "ab")
        ids = [*prompt, base.gmask_token_id, base.bos_token_id, *answer, base.eos_token_id]
        rows.append({"input_ids": ids, "seq_len": len(prompt) + 2})
    path = str(tmp_path_factory.mktemp("toy") / "rows")
    datasets.Dataset.from_list(rows).save_to_disk(path)
    return path


@pytest.fixture(scope="session")
def short_run():
    """Settings of a run of a few steps, each of two passes."""
    return {
        "per_device_train_batch_size": 3,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_steps": 1000,
        "report_to": "none",
        "use_cpu": True,
    }


@pytest.fixture
def toy_run(toy_rows, short_run, tmp_path):
    """Make the settings of a short run of glm-tiny, in the folder `run` unless told otherwise."""

    def make(**settings):
        paths = {"dataset_path": toy_rows, "output_dir": str(tmp_path / "run")}
        defaults = short_run | paths | {"chatglm_path": GLM_TINY, "max_steps": 4}
        return TrainSettings(**defaults | settings)

    return make
