"""An endpoint of `glmtune serve` itself, sound and in five broken states."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from serving import client_of, question, serving

from glmtune import cli
from glmtune.data.conversations import USER, Example, Turn
from glmtune.evaluation import endpoint_probes
from glmtune.serving.engine import Engine


@pytest.fixture
def check(taught, tmp_path, monkeypatch):
    """Run the command against a server; gives exit code and report."""
    few = endpoint_probes.STRANGE_QUESTIONS[:2]
    monkeypatch.setattr(endpoint_probes, "STRANGE_QUESTIONS", few)
    monkeypatch.setattr("glmtune.evaluation.endpoint.MOST_TOKENS", 640)

    def run(engine, model="mine", against=None):
        path = tmp_path / "report.json"
        line = ["check", "--url", f"{engine.url}/v1", "--model", model, "--base", "glm-tiny"]
        line += ["--against", str(against or taught / "adapter"), "--use_cpu", "true"]
        line += ["--data_path", str(taught / "rows.json"), "--json_path", str(path)]
        code = cli.main([*line, "--max_new_tokens", "16", "--limit", "8"])
        return code, json.loads(path.read_text())

    return run


@pytest.fixture(scope="module")
def engine(taught, strange_adapter):
    with serving(adapter=(f"mine={taught / 'adapter'}", f"other={strange_adapter}")) as engine:
        yield engine


def test_a_sound_one_and_the_official_client_agree(engine, check):
    code, report = check(engine)
    assert (code, report["verdict"], report["faults"]) == (0, "tuned", [])
    client = client_of(engine)
    for probe in report["probes"]:
        asked = {"messages": question(probe["content"]), "max_tokens": 16, "temperature": 0}
        found = client.chat.completions.create(model="mine", **asked)
        assert found.choices[0].message.content == probe["reply"]


@pytest.mark.parametrize("model, verdict", [("base", "base"), ("other", "neither")])
def test_the_base_or_another_adapter(engine, check, model, verdict):
    code, report = check(engine, model)
    assert (code, report["verdict"]) == (1, verdict)


def test_no_stop(engine, check, monkeypatch):
    monkeypatch.setattr(engine.loaded.decoder, "stop_ids", [])
    code, report = check(engine)
    assert (code, report["verdict"]) == (1, "tuned")
    assert any("answers that end by themselves run on" in fault for fault in report["faults"])


def test_another_template(engine, check, monkeypatch):
    def as_taught(self, side, example):
        return Example((Turn(USER, f"Human: {example.turns[0].text} Assistant:"),))

    monkeypatch.setattr(Engine, "_as_taught", as_taught)
    code, report = check(engine)
    assert code == 1
    assert any(fault.startswith("template drift: ") for fault in report["faults"])


def test_half_the_context(taught, check):
    given = f"mine={taught / 'adapter'}"
    with serving(adapter=(given,), max_prompt_tokens=320) as engine:
        code, report = check(engine)
    assert (code, report["verdict"]) == (1, "tuned")
    (fault,) = report["faults"]
    assert fault.startswith("context: a prompt of 3")
    assert "it is refused" in fault


@pytest.mark.slow
def test_an_adapter_that_was_taught_in_alpacas_template(taught, check, tmp_path):
    """The server puts questions into it by itself, and says so."""
    folder = tmp_path / "old"
    shutil.copytree(taught / "adapter", folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    torch.save(tensors, folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    with serving(adapter=(f"mine={folder}",)) as engine:
        code, report = check(engine, against=folder)
        assert (code, report["verdict"], report["faults"]) == (0, "tuned", [])
        assert not any("Instruction:" in probe["content"] for probe in report["probes"])
        code, report = check(engine, "base", against=folder)
    assert (code, report["verdict"]) == (1, "base")
    assert all("Instruction:" in probe["content"] for probe in report["probes"])
