"""Models with random weights, written by command."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch

from glmtune import cli
from glmtune.config.reading import read_config
from glmtune.config.settings import NewModelSettings
from glmtune.models.chatglm import new_model as module
from glmtune.models.chatglm.new_model import count_parameters, new_model, shape
from glmtune.models.chatglm.vocabulary import VOCAB_FILE
from glmtune.models.loading import check_pair, load_base_model, load_tokenizer
from glmtune.models.resolve import GLM_TINY

SMALL = {"hidden_size": "32", "num_layers": "2", "num_attention_heads": "4"}


def settings(folder, like="glm-tiny", **flags) -> NewModelSettings:
    flags = {"folder": str(folder), "like": like} | flags
    return read_config(NewModelSettings, None, flags)


def test_a_model_like_glm_tiny(tmp_path, capsys):
    folder = tmp_path / "new"
    written = new_model(settings(folder, **SMALL))
    out = capsys.readouterr().out
    assert out.splitlines()[0].startswith(f"{folder}: {written.num_parameters:,} parameters")
    model, tokenizer = load_base_model(str(folder)), load_tokenizer(str(folder))
    check_pair(model, tokenizer)
    assert model.num_parameters() == written.num_parameters
    assert (model.config.hidden_size, model.config.inner_hidden_size) == (32, 128)
    assert (model.config.num_layers, model.config.num_attention_heads) == (2, 4)
    assert tokenizer.vocab_hash == load_tokenizer(GLM_TINY).vocab_hash
    with torch.no_grad():
        assert model(torch.tensor([tokenizer.encode_batch(["猫"], add_special_tokens=True)[0]]))


def test_a_model_like_the_published_one(tmp_path, capsys):
    folder = tmp_path / "new"
    new_model(settings(folder, "chatglm-6b", vocab_size="2000", num_shards="3", **SMALL))
    assert "no tokenizer" in capsys.readouterr().out
    assert len(list(folder.glob("*.bin"))) == 3
    config = json.loads((folder / "config.json").read_text())
    assert config["auto_map"]["AutoConfig"] == "configuration_chatglm.ChatGLMConfig"
    assert config["eos_token_id"] == config["bos_token_id"] + 1 < 2000
    assert not (folder / VOCAB_FILE).exists()


def test_a_vocabulary_of_ones_own_gives_the_special_ids(tmp_path):
    flags = {"vocab_file": f"{GLM_TINY}/{VOCAB_FILE}", "vocab_size": "3000"}
    folder = tmp_path / "new"
    new_model(settings(folder, "chatglm-6b", **flags, **SMALL))
    check_pair(load_base_model(str(folder)), load_tokenizer(str(folder)))


def test_the_same_seed_gives_the_same_weights(tmp_path):
    one, same, other = (
        load_base_model(str(new_model(settings(tmp_path / name, seed=seed, **SMALL)).folder))
        for name, seed in (("a", "1"), ("b", "1"), ("c", "2"))
    )
    weights = [model.transformer.word_embeddings.weight for model in (one, same, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("revision, bos", [("130528", 130004), ("150528", 150004)])
def test_the_number_of_parameters_is_the_published_one(revision, bos):
    config = shape(settings("x", "chatglm-6b", vocab_size=revision), None)
    assert (config.bos_token_id, config.eos_token_id) == (bos, bos + 1)
    assert (config.hidden_size, config.num_layers, config.inner_hidden_size) == (4096, 28, 16384)
    if revision == "130528":
        assert count_parameters(config) == 6_173_286_400


@pytest.mark.parametrize(
    "flags, words",
    [
        ({"hidden_size": "30"}, "cannot be cut into"),
        ({"vocab_size": "1024"}, "vocab_size: the tokenizer has"),
        ({"vocab_file": "/no/such"}, "--vocab_file: /no/such is no file"),
        ({"vocab_file": __file__}, "test_new_model.py"),
    ],
)
def test_sizes_that_do_not_fit_each_other_are_refused(flags, words, tmp_path, capsys):
    line = [f"--{name}={value}" for name, value in flags.items()]
    assert cli.main(["new-model", str(tmp_path / "new"), "--like", "glm-tiny", *line]) == 2
    err = capsys.readouterr().err
    assert words in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_holds_something_is_left_alone(tmp_path, capsys):
    (tmp_path / "mine").write_text("x")
    for folder in (tmp_path, tmp_path / "mine"):
        assert cli.main(["new-model", str(folder), "--like", "glm-tiny"]) == 2
        assert "not an empty folder" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_disk_without_room_is_told_beforehand(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "new"
    line = ["new-model", str(folder), "--like", "chatglm-6b"]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10**9))
    assert cli.main(line) == 2
    assert "1,000 MB are free, but the weights take 12,347 MB" in capsys.readouterr().err
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10**12))
    monkeypatch.setattr(module, "machine_memory_gib", lambda: 4.0)
    assert cli.main(line) == 2
    assert "11.5 GiB of memory, this machine has 4.0 GiB" in capsys.readouterr().err
    assert not folder.exists()


def test_a_disk_that_fills_up_leaves_nothing(tmp_path, monkeypatch, capsys):
    def fill(*_, **__):
        raise RuntimeError("PytorchStreamWriter failed writing file data/0\nmore")

    monkeypatch.setattr("glmtune.models.chatglm.random_init.write_random_model", fill)
    line = ["new-model", str(tmp_path / "new"), "--like", "glm-tiny"]
    assert cli.main(line) == 2
    assert "check the free space" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
