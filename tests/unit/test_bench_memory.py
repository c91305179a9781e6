"""`glmtune bench memory`, run small on a CPU."""

import json

import pytest

from glmtune.bench import memory as room
from glmtune.bench.memory import train_settings
from glmtune.cli import main
from glmtune.config.settings import BenchMemorySettings
from glmtune.errors import UserError

SMALL = ["--shape", "small", "--use_cpu", "true", "--steps", "1", "--warmup", "0"]


@pytest.mark.slow
def test_each_setting_is_measured_beside_its_estimate(tmp_path, capsys):
    path = tmp_path / "memory.jsonl"
    flags = [*SMALL, "--only", "recompute,packed", "--json_path", str(path)]
    assert main(["bench", "memory", *flags]) == 0
    record = json.loads(path.read_text(encoding="utf-8"))
    assert record["copy_bytes_per_second"] > 1e8
    recompute, packed = record["recompute"], record["packed"]
    assert recompute["forecast"]["layout"] == "exact"
    assert recompute["forecast"]["layers_recomputed"] == 3
    assert packed["forecast"]["layers_recomputed"] == 0
    # Nearly 4 times the tokens, and all activations kept.
    assert packed["allocated_gib"] > 1.5 * recompute["allocated_gib"]
    for peak in (recompute, packed):
        assert peak["ratio"] == peak["estimate_gib"] / peak["allocated_gib"]
        assert 0 < peak["loading_gib"] < peak["allocated_gib"]
        assert peak["real_tokens_per_second"] > 0
        assert peak["reserved_gib"] is None
    out = capsys.readouterr().out
    assert "estimated" in out
    assert "copy" in out


@pytest.mark.slow
def test_a_younger_models_memory_is_measured(tmp_path):
    path = tmp_path / "memory.jsonl"
    flags = ["--shape", "glm-small", *SMALL[2:], "--only", "recompute", "--json_path", str(path)]
    assert main(["bench", "memory", *flags]) == 0
    peak = json.loads(path.read_text(encoding="utf-8"))["recompute"]
    assert peak["forecast"]["layers_recomputed"] == 3
    assert peak["allocated_gib"] > 0


def test_the_settings_are_those_of_the_targets():
    configs = {name: train_settings(name, BenchMemorySettings()) for name in room.CASES}
    assert [config.bits for config in configs.values()] == [4, 8, None, None]
    assert [config.layout for config in configs.values()] == ["exact"] * 3 + ["packed"]
    assert configs["4bit"].per_device_train_batch_size == 6


def test_what_a_machine_cannot_do_is_said_and_the_rest_measured(monkeypatch, capsys):
    def in_a_process(work, *arguments, **named):
        if work is room.measure:
            raise UserError(f"{arguments[0]}: not on this machine")
        return 1e9

    monkeypatch.setattr(room, "_in_a_process", in_a_process)
    assert main(["bench", "memory", *SMALL]) == 0
    assert capsys.readouterr().out.count("not measured: ") == 8  # at once, and in the table


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--only", "5bit"], "only '5bit': is none of 4bit, 8bit, recompute, packed"),
        (["--json_path", "no/such/file"], "cannot be written"),
        (["--shape", "huge"], "--shape 'huge' should be 6b, wide, small, "),
    ],
)
def test_mistakes_of_bench_memory_are_refused_in_one_line(flags, words, capsys):
    assert main(["bench", "memory", "--use_cpu", "true", *flags]) == 2
    assert words in capsys.readouterr().err
