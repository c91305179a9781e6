"""A base that processes share: the run is that of processes that hold all of it."""

import gc
import json
import os
import re
import time
import weakref
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from glm_folders import SIZES
from together import in_processes, output
from toys import (
    PACKED,
    ToyTokenizer,
    keep_only,
    losses,
    randomise_adapter,
    records,
    saved,
    short_run,
)

from glmtune.adapters import attach_lora
from glmtune.bench.rows import random_rows
from glmtune.cli import main
from glmtune.errors import UserError
from glmtune.models.families import FAMILIES
from glmtune.models.family import layers_of
from glmtune.models.packed import PackedModel
from glmtune.models.resolve import GLM_TINY
from glmtune.models.sharded import begin_gathering, is_sharded, shard_base
from glmtune.training import loop, passes, peers, prepare
from glmtune.training.launch_options import asks_for_shares
from glmtune.training.processes import deal

SETTINGS = {
    "max_steps": -1,
    "num_train_epochs": 2,
    "eval_ratio": 0.17,  # 19 rows to train on: the last step of an epoch has one for the two
    "eval_steps": 3,
    "save_steps": 4,
    "per_device_train_batch_size": 3,
    "gradient_accumulation_steps": 1,
    "general_set": False,
}
OF_ONE = SETTINGS | {"gradient_accumulation_steps": 2}
RUNS = {
    "packs": PACKED,
    "padded": {"layout": "padded"},
    "exact, recomputed": {"layout": "exact", "gradient_checkpointing": True},
    "packs in 4 bits": PACKED | {"quantization_bit": "4"},
    "padded in 4 bits": {"layout": "padded", "quantization_bit": "4"},
}


@pytest.fixture(scope="module")
def folder(tiny_rows, toy_rows, tiny_folder, tmp_path_factory):
    """The folder of two processes that ran `run_in_two_processes`, with their output."""
    folder = tmp_path_factory.mktemp("shares")
    given = folder, tiny_rows, toy_rows, str(tiny_folder)
    codes = in_processes(2, run_in_two_processes, *given, folder=folder)
    assert codes == [0, 0], output(folder) + output(folder, 1)
    return folder


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_train_as_one_that_holds_all(folder, tiny_run, name):
    single = loop.train(tiny_run(**OF_ONE | RUNS[name]))
    assert len(losses(single)) > 4
    for key in ("loss", "eval_loss"):
        assert losses(folder / name, key) == pytest.approx(losses(single, key), abs=1e-6)
    wanted = losses(single, "grad_norm")
    assert losses(folder / name, "grad_norm") == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("name", ["packs", "padded", "packs in 4 bits"])
def test_each_process_holds_half_of_the_base(folder, name, rank):
    """Between steps too: what was gathered has been freed."""
    held = json.loads((folder / f"{name} {rank}.json").read_text())
    assert held["own"] <= 0.52 * held["all"]
    assert not held["no floats"]  # which FSDP2 of torch 2.11 cannot share out


def test_the_general_set_is_scored_as_by_processes_that_hold_all(folder):
    scores, wanted = (
        [r["general_log_prob"] for r in records(folder / name, "general_log_prob")]
        for name in ("general", "general, whole")
    )
    assert len(scores) == 3
    assert scores == pytest.approx(wanted, abs=1e-6)


def test_its_checkpoint_is_resumed_by_one_process_that_holds_all(folder, tiny_run, capsys):
    keep_only(folder / "packs", 4, folder / "goes on")
    how = {"output_dir": folder / "goes on", "resume_from_checkpoint": "auto"}
    single = loop.train(tiny_run(**OF_ONE | PACKED | {"shard_base": True} | how))
    assert losses(single) == pytest.approx(losses(folder / "packs"), abs=1e-6)
    assert "shard_base has no effect: there is one process" in capsys.readouterr().err


def test_fsdp_of_accelerates_launcher_is_this(folder):
    assert losses(folder / "launched") == losses(folder / "packs")
    held = json.loads((folder / "launched 0.json").read_text())
    assert held["own"] <= 0.52 * held["all"]


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("FSDP_VERSION", "1", "set fsdp_version 2"),
        ("FSDP_OFFLOAD_PARAMS", "true", "fsdp_offload_params"),
        ("FSDP_ACTIVATION_CHECKPOINTING", "true", "--gradient_checkpointing true"),
        ("FSDP_RESHARD_AFTER_FORWARD", "false", "fsdp_reshard_after_forward"),
    ],
)
def test_what_accelerates_fsdp_does_otherwise_is_refused(monkeypatch, name, value, told):
    assert not asks_for_shares()
    given = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    for key, word in given.items():
        monkeypatch.setenv(key, word)
    assert asks_for_shares()
    for key, word in (given | {name: value}).items():
        monkeypatch.setenv(key, word)
    with pytest.raises(UserError, match=told):
        asks_for_shares()


def test_what_is_none_of_torchs_is_refused(monkeypatch, capsys):
    monkeypatch.setenv("ACCELERATE_USE_MEGATRON_LM", "true")
    assert main(["train", "--dataset_path", str(GLM_TINY), "--output_dir", "out"]) == 2
    assert "error: accelerate launch: Megatron-LM is not offered" in capsys.readouterr().err


def launched_by_deepspeed(monkeypatch, options):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    for name, value in options.items():
        monkeypatch.setenv(f"ACCELERATE_{name}", value)


@pytest.mark.parametrize(
    ("options", "shares", "told"),
    [
        ({}, False, "ZeRO-2 by torch, not by DeepSpeed: each process holds the whole base"),
        ({"DEEPSPEED_ZERO_STAGE": "3"}, True, "ZeRO-3 by torch, not by DeepSpeed: the processes"),
        (
            {"DEEPSPEED_ZERO_STAGE": "3", "GRADIENT_CLIPPING": "0.5"},
            True,
            "without effect: gradient_clipping (--max_grad_norm sets it)\n",
        ),
        (
            {"GRADIENT_ACCUMULATION_STEPS": "4", "GRADIENT_CLIPPING": "none"},
            False,
            "without effect: gradient_accumulation_steps (--gradient_accumulation_steps sets it)\n",
        ),
    ],
)
def test_zero_of_accelerates_launcher_is_this(monkeypatch, capsys, options, shares, told):
    launched_by_deepspeed(monkeypatch, options)
    assert asks_for_shares() == shares
    assert told in capsys.readouterr().err
    assert os.environ["ACCELERATE_USE_DEEPSPEED"] == "false"


def test_a_configuration_of_deepspeed_is_read(monkeypatch, tmp_path, capsys):
    path = tmp_path / "zero.json"
    path.write_text(
        json.dumps(
            {
                "zero_optimization": {
                    "stage": 3,
                    "offload_param": {"device": "none"},
                    "overlap_comm": True,
                    "reduce_bucket_size": "auto",
                },
                "bf16": {"enabled": True},
                "fp16": {"enabled": "auto"},
                "train_batch_size": "auto",
                "optimizer": {"type": "AdamW"},
                "wall_clock_breakdown": False,
            }
        )
    )
    launched_by_deepspeed(monkeypatch, {"DEEPSPEED_CONFIG_FILE": str(path)})
    assert asks_for_shares()
    wanted = "bf16 (--bf16 sets it), optimizer, zero_optimization.overlap_comm"
    assert capsys.readouterr().err.endswith(f"without effect: {wanted}\n")


@pytest.mark.parametrize(
    ("options", "content", "told"),
    [
        ({"DEEPSPEED_OFFLOAD_PARAM_DEVICE": "cpu"}, None, "offload_param to cpu is not offered"),
        ({"DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "nvme"}, None, "offload_optimizer to nvme"),
        ({}, {"zero_optimization": {"offload_param": {"device": "cpu"}}}, "offload_param to cpu"),
        ({}, {"zero_optimization": {"offload_optimizer": "cpu"}}, "offload_optimizer to cpu"),
        ({}, {"zero_optimization": {"cpu_offload": True}}, "DeepSpeed's cpu_offload to cpu"),
        ({}, {"zero_optimization": {"stage": True}}, "ZeRO's stage True: give 0, 1, 2 or 3"),
        ({}, {"zero_optimization": {"stage": "auto"}}, "ZeRO's stage 'auto': give 0, 1, 2 or 3"),
        ({}, [], "is no configuration of DeepSpeed"),
        ({}, {"zero_optimization": 3}, "is no configuration of DeepSpeed"),
        ({}, "{", "cannot be read (it is no JSON)"),
        ({"DEEPSPEED_CONFIG_FILE": "none/such.json"}, None, "cannot be read (No such file"),
    ],
)
def test_what_deepspeed_does_otherwise_is_refused(monkeypatch, tmp_path, options, content, told):
    if content is not None:
        path = tmp_path / "zero.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        options = {"DEEPSPEED_CONFIG_FILE": str(path)}
    launched_by_deepspeed(monkeypatch, options)
    with pytest.raises(UserError, match=re.escape(told)):
        asks_for_shares()


def test_a_step_that_is_not_finite_is_looked_into_by_both(folder):
    told = (folder / "spoilt 0").read_text()
    assert "the loss is nan" in told
    assert (folder / "spoilt 1").read_text() == told
    assert output(folder).count("looking for where it comes from") == 1


def test_bytes_that_change_as_they_are_shared_out_are_found_by_both(folder):
    told = (folder / "changed 0").read_text()
    assert told.startswith("shard_base: gathering changes the 4-bit weight of ")
    assert (folder / "changed 1").read_text() == told
    assert not (folder / "changed").exists()


def test_what_one_process_does_alone_is_left_out_and_that_is_said(folder):
    assert "no check-up (one process alone cannot gather the base)" in output(folder)
    assert "eval_answers: none are made, as one process alone cannot gather" in output(folder)
    assert not (folder / "packs" / "samples.jsonl").exists()
    assert (folder / "general, whole" / "samples.jsonl").exists()


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ({"quantization_bit": "8"}, "quantization_bit 8"),
        ({"base_dtype": "fp8"}, "base_dtype fp8"),
        ({"quantize_head": True, "quantization_bit": "4"}, "quantize_head true"),
    ],
)
def test_weights_that_cannot_be_cut_are_refused(given, name):
    with pytest.raises(ValueError, match=f"and not with {name}: leave one"):
        short_run("rows", "out", shard_base=True, **given)


def test_the_processes_of_a_machine_load_the_base_in_turns(folder):
    """Until it has been shared out, it is whole in the memory of a process."""
    (_, end), (begin, _) = (json.loads((folder / f"loaded {rank}").read_text()) for rank in (0, 1))
    assert end <= begin
    told = json.loads((folder / "kept 0").read_text())
    assert told == 0, f"{told} whole weights were kept while others were shared out"


def run_in_two_processes(folder, tiny_rows, toy_rows, base):
    """What each of two launched processes does."""
    load, rank = prepare.load_tokenizer, os.environ["RANK"]

    def train(name, rows=tiny_rows, base=base, **changes):
        given = {"shard_base": True} | SETTINGS | changes
        with pytest.MonkeyPatch.context() as patch:
            weigh(patch, Path(folder, f"{name} {rank}.json"))
            return loop.train(short_run(rows, Path(folder, name), base=base, **given), no_check_up)

    general = {"rows": toy_rows, "base": GLM_TINY, "general_set": True, "max_steps": 4} | PACKED
    general["eval_steps"] = 2
    train("general", **general)
    train("general, whole", shard_base=False, **general)
    prepare.load_tokenizer = lambda base: ToyTokenizer() if base != GLM_TINY else load(base)
    with pytest.MonkeyPatch.context() as patch:
        observe_loading(patch, Path(folder), rank)
        train("packs", **RUNS["packs"])
    for name in [name for name in RUNS if name != "packs"]:
        train(name, **RUNS[name])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_FSDP", "true")
        patch.setenv("FSDP_VERSION", "2")
        train("launched", shard_base=False, **PACKED)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(passes.PackedPass, "run", with_a_nan(3))
        with pytest.raises(UserError) as error:
            train("spoilt", **PACKED)
    Path(folder, f"spoilt {rank}").write_text(str(error.value))
    with pytest.MonkeyPatch.context() as patch:
        share_out_through_one_nan(patch)
        with pytest.raises(UserError) as error:
            train("changed", **RUNS["packs in 4 bits"])
    Path(folder, f"changed {rank}").write_text(str(error.value))


def share_out_through_one_nan(patch):
    """As FSDP2 copies floats of 16 bits on a GPU: what is not a number becomes always the same."""
    from torch.distributed import fsdp

    cut = fsdp.fully_shard

    def cut_changed(unit, **more):
        for weight in getattr(unit, "parameters", lambda: [])():
            if not weight.requires_grad and not hasattr(weight, "to_local"):
                weight.data[weight.isnan()] = torch.nan
        return cut(unit, **more)

    patch.setattr(fsdp, "fully_shard", cut_changed)


def observe_loading(patch, folder, rank):
    """Write when the base was loaded and shared out, and how many whole weights there were last."""
    from torch.distributed import fsdp

    load, shard, cut = prepare.load_base_model, prepare.shard_base, fsdp.fully_shard
    moments, weights = [], []

    def loaded(*given, **more):
        moments.append(time.monotonic())
        model = load(*given, **more)
        weights.extend(weakref.ref(weight) for weight in layers_of(model).parameters())
        return model

    def shared(*given):
        shard(*given)
        moments.append(time.monotonic())
        (folder / f"loaded {rank}").write_text(json.dumps(moments))

    def cut_and_count(*given, **more):
        cut(*given, **more)
        gc.collect()
        kept = sum(weight() is not None for weight in weights)
        (folder / f"kept {rank}").write_text(json.dumps(kept))

    patch.setattr(fsdp, "fully_shard", cut_and_count)
    patch.setattr(prepare, "load_base_model", loaded)
    patch.setattr(prepare, "shard_base", shared)


def no_check_up(model, *given):
    """At the end of a run, for the first process alone, which cannot compute with a share."""
    assert not is_sharded(model)


def weigh(patch, file):
    """Write how many bytes of the frozen base a process holds when a run has ended."""
    fit = loop.fit

    def weighed(run, model, *given):
        result = fit(run, model, *given)
        frozen = [weight for weight in model.parameters() if not weight.requires_grad]
        own = sum(getattr(w, "to_local", lambda w=w: w)().nbytes for w in frozen)
        kinds = sorted({str(weight.dtype) for weight in frozen if not weight.is_floating_point()})
        held = {"own": own, "all": sum(w.nbytes for w in frozen), "no floats": kinds}
        file.write_text(json.dumps(held))
        return result

    patch.setattr(loop, "fit", weighed)


def with_a_nan(number):
    """`PackedPass.run`, of which the Nth loss of the second process is not a number."""
    run, losses = passes.PackedPass.run, []

    def changed(self, *given):
        losses.append(run(self, *given))
        is_it = os.environ["RANK"] == "1" and len(losses) == number
        return losses[-1] * torch.nan if is_it else losses[-1]

    return changed


def test_too_little_memory_in_one_process_ends_both(tiny_rows, tiny_folder, tmp_path):
    """The other waits for its share of a layer: what is saved are the checkpoints."""
    given = tmp_path, tiny_rows, str(tiny_folder)
    assert in_processes(2, run_out_of_memory, *given, folder=tmp_path) == [2, 2]
    for rank in (0, 1):
        told = (tmp_path / f"told {rank}").read_text()
        assert "process 1 of 2" in told
        assert "the device's memory is too small for this" in told
        assert "checkpoint-2 is whole: resume with `torchrun --nproc_per_node 2" in told
    assert saved(tmp_path / "run") == ["checkpoint-1", "checkpoint-2"]


def run_out_of_memory(folder, tiny_rows, base):
    prepare.load_tokenizer = lambda base: ToyTokenizer()
    peers.GRACE_SECONDS = 1.0

    settings = SETTINGS | PACKED | {"save_steps": 1, "shard_base": True}
    run, calls = passes.PackedPass.run, []

    def run_or_fail(self, *given):
        calls.append(1)
        if len(calls) == 4 and os.environ["RANK"] == "1":  # 2 before the first step
            raise torch.OutOfMemoryError("CUDA out of memory")
        return run(self, *given)

    passes.PackedPass.run = run_or_fail
    try:
        loop.train(short_run(tiny_rows, Path(folder, "run"), base=base, **settings))
    except UserError as error:
        Path(folder, f"told {os.environ['RANK']}").write_text(str(error))
        return 2


def test_packs_of_each_family_are_those_of_a_whole_base(tmp_path):
    """With queries, keys and values as one or three, three norms or five, and a shared table."""
    codes = in_processes(2, compare_families, folder=tmp_path)
    assert codes == [0, 0], output(tmp_path) + output(tmp_path, 1)


def compare_families():
    accelerator = Accelerator(cpu=True)
    for family in FAMILIES:
        if family.name in ("GLM-4-9B", "GLM-4-0414", "GLM-Edge"):
            whole, shared = (passes_of(accelerator, family, shares) for shares in (False, True))
            for one, other in zip(whole, shared, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def passes_of(accelerator, family, shares):
    """Losses and gradients of packed and padded passes."""
    native = family.native()
    torch.manual_seed(0)
    ends = {"pad_token_id": 264, "eos_token_id": [264, 271, 273]}
    settings = {**family.published_settings, **SIZES, **ends, "vocab_size": 512}
    model = native.model_class(native.config_class.from_dict(settings))
    adapted = attach_lora(model, rank=2, targets="all")
    randomise_adapter(adapted, 0.1)
    torch.manual_seed(0)
    rows = random_rows(model.config, 6)
    if shares:
        shard_base(adapted, model, torch.device("cpu"))
        begin_gathering(adapted, model, torch.device("cpu"))
    weights = [weight for weight in adapted.parameters() if weight.requires_grad]
    found = []
    for recompute in (0, 1):
        packed = PackedModel(adapted, native.packed, compiled=False, recompute=recompute)
        for one in (
            passes.PackedPass(accelerator, packed, rows, 0.1, None),
            passes.PaddedPass(accelerator, adapted, rows, recompute),
        ):
            own = torch.arange(5).numpy() + accelerator.process_index
            for weight in weights:
                weight.grad = None
            found += [one.run(own, 7, 3), *(weight.grad for weight in weights)]
            found += [one.row_losses(own), *one.gradients(own, weights)[1]]
    return [tensor.clone() for tensor in found]


class TestDeal:
    def of(self, rank, parts, in_step):
        accelerator = type("", (), {"num_processes": 3, "process_index": rank})()
        return deal(parts, accelerator, in_step)

    def test_passes_go_by_turns(self):
        parts = [[1], [2], [3], [4], [], []]
        assert self.of(0, parts, False) == [(0, True), (3, True)]
        assert self.of(1, parts, False) == [(1, True)]
        assert self.of(2, [[1], [2]], False) == []

    def test_in_step_all_have_as_many(self):
        parts = [[], [2], [3], [4], [], []]
        assert self.of(0, parts, True) == [(3, True)]
        assert self.of(1, parts, True) == [(1, True)]
        assert self.of(2, [[], [2]], True) == [(1, False)]
        assert self.of(2, [], True) == []
