"""Fixtures of the unit tests: records, token rows, and runs on the two small models."""

import json
import shutil
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from toys import (
    QUESTIONS,
    ToyTokenizer,
    draw_rows,
    draw_uneven_rows,
    randomise_adapter,
    save_rows,
    short_run,
)

from glmtune.adapters import attach_lora, save_adapter
from glmtune.data.templates import alpaca
from glmtune.data.token_rows import TokenRows
from glmtune.evaluation.probes import from_texts
from glmtune.models.chatglm.configuration import ChatGLMConfig
from glmtune.models.chatglm.rows import row_rule
from glmtune.models.loading import load_base_model, load_tokenizer
from glmtune.models.resolve import GLM_TINY


@pytest.fixture(autouse=True, scope="module")
def brief_checkup(request):
    """The check-up after training asks for four tokens: answering took most of a short run."""
    with pytest.MonkeyPatch.context() as patch:
        if request.path.stem != "test_checkup":
            patch.setattr("glmtune.evaluation.checkup.SHORT_ANSWER", 4)
        yield


@pytest.fixture(scope="session")
def word_tokenizer():
    return ToyTokenizer()


@pytest.fixture(scope="session")
def march_vocabulary(shared):
    """The file of March 2023: the later one without the pieces that the code of March appended."""
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
        "adapter": str(adapter),
        "base": str(tiny_folder),
        "max_new_tokens": 6,
        "per_device_eval_batch_size": 2,
        "use_cpu": True,
    }


@pytest.fixture
def tiny_base(tiny_folder):
    """The tiny golden model."""
    return load_base_model(str(tiny_folder), dtype=torch.float32)


@pytest.fixture
def fused_adapter(tiny_folder, tmp_path) -> Path:
    """A copy of the adapter of 2023 with enable_lora."""
    return shutil.copytree(tiny_folder / "adapter_peft_0_2_merged", tmp_path / "fused")


@pytest.fixture
def todays_adapter(tiny_folder, tmp_path) -> Path:
    """A small adapter in PEFT's current format, whose weights change the outputs."""
    model = attach_lora(load_base_model(str(tiny_folder), dtype=torch.float32), rank=2)
    randomise_adapter(model, std=0.05)
    save_adapter(model, tmp_path / "today", "zai-org/chatglm-6b")
    return tmp_path / "today"


@pytest.fixture
def offline(monkeypatch):
    """No hub, no cache of one, and no base in the environment."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("glmtune.doctor.model.HF_HUB_OFFLINE", True)
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    monkeypatch.delenv("GLMTUNE_MODEL", raising=False)
    for module in ("resolve", "base_files"):
        monkeypatch.setattr(f"glmtune.models.{module}.try_to_load_from_cache", lambda *_: None)
    monkeypatch.setattr("glmtune.models.resolve._hub_has", lambda _: False)


@pytest.fixture(scope="session")
def make_rows():
    """Make token rows of random ids, given the numbers before [gMASK] and after <sop>."""

    def make(shapes, config=None, seed=0):
        config = config or ChatGLMConfig()
        drawn = draw_rows(shapes, config, seed)
        return TokenRows.from_table(pa.Table.from_pylist(drawn), row_rule(config))

    return make


@pytest.fixture(scope="session")
def toy_rows(tmp_path_factory):
    """A data set for glm-tiny."""
    glm_tiny = ChatGLMConfig.from_pretrained(GLM_TINY)
    return save_rows(draw_uneven_rows(glm_tiny), tmp_path_factory.mktemp("toy") / "rows")


@pytest.fixture(scope="session")
def tiny_rows(tmp_path_factory, word_tokenizer):
    """A data set for the tiny golden model."""
    return save_rows(draw_uneven_rows(word_tokenizer), tmp_path_factory.mktemp("tiny") / "rows")


@pytest.fixture
def no_curve(monkeypatch):
    """Drawing takes longer than training these few rows."""
    monkeypatch.setattr("glmtune.runlog.RunLog.plot_loss", lambda *_: None)


@pytest.fixture
def toy_run(toy_rows, tmp_path):
    """Make the settings of a short run of glm-tiny, in the folder `run` by default."""

    def make(**settings):
        paths = {"dataset_path": toy_rows, "output_dir": tmp_path / "run"}
        return short_run(**paths | settings)

    return make


@pytest.fixture
def tiny_run(toy_run, tiny_rows, tiny_folder, word_tokenizer, monkeypatch):
    """The same for the tiny golden model, and let it be trained without a vocabulary."""
    monkeypatch.setattr("glmtune.training.prepare.load_tokenizer", lambda base: word_tokenizer)
    defaults = {"dataset_path": tiny_rows, "base": str(tiny_folder), "max_steps": 6}
    defaults["general_set"] = False  # its tokenizer writes no question
    return lambda **settings: toy_run(**defaults | settings)


@pytest.fixture(scope="session")
def taught(tmp_path_factory):
    """An adapter of glm-tiny that has memorised sixteen answers, and the file of them."""
    torch.manual_seed(0)
    tokenizer = load_tokenizer(GLM_TINY)
    model = attach_lora(load_base_model(GLM_TINY, dtype=torch.float32), dropout=0.0, targets="all")
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-2)
    probes = from_texts(tokenizer, [(alpaca(asked), answer) for asked, answer in QUESTIONS])
    length = max(len(p.prompt_ids) + len(p.answer_ids) for p in probes)
    ids = torch.full((len(probes), length), tokenizer.pad_token_id)
    labels = torch.full_like(ids, -100)
    for row, probe in enumerate(probes):
        start, end = len(probe.prompt_ids), len(probe.prompt_ids) + len(probe.answer_ids)
        ids[row, :end] = torch.tensor(probe.prompt_ids + probe.answer_ids)
        labels[row, start:end] = torch.tensor(probe.answer_ids)
    for _ in range(16):
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    folder = tmp_path_factory.mktemp("taught")
    save_adapter(model, folder / "adapter", "glm-tiny")
    records = [{"instruction": asked, "output": answer} for asked, answer in QUESTIONS]
    (folder / "rows.json").write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    return folder
