"""What goes to a hub: by the hub's own client, to a hub on this machine."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
import yaml
from fake_hub import FakeHub
from safetensors.torch import load

import glmtune
from glmtune import cli
from glmtune.adapters import read_adapter
from glmtune.models.families import FAMILIES, naming_rule_of
from glmtune.models.loading import load_base_model

TOKEN = "hf_" + "S3cretS3cretS3cretS3cret"


@pytest.fixture
def hub(monkeypatch):
    """A hub that the client of this process uploads to."""
    hub = FakeHub()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub._commit_api.is_xet_available", lambda: False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    yield hub
    hub.close()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run folder with all that a run, a comparison and its user leave there."""
    folder = tmp_path_factory.mktemp("secret-place")
    records = [
        {"instruction": f"Who has the number {i}?", "output": f"Number {i} is Mira."}
        for i in range(40)
    ]
    rows = folder / "my_private_rows.json"
    rows.write_text(json.dumps(records))
    run = folder / "my-run"
    for line in (
        f"convert --data_path {rows} --save_path {folder}/rows.jsonl",
        f"tokenize --jsonl_path {folder}/rows.jsonl --save_path {folder}/tokens",
        f"train --dataset_path {folder}/tokens --output_dir {run} --max_steps 12 --save_steps 6 "
        "--eval_ratio 0.4 --general_set false --report_to none --learning_rate 3e-3 "
        "--layout padded --use_cpu true",
        f"compare --adapter {run} --general_set false --max_new_tokens 2 --use_cpu true",
    ):
        base = [] if line.startswith("convert") else ["--base", "glm-tiny"]
        assert cli.main([*line.split(), *base]) == 0, line
    (run / "note.txt").write_text(TOKEN)
    return run


def push(*words):
    return cli.main(["push", *map(str, words)])


def uploaded(hub, repo_id="me/toy"):
    return {name: data for name, (data, _) in hub.files(repo_id).items()}


def test_a_dry_run_shows_all_and_sends_nothing(trained, hub, capsys):
    assert push(trained, "--repo_id", "me/toy") == 0
    out = capsys.readouterr().out
    assert (hub.repos, hub.sent, hub.tokens) == ({}, [], set())
    assert "me/toy on huggingface, private: " in out
    size = len((trained / "adapter_model.safetensors").read_bytes())
    assert f"adapter_model.safetensors  {size:>14,} bytes" in out
    assert "not uploaded: " in out
    for name in ("checkpoint-6", "checkpoint-12", "compare", "metrics.jsonl", "note.txt"):
        assert name in out.partition("not uploaded: ")[2]
    assert "nothing was uploaded; --yes true uploads these 3 files" in out
    assert "## Scores" in out


def test_what_is_uploaded_is_the_adapter_and_a_card_and_nothing_private(trained, hub, capsys):
    assert push(trained, "--repo_id", "me/toy", "--yes", "true") == 0
    assert hub.repos["me/toy"]["private"] is True
    assert hub.tokens == {f"Bearer {TOKEN}"}
    files = uploaded(hub)
    assert set(files) == {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    everything = b"\0".join(files.values())
    for private in (str(trained), str(trained.parent), TOKEN, "secret-place", str(Path.home())):
        assert private == "/root" or private.encode() not in everything
    for content in (b"optimizer", b"exp_avg", b"Who has the number 3", b"Number 3 is Mira"):
        assert content not in everything
    wanted = read_adapter(trained).weights
    found = load(files["adapter_model.safetensors"])
    assert all(torch.equal(found[key], tensor) for key, tensor in wanted.items())


def test_the_card_says_base_data_recipe_scores_cost_and_licence(trained, hub):
    assert push(trained, "--repo_id", "me/toy", "--yes", "true") == 0
    card = uploaded(hub)["README.md"].decode()
    _, front, text = card.split("---\n", 2)
    settings = yaml.safe_load(front)
    assert settings["library_name"] == "peft"
    assert settings["license"] == "other"
    assert "- Base: glm-tiny (ChatGLM-6B)" in text
    compared = json.loads((trained / "compare" / "compare.json").read_text())
    one = compared["languages"]["all"]["metrics"]["chrf"]
    cells = f"{one['base']:.3f} | {one['tuned']:.3f} | {one['difference']:+.3f}"
    assert cells in text
    assert f"({one['low']:+.3f} to {one['high']:+.3f})" in text
    recipe = yaml.safe_load(text.partition("```yaml\n")[2].partition("```")[0])
    assert recipe["max_steps"] == 12
    assert recipe["dataset_path"] == "tokens"  # of a path the last name alone
    assert "40 rows" in text
    assert "12 steps" in text
    assert "## Licence" in text


def test_an_upload_goes_on_where_it_was(trained, hub, capsys):
    hub.refuses = "README.md"
    assert push(trained, "--repo_id", "me/toy", "--yes", "true") == 2
    err = capsys.readouterr().err
    assert "me/toy: the hub did not take it" in err
    assert set(uploaded(hub)) == {"adapter_config.json", "adapter_model.safetensors"}
    hub.refuses, hub.sent = None, []
    assert push(trained, "--repo_id", "me/toy", "--yes", "true") == 0
    assert hub.sent == ["README.md"]
    out = capsys.readouterr().out
    assert "adapter_model.safetensors: is there already" in out
    hub.sent = []
    assert push(trained, "--repo_id", "me/toy", "--yes", "true") == 0
    assert hub.sent == []


def test_private_by_default_and_public_by_wish(trained, hub, capsys):
    public = ("--repo_id", "me/open", "--yes", "true", "--private", "false")
    assert push(trained, *public) == 0
    assert hub.repos["me/open"]["private"] is False
    assert push(trained, *public[:4]) == 2
    assert "is there already and public" in capsys.readouterr().err


def test_an_adapter_of_2023_is_uploaded_in_todays_format(tiny_folder, hub, tmp_path):
    folder = shutil.copytree(tiny_folder / "adapter_peft_0_2_merged", tmp_path / "old")
    config = json.loads((folder / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "/home/somebody/models/chatglm-6b"
    (folder / "adapter_config.json").write_text(json.dumps(config))
    line = (folder, "--repo_id", "me/toy", "--yes", "true", "--base", tiny_folder)
    assert push(*line) == 0
    there = tmp_path / "there"
    there.mkdir()
    for name, data in uploaded(hub).items():
        (there / name).write_bytes(data)
        assert b"/home/somebody" not in data
    base = load_base_model(str(tiny_folder), dtype=torch.float32)
    assert peft.PeftModel.from_pretrained(base, str(there))


def model_folder(folder, **files):
    """A merged folder of a tiny Glm, as far as a push looks at it."""
    folder.mkdir()
    config = {"model_type": "glm", "vocab_size": 59264, "partial_rotary_factor": 1.0}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(b"\2\0\0\0\0\0\0\0{}")
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)
    return folder


def test_a_model_folder_is_uploaded_without_what_is_no_model(hub, tmp_path):
    folder = model_folder(
        tmp_path / "merged",
        LICENSE="GLM-Edge",
        optimizer__pt="moments",
        train__jsonl="rows",
        tokenizer__json=json.dumps({"vocab": {"/home/x": 1}}),
    )
    line = (folder, "--repo_id", "me/glm-edge-mine", "--base", "zai-org/glm-edge-1.5b-chat")
    assert push(*line, "--yes", "true") == 0
    files = uploaded(hub, "me/glm-edge-mine")
    assert set(files) == {
        "config.json", "model.safetensors", "LICENSE", "tokenizer.json", "README.md",
    }  # fmt: skip
    card = files["README.md"].decode()
    assert "Built with GLM-Edge" in card
    assert "base_model: zai-org/glm-edge-1.5b-chat" in card


@pytest.mark.parametrize(
    "name, text, told",
    [
        ("generation_config.json", '{"from": "/home/me/models/x"}', "an absolute path (/home/me"),
        ("generation_config.json", '{"from": "C:\\\\models\\\\x"}', "an absolute path (C:"),
        ("Modelfile", f"# {TOKEN}", "a token of yours"),
        ("Modelfile", "# ghp_0123456789012345678901234567890123456", "looks like a token (ghp_01"),
    ],
)
def test_a_path_or_a_token_in_a_file_is_refused(hub, tmp_path, capsys, name, text, told):
    folder = model_folder(tmp_path / "merged")
    (folder / name).write_text(text)
    line = (folder, "--repo_id", "me/glm-edge-mine", "--base", "zai-org/glm-edge-1.5b-chat")
    assert push(*line, "--yes", "true") == 2
    err = capsys.readouterr().err
    assert told in err
    assert TOKEN not in err
    assert hub.repos == {}


@pytest.mark.parametrize(
    "base, name, begins",
    [
        ("zai-org/glm-edge-1.5b-chat", "my-bot", "GLM-Edge"),
        ("THUDM/glm-4-9b-chat", "my-bot", "glm-4"),
        ("zai-org/glm-4-9b-chat-hf", "chatbot-glm-4", "glm-4"),
    ],
)
def test_the_licences_naming_rule(hub, tmp_path, capsys, base, name, begins, todays_adapter):
    line = (todays_adapter, "--repo_id", f"me/{name}", "--base", base)
    assert push(*line) == 2
    err = capsys.readouterr().err
    assert f"asks that the names of models made of it begin with {begins}" in err
    assert f"name it me/{begins}-{name}" in err
    line = (todays_adapter, "--repo_id", f"me/{begins.upper()}-{name}", "--base", base)
    assert push(*line) == 0
    assert f"Built with {begins}." in capsys.readouterr().out


@pytest.mark.parametrize(
    "base, begins",
    [
        ("zai-org/GLM-4-9B-0414", None),
        ("zai-org/chatglm3-6b", None),
        ("ZhipuAI/glm-4-9b-chat", "glm-4"),
        ("zai-org/codegeex4-all-9b", "glm-4"),
        ("THUDM/glm-edge-4b-chat", "GLM-Edge"),
    ],
)
def test_which_bases_have_the_rule(base, begins):
    rule = naming_rule_of(base, None)
    assert (rule and rule.begins) == begins


def test_published_bases_have_the_rule_of_their_family():
    for family in FAMILIES:
        for name in family.published:
            assert naming_rule_of(name, None) == family.naming_rule


def test_mistakes_are_one_line(hub, tmp_path, capsys, monkeypatch, todays_adapter):
    def says(*words):
        assert push(*words) == 2
        return capsys.readouterr().err.strip().splitlines()[-1]

    assert "is no owner/name" in says(todays_adapter, "--repo_id", "mine")
    assert "no such folder" in says(tmp_path / "no", "--repo_id", "me/mine")
    assert "pip install modelscope" in says(
        todays_adapter, "--repo_id", "me/mine", "--to", "modelscope"
    )
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    line = (todays_adapter, "--repo_id", "me/mine", "--yes", "true")
    assert "HF_HUB_OFFLINE is set" in says(*line)


@pytest.mark.slow
def test_the_command_uploads_to_hf_endpoint(hub, todays_adapter):
    """In a process of its own, which the client reads its settings in."""
    environment = os.environ | {
        "HF_ENDPOINT": hub.url,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "PYTHONPATH": str(Path(glmtune.__file__).parent.parent),
    }
    line = [sys.executable, "-m", "glmtune", "push", str(todays_adapter), "--repo_id", "me/toy"]
    done = subprocess.run(
        [*line, "--yes", "true"], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert f"uploaded: {hub.url}/me/toy" in done.stdout
    assert set(uploaded(hub)) == {"adapter_config.json", "adapter_model.safetensors", "README.md"}
