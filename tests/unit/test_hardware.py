"""Device, number format and memory, on simulated machines."""

import pytest
import torch

from glmtune import hardware
from glmtune.errors import UserError


@pytest.fixture
def machine(monkeypatch):
    """Simulate a machine with some GPUs, with or without bfloat16."""

    def pretend(num_gpus, has_bf16=True, local_rank=None):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: num_gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bf16)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100")
        monkeypatch.delenv("LOCAL_RANK", raising=False)
        if local_rank is not None:
            monkeypatch.setenv("LOCAL_RANK", str(local_rank))

    return pretend


CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def test_the_gpu_is_taken_unless_the_cpu_is_asked_for(machine):
    machine(1)
    assert hardware.pick_device() == GPU
    assert hardware.pick_device(use_cpu=True) == CPU
    machine(0)
    assert hardware.pick_device() == CPU


def test_each_process_has_a_gpu_of_its_own(machine):
    machine(2, local_rank=1)
    assert hardware.pick_device() == torch.device("cuda", 1)
    machine(2, local_rank=2)
    with pytest.raises(UserError, match=r"LOCAL_RANK 2.*2 GPU"):
        hardware.pick_device()


def test_bfloat16_is_the_default_where_the_gpu_has_it(machine):
    machine(1)
    assert hardware.pick_dtype(GPU) == (torch.bfloat16, None)
    assert hardware.pick_dtype(GPU, bf16=False) == (torch.float32, None)


def test_float16_comes_with_a_word_of_caution(machine):
    machine(1)
    dtype, caution = hardware.pick_dtype(GPU, fp16=True)
    assert dtype == torch.float16
    assert "bf16" in caution
    machine(1, has_bf16=False)
    dtype, caution = hardware.pick_dtype(GPU)
    assert dtype == torch.float16
    assert "has no bfloat16" in caution


def test_a_format_that_is_not_to_be_had_is_refused(machine):
    machine(1, has_bf16=False)
    with pytest.raises(UserError, match="Tesla V100 computes no bfloat16"):
        hardware.pick_dtype(GPU, bf16=True)
    with pytest.raises(UserError, match="float16 needs a GPU"):
        hardware.pick_dtype(CPU, fp16=True)


def test_a_cpu_takes_float32_and_bfloat16_on_demand():
    assert hardware.pick_dtype(CPU) == (torch.float32, None)
    assert hardware.pick_dtype(CPU, bf16=True) == (torch.bfloat16, None)


def test_memory_of_this_machine_is_plausible():
    peak, total = hardware.memory_gib(CPU), hardware.total_memory_gib(CPU)
    assert 0.05 < peak < total < 10_000  # torch alone takes more than 50 MiB


def test_memory_is_a_peak():
    before = hardware.memory_gib(CPU)
    torch.ones(int((before + 0.1) * hardware.GIB), dtype=torch.uint8)  # given back at once
    assert hardware.memory_gib(CPU) > before + 0.05


@pytest.mark.parametrize(
    "capability, wish, refused",
    [
        ((6, 1), {"compiled": True, "bits": 16}, "decode_compile true: .* 6.1, and 7.0"),
        ((7, 5), {"compiled": True, "bits": 8}, None),
        ((7, 5), {"compiled": False, "bits": 4}, "decode_bits 4: .* 7.5, and 8.0"),
        ((9, 0), {"compiled": True, "bits": 4}, None),
    ],
)
def test_a_card_that_is_too_old_is_named(capability, wish, refused, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(hardware, "device_name", lambda _: "Card")
    if refused is None:
        hardware.check_decoding(torch.device("cuda"), **wish)
        return
    with pytest.raises(UserError, match=refused):
        hardware.check_decoding(torch.device("cuda"), **wish)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("NVIDIA H200", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A10G", 70),
        ("NVIDIA L4", 121),
        ("NVIDIA GeForce RTX 3090", 71),
        ("NVIDIA GeForce RTX 3080", 59.5),
        ("Tesla T4", 65),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", 85.7),
        ("NVIDIA RTX 6000 Ada Generation", 364),
        ("Tesla P40", None),
        ("NVIDIA T400", None),
        ("NVIDIA GH200 480GB", None),
        ("X", None),
    ],
)
def test_what_a_card_is_rated(monkeypatch, name, expected):
    monkeypatch.setattr("glmtune.hardware.device_name", lambda device: name)
    assert hardware.rated_tflops(torch.device("cuda")) == expected
    assert hardware.rated_tflops(torch.device("cpu")) is None
