"""Glm's and Glm4's layers by kernels on a CUDA device; run by name: pytest -m gpu tests/gpu."""

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from toys import randomise_adapter
from transformers import Glm4Config, Glm4ForCausalLM, GlmConfig, GlmForCausalLM

from glmtune.adapters import attach_lora
from glmtune.bench.random_model import CONFIGS
from glmtune.data.packing import plan_packs
from glmtune.generation.weights import read_weights
from glmtune.hardware import Card, can_compile
from glmtune.models.decoding import Place
from glmtune.models.family import layers_of
from glmtune.models.glm.decoding import DECODING
from glmtune.models.glm.packed import PACKED
from glmtune.models.packed import PackedModel, to_fp8
from glmtune.models.quantised import quantise
from glmtune.ops.lora import Dropout, LowRank, lora_factors
from glmtune.training.first_step import check_agreement
from glmtune.training.passes import CapturedPass, PackedPass, PaddedPass

CUDA = torch.device("cuda")
CONFIG = CONFIGS["glm-small"]
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("fresh_compiler"),
    pytest.mark.skipif(
        not torch.cuda.is_available() or not can_compile(Card.of(CUDA), 64, (64,)),
        reason="no CUDA device of the Ampere generation or newer here, or no Triton",
    ),
]
SIZES = {
    "vocab_size": 512, "hidden_size": 256, "intermediate_size": 384, "num_hidden_layers": 1,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "attention_bias": True,
    "pad_token_id": 0, "eos_token_id": 2, "initializer_range": 0.05,
}  # fmt: skip
KINDS = {
    "half of a head": (GlmForCausalLM, GlmConfig, 0.5),
    "whole heads": (GlmForCausalLM, GlmConfig, 1.0),
    "four norms": (Glm4ForCausalLM, Glm4Config, 0.5),
}


def make_model(kind):
    model_class, config_class, partial = KINDS[kind]
    rope = {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": partial}
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = model_class(config_class(**SIZES, rope_parameters=rope)).eval()
    for name, weight in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(weight, 0.5, 1.5)
        if "bias" in name:
            torch.nn.init.normal_(weight)
    return model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("num_rows", [1, 3])
@torch.no_grad()
def test_a_layer_in_few_kernels_is_the_plain_one(kind, bits, adapted, num_rows):
    model, columns = make_model(kind), 70
    config = model.config
    if adapted:
        model = attach_lora(model, targets="q_proj,v_proj,gate_up_proj,down_proj").eval()
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.1)
    weights = read_weights(model, DECODING, bits=bits)
    shape = num_rows, config.num_key_value_heads, columns, config.head_dim
    cache = [torch.randn(shape, device="cuda") for _ in range(2)]
    copies = [tensor.clone() for tensor in cache]
    place = Place(*torch.tensor([range(num_rows), [41, 0, 69][:num_rows]], device="cuda"))
    angles = DECODING.angles(place.column_B[:, None], config)
    hidden = torch.randn(num_rows, 1, config.hidden_size, device="cuda")
    seen = torch.arange(columns, device="cuda") <= place.column_B[:, None]
    (block,) = weights.blocks
    expected = DECODING.run_block(hidden, block, *cache, place, seen[:, None, None], angles)
    found = DECODING.run_block_in_few_kernels(hidden, block, *copies, place, None, angles)
    assert (found - expected).norm() / expected.norm() < 1e-5
    for ours, theirs in zip(copies, cache, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)


LENGTH = 640
QKV = "q_proj,k_proj,v_proj"


def make_trained(kind, targets=QKV, dtype=torch.float32, rank=8):
    """A model of `CONFIG`'s sizes, of the kind's layers, with an adapter that has an effect."""
    model_class, config_class, partial = KINDS[kind]
    rope = {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": partial}
    sizes = {name: getattr(CONFIG, name) for name in (*SIZES, "max_position_embeddings")}
    if partial == 1.0:  # GLM-Edge's
        sizes |= {"attention_bias": False, "tie_word_embeddings": True}
    torch.manual_seed(0)
    with CUDA:
        base = model_class._from_config(config_class(**sizes, rope_parameters=rope), dtype=dtype)
    for name, weight in base.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(weight, 0.5, 1.5)
        if "bias" in name:
            torch.nn.init.normal_(weight, std=0.1)
    return adapted(base, targets, rank)


def adapted(base, targets, rank=8):
    model = attach_lora(base, rank=rank, dropout=0.1, targets=targets)
    randomise_adapter(model, std=0.05)
    return model, [weight for weight in model.parameters() if weight.requires_grad]


def compare(model, weights, rows, dtype):
    accelerator = Accelerator()
    fast = PackedPass(accelerator, PackedModel(model, PACKED, compiled=True), rows, 0.1, LENGTH)
    plain = PaddedPass(accelerator, model, rows)
    packs = plan_packs(rows.lengths_R, np.arange(len(rows)), LENGTH)
    return [
        check_agreement(fast, plain, row_ids, weights, dtype)
        for row_ids in (packs[0], packs[1][:2])  # full, and mostly filler
    ]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("targets", "rank"),
    [(QKV, 8), ("all", 8), ("q_proj,v_proj,down_proj", 5), ("gate_up_proj", 96)],
)
def test_a_compiled_pack_equals_its_rows(rows, kind, targets, rank):
    found = compare(*make_trained(kind, targets, rank=rank), rows, torch.float32)
    for off_loss, off_grad in found:
        assert off_loss < 1e-5
        assert off_grad < 2e-5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("targets", [QKV, "all"])
def test_a_compiled_pack_in_bfloat16_equals_its_rows(rows, kind, targets):
    compare(*make_trained(kind, targets, torch.bfloat16), rows, torch.bfloat16)


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0),
    reason="float8 matrix units are of the Hopper generation and newer",
)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("targets", [QKV, "all"])
def test_a_compiled_pack_in_float8_equals_its_rows(rows, kind, targets):
    model, weights = make_trained(kind, targets, torch.bfloat16)
    to_fp8(model, PACKED.together)
    compare(model, weights, rows, torch.bfloat16)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("kind", ["half of a head", "four norms"])
def test_a_compiled_pack_in_few_bits_equals_its_rows(rows, kind, bits):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    model, _ = make_trained(kind, dtype=torch.bfloat16)
    base = model.unload()
    quantise(base, layers_of(base), bits)
    compare(*adapted(base, "all"), rows, torch.bfloat16)


@pytest.mark.parametrize("kind", ["half of a head", "four norms"])
@pytest.mark.parametrize("form", ["bfloat16", "float8", "four bits"])
def test_a_compiled_pack_gives_the_same_gradients_again(rows, kind, form):
    model, weights = make_trained(kind, "all", torch.bfloat16)
    if form == "float8":
        to_fp8(model, PACKED.together)
    if form == "four bits":
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
        base = model.unload()
        quantise(base, layers_of(base), 4)
        model, weights = adapted(base, "all")
    fast = PackedPass(Accelerator(), PackedModel(model, PACKED, compiled=True), rows, 0.1, LENGTH)
    packs = plan_packs(rows.lengths_R, np.arange(len(rows)), LENGTH)
    for row_ids in (packs[0], packs[1][:2], packs[2][:5]):
        first, *others = (fast.gradients(row_ids, weights)[1] for _ in range(12))
        assert all(
            torch.equal(*pair) for again in others for pair in zip(first, again, strict=True)
        )


@pytest.mark.parametrize("targets", [QKV, "q_proj,v_proj", "all"])
@pytest.mark.parametrize(
    ("dtype", "recompute", "most"),
    [(torch.float32, 0, 1e-5), (torch.bfloat16, 0, 3e-2), (torch.bfloat16, 2, 3e-2)],
)
def test_compiled_passes_drop_what_plain_ones_drop(rows, targets, dtype, recompute, most):
    model, weights = make_trained("four norms", targets, dtype)
    row_ids = plan_packs(rows.lengths_R, np.arange(len(rows)), LENGTH)[0]
    results = []
    for compiled in (True, False):
        packed = PackedModel(model, PACKED, compiled=compiled, recompute=recompute)
        loss = PackedPass(Accelerator(), packed, rows, 0.1, LENGTH).run(row_ids, 100, seed=3)
        results.append((loss, torch.cat([weight.grad.flatten() for weight in weights])))
        for weight in weights:
            weight.grad = None
    (loss, grad), (wanted_loss, wanted) = results
    torch.testing.assert_close(loss, wanted_loss, rtol=most, atol=1e-5)
    assert (grad - wanted).norm() / wanted.norm() < most


def test_a_captured_pack_equals_the_packed_pass(rows):
    model, weights = make_trained("four norms", "all", torch.bfloat16)
    packed = PackedModel(model, PACKED, compiled=True)
    plain = PackedPass(Accelerator(), packed, rows, 0.1, LENGTH)
    captured = CapturedPass(Accelerator(), packed, rows, 0.1, LENGTH, weights)
    packs = plan_packs(rows.lengths_R, np.arange(len(rows)), LENGTH)
    for step, row_ids in enumerate((packs[0], packs[1][:2], packs[2])):
        results = []
        for way in (captured, plain):
            loss = way.run(row_ids, 300, step)
            results.append((loss, torch.cat([w.grad.flatten() for w in weights])))
            for weight in weights:
                weight.grad = None
        (loss, grad), (wanted_loss, wanted) = results
        torch.testing.assert_close(loss, wanted_loss, rtol=1e-4, atol=1e-4)
        assert (grad - wanted).norm() / wanted.norm() < 1e-2


def leaf(*shape, size=1.0, dtype=torch.float32):
    return (size * torch.randn(shape, device=CUDA)).to(dtype).requires_grad_()


def compare_gradients(results, inputs, most):
    upstream = [torch.randn_like(result) for result in results[0]]
    found, wanted = ([*each, *torch.autograd.grad(each, inputs, upstream)] for each in results)
    for one, other in zip(found, wanted, strict=True):
        assert (one.float() - other.float()).norm() / other.float().norm() < most


@pytest.mark.parametrize(
    ("num_linears", "rank", "width"), [(1, 8, 200), (3, 8, 256), (2, 5, 130), (3, 64, 192)]
)
@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_products_of_dropped_inputs_in_one_kernel(num_linears, rank, width, dtype, most):
    from glmtune.ops.dropped_kernels import fork

    torch.manual_seed(0)
    x, a = leaf(700, width, dtype=dtype), [leaf(rank, width) for _ in range(num_linears)]
    number = lambda value: torch.tensor(value, dtype=torch.int32, device=CUDA)
    below, scale = number(round(0.3 * 2**32) - 2**31), torch.tensor(1 / 0.7, device=CUDA)
    factors = [number(value) for value in (99, -7, 2**30 + 5)[:num_linears]]
    factors = factors if num_linears > 1 else []
    drops = [Dropout(number(5), below, scale, factor) for factor in factors or [None]]
    adapters = [LowRank(each, torch.zeros(1, rank, device=CUDA), 1.0) for each in a]
    plain = [lora_factors(x, *pair)[0] for pair in zip(adapters, drops, strict=True)]
    same, lows = fork(x, a, number(5), factors, below, scale)
    compare_gradients(([same, *lows], [x * 1, *plain]), [x, *a], most)


@pytest.mark.parametrize("rank", [None, 5, 64])
@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_a_gate_in_one_kernel(rank, dtype, most):
    from glmtune.ops.gate_kernels import Gate, UpdatedGate

    torch.manual_seed(0)
    y, inputs = leaf(70, 2 * 100, dtype=dtype), []
    if rank:
        inputs = [leaf(70, rank, dtype=dtype), leaf(2 * 100, rank, size=0.1, dtype=dtype)]
    whole = y.float()
    if rank:
        whole = whole + inputs[0].float() @ inputs[1].float().T
    gate, up = whole.chunk(2, -1)
    plain = (torch.nn.functional.silu(gate) * up).to(dtype)
    found = UpdatedGate.apply(y, *inputs) if rank else Gate.apply(y)
    compare_gradients(([found], [plain]), [y, *inputs], most)
