"""Finding and naming the base model."""

import json
import shutil
import threading
from types import SimpleNamespace

import pytest
import torch

from glmtune.errors import UserError
from glmtune.models import resolve
from glmtune.models.chatglm.configuration import ChatGLMConfig
from glmtune.models.chatglm.random_init import write_random_model
from glmtune.models.chatglm.rows import row_rule
from glmtune.models.loading import check_pair, load_base_model, load_tokenizer
from glmtune.models.resolve import GLM_TINY, HUB_IDS, base_name, resolve_base

ask_hub = resolve._hub_has


@pytest.fixture(autouse=True)
def no_base_anywhere(monkeypatch):
    monkeypatch.delenv("GLMTUNE_MODEL", raising=False)
    monkeypatch.setattr(resolve, "try_to_load_from_cache", lambda *_: None)
    monkeypatch.setattr(resolve, "_hub_has", lambda _: False)
    resolve._tell_of_glm_tiny.cache_clear()


def test_the_setting_wins_over_environment_and_run_folder(tmp_path, monkeypatch):
    folders = [tmp_path / name for name in ("flag", "env", "recipe", "run")]
    for folder in folders:
        folder.mkdir()
    flag, env, recipe, run = map(str, folders)
    (tmp_path / "run" / "recipe.yaml").write_text(f"base: {recipe}\n")
    (tmp_path / "run" / "checkpoint-5").mkdir()
    assert resolve_base(None, run) == recipe
    assert resolve_base(None, f"{run}/checkpoint-5") == recipe
    monkeypatch.setenv("GLMTUNE_MODEL", env)
    assert resolve_base(None, run) == env
    assert resolve_base(flag, run) == flag


def test_the_hub_cache_comes_next_then_the_hub(monkeypatch):
    monkeypatch.setattr(resolve, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(resolve, "_hub_has", lambda name: name == HUB_IDS[0])
    assert resolve_base() == HUB_IDS[0]
    cached = {HUB_IDS[1]: "/cache/config.json"}
    monkeypatch.setattr(resolve, "try_to_load_from_cache", lambda name, _: cached.get(name))
    assert resolve_base() == HUB_IDS[1]


def test_nothing_given_and_nothing_found(capsys):
    assert resolve_base() == resolve_base() == GLM_TINY
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1, "told once a process, in one line"
    assert "glm-tiny" in err
    assert "--base FOLDER" in err
    assert load_tokenizer(GLM_TINY).vocab_size <= load_base_model(GLM_TINY).config.vocab_size


def test_glm_tiny_by_name(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert resolve_base("glm-tiny") == GLM_TINY
    assert capsys.readouterr().err == ""
    (tmp_path / "glm-tiny").mkdir()
    assert resolve_base("glm-tiny") == "glm-tiny", "a folder of that name comes first"


def test_a_hub_that_is_not_to_be_asked(monkeypatch):
    monkeypatch.setattr(resolve, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(resolve, "_hub_has", lambda _: pytest.fail("asked the hub"))
    assert resolve_base() == GLM_TINY


@pytest.mark.parametrize("trouble", [OSError, RuntimeError, None])
def test_a_hub_that_fails_or_hangs(trouble, monkeypatch):
    gone, answers = threading.Event(), []

    def model_info(self, name, timeout):
        if trouble:
            raise trouble
        gone.wait(60)
        answers.append(name)

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", model_info)
    monkeypatch.setattr(resolve, "HUB_TIMEOUT_SECONDS", 0.05)
    assert not ask_hub.__wrapped__("any/name")
    assert not answers, "it was not waited for"
    gone.set()


@pytest.mark.parametrize("value", ["./no/such", "/no/such", "typo", "~/no-such-folder", "a/b/c"])
def test_a_folder_that_is_not_there(value):
    with pytest.raises(UserError, match=r"--base.*is no folder"):
        resolve_base(value)


def test_a_name_never_gives_away_a_private_path(tmp_path):
    private = tmp_path / "chatglm-6b"
    snapshot = tmp_path / "models--zai-org--chatglm-6b" / "snapshots" / "0123abc"
    private.mkdir()
    snapshot.mkdir(parents=True)
    assert base_name(str(private)) == "chatglm-6b"
    assert base_name(str(snapshot)) == "zai-org/chatglm-6b"
    assert base_name("THUDM/chatglm-6b") == "THUDM/chatglm-6b"


def test_load_base_model(tiny_folder):
    model = load_base_model(str(tiny_folder), dtype=torch.float64, device="cpu")
    assert not model.training
    assert model.dtype == torch.float64
    assert model.name_or_path == str(tiny_folder)


def test_a_head_that_the_files_hold_twice_is_compared_once(tmp_path, spy):
    """transformers would compare both copies again while loading, which takes memory."""
    shape = {"hidden_size": 32, "num_layers": 1, "num_attention_heads": 2, "inner_hidden_size": 64}
    config = ChatGLMConfig(**shape, vocab_size=1024, bos_token_id=1004, eos_token_id=1005)
    write_random_model(tmp_path, config, num_shards=2)
    calls = spy(torch, "equal")
    model = load_base_model(str(tmp_path))
    assert [call.args[0].shape for call in calls].count((1024, 32)) == 1
    assert model.lm_head.weight is model.transformer.word_embeddings.weight


def test_folders_of_something_else(tmp_path):
    with pytest.raises(UserError, match=r"has no config\.json"):
        load_base_model(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(UserError, match="model_type 'llama'"):
        load_base_model(str(tmp_path))


def test_a_base_without_a_vocabulary(tiny_folder):
    with pytest.raises(UserError, match=r"no ice_text\.model"):
        load_tokenizer(str(tiny_folder))


IDS = ("bos_token_id", "eos_token_id", "gmask_token_id", "mask_token_id", "pad_token_id")


def named_ids(config, **changes):
    """What a tokenizer of the same ids as a model says of them."""
    ids = SimpleNamespace(
        **{name: getattr(config, name) for name in IDS} | {"vocab_size": 1000} | changes
    )
    ids.row_rule = row_rule(ids)
    return ids


def test_a_model_and_a_tokenizer_that_disagree(tiny_folder):
    model = load_base_model(str(tiny_folder))
    check_pair(model, named_ids(model.config))
    with pytest.raises(UserError, match="eos_token_id: the model says 1005, the tokenizer 2"):
        check_pair(model, named_ids(model.config, eos_token_id=2))
    with pytest.raises(UserError, match="vocab_size"):
        check_pair(model, named_ids(model.config, vocab_size=5000))


@pytest.mark.parametrize("name", IDS)
@pytest.mark.parametrize("value", [{}, "130004", 1.5, True])
def test_special_ids_that_are_none(name, value):
    with pytest.raises(UserError, match=rf"config\.json: {name} is .* which is not possible"):
        ChatGLMConfig(**{name: value})


@pytest.mark.parametrize("ends", [2, [1005, 2], [2], {}, [[1005]]])
def test_a_generation_config_that_ends_answers_elsewhere(tiny_folder, tmp_path, ends):
    folder = shutil.copytree(tiny_folder, tmp_path / "base")
    written = folder / "generation_config.json"
    for right in (None, 1005, [1005]):
        written.write_text(json.dumps({"eos_token_id": right}))
        model = load_base_model(str(folder))
        tokenizer = named_ids(model.config)
        check_pair(model, tokenizer)
    written.write_text(json.dumps({"eos_token_id": ends}))
    with pytest.raises(UserError, match=r"generation_config.json: eos_token_id says .*1005"):
        check_pair(load_base_model(str(folder)), tokenizer)
