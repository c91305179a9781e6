"""Fixtures shared by all tests: golden folders in the project and, if present, ../shared."""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from torch import nn

# A test may take as long as a busy machine makes it.
hypothesis.settings.register_profile("patient", deadline=None)
hypothesis.settings.load_profile("patient")

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden"
SHARED = ROOT.parent / "shared"
NO_SHARED = "../shared is not here: the real tokenizer and records lie outside the project"
NO_BROWSER = "no Chromium is installed, in which pages are tested"


def pytest_sessionfinish(session):
    """On CI a test must not skip for want of ../shared or of a browser that is there."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    skipped = (
        [str(report.longrepr) for report in reporter.stats.get("skipped", [])] if reporter else []
    )
    present = {
        NO_SHARED: os.environ.get("CI") and SHARED.is_dir(),
        NO_BROWSER: os.environ.get("NEEDS_BROWSER"),  # .ci/run says so
    }
    for reason, is_there in present.items():
        if is_there and any(reason in told for told in skipped):
            reporter.write_line(f"\ntests were skipped without need: {reason}", red=True)
            session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return ROOT


@pytest.fixture(scope="session")
def shared() -> Path:
    """../shared: tokenizer models and alpaca records under their own licences."""
    if not (SHARED / "golden").is_dir():
        pytest.skip(NO_SHARED)
    return SHARED


@pytest.fixture(scope="session")
def browser_path() -> str:
    """A Chromium of this machine; none is downloaded."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        pytest.skip(NO_BROWSER)
    return found


@dataclass
class Call:
    """Arguments of a call and its result, which is None until the function returns."""

    name: str
    args: tuple
    settings: dict[str, Any]
    result: Any = None


@pytest.fixture
def spy(monkeypatch):
    """`spy(owner, name)` lists the calls of a function or method, which does what it did before.

    Several functions may share a list, which is in the order in which they were called.
    """

    def watch(owner, name: str, calls: list[Call] | None = None) -> list[Call]:
        original, calls = getattr(owner, name), [] if calls is None else calls

        def recorded(*args, **settings):
            call = Call(name, args, settings)
            calls.append(call)
            call.result = original(*args, **settings)
            return call.result

        monkeypatch.setattr(owner, name, recorded)
        return calls

    return watch


@pytest.fixture(scope="session")
def tiny_folder() -> Path:
    """A 4-layer ChatGLM-6B of revision v1.1 with random weights, in the published layout."""
    return GOLDEN / "chatglm-6b-tiny"


@pytest.fixture(scope="session")
def write_quantised():
    """A function that writes a float folder in the form of -int8, -int4 or, all of it, -int4-qe.

    tests/parity compares what it writes with the recorded folders, byte for byte.
    """
    from glmtune.models import ChatGLMForConditionalGeneration

    def quantise(weight, bits):
        scale = weight.abs().amax(-1) / (2 ** (bits - 1) - 1)
        values = (weight / scale[:, None]).round().char()
        if bits == 4:
            values = (values[:, 0::2] << 4) | (values[:, 1::2] & 15)
        return {"weight": values, "weight_scale": scale}

    def write(source: Path, target: Path, bits: int, embeddings: bool = False) -> Path:
        shutil.copytree(
            source, target, ignore=lambda *_: ["pytorch_model.bin", "model.safetensors"]
        )
        model = ChatGLMForConditionalGeneration.from_pretrained(source, dtype=torch.float16)
        embedding, head = "transformer.word_embeddings", "lm_head"
        names = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
        names.remove(head)
        tensors = model.state_dict()
        for name in [*names, embedding] if embeddings else names:
            packed = quantise(tensors[f"{name}.weight"], bits)
            tensors |= {f"{name}.{key}": tensor for key, tensor in packed.items()}
            if name == embedding:  # which the published code takes for the head as well
                tensors |= {f"{head}.{key}": tensor for key, tensor in packed.items()}
        torch.save(tensors, target / "pytorch_model.bin")
        settings = json.loads((target / "config.json").read_text())
        settings |= {"quantization_bit": bits, "quantization_embeddings": embeddings}
        (target / "config.json").write_text(json.dumps(settings))
        return target

    return write


@pytest.fixture(scope="session")
def strange_adapter(tmp_path_factory) -> str:
    """Folder of a random adapter of the embedded model that changes its answers."""
    from toys import randomise_adapter

    from glmtune.adapters import attach_lora, save_adapter
    from glmtune.models.loading import load_base_model
    from glmtune.models.resolve import GLM_TINY

    torch.manual_seed(1)  # not all seeds change its answers
    model = attach_lora(load_base_model(GLM_TINY, dtype=torch.float32))
    randomise_adapter(model, std=0.2)
    folder = tmp_path_factory.mktemp("strange") / "adapter"
    save_adapter(model, folder, "glm-tiny")
    return str(folder)


class HandTraining:
    """Weights that are trained as the loop does it, with losses and gradients of our choice.

    Nothing in a step waits for the device.

    Args:
        watch: makes a `Watch`.
        device: of the weights.
        at_once: as a Watch takes it; a fused AdamW whose watch is not read at once is what runs
            on a GPU.
        scaler: of float16's gradients.
    """

    def __init__(self, watch, device, at_once, scaler=None):
        self.weights = [nn.Parameter(torch.ones(n, device=device)) for n in (3, 2)]
        self.optimizer = torch.optim.AdamW(self.weights, lr=0.1, fused=not at_once)
        self.scaler = scaler
        self.watch = watch(self.weights, self.optimizer, scaler, device, at_once=at_once)
        self.num_steps = 0
        self.one = torch.ones((), device=device)

    def step(self, loss=1.0, grads=(1.0, 1.0)):
        largest = self.watch.begin(self.num_steps)
        scale = self.one if self.scaler is None else self.scaler.scale(self.one)
        for weight, grad in zip(self.weights, grads, strict=True):
            weight.grad = torch.ones_like(weight) * grad * scale
        self.watch.see_loss(self.one * loss, largest)
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        self.watch.see_gradient(nn.utils.get_total_norm([w.grad for w in self.weights]))
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.num_steps += 1

    def snapshot(self):
        """A copy of everything that a step changes."""
        moments = self.optimizer.state_dict()["state"].values()
        slots = [slot for of_weight in moments for slot in of_weight.values()]
        return [tensor.clone() for tensor in (*[w.detach() for w in self.weights], *slots)]


@pytest.fixture(scope="session")
def hand_training():
    """`HandTraining`, for tests of the watch on either device."""
    from glmtune.training.watch import Watch

    return lambda device, at_once, scaler=None: HandTraining(Watch, device, at_once, scaler)
