"""The native model against the recorded numbers of the published code, in float32."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import glmtune.models  # noqa: F401


def load(folder, **kwargs):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **kwargs).eval()


def left_pad(prompts, pad):
    longest = max(map(len, prompts))
    return torch.tensor([[pad] * (longest - len(prompt)) + prompt for prompt in prompts])


@pytest.fixture(scope="module")
def model(tiny_folder):
    return load(tiny_folder)


@pytest.fixture(scope="module")
def golden(tiny_folder):
    return load_file(tiny_folder / "forward.safetensors")


@pytest.fixture(scope="module")
def continuations(tiny_folder, model):
    """Greedy continuations of the published code, and the prompts they begin with."""
    expected = json.loads((tiny_folder / "expected.json").read_text())["generate_greedy_24"]
    sop = model.config.bos_token_id
    return [(row[: row.index(sop) + 1], row) for row in expected]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_logits_and_loss(tiny_folder, golden, attention):
    model = load(tiny_folder, attn_implementation=attention)
    with torch.no_grad():
        output = model(golden["input_ids"], labels=golden["labels"])
    valid = golden["valid"]
    assert (output.logits - golden["logits"])[valid].abs().max() < 1e-4
    assert abs(output.loss.item() - golden["loss"].item()) < 1e-5
    assert output.loss.dtype == torch.float32


@pytest.mark.parametrize("cache", [None, "static"])
def test_greedy_continuations_alone_and_left_padded(model, continuations, cache):
    batch = left_pad([prompt for prompt, _ in continuations], model.config.pad_token_id)
    together = model.generate(
        batch, max_new_tokens=24, do_sample=False, cache_implementation=cache
    ).tolist()
    for (prompt, expected), row in zip(continuations, together, strict=True):
        alone = model.generate(
            torch.tensor([prompt]), max_new_tokens=24, do_sample=False, cache_implementation=cache
        )
        start = batch.shape[1] - len(prompt)
        assert alone[0].tolist() == expected
        assert row[start : start + len(expected)] == expected


def test_logits_of_the_first_revision(shared):
    folder = shared / "golden" / "chatglm-6b-v1.0-tiny"
    model = load(folder)
    assert model.config.revision == "v1.0"
    golden = load_file(folder / "forward.safetensors")
    expected = json.loads((folder / "expected.json").read_text())["generate_greedy_16"]
    for i, row in enumerate(expected):
        prompt = golden[f"input_ids_{i}"]
        with torch.no_grad():
            logits = model(prompt).logits[..., 20000:20256]
        assert (logits - golden[f"logits_20000_to_20256_{i}"]).abs().max() < 1e-4
        for use_cache in (True, False):
            out = model.generate(prompt, max_new_tokens=16, do_sample=False, use_cache=use_cache)
            assert out[0].tolist() == row
