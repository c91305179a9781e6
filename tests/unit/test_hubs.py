"""Folders and names as users have them: hub caches, shards without an index, ModelScope."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from glmtune.adapters import find_adapter
from glmtune.cli import main
from glmtune.errors import UserError
from glmtune.models import hubs
from glmtune.models.chatglm.configuration import ChatGLMConfig
from glmtune.models.chatglm.modeling import ChatGLMForConditionalGeneration as Model
from glmtune.models.chatglm.random_init import write_random_model
from glmtune.models.families import family_not_loaded
from glmtune.models.hubs import check_endpoint, in_modelscope_cache, open_folder
from glmtune.models.loading import load_base_model, load_config, load_tokenizer
from glmtune.models.resolve import GLM_TINY, base_name, resolve_base

COMMIT, OLDER = "0123456789abcdef0123456789abcdef01234567", "f" * 40
SHAPE = {"hidden_size": 32, "num_layers": 2, "num_attention_heads": 2, "inner_hidden_size": 64}
IDS = torch.tensor([[5, 6, 7, 1001, 1004, 8, 9]])


@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path):
    """No network, no caches but those of the test, and nothing named by the environment."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "modelscope"))
    monkeypatch.delenv("GLMTUNE_MODEL", raising=False)
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    monkeypatch.chdir(tmp_path)


def cache_model(source, outer, commit=COMMIT, branch="main"):
    """A model as the hub's cache keeps it: blobs, links to them, and what a branch stands for."""
    snapshot, blobs = outer / "snapshots" / commit, outer / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir(exist_ok=True)
    for path in Path(source).iterdir():
        shutil.copy(path, blobs / f"{commit[:4]}-{path.name}")
        (snapshot / path.name).symlink_to(blobs / f"{commit[:4]}-{path.name}")
    (outer / "refs").mkdir(exist_ok=True)
    (outer / "refs" / branch).write_text(commit)
    return snapshot


def logits(folder):
    with torch.no_grad():
        return Model.from_pretrained(folder, dtype=torch.float32)(IDS).logits


@pytest.fixture
def sharded(tmp_path):
    """A tiny model in four numbered shards with their index."""
    config = ChatGLMConfig(**SHAPE, vocab_size=1024, bos_token_id=1004, eos_token_id=1005)
    write_random_model(tmp_path / "sharded", config, num_shards=4)
    return tmp_path / "sharded"


# --- the hub's cache ---


@pytest.mark.parametrize("part", ["", "snapshots", f"snapshots/{COMMIT}"])
def test_a_folder_of_the_hub_s_cache_is_opened(tmp_path, part):
    outer = tmp_path / "models--THUDM--chatglm-6b"
    snapshot = cache_model(GLM_TINY, outer)
    base = resolve_base(str(outer / part))
    assert Path(base) == snapshot
    assert base_name(base) == "THUDM/chatglm-6b"
    assert load_tokenizer(base).vocab_size <= load_config(base).vocab_size
    assert Model.from_pretrained(outer / part).config.num_layers == load_config(base).num_layers


def test_the_snapshot_is_that_of_main_unless_it_holds_no_model(tmp_path):
    outer = tmp_path / "models--me--mine"
    of_main = cache_model(GLM_TINY, outer)
    other = cache_model(GLM_TINY, outer, OLDER, branch="pr")
    os.utime(of_main, (1, 1))
    assert open_folder(outer) == of_main
    (of_main / "config.json").unlink()
    assert open_folder(outer) == other
    shutil.rmtree(outer / "refs")
    assert open_folder(outer) == other


def test_a_cache_folder_without_a_snapshot(tmp_path):
    (tmp_path / "models--me--mine" / "snapshots").mkdir(parents=True)
    with pytest.raises(UserError, match="without a snapshot in it; download the model again"):
        resolve_base("models--me--mine")


@pytest.mark.parametrize("inside", ["chatglm-6b", "models--a--b/snapshots/0123"])
def test_a_folder_around_the_model_is_told_where_it_lies(tmp_path, inside):
    shutil.copytree(GLM_TINY, tmp_path / "around" / inside)
    with pytest.raises(UserError, match=r"has no config\.json; pass .*, such as (.*)") as caught:
        load_tokenizer("around")
    advised = str(caught.value).rpartition("such as ")[2]
    assert load_tokenizer(resolve_base(advised)).vocab_size


# --- shards without their index ---


@pytest.mark.parametrize("form", ["bin", "safetensors"])
def test_shards_without_their_index(sharded, form):
    expected = logits(sharded)
    (index,) = sharded.glob("*.index.json")
    index.unlink()
    if form == "safetensors":
        for path in sharded.glob("*.bin"):
            name = path.name.replace("pytorch_model", "model").replace(".bin", ".safetensors")
            save_file(
                {key: value.clone() for key, value in torch.load(path).items()},
                sharded / name,
                {"format": "pt"},
            )
            path.unlink()
    before = sorted(path.name for path in sharded.iterdir())
    assert torch.equal(logits(sharded), expected)
    assert load_base_model(str(sharded)).name_or_path == str(sharded)
    assert sorted(path.name for path in sharded.iterdir()) == before, "nothing is written there"


def test_shards_without_their_index_keep_the_generation_settings(sharded):
    (sharded / "generation_config.json").write_text('{"eos_token_id": 1005, "top_k": 17}')
    next(sharded.glob("*.index.json")).unlink()
    assert load_base_model(str(sharded)).generation_config.top_k == 17


@pytest.mark.parametrize(
    "spoil, words",
    [
        (
            lambda f: (f / "pytorch_model-00003-of-00004.bin").unlink(),
            r"of 4 shards these are missing: pytorch_model-00003-of-00004\.bin; download them",
        ),
        (
            lambda f: [p.unlink() for p in f.glob("*.bin") if "00001" not in p.name],
            r"missing: pytorch_model-00002-of-00004\.bin, .*00003.*, .*00004",
        ),
        (
            lambda f: shutil.copy(
                f / "pytorch_model-00001-of-00004.bin", f / "pytorch_model-00001-of-00008.bin"
            ),
            "shards of several downloads .*; leave those of one there",
        ),
        (
            lambda f: (f / "pytorch_model-00002-of-00004.bin").write_bytes(b"PK" + b"0" * 99),
            r"pytorch_model-00002-of-00004\.bin: is damaged",
        ),
        (lambda f: [p.unlink() for p in f.glob("*.bin")], "holds no weights .*numbered shards"),
    ],
)
def test_shards_that_are_not_whole(sharded, spoil, words):
    next(sharded.glob("*.index.json")).unlink()
    spoil(sharded)
    with pytest.raises(UserError, match=words):
        load_base_model(str(sharded))


# --- P-Tuning v2 ---


@pytest.mark.parametrize("with_base", [False, True])
def test_a_checkpoint_of_p_tuning_says_what_it_is(sharded, with_base, capsys):
    config = json.loads((sharded / "config.json").read_text())
    config |= {"pre_seq_len": 8, "prefix_projection": False, "_name_or_path": "THUDM/chatglm-6b"}
    tensors = {"transformer.prefix_encoder.embedding.weight": torch.zeros(8, 128)}
    if with_base:
        tensors |= Model.from_pretrained(sharded).state_dict()
    shutil.rmtree(sharded)
    sharded.mkdir()
    (sharded / "config.json").write_text(json.dumps(config))
    torch.save(tensors, sharded / "pytorch_model.bin")
    with pytest.raises(UserError, match="is a P-Tuning v2 checkpoint, ") as caught:
        load_base_model(str(sharded))
    assert ("a base model and a prefix in one" if with_base else "no base model") in str(
        caught.value
    )
    assert "trained on (config.json names THUDM/chatglm-6b) as --base" in str(caught.value)
    assert main(["doctor", "--base", str(sharded), "--use_cpu", "true"]) == 1
    assert "problem  base model" in capsys.readouterr().out


# --- ChatGLM-6B-Slim ---


@pytest.mark.parametrize("names_gmask", [False, True])
def test_march_s_model_without_its_image_tokens(shared, march_vocabulary, tmp_path, names_gmask):
    source, slim = shared / "golden" / "chatglm-6b-v1.0-tiny", tmp_path / "slim"
    slim.mkdir()
    config = json.loads((source / "config.json").read_text())
    config |= {"vocab_size": 130_528, "bos_token_id": 130_004, "eos_token_id": 130_005}
    if names_gmask:  # then the rest is of mid-2023, and only the vocabulary's file is March's
        config |= {"gmask_token_id": 130_001, "mask_token_id": 130_000, "pad_token_id": 3}
    (slim / "config.json").write_text(json.dumps(config))
    tensors = torch.load(source / "pytorch_model.bin")
    tables = ("transformer.word_embeddings.weight", "lm_head.weight")
    torch.save(
        {k: v[20_000:].clone() if k in tables else v for k, v in tensors.items()},
        slim / "pytorch_model.bin",
    )
    (slim / "ice_text.model").write_bytes(march_vocabulary)
    ids = load_tokenizer(str(slim))("你好, how are you?").input_ids
    assert ids[-2:] == [130_001, 130_004]
    ids = torch.tensor([[*ids, 5, 6]])
    with torch.no_grad():
        whole = Model.from_pretrained(source, dtype=torch.float32)(ids + 20_000).logits[
            ..., 20_000:
        ]
        cut = load_base_model(str(slim), dtype=torch.float32)(ids).logits
    assert torch.equal(cut, whole) is not names_gmask
    if not names_gmask:  # and what is saved of it still says so
        model = Model.from_pretrained(slim, dtype=torch.float32)
        model.save_pretrained(tmp_path / "saved")
        again = Model.from_pretrained(tmp_path / "saved", dtype=torch.float32)
        with torch.no_grad():
            assert torch.equal(again(ids).logits, whole)


# --- adapters of a hub ---


def test_an_adapter_by_its_hub_id(tmp_path, strange_adapter, capsys):
    cache_model(strange_adapter, tmp_path / "hub" / "models--me--my-adapter")
    Path("a.json").write_text('[{"instruction": "Who?", "input": "", "output": "x"}]')
    flags = ["--data_path", "a.json", "--base", "glm-tiny", "--max_new_tokens", "4"]
    answers = []
    for path in ("me/my-adapter", strange_adapter):
        for _ in range(2):  # the second time the answers lie in a folder of that name
            flags_of_it = ["--adapter", path, "--output_path", f"{len(answers)}.jsonl"]
            assert main(["infer", *flags, *flags_of_it, "--use_cpu", "true"]) == 0
            answers.append(json.loads(Path(f"{len(answers)}.jsonl").read_text())["answer"])
    assert len(set(answers)) == 1
    assert main(["infer", *flags, "--adapter", "me/my-adapter", "--use_cpu", "true"]) == 0
    assert main(["infer", *flags, "--adapter", "me/my-adapter", "--use_cpu", "true"]) == 0
    assert "nothing was left to do" in capsys.readouterr().out
    settings = json.loads(Path("me/my-adapter/answers.settings.json").read_text())
    assert settings["adapter"] == "me/my-adapter"


def test_an_adapter_in_the_outer_folder_of_a_cache(tmp_path, strange_adapter):
    snapshot = cache_model(strange_adapter, tmp_path / "models--me--my-adapter")
    assert find_adapter(tmp_path / "models--me--my-adapter") == snapshot


def test_an_adapter_that_the_hub_does_not_give():
    with pytest.raises(UserError, match=r"no such folder, and the hub does not give it \(.*\)"):
        find_adapter("me/none")
    with pytest.raises(UserError, match="no such folder \\(an adapter is"):
        find_adapter("./me/none")


# --- ModelScope ---


@pytest.mark.parametrize(
    "place",
    [
        "models/ZhipuAI/ChatGLM-6B",
        "hub/models/ZhipuAI/ChatGLM-6B",
        "ZhipuAI/ChatGLM-6B",
        "hub/ZhipuAI/ChatGLM-6B",
        "models/ZhipuAI--ChatGLM-6B/snapshots/master",
    ],
)
def test_modelscope_s_cache(tmp_path, place, monkeypatch):
    shutil.copytree(GLM_TINY, tmp_path / "modelscope" / place)
    base = resolve_base("ZhipuAI/ChatGLM-6B")
    assert Path(base) == tmp_path / "modelscope" / place
    assert load_base_model(base).config.num_layers
    assert base_name(base).endswith("ChatGLM-6B")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("MODELSCOPE_CACHE")
    (tmp_path / ".cache").mkdir()
    shutil.move(tmp_path / "modelscope", tmp_path / ".cache" / "modelscope")
    assert resolve_base("ZhipuAI/ChatGLM-6B") == str(tmp_path / ".cache" / "modelscope" / place)


def test_a_name_with_a_dot_in_modelscope_s_cache(tmp_path):
    folder = shutil.copytree(GLM_TINY, tmp_path / "modelscope/models/me/chatglm-6b-v1___1")
    assert in_modelscope_cache("me/chatglm-6b-v1.1") == folder
    assert base_name(str(folder)) == "chatglm-6b-v1.1"


def test_modelscope_s_client_is_asked_where_it_is_installed(tmp_path, monkeypatch):
    (tmp_path / "modelscope.py").write_text(
        "asked = []\n"
        "def snapshot_download(model_id, *, allow_patterns):\n"
        "    asked.append((model_id, allow_patterns))\n"
        f"    return {GLM_TINY!r}\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    base = resolve_base("ZhipuAI/ChatGLM-6B")
    assert base == "ZhipuAI/ChatGLM-6B"
    assert load_tokenizer(base).vocab_size
    asked = sys.modules.pop("modelscope").asked
    assert [name for name, _ in asked] == ["ZhipuAI/ChatGLM-6B"] * 2
    assert [patterns for _, patterns in asked] == [
        ["config.json"],
        ["*.json", "*.model", "*.jinja"],
    ]


def test_a_download_from_modelscope_that_was_not_finished_is_gone_on_with(tmp_path, monkeypatch):
    """As after `tokenize`, which fetches no weights."""
    cached = shutil.copytree(GLM_TINY, tmp_path / "modelscope/models/ZhipuAI--x/snapshots/master")
    assert resolve_base("ZhipuAI/x") == str(cached)
    (cached / "model.safetensors").rename(tmp_path / "model.safetensors")
    assert resolve_base("ZhipuAI/x") == "ZhipuAI/x", "which its client completes"
    monkeypatch.setattr(hubs, "find_spec", lambda _: None)
    assert load_tokenizer("ZhipuAI/x").vocab_size, "what is here serves where that is enough"


def test_modelscope_without_its_client(monkeypatch):
    monkeypatch.setattr(hubs, "find_spec", lambda _: None)
    with pytest.raises(UserError, match="pip install modelscope and run this again") as caught:
        load_tokenizer(resolve_base("ZhipuAI/ChatGLM-6B"))
    assert str(caught.value).endswith("--base zai-org/chatglm-6b")


# --- the hub ---


@pytest.mark.parametrize(
    "value, fix",
    [
        ("hf-mirror.com", "https://hf-mirror.com"),
        ("hf-mirror.com/", "https://hf-mirror.com/"),
        ("https:/hf-mirror.com", "https://hf-mirror.com"),
        ("//hf-mirror.com", "https://hf-mirror.com"),
        ("htps://hf-mirror.com", "https://hf-mirror.com"),
        ("", "https://huggingface.co"),
        ("localhost:8080", "https://localhost:8080"),
    ],
)
def test_an_endpoint_that_is_no_address(value, fix, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("glmtune.models.resolve.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_ENDPOINT", value)
    for ask in (check_endpoint, resolve_base, lambda: load_tokenizer("THUDM/chatglm-6b")):
        with pytest.raises(UserError, match=r"HF_ENDPOINT .* is no address") as caught:
            ask()
        advised = str(caught.value).rpartition("HF_ENDPOINT=")[2]
        assert advised == fix
    monkeypatch.setenv("HF_ENDPOINT", advised)
    check_endpoint()


@pytest.mark.parametrize(
    "name, family",
    [
        ("THUDM/chatglm3-6b", None),
        ("zai-org/chatglm2-6b-32k-int4", None),
        ("THUDM/glm-4-9b-chat-hf", None),
        ("zai-org/GLM-4-9B-0414", None),
        ("THUDM/glm-4v-9b", "a GLM that sees pictures"),
        ("zai-org/GLM-4.1V-9B-Thinking", "a GLM that sees pictures"),
        ("zai-org/GLM-4.5-Air", "GLM-4.5 or newer, a mixture of experts"),
        ("zai-org/GLM-5.1", "GLM-5, a mixture of experts"),
        ("Qwen/Qwen2-7B", "of another family"),
        ("THUDM/chatglm-6b-int4", None),
        ("silver/chatglm-6b-slim", None),
        ("me/my-llm", None),
    ],
)
def test_families_by_name(name, family):
    assert family_not_loaded(name) == family
    with pytest.raises(UserError) as caught:
        load_tokenizer(name)
    assert (f"is {family} by its name" in str(caught.value)) is (family is not None)
