"""`glmtune doctor` on a base model: one on the disk, one on a hub, one that cannot be loaded."""

import json
import shutil
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest

from glmtune.config.settings import DoctorSettings
from glmtune.doctor import environment, model, run
from glmtune.doctor.findings import OK, PROBLEM, WARNING, run_check
from glmtune.hardware import Card
from glmtune.models import hubs, loading
from glmtune.models.families import FAMILIES
from glmtune.models.resolve import GLM_TINY

pytestmark = pytest.mark.usefixtures("offline")


@pytest.fixture
def glm_tiny(tmp_path):
    return shutil.copytree(GLM_TINY, tmp_path / "base")


def told(check, status):
    """A check's findings of one status, as one text."""
    return "\n".join(text for found, text in check if found == status)


def test_a_base_of_one_piece(glm_tiny):
    for check in (model.check_base(glm_tiny), model.check_tokenizer(glm_tiny),
                  model.check_stop_ids(glm_tiny)):  # fmt: skip
        assert {status for status, _ in check} == {OK}


def test_a_base_that_is_not_here_yet(monkeypatch):
    base = model.find_base("zai-org/chatglm-6b")
    assert base == "zai-org/chatglm-6b"
    assert "would be downloaded first (13.4 GB)" in told(model.check_base(base), WARNING)
    assert list(model.check_tokenizer(base)) == list(model.check_stop_ids(base)) == []


def findings_on(base, **settings):
    """The findings on a base model: (status, text) of all lines, and the names of all checks."""
    loading.hub_config.cache_clear()
    findings = list(run.examine(DoctorSettings(base=base, use_cpu=True, **settings)))
    of_base = [(f.status, f.text) for f in findings if f.check == "base model"]
    return of_base, {finding.check for finding in findings}


CHATGLM = {"model_type": "chatglm", "vocab_size": 130528, "bos_token_id": 130004}


@pytest.fixture
def hub(monkeypatch):
    """A hub on this machine: what it answers by path, and the paths that it was asked for."""
    answers, asked = {}, []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            status, content = answers.get(self.path, (404, "Entry not found"))
            self.send_response(status)
            self.end_headers()
            self.wfile.write(
                (content if isinstance(content, str) else json.dumps(content)).encode()
            )

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
    monkeypatch.setattr(model, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_ENDPOINT", address)
    yield SimpleNamespace(answers=answers, asked=asked, address=address)
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    "name, config, words",
    [
        ("me/pictures", {"model_type": "glm4v"}, "is GLM-4.1V, which sees pictures"),
        ("me/experts", {"model_type": "glm4_moe"}, "GLM-4.5, 4.6 or 4.7, a mixture of experts"),
        ("me/another", {"model_type": "llama"}, "is of model_type 'llama', no model that is known"),
        ("me/prefix", CHATGLM | {"pre_seq_len": 128}, "is a P-Tuning v2 checkpoint"),
        ("me/gptq", CHATGLM | {"quantization_config": {"quant_method": "gptq"}}, "gptq"),
        ("me/none", None, "gives no config.json (status 404); check the name"),
    ],
)
def test_what_cannot_be_loaded_is_told_before_it_is_fetched(hub, name, config, words, tmp_path):
    if config is not None:
        hub.answers[f"/{name}/resolve/main/config.json"] = (200, config)
    findings, checks = findings_on(name)
    assert [status for status, _ in findings] == [PROBLEM]
    assert findings[0][1].startswith(name)
    assert words in findings[0][1]
    assert "memory" not in checks
    assert {path for path in hub.asked if "config" in path} == {f"/{name}/resolve/main/config.json"}


@pytest.mark.parametrize(
    "name, size", [("THUDM/chatglm3-6b", "12.5 GB"), ("zai-org/GLM-4-9B-0414", "18.8 GB")]
)
def test_published_models_have_a_known_size(hub, name, size):
    settings = next(dict(f.published_settings) for f in FAMILIES if name in f.published)
    hub.answers[f"/{name}/resolve/main/config.json"] = (200, settings)
    findings, _ = findings_on(name)
    assert [status for status, _ in findings] == [WARNING]
    assert f"{name} would be downloaded first ({size})" in findings[0][1]
    assert model.config_of(name).num_hidden_layers in (28, 40)


def test_a_hub_s_model_that_can_be_loaded(hub):
    hub.answers["/me/chatglm-of-two/resolve/main/config.json"] = (200, CHATGLM | {"num_layers": 2})
    findings, checks = findings_on("me/chatglm-of-two")
    assert [status for status, _ in findings] == [WARNING]
    assert "would be downloaded first: hf download me/chatglm-of-two" in findings[0][1]
    assert {"memory", "tokenizer", "stop ids"} <= checks
    assert model.config_of("me/chatglm-of-two").num_layers == 2


def test_a_download_that_was_not_finished_is_finished_by_the_run(tmp_path, monkeypatch):
    snapshot = shutil.copytree(GLM_TINY, tmp_path / "snapshot")
    monkeypatch.setattr(model, "try_to_load_from_cache", lambda *_: str(snapshot / "config.json"))
    assert model.find_base("me/mine") == snapshot
    (snapshot / "model.safetensors").unlink()
    assert model.find_base("me/mine") == "me/mine"


def test_a_name_is_all_there_is_where_no_hub_answers(hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    findings, _ = findings_on("zai-org/GLM-4.5-Air")
    assert findings == [(PROBLEM, findings[0][1])]
    assert "is GLM-4.5 or newer, a mixture of experts by its name" in findings[0][1]
    findings, _ = findings_on("me/unheard-of")
    assert findings[0][0] == PROBLEM
    assert "no hub answers" in findings[0][1]


def test_modelscope_is_asked_for_its_models(monkeypatch, hub, spy):
    answer = 200, {"model_type": "glm4v"}
    monkeypatch.setattr(hubs, "ask", lambda url: answer)
    calls = spy(hubs, "ask")
    findings, _ = findings_on("ZhipuAI/chatglm3-6b-like")
    assert [status for status, _ in findings] == [PROBLEM]
    assert calls[-1].args == (
        "https://modelscope.cn/api/v1/models/ZhipuAI/chatglm3-6b-like/repo?FilePath=config.json",
    )


def test_where_no_base_is_named_doctor_speaks_of_chatglm(monkeypatch):
    findings, checks = findings_on(None)
    assert {status for status, _ in findings} == {WARNING}
    assert "none is named or found, so this is of zai-org/chatglm-6b" in findings[0][1]
    assert {"tokenizer", "stop ids", "memory"} <= checks
    monkeypatch.setenv("GLMTUNE_MODEL", "glm-tiny")
    assert findings_on(None)[0][0][0] == OK


def test_a_hub_that_answers(hub):
    assert f"HF_ENDPOINT is {hub.address}" in told(environment.check_hub(), OK)
    hub.answers["/"] = (503, "busy")  # which is an answer
    assert told(environment.check_hub(), WARNING) == ""


@pytest.mark.parametrize("trouble", ["refuses", "is silent"])
def test_a_hub_that_does_not_answer(hub, trouble, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1] if trouble == "is silent" else 9
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{port}")
        monkeypatch.setattr(hubs.ask, "__defaults__", (0.5,))
        text = told(environment.check_hub(), WARNING)
    assert f"http://127.0.0.1:{port} does not answer" in text
    assert "HF_ENDPOINT=https://" in text


def test_an_endpoint_that_is_no_address(hub, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "hf-mirror.com")
    (finding,) = run_check("hub", environment.check_hub)
    assert finding.status == PROBLEM
    assert "export HF_ENDPOINT=https://hf-mirror.com" in finding.text


def test_stop_ids_that_differ(glm_tiny):
    path = glm_tiny / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": 2}))
    (finding,) = run_check("stop ids", lambda: model.check_stop_ids(glm_tiny))
    assert finding.status == PROBLEM
    assert "generation_config.json: eos_token_id says 2" in finding.text


def test_a_vocabulary_and_weights_of_two_revisions(shared, tmp_path):
    folder = tmp_path / "base"
    shutil.copytree(shared / "golden" / "chatglm-6b-v1.0-tiny", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 150_528}))
    (folder / "ice_text.model").write_bytes((shared / "golden" / "ice_text.model").read_bytes())
    findings = list(run_check("tokenizer", lambda: model.check_tokenizer(folder)))
    assert [finding.status for finding in findings] == [PROBLEM]
    assert "different revisions" in findings[0].text


def test_a_base_that_is_too_large(glm_tiny, monkeypatch):
    small = Card("CPU", 0.001, 0.001, None)
    monkeypatch.setattr(Card, "of", lambda device: small)
    text = told(model.check_memory(glm_tiny, DoctorSettings(use_cpu=True)), PROBLEM)
    assert "take 0.02 GiB in float32, CPU has 0.0" in text
