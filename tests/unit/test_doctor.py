"""`glmtune doctor`: each check finds what it is there to find, and never falls over itself."""

import json
import re
import shutil
import socket
import threading
import tomllib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from glmtune import cli
from glmtune.config import DoctorSettings, TrainSettings
from glmtune.doctor import environment, model, recipe, run
from glmtune.doctor.findings import OK, PROBLEM, WARNING, carry_out
from glmtune.hardware import Card
from glmtune.models import hubs, loading
from glmtune.models.chatglm.configuration import ChatGLMConfig
from glmtune.models.resolve import GLM_TINY


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(model, "HF_HUB_OFFLINE", True)
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    monkeypatch.delenv("GLMTUNE_MODEL", raising=False)
    for module in ("resolve", "loading"):
        monkeypatch.setattr(f"glmtune.models.{module}.try_to_load_from_cache", lambda *_: None)
    monkeypatch.setattr("glmtune.models.resolve._hub_has", lambda _: False)


@pytest.fixture
def glm_tiny(tmp_path):
    return shutil.copytree(GLM_TINY, tmp_path / "base")


def told(check, status):
    """What a check tells of one status, as one text."""
    return "\n".join(text for found, text in check if found == status)


# --- the machine ---


def test_oldest_versions_are_those_of_the_project(root):
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert [f"{name}>={oldest}" for name, oldest in environment.OLDEST.items()] == project[
        "dependencies"
    ]
    assert project["requires-python"] == ">=" + ".".join(map(str, environment.OLDEST_PYTHON))


@pytest.mark.parametrize(
    "package, version, status, words",
    [
        (
            "sentencepiece",
            "0.2.1",
            PROBLEM,
            "rows get other ids.*pip install 'sentencepiece>=0.2.3",
        ),
        ("transformers", "4.33.0", PROBLEM, "4.33.0 is too old: pip install 'transformers>=5.17"),
        ("transformers", "4.45.2", PROBLEM, "stopped the published remote code.*ChatGLM3#1324"),
        ("transformers", "9.0", WARNING, "newer than what was tested"),
        ("torch", "2.4.0+cu121", PROBLEM, "too old"),
        ("torch", "2.13.1+cu130", OK, r"torch 2\.13\.1\+cu130"),
        ("bitsandbytes", "0.37.2", PROBLEM, "CUDA Setup failed"),
        ("bitsandbytes", "0.50.2", OK, "bitsandbytes 0.50.2"),
        ("tqdm", None, PROBLEM, "tqdm is not installed"),
    ],
)
def test_versions_of_packages(monkeypatch, package, version, status, words):
    real = environment.installed
    monkeypatch.setattr(
        environment, "installed", lambda name: version if name == package else real(name)
    )
    findings = list(environment.check_packages())
    assert re.search(words, told(findings, status))
    if status != OK:
        assert f"{package} " not in told(findings, OK)


def test_python_that_is_too_old(monkeypatch):
    monkeypatch.setattr(environment.sys, "version_info", (3, 9))
    assert "too old" in told(environment.check_python(), PROBLEM)


def test_a_library_that_does_not_load(monkeypatch):
    real = environment.importlib.import_module

    def load(name):
        if name == "peft":
            raise RuntimeError("undefined symbol: cget_managed_ptr\nmore")
        return real(name)

    monkeypatch.setattr(environment.importlib, "import_module", load)
    text = told(environment.check_imports(), PROBLEM)
    assert text.startswith("import peft: undefined symbol: cget_managed_ptr; pip install")
    findings = list(run.examine(DoctorSettings()))
    assert findings[-1].text == "left out until the libraries load"


def test_torch_and_numpy_of_other_generations(monkeypatch):
    class Odd:
        def numpy(self):
            raise RuntimeError("Numpy is not available")

    monkeypatch.setattr(torch, "zeros", lambda *_: Odd())
    assert "torch and numpy do not fit" in told(environment.check_imports(), PROBLEM)


def with_card(monkeypatch, *, name="NVIDIA X", capability=(8, 0), free=70, archs=("sm_80",)):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: list(archs))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: name)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (free * 2**30, 80 * 2**30))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: capability >= (8, 0))


def test_what_is_told_of_a_card(monkeypatch):
    with_card(monkeypatch, free=79)
    findings = list(environment.check_card(False, None, False))
    assert {status for status, _ in findings} == {OK}
    assert "NVIDIA X, 80 GiB" in told(findings, OK)
    assert "bfloat16" in told(findings, OK)


@pytest.mark.parametrize(
    "card, status, words",
    [
        ({"free": 20}, WARNING, "only 20 GiB are free"),
        ({"capability": (12, 0)}, PROBLEM, r"no kernels for NVIDIA X, sm_120 \(sm_80\)"),
        ({"capability": (7, 0), "archs": ("sm_70",)}, WARNING, "no bfloat16"),
    ],
)
def test_what_a_card_lacks(monkeypatch, card, status, words):
    with_card(monkeypatch, **card)
    assert re.search(words, told(environment.check_card(False, None, False), status))


@pytest.mark.parametrize(
    "kernel, card, serves",
    [
        *[("sm_80", 89, True), ("sm_90a", 90, True), ("sm_80", 90, False), ("sm_89", 80, False)],
        *[("compute_90", 120, True), ("compute_120", 90, False)],
    ],
)
def test_which_kernels_serve_a_card(kernel, card, serves):
    assert environment._serves(kernel, card) == serves


@pytest.mark.parametrize("cuda, words", [(None, "this build has no CUDA"), ("13.0", "the driver")])
def test_a_card_that_torch_does_not_see(monkeypatch, cuda, words):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(environment.shutil, "which", lambda _: "/usr/bin/nvidia-smi")
    text = told(environment.check_card(False, None, False), PROBLEM)
    assert "does not see the NVIDIA card" in text
    assert words in text
    assert told(environment.check_card(True, None, False), PROBLEM) == ""


def test_half_precision_on_a_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    findings = list(carry_out("card", lambda: environment.check_card(False, None, True)))
    assert findings[-1].status == PROBLEM
    assert "float16 needs a GPU" in findings[-1].text


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A hub cache with a whole copy of a model in it."""
    snapshot = tmp_path / "hub/models--a--b/snapshots/0123"
    blobs = tmp_path / "hub/models--a--b/blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    index = {"weight_map": {"w": "pytorch_model-00001-of-00001.bin"}}
    for name, content in (
        ("pytorch_model.bin.index.json", json.dumps(index)),
        ("pytorch_model-00001-of-00001.bin", "weights"),
    ):
        (blobs / name).write_text(content)
        (snapshot / name).symlink_to(f"../../blobs/{name}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    return snapshot


def test_a_whole_cache(cache):
    findings = list(environment.check_hub_cache(("a/b",)))
    assert [status for status, _ in findings] == [OK]
    assert "a/b lies whole" in findings[0][1]
    assert "no ChatGLM-6B" in told(environment.check_hub_cache(("c/d",)), OK)


@pytest.mark.parametrize(
    "spoil, words",
    [
        (lambda s: (s.parents[1] / "blobs/ab.incomplete").write_text(""), "is half downloaded"),
        (lambda s: (s / "pytorch_model-00001-of-00001.bin").resolve().unlink(), "leads nowhere"),
        (
            lambda s: (s / "pytorch_model-00001-of-00001.bin").unlink(),
            "a shard that the index names is missing",
        ),
        (
            lambda s: (s / "x.bin").write_text("version https://git-lfs.github.com/spec/v1\n"),
            "x.bin is a Git-LFS pointer",
        ),
    ],
)
def test_a_cache_that_is_not_whole(cache, spoil, words):
    spoil(cache)
    text = told(environment.check_hub_cache(("a/b",)), WARNING)
    assert words in text
    assert "hf download a/b" in text


def test_remote_code_of_other_tools(cache, tmp_path):
    code = tmp_path / "modules/transformers_modules/x/modeling_chatglm.py"
    code.parent.mkdir(parents=True)
    code.write_text("")
    assert "1 copies of ChatGLM's remote code" in told(environment.check_hub_cache(()), WARNING)


# --- the base ---


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
    """What is found of a base model: (status, text) of all lines, and the names of all checks."""
    loading.hub_config.cache_clear()
    findings = list(run.examine(DoctorSettings(chatglm_path=base, use_cpu=True, **settings)))
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
        ("THUDM/chatglm3-6b", CHATGLM | {"multi_query_attention": True}, "ChatGLM2-6B or ChatGLM3"),
        ("me/by-no-name", CHATGLM | {"padded_vocab_size": 65024}, "ChatGLM2-6B or ChatGLM3-6B"),
        ("me/another", {"model_type": "llama"}, "model_type 'llama', not 'chatglm'"),
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
    findings, _ = findings_on("THUDM/chatglm2-6b")
    assert findings == [(PROBLEM, findings[0][1])]
    assert "is ChatGLM2-6B by its name" in findings[0][1]
    findings, _ = findings_on("me/unheard-of")
    assert findings[0][0] == PROBLEM
    assert "no hub answers" in findings[0][1]


def test_modelscope_is_asked_for_its_models(monkeypatch, hub):
    asked = []
    answers = {"multi_query_attention": True, **CHATGLM}
    monkeypatch.setattr(hubs, "ask", lambda url: asked.append(url) or (200, answers))
    findings, _ = findings_on("ZhipuAI/chatglm3-6b")
    assert [status for status, _ in findings] == [PROBLEM]
    assert asked[-1] == (
        "https://modelscope.cn/api/v1/models/ZhipuAI/chatglm3-6b/repo?FilePath=config.json"
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
    (finding,) = carry_out("hub", environment.check_hub)
    assert finding.status == PROBLEM
    assert "export HF_ENDPOINT=https://hf-mirror.com" in finding.text


def test_stop_ids_that_differ(glm_tiny):
    path = glm_tiny / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": 2}))
    (finding,) = carry_out("stop ids", lambda: model.check_stop_ids(glm_tiny))
    assert finding.status == PROBLEM
    assert "generation_config.json: eos_token_id says 2" in finding.text


def test_a_vocabulary_and_weights_of_two_revisions(shared, tmp_path):
    folder = tmp_path / "base"
    shutil.copytree(shared / "golden" / "chatglm-6b-v1.0-tiny", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 150_528}))
    (folder / "ice_text.model").write_bytes((shared / "golden" / "ice_text.model").read_bytes())
    findings = list(carry_out("tokenizer", lambda: model.check_tokenizer(folder)))
    assert [finding.status for finding in findings] == [PROBLEM]
    assert "different revisions" in findings[0].text


def test_a_base_that_is_too_large(glm_tiny, monkeypatch):
    small = Card("CPU", 0.001, 0.001, None)
    monkeypatch.setattr(Card, "of", lambda device: small)
    text = told(model.check_memory(glm_tiny, DoctorSettings(use_cpu=True)), PROBLEM)
    assert "take 0.02 GiB in float32, CPU has 0.0" in text


# --- the recipe ---


def write_recipe(folder, **train):
    lines = "".join(f"  {name}: {value}\n" for name, value in train.items())
    path = folder / "r.yaml"
    path.write_text(f"train:\n  dataset_path: rows\n  output_dir: out\n{lines}")
    return str(path)


def findings_of(path):
    return {f"{f.check} {f.status}": f.text for f in run.examine(DoctorSettings(recipe_path=path))}


@pytest.fixture
def rows(tmp_path, monkeypatch):
    """Token rows of glm-tiny in a fresh folder, half of them cut."""
    monkeypatch.chdir(tmp_path)
    lines = [{"context": "Who is it?", "target": "word " * n} for n in (1, 1, 40, 40)]
    Path("x.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    line = "tokenize --jsonl_path x.jsonl --save_path rows --max_seq_length 16"
    assert cli.main([*line.split(), "--chatglm_path", "glm-tiny"]) == 0
    return tmp_path / "rows"


def test_a_recipe_that_would_start(rows, tmp_path, capsys):
    path = write_recipe(tmp_path, max_steps=3, save_total_limit=2)
    capsys.readouterr()
    assert cli.main(["doctor", path, "--json_path", "report.json"]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[-1].endswith(f"{path} would start")
    report = json.loads(Path("report.json").read_text())
    assert report["counts"]["problem"] == 0
    assert {finding["check"] for finding in report["findings"]} >= {
        "python", "packages", "imports", "recipe", "card", "hub", "hub cache", "base model",
        "tokenizer", "stop ids", "data", "run folder",
    }  # fmt: skip
    assert "2 of 4 rows were cut to max_seq_length" in out
    assert not Path("out").exists(), "a look leaves nothing behind"


@pytest.mark.parametrize(
    "settings, finding, words",
    [
        ({"lora_rnk": 8}, "recipe problem", "did you mean lora_rank"),
        ({"fp16": "true", "bf16": "true"}, "recipe problem", "fp16 and bf16 are both true"),
        ({"chatglm_path": "./no/such"}, "base model problem", "is no folder"),
        ({"resume_from_checkpoint": "true"}, "run folder problem", "is no folder"),
        ({"lora_rank": 100_000_000}, "run folder problem", "GB are needed"),
        ({"max_steps": -1}, "run folder warning", "set save_total_limit"),
        ({"per_device_train_batch_size": 4, "use_cpu": "true"}, "memory ok", "GiB of "),
        ({"lora_rank": 100_000_000, "use_cpu": "true"}, "memory warning", "take a larger card"),
    ],
)
def test_a_recipe_that_would_not(rows, tmp_path, settings, finding, words):
    assert words in findings_of(write_recipe(tmp_path, **settings))[finding]


def test_a_recipe_whose_rows_are_of_another_tokenizer(rows, tmp_path):
    card = json.loads((rows / "glmtune_data.json").read_text())
    (rows / "glmtune_data.json").write_text(json.dumps(card | {"tokenizer_sha256": "0" * 64}))
    assert "tokenised with another tokenizer" in findings_of(write_recipe(tmp_path))["data problem"]


def test_a_recipe_whose_rows_are_not_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "no such folder" in findings_of(write_recipe(tmp_path))["data problem"]


def test_files_of_the_published_recipes(root, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path = str(root / "recipes" / "chatglm-6b-alpaca-zh.yaml")
    assert cli.main(["doctor", path]) == 1
    out = capsys.readouterr().out
    assert "convert: data_path data/alpaca_data_zh.json is not there" in out
    assert "tokenize: jsonl_path data/alpaca_data_zh.jsonl is what convert will write" in out
    assert "data/alpaca_zh is what tokenize will write" in out
    assert out.splitlines()[-1].endswith("would not start")
    Path("data").mkdir()
    Path("data/alpaca_data_zh.json").write_text("version https://git-lfs.github.com/spec/v1\n")
    assert "is a Git-LFS pointer" in findings_of(path)["files problem"]
    Path("data/alpaca_data_zh.json").write_text("[]")
    assert cli.main(["doctor", path]) == 0


def test_doctor_without_a_recipe(tmp_path, capsys):
    assert cli.main(["doctor", str(tmp_path / "none.yaml")]) == 1
    assert "cannot read the recipe" in capsys.readouterr().out


def test_a_check_that_fails_is_a_problem_of_that_check(monkeypatch, capsys):
    def fall_over(*_):
        raise ZeroDivisionError("deep\ndown")

    for name in ("check_python", "check_card", "check_hub_cache"):
        monkeypatch.setattr(environment, name, fall_over)
    for name in ("check_base", "check_tokenizer", "check_stop_ids"):
        monkeypatch.setattr(model, name, fall_over)
    assert cli.main(["doctor", "--chatglm_path", "glm-tiny"]) == 1
    out = capsys.readouterr().out
    assert out.count("the check itself failed (ZeroDivisionError: deep)") == 6
    assert "problem  python" in out


def test_the_size_told_of_a_checkpoint_is_its_size(rows, tmp_path):
    config = {"max_steps": 1, "lora_target": "all", "disable_tqdm": "true", "use_cpu": "true"}
    path = write_recipe(tmp_path, **config, chatglm_path="glm-tiny")
    assert cli.main(["train", path]) == 0
    written = sum(file.stat().st_size for file in Path("out/checkpoint-1").iterdir())
    settings = TrainSettings(dataset_path="rows", output_dir="out", lora_target="all")
    guess = recipe.checkpoint_bytes(settings, ChatGLMConfig.from_pretrained(GLM_TINY))
    assert guess <= written < 1.05 * guess
