"""Damaged, mixed and foreign folders of the younger family: one line, code 2, nothing written."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from glm_folders import toy_tiktoken, write_model
from toys import randomise_adapter

from glmtune.adapters.lora import attach_lora, save_adapter
from glmtune.cli import main
from glmtune.models.families import FAMILIES
from glmtune.models.loading import load_base_model
from glmtune.models.resolve import GLM_TINY

RECORDS = [{"instruction": f"Write {i}", "input": "", "output": f"{i}"} for i in range(4)]
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"
MODELS = {
    "chatglm2": ("ChatGLM2-6B", "glm3_tokenizer.model", True),
    "chatglm3": ("ChatGLM3-6B", "glm3_tokenizer.model", True),
    "glm4": ("GLM-4-9B", "glm/glm4_tokenizer.model", True),
    "edge": ("GLM-Edge", None, False),
}
TOKENIZE = "tokenize --jsonl_path rows.jsonl --save_path new"
INFER = "infer --data_path data.json --limit 1 --max_new_tokens 2 --use_cpu true --output_path new"
TRAIN = "train --output_dir new --max_steps 1 --use_cpu true --report_to none --dataset_path tokens"
PLAN = "plan --card 4090 --num_rows 10 --row_length 32"
MERGE = "merge --adapter adapter --save_path new"


@pytest.fixture(scope="module")
def made(request, tmp_path_factory):
    """By kind: a folder, with rows and an adapter of it beside."""
    found = {}

    def make(kind):
        if kind not in found:
            name, vocabulary, published = MODELS[kind]
            if vocabulary is not None:
                vocabulary = request.getfixturevalue("shared") / "golden" / vocabulary
            place = tmp_path_factory.mktemp(kind)
            family = next(family for family in FAMILIES if family.name == name)
            write_model(place / "base", family, vocabulary, published=published)
            (place / "data.json").write_text(json.dumps(RECORDS))
            convert = ["convert", "--data_path", str(place / "data.json")]
            assert main([*convert, "--save_path", str(place / "rows.jsonl")]) == 0
            line = ["tokenize", "--jsonl_path", str(place / "rows.jsonl"), "--save_path"]
            assert main([*line, str(place / "tokens"), "--base", str(place / "base")]) == 0
            model = attach_lora(load_base_model(str(place / "base"), dtype=torch.float32))
            save_adapter(randomise_adapter(model, 0.1), place / "adapter", "base")
            found[kind] = place
        return found[kind]

    return make


@pytest.fixture
def copy(made, tmp_path, monkeypatch):
    """Gives a copy of a kind's folder, in which the commands below run."""

    def copied(kind):
        shutil.copytree(made(kind), tmp_path / "here")
        monkeypatch.chdir(tmp_path / "here")
        return Path("base")

    return copied


@pytest.fixture
def refused(capsys):
    """Runs commands that must fail in one line which holds some words, and write nothing."""

    def check(words, *lines):
        for line in lines:
            before = sorted(Path().rglob("*"))
            capsys.readouterr()
            assert main([*line.split(), "--base", "base"]) == 2, line
            last = capsys.readouterr().err.splitlines()[-1]
            assert last.startswith("error: "), line
            assert words in last, line
            assert sorted(Path().rglob("*")) == before, line

    return check


def change(file, **settings):
    found = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps(found | settings))


def test_a_download_that_is_half_there(copy, refused):
    base = copy("chatglm3")
    weights = torch.load(base / "pytorch_model.bin")
    (base / "pytorch_model.bin").unlink()
    shards = [f"pytorch_model-{n:05}-of-00002.bin" for n in (1, 2)]
    torch.save(dict(list(weights.items())[:9]), base / shards[0])
    index = {name: shards[place >= 9] for place, name in enumerate(weights)}
    change(base / "pytorch_model.bin.index.json", weight_map=index)
    refused(f"{shards[1]}: a shard that the index names is missing", INFER, TRAIN, MERGE)
    (base / shards[1]).write_text(POINTER)
    refused(f"{shards[1]}: is a Git-LFS pointer", INFER, TRAIN, MERGE)


@pytest.mark.parametrize(
    "kind, other, words",
    [("chatglm3", "glm4", "is a vocabulary of glm4-0414 or glm4 or glm-edge, but the config.json"),
     ("glm4", "chatglm2", "is a vocabulary of chatglm3 or chatglm2, but the config.json")],
)  # fmt: skip
def test_a_vocabulary_of_another_model(copy, made, refused, kind, other, words):
    base = copy(kind)
    shutil.copyfile(made(other) / "base" / "tokenizer.model", base / "tokenizer.model")
    refused(words, TOKENIZE, INFER, TRAIN, MERGE)


def test_a_vocabulary_that_is_not_there(copy, refused):
    base = copy("chatglm3")
    (base / "tokenizer.model").unlink()
    refused("base: has no tokenizer.model; take it from the published folder", TOKENIZE, INFER)


def test_a_tokenizer_json_that_ends_early(copy, refused):
    base = copy("edge")
    text = (base / "tokenizer.json").read_text()
    (base / "tokenizer.json").write_text(text[: len(text) // 2])
    refused("tokenizer.json: is damaged", TOKENIZE, INFER, TRAIN)


@pytest.mark.parametrize(
    "template, why",
    [("{{ raise_exception('no chat') }}", "no chat"), ("{% for m in x %}{{ m", "unexpected end")],
)
def test_a_template_that_fails_is_told_and_rows_are_made_without(copy, capsys, template, why):
    base = copy("edge")
    (base / "chat_template.jinja").write_text(template)
    from glmtune.models import base_files

    base_files._told.clear()
    assert main([*TOKENIZE.split(), "--base", "base"]) == 0
    assert f"note: chat template: fails on one turn ({why}" in capsys.readouterr().err


@pytest.mark.parametrize("kind, stops", [("chatglm3", 7), ("edge", [5, 6])])
def test_stop_ids_of_another_model(copy, refused, kind, stops):
    base = copy(kind)
    change(base / "generation_config.json", eos_token_id=stops)
    refused(f"generation_config.json: eos_token_id says {stops}, but answers", INFER, TRAIN)


def test_an_adapters_file_in_the_base(copy, refused):
    base = copy("chatglm3")
    change(base / "adapter_config.json", peft_type="LORA", base_model_name_or_path="no/where")
    refused("adapter_config.json: an adapter's file in a base model's folder", INFER, TRAIN, MERGE)


@pytest.mark.parametrize(
    "rows, kind, words",
    [("chatglm3", "glm4", "tokenised with another tokenizer"),
     ("glm4", "edge", "tokenised with another tokenizer"),
     ("edge", "chatglm3", "tokenised with another tokenizer"),
     ("chatglm3", "chatglm2", "its user id is 64795, the tokenizer has None"),
     ("chatglm2", "chatglm3", "a prompt that does not end with <|assistant|>")],
)  # fmt: skip
def test_rows_of_another_model(copy, made, refused, rows, kind, words):
    copy(kind)
    shutil.rmtree("tokens")
    shutil.copytree(made(rows) / "tokens", "tokens")
    refused(words, TRAIN)


def test_p_tuning_is_named(copy, refused):
    base = copy("chatglm2")
    weights = torch.load(base / "pytorch_model.bin")
    prefix = {"transformer.prefix_encoder.embedding.weight": torch.zeros(4, 8)}
    torch.save(prefix, base / "pytorch_model.bin")
    refused("is a P-Tuning v2 checkpoint, no base model", INFER, TRAIN, MERGE)
    torch.save(weights | prefix, base / "pytorch_model.bin")
    refused("a base model and a prefix in one", INFER, TRAIN)
    change(base / "config.json", pre_seq_len=128)
    refused("config.json has pre_seq_len", TOKENIZE, INFER, PLAN, TRAIN, MERGE)


@pytest.mark.parametrize("kind", ["chatglm3", "edge"])
@pytest.mark.parametrize(
    "quantised, name",
    [({"quant_method": "gptq", "bits": 4}, "gptq"), ({"quant_method": "awq", "bits": 4}, "awq"),
     ({"quant_method": "fp8"}, "fp8"), ({"w_bit": 4}, "without quant_method"), ("x", "x"),
     ({"quant_method": "bitsandbytes"}, "bitsandbytes")],
)  # fmt: skip
def test_other_kinds_of_quantisation(copy, refused, kind, quantised, name):
    base = copy(kind)
    change(base / "config.json", quantization_config=quantised)
    refused(f"quantization_config ({name}) is not a supported", INFER, PLAN, TRAIN, MERGE)


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize(
    "rope, words",
    [({"rope_type": "dynamic", "factor": 2.0}, "rope_type 'dynamic' is not known here; there are"),
     ({"type": "longrope", "factor": 2.0}, "rope_type 'longrope' is not known here"),
     ({"rope_type": "yarn"}, "rope_type yarn needs factor, and it is None"),
     ({"rope_type": "linear", "factor": "4"}, "rope_type linear needs factor, and it is '4'"),
     ({"rope_type": [1]}, "rope_type [1] is not known here"),
     ("yarn", "is 'yarn', which no model has")],
)  # fmt: skip
def test_scalings_of_positions_that_are_not_known(copy, refused, key, rope, words):
    base = copy("edge")
    change(base / "config.json", rope_parameters=None, partial_rotary_factor=1.0)
    change(base / "config.json", **{key: rope})
    refused(words, TOKENIZE, INFER, PLAN, TRAIN, MERGE)


def test_a_scaling_that_the_published_layout_does_not_read(copy, refused):
    base = copy("chatglm3")
    change(base / "config.json", rope_scaling={"rope_type": "yarn", "factor": 4.0})
    refused("rope_scaling has no effect in the layout of model_type 'chatglm'", INFER, PLAN, TRAIN)


def test_a_vocabulary_of_chatglm_6b(copy, refused):
    """`ice_text.model` lies beside no model of this family."""
    base = copy("chatglm3")
    (base / "tokenizer.model").rename(base / "ice_text.model")
    refused("base: has no tokenizer.model", TOKENIZE, INFER, TRAIN)
    shutil.copyfile(Path(GLM_TINY, "ice_text.model"), base / "tokenizer.model")
    refused("ids, but config.json says 65024 rows, so they are of different models", TOKENIZE)
    (base / "tokenizer.model").write_bytes(toy_tiktoken()[:-1])
    refused("is a vocabulary of glm4-0414", TOKENIZE, INFER)
