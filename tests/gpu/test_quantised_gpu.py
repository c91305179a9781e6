"""Bases in 8 and 4 bits on a GPU: pytest -m gpu tests/gpu/test_quantised_gpu.py."""

import gc
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from toys import randomise_adapter

from glmtune.adapters import attach_lora
from glmtune.bench.random_model import random_model
from glmtune.data.packing import plan_packs
from glmtune.hardware import GIB, Card, can_compile
from glmtune.models.chatglm.configuration import ChatGLMConfig
from glmtune.models.chatglm.family import shape
from glmtune.models.chatglm.packed import PACKED
from glmtune.models.chatglm.random_init import write_random_model
from glmtune.models.families import DEFAULT
from glmtune.models.loading import load_base_model
from glmtune.models.packed import PackedModel
from glmtune.models.precision import quantise_layers
from glmtune.models.quantised import _quantised as quantised_linear
from glmtune.models.quantised import unrounded_inputs
from glmtune.ops.quantised import Quantised
from glmtune.training.first_step import check_agreement
from glmtune.training.passes import CapturedPass, PackedPass, PaddedPass

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")

CUDA = torch.device("cuda")
CONFIG = ChatGLMConfig(
    vocab_size=32768, hidden_size=1024, num_layers=3, num_attention_heads=8,
    inner_hidden_size=4096, bos_token_id=32000, eos_token_id=32001,
)  # fmt: skip
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("fresh_compiler"),
    pytest.mark.skipif(
        not torch.cuda.is_available()
        or not can_compile(Card.of(CUDA), CONFIG.head_dim, DEFAULT.head_dims),
        reason="no CUDA device of the Ampere generation or newer here, or no Triton",
    ),
]
LENGTH = 640
"""Of a pack: none of its activations then has as many elements as a weight."""
BASES = [(8, False), (4, False), (4, True), (None, True)]


def make_model(bits, quantize_head, dtype=torch.bfloat16, targets="all"):
    base = random_model(CONFIG, CUDA, dtype, bits=bits, quantize_head=quantize_head)
    torch.manual_seed(0)
    model = attach_lora(base, rank=8, dropout=0.1, targets=targets)
    randomise_adapter(model, std=0.05)
    return model, [weight for weight in model.parameters() if weight.requires_grad]


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_four_bits_mean_what_bitsandbytes_says(kind, nested, dtype):
    """The last program converts fewer blocks than the others."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    torch.manual_seed(0)
    weight = torch.randn(150, 128, device=CUDA)
    packed, state = quantize_4bit(weight, blocksize=64, compress_statistics=nested, quant_type=kind)
    more = (state.state2.absmax, state.state2.code, state.offset) if nested else ()
    ours = Quantised((packed, state.absmax, *more), kind, 64, 128, None).weight(dtype)
    theirs = dequantize_4bit(packed, state)
    assert ours.dtype == dtype
    off = (ours.float() - theirs).norm() / theirs.norm()
    assert off < (1e-6 if dtype == torch.float32 else 4e-3)


@pytest.mark.parametrize(("bits", "quantize_head"), BASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_compiled_pack_equals_its_rows(rows, bits, quantize_head, dtype):
    """The reference are PEFT's modules over bitsandbytes' own."""
    model, weights = make_model(bits, quantize_head, dtype)
    accelerator = Accelerator()
    fast = PackedPass(accelerator, PackedModel(model, PACKED, compiled=True), rows, 0.1, LENGTH)
    plain = PaddedPass(accelerator, model, rows)
    packs = plan_packs(rows.lengths_R, np.arange(len(rows)), LENGTH)
    for row_ids in (packs[0], packs[1][:3]):
        check_agreement(fast, plain, row_ids, weights, dtype)


@pytest.mark.parametrize(("bits", "quantize_head"), BASES)
def test_a_captured_pass_equals_the_packed_pass(rows, bits, quantize_head):
    model, weights = make_model(bits, quantize_head)
    packed = PackedModel(model, PACKED, compiled=True, any_length=True)
    plain = PackedPass(Accelerator(), packed, rows, 0.1, None)
    captured = CapturedPass(Accelerator(), packed, rows, 0.1, None, weights)
    for step in range(3):
        results = []
        for way in (captured, plain):
            loss = way.run(np.arange(step, step + 6), 300, step)
            results.append((loss, torch.cat([weight.grad.flatten() for weight in weights])))
            for weight in weights:
                weight.grad = None
        (loss, grad), (wanted_loss, wanted) = results
        torch.testing.assert_close(loss, wanted_loss, rtol=1e-5, atol=1e-5)
        assert (grad - wanted).norm() / wanted.norm() < 1e-2


@pytest.mark.parametrize("bits", [None, 8, 4])
def test_a_compiled_pass_keeps_no_weight_as_floats(rows, bits):
    """Between forward and backward pass; an unquantised base shows that the test can fail."""
    model, _ = make_model(bits, False, targets="query_key_value")
    packed = PackedModel(model, PACKED, compiled=True)
    one = PackedPass(Accelerator(), packed, rows, 0.1, LENGTH)
    row_ids = plan_packs(rows.lengths_R, np.arange(len(rows)), LENGTH)[0]
    kept = set()

    def keep(tensor):
        if tensor.is_floating_point():
            kept.add(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = packed.loss(packed.to_tensors(one.pack(row_ids)), packed.dropouts(0.1, 1))
    loss.backward()
    sizes = {n * CONFIG.hidden_size**2 for n in (1, 3, 4)}
    assert kept & sizes == (sizes if bits is None else set())


def test_the_check_holds_no_weight_of_8_bits_as_floats():
    """Else a run that fits on the card could fail before its first step."""
    with torch.device(CUDA):
        part = torch.nn.Sequential(torch.nn.Linear(4096, 16384, dtype=torch.bfloat16))
    part[0] = quantised_linear(part[0], 8, torch.bfloat16)
    x = torch.randn(8, 4096, device=CUDA, dtype=torch.bfloat16, requires_grad=True)
    with unrounded_inputs(part):
        part(x).sum().backward()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        part(x).sum().backward()
    assert torch.cuda.max_memory_allocated() - before < part[0].weight.numel()  # half of it


@pytest.mark.parametrize("bits", [8, 4])
def test_loading_gives_what_quantising_in_memory_gives(tmp_path, bits):
    write_random_model(tmp_path, CONFIG, num_shards=3, device=CUDA)
    loaded = load_base_model(str(tmp_path), dtype=torch.bfloat16, device=CUDA, bits=bits)
    model = load_base_model(str(tmp_path), dtype=torch.bfloat16, device=CUDA)
    quantise_layers(model, bits)
    ids = torch.tensor([[300, CONFIG.gmask_token_id, CONFIG.bos_token_id, 400]], device=CUDA)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)


_LOAD = """
import sys, threading, torch
from glmtune.hardware import GIB
from glmtune.models.loading import load_base_model
from glmtune.models.resolve import GLM_TINY

def anonymous():
    with open("/proc/self/status") as status:
        return 1024 * int(next(line for line in status if line.startswith("RssAnon")).split()[1])

folder, bits = sys.argv[1], int(sys.argv[2])
settings = {"dtype": torch.bfloat16, "device": "cuda", "bits": bits, "quantize_head": True}
load_base_model(GLM_TINY, **settings)  # what the libraries take
peak, done = 0, threading.Event()

def watch():
    global peak
    while not done.wait(0.005):
        peak = max(peak, anonymous())

thread = threading.Thread(target=watch)
thread.start()
torch.cuda.reset_peak_memory_stats()
model = load_base_model(folder, **settings)
done.set()
thread.join()
print(torch.cuda.max_memory_allocated() / GIB, torch.cuda.memory_allocated() / GIB, peak / GIB)
"""


@pytest.mark.parametrize(("bits", "most_gib"), [(4, 5.0), (8, 7.5)])
def test_6b_loads_within_little_memory(tmp_path, bits, most_gib):
    """float16 shards as published; CPU memory includes the libraries and CUDA itself."""
    config = ChatGLMConfig()
    if shutil.disk_usage(tmp_path).free < 20 * GIB:
        pytest.skip("the shards take 12 GiB of disk")
    write_random_model(tmp_path, config, device=CUDA)
    gc.collect()
    torch.cuda.empty_cache()
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _LOAD, str(tmp_path), str(bits)],
        capture_output=True, text=True, check=True, timeout=600,
    )  # fmt: skip
    peak, in_the_end, on_cpu = map(float, done.stdout.split())
    print(f"{bits} bits: {peak:.2f} GiB at most on the GPU, {on_cpu:.2f} on the CPU")
    estimate = shape(config).weight_bytes(torch.bfloat16, bits, quantize_head=True) / GIB
    assert in_the_end == pytest.approx(estimate, rel=0.02)
    assert peak < most_gib
    assert on_cpu < 4.0
