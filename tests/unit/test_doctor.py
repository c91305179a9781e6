"""`glmtune doctor` on the machine; a check that crashes is reported as a problem."""

import json
import re
import tomllib

import pytest
import torch

from glmtune import cli
from glmtune.config.settings import DoctorSettings
from glmtune.doctor import environment, model, run
from glmtune.doctor.findings import OK, PROBLEM, WARNING, run_check

pytestmark = pytest.mark.usefixtures("offline")


def told(check, status):
    """A check's findings of one status, as one text."""
    return "\n".join(text for found, text in check if found == status)


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
    findings = list(run_check("card", lambda: environment.check_card(False, None, True)))
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


def test_a_check_that_fails_is_a_problem_of_that_check(monkeypatch, capsys):
    def fall_over(*_):
        raise ZeroDivisionError("deep\ndown")

    for name in ("check_python", "check_card", "check_hub_cache"):
        monkeypatch.setattr(environment, name, fall_over)
    for name in ("check_base", "check_tokenizer", "check_stop_ids"):
        monkeypatch.setattr(model, name, fall_over)
    assert cli.main(["doctor", "--base", "glm-tiny"]) == 1
    out = capsys.readouterr().out
    assert out.count("the check itself failed (ZeroDivisionError: deep)") == 6
    assert "problem  python" in out
