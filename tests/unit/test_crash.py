"""The bundle of a step that stopped a run, and `glmtune replay` on it."""

import json
import math
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from together import in_processes, output
from toys import (
    EXACT,
    PACKED,
    ToyTokenizer,
    adapter_weights,
    draw_rows,
    losses,
    save_rows,
    short_run,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from glmtune.config.settings import ReplaySettings
from glmtune.errors import UserError
from glmtune.models.chatglm.configuration import ChatGLMConfig
from glmtune.models.chatglm.rows import row_rule
from glmtune.training import loop, passes, prepare
from glmtune.training.faults.crash import read_bundle
from glmtune.training.faults.replay import replay

BROKEN = "transformer.layers.2.mlp.dense_h_to_4h"


@pytest.fixture(scope="module")
def numbered_rows(tmp_path_factory):
    """Twenty rows, row n with the answer n."""
    lengths = np.random.default_rng(0).integers(2, 12, 20)
    rows = draw_rows([(length, 2) for length in lengths], ToyTokenizer)
    for number, row in enumerate(rows, 1):
        row["input_ids"][-2] = number
    return save_rows(rows, tmp_path_factory.mktemp("data") / "rows")


@pytest.fixture
def crash_run(tiny_run, numbered_rows):
    """Make settings of a short run, on the tiny model unless another base is given."""

    def make(base=None, **settings):
        bases = {} if base is None else {"base": str(base)}
        return tiny_run(**{"dataset_path": numbered_rows} | bases | settings)

    return make


@pytest.fixture(scope="module")
def broken_base(tiny_folder, tmp_path_factory):
    """The tiny model with one weight that is infinite."""
    folder = shutil.copytree(tiny_folder, tmp_path_factory.mktemp("base") / "broken")
    tensors = torch.load(folder / "pytorch_model.bin", weights_only=True)
    tensors[f"{BROKEN}.weight"][0, 0] = math.inf
    torch.save(tensors, folder / "pytorch_model.bin")
    return folder


def fail_at(step, monkeypatch, factor=math.nan, rank=0):
    """Multiply the loss of a step's first pass in a process by a number."""
    run_pass, train_step, now = passes.PaddedPass.run, loop.train_step, {}

    def counted(run, state, *how):
        now["step"] = state.global_step + 1
        return train_step(run, state, *how)

    def run(self, *args, **kwargs):
        loss = run_pass(self, *args, **kwargs)
        is_here = self.accelerator.process_index == rank and now.pop("step", None) == step
        return loss * (factor if is_here else 1)

    monkeypatch.setattr(loop, "train_step", counted)
    monkeypatch.setattr(passes.PaddedPass, "run", run)


@pytest.mark.parametrize("layout", [{}, PACKED, EXACT], ids=["padded", "packed", "exact"])
def test_a_broken_base_is_found_and_found_again(crash_run, broken_base, tmp_path, layout, capsys):
    with pytest.raises(UserError) as error:
        loop.train(crash_run(broken_base, **layout))
    told = str(error.value)
    assert told.startswith("step 1: the loss is nan, first the output of " + BROKEN)
    assert "its weight is not finite" in told
    assert "the base model broken is damaged" in told
    assert "there is no checkpoint of this run to resume from" in told
    assert f"glmtune replay {tmp_path}/run/crash-1" in told
    assert replay(ReplaySettings(bundle=str(tmp_path / "run" / "crash-1"), use_cpu=True))
    assert "reproduced\n  device, number format and versions are those" in capsys.readouterr().out


def test_what_lies_between_two_modules_is_named_by_both(crash_run, monkeypatch):
    """The attention itself, here of the second layer, is no module of its own."""
    attend = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def overflows(module, *args, **kwargs):
        context, weights = attend(module, *args, **kwargs)
        return context * (math.inf if module.layer_idx == 1 else 1), weights

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", overflows)
    place = r"transformer\.layers\.1\.attention \(in what it computes before dense\)"
    with pytest.raises(UserError, match="the loss is nan, first the output of " + place):
        loop.train(crash_run())


def test_a_mended_base_does_not_reproduce_it(crash_run, broken_base, tiny_folder, tmp_path, capsys):
    with pytest.raises(UserError):
        loop.train(crash_run(broken_base))
    bundle = tmp_path / "run" / "crash-1"
    told = json.loads((bundle / "crash.json").read_text())
    told["surroundings"] |= {"device": "NVIDIA T4", "torch": "2.0"}
    (bundle / "crash.json").write_text(json.dumps(told))
    here = ReplaySettings(bundle=str(bundle), base=str(tiny_folder), use_cpu=True)
    assert not replay(here)
    out = capsys.readouterr().out
    assert "all is finite\nnot reproduced\n  device then NVIDIA T4, now CPU" in out
    assert f"torch then 2.0, now {torch.__version__}" in out


def test_a_bundle_holds_what_was_before_the_step(crash_run, tmp_path, monkeypatch):
    """The third step fails: adapter, moments and random state are those after the second."""
    loop.train(crash_run(max_steps=2, save_steps=2, lr_scheduler_type="constant"))
    good = tmp_path / "run" / "checkpoint-2"
    fail_at(3, monkeypatch)
    with pytest.raises(UserError, match=r"step 3: the loss is nan, which it is not when computed"):
        loop.train(crash_run(lr_scheduler_type="constant", resume_from_checkpoint="true"))
    crash = tmp_path / "run" / "crash-3"
    assert {path.name for path in crash.iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "crash.json", "optimizer.pt",
        "recipe.yaml", "step.safetensors",
    }  # fmt: skip
    before, kept = map(adapter_weights, (good, crash))
    assert all(torch.equal(kept[name], before[name]) for name in before)
    moments = [torch.load(f / "optimizer.pt", weights_only=True)["state"] for f in (good, crash)]
    for then, now in zip(*(states.values() for states in moments), strict=True):
        assert all(torch.equal(now[name], then[name]) for name in then)
    bundle = read_bundle(crash)
    state = torch.load(good / "rng_state_0.pth", weights_only=True)["cpu"]
    assert torch.equal(bundle.random_states[0].cpu, state)
    assert sorted(p.name for p in (tmp_path / "run").glob("checkpoint-*")) == ["checkpoint-2"]


def test_replay_computes_the_losses_of_the_run(crash_run, tmp_path, monkeypatch, capsys):
    """Dropout included: the bundle's third step has the loss that the run would have had."""
    wanted = losses(loop.train(crash_run()))
    fail_at(3, monkeypatch)
    with pytest.raises(UserError):
        loop.train(crash_run(overwrite_output_dir=True))
    monkeypatch.undo()
    bundle = tmp_path / "run" / "crash-3"
    assert replay(ReplaySettings(bundle=str(bundle), use_cpu=True))
    assert f"now   loss {wanted[2]:.6g}" in capsys.readouterr().out


def test_rows_are_named_by_their_place_in_the_source(
    crash_run, numbered_rows, tmp_path, tiny_folder, broken_base
):
    rows = shutil.copytree(numbered_rows, tmp_path / "rows")
    card = {
        "num_kept": 20, "num_read": 21, "num_tokens": 220, "num_target_tokens": 40,
        "lengths": {"min": 6, "median": 10, "p95": 15, "max": 15}, "special_ids": {},
        "source": "a.jsonl", "rows_out": {"empty": [2]}, "row_is_line": True,
    }  # fmt: skip
    (rows / "glmtune_data.json").write_text(json.dumps(card))
    settings = {"dataset_path": str(rows), "train_sampling_strategy": "sequential"}
    with pytest.raises(UserError):
        loop.train(crash_run(broken_base, **settings))
    told = json.loads((tmp_path / "run" / "crash-1" / "crash.json").read_text())["rows"]
    assert [place["row"] for place in told] == [1, 2, 3, 4, 5, 6]
    assert [place["pass"] for place in told] == [1, 1, 1, 2, 2, 2]
    assert told[0]["source"] == "a.jsonl:1 (row 1)"
    assert told[1]["source"] == "a.jsonl:3 (row 3)"
    bundle = read_bundle(tmp_path / "run" / "crash-1")
    step_rows = bundle.rows_by(row_rule(ChatGLMConfig.from_pretrained(tiny_folder)))
    answers = [step_rows[row][-2] for row in range(6)]
    assert answers == [1, 2, 3, 4, 5, 6]
    assert [p.row_ids.tolist() for p in bundle.passes] == [[0, 1, 2], [3, 4, 5]]


def test_a_fault_of_the_packed_pass_alone_is_told_as_such(crash_run, tmp_path, monkeypatch):
    run_pass = passes.PackedPass.run
    monkeypatch.setattr(passes.PackedPass, "run", lambda *args: run_pass(*args) * math.inf)
    with pytest.raises(UserError, match=r"it is not by the reference path: .*\(packed\)"):
        loop.train(crash_run(**PACKED))


def test_overwriting_a_run_takes_its_bundles(crash_run, tmp_path, broken_base):
    with pytest.raises(UserError):
        loop.train(crash_run(broken_base))
    loop.train(crash_run(max_steps=1, overwrite_output_dir=True))
    assert not (tmp_path / "run" / "crash-1").exists()


@pytest.mark.parametrize("name", ["crash.json", "step.safetensors"])
def test_a_damaged_bundle_is_refused(crash_run, tmp_path, broken_base, name):
    with pytest.raises(UserError, match=r"has no crash\.json"):
        read_bundle(tmp_path)
    with pytest.raises(UserError):
        loop.train(crash_run(broken_base))
    file = tmp_path / "run" / "crash-1" / name
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UserError, match="is damaged"):
        read_bundle(file.parent)


@pytest.mark.parametrize("file", ["step.safetensors", "optimizer.pt"])
def test_a_full_disk_leaves_no_half_bundle(crash_run, tmp_path, broken_base, monkeypatch, file):
    write_bytes = Path.write_bytes

    def full(path, content):
        if path.name == file:
            raise OSError(28, "No space left on device")
        return write_bytes(path, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(UserError, match="crash-1: cannot be written"):
        loop.train(crash_run(broken_base))
    assert [p.name for p in (tmp_path / "run").iterdir() if "crash" in p.name] == []


def test_two_processes_stop_at_the_same_step(numbered_rows, tiny_folder, tmp_path):
    """The fault is in the second one; both stop, and the first leaves the bundle."""
    given = tmp_path / "run", numbered_rows, str(tiny_folder)
    assert in_processes(2, stop_in_one_of_two, *given, folder=tmp_path) == [0, 0], output(tmp_path)
    said = [(tmp_path / f"run.{rank}").read_text() for rank in (0, 1)]
    assert all(text.startswith("step 2: the loss is nan") for text in said)
    bundle = read_bundle(tmp_path / "run" / "crash-2")
    assert [p.rank for p in bundle.passes] == [0, 1]
    assert len(bundle.random_states) == 2


def stop_in_one_of_two(folder, dataset_path, base):
    """What each of two launched processes does."""
    prepare.load_tokenizer = lambda base: ToyTokenizer()
    settings = {"gradient_accumulation_steps": 1, "max_steps": 6}
    with pytest.MonkeyPatch.context() as patch:
        fail_at(2, patch, rank=1)
        with pytest.raises(UserError) as error:
            loop.train(short_run(dataset_path, folder, base=base, **settings))
    Path(f"{folder}.{os.environ['RANK']}").write_text(str(error.value))
