"""Bases in 8 and 4 bits by bitsandbytes: loaded, trained padded and packed, saved and refused."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from packaging.version import Version
from safetensors.torch import load_file, save_file
from torch import nn
from toys import randomise_adapter
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from glmtune.adapters import attach_lora
from glmtune.bench.rows import random_rows
from glmtune.errors import UserError
from glmtune.models import quantised
from glmtune.models.chatglm.configuration import ChatGLMConfig
from glmtune.models.chatglm.family import shape
from glmtune.models.chatglm.packed import PACKED
from glmtune.models.chatglm.random_init import write_random_model
from glmtune.models.integer_weights import IntegerEmbedding, IntegerLinear
from glmtune.models.loading import load_base_model
from glmtune.models.packed import PackedModel
from glmtune.models.precision import quantise_layers
from glmtune.models.resolve import GLM_TINY
from glmtune.training.first_step import check_agreement
from glmtune.training.passes import PackedPass, PaddedPass

bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: make test does it")

KINDS = {8: bnb.nn.Linear8bitLt, 4: bnb.nn.Linear4bit}
LINEAR = "transformer.layers.1.mlp.dense_4h_to_h"


def load(folder=GLM_TINY, **settings):
    return load_base_model(str(folder), dtype=torch.float32, device="cpu", **settings)


@torch.no_grad()
def logits(model):
    special = model.config
    ids = [200, 300, special.gmask_token_id, special.bos_token_id, 400, 500, 600]
    return model(torch.tensor([ids])).logits


def off(result, wanted):
    return ((result - wanted).norm() / wanted.norm()).item()


@pytest.fixture(scope="module")
def plain_logits():
    return logits(load())


@pytest.fixture(params=[8, 4], scope="module")
def bits(request):
    return request.param


@pytest.fixture(scope="module")
def saved(bits, tmp_path_factory):
    """A folder as `save_pretrained` writes it, and the logits of the model that was saved."""
    folder = tmp_path_factory.mktemp("saved") / f"{bits}-bits"
    model = load(bits=bits)
    model.save_pretrained(folder)
    return folder, logits(model)


class TestLoading:
    def test_linears_of_the_layers_are_bitsandbytes_own(self, bits, plain_logits):
        model = load(bits=bits)
        kinds = {type(m) for m in model.transformer.layers.modules() if isinstance(m, nn.Linear)}
        assert kinds == {KINDS[bits]}
        assert type(model.lm_head) is nn.Linear
        assert getattr(model, f"is_loaded_in_{bits}bit"), "where PEFT looks"
        assert model.dtype == torch.float32
        assert 0 < off(logits(model), plain_logits) < {8: 0.05, 4: 0.25}[bits]

    def test_4_bits_are_nf4_with_double_quantisation(self):
        state = load(bits=4).get_submodule(LINEAR).weight.quant_state
        assert (state.quant_type, state.nested, state.blocksize) == ("nf4", True, 64)

    def test_transformers_own_argument_does_the_same(self):
        settings = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
        )
        model = AutoModelForCausalLM.from_pretrained(
            GLM_TINY, dtype=torch.float32, quantization_config=settings, device_map="cpu"
        )
        assert torch.equal(logits(model), logits(load(bits=4)))

    def test_a_model_in_memory_is_quantised_to_the_same(self, bits):
        model = load()
        quantise_layers(model, bits)
        assert torch.equal(logits(model), logits(load(bits=bits)))
        assert getattr(model, f"is_loaded_in_{bits}bit")

    def test_weights_are_never_repacked_for_one_processor(self):
        """bitsandbytes would on a CPU with AVX512-BF16, and nothing else can read that order."""
        assert not load(bits=4).get_submodule(LINEAR).support_avx512bf16_for_cpu

    def test_a_loaded_head_in_8_bits(self, plain_logits):
        model = load(quantize_head=True)
        embedding, head = model.transformer.word_embeddings, model.lm_head
        assert isinstance(embedding, IntegerEmbedding)
        assert isinstance(head, IntegerLinear)
        assert head.weight is embedding.weight
        assert head.weight_scale is embedding.weight_scale
        assert 0 < off(logits(model), plain_logits) < 0.05

    def test_a_head_of_its_own_stays_so(self, tiny_folder):
        plain, model = load(tiny_folder), load(tiny_folder, quantize_head=True)
        assert plain.lm_head.weight is not plain.transformer.word_embeddings.weight
        assert model.lm_head.weight is not model.transformer.word_embeddings.weight
        assert off(logits(model), logits(plain)) < 0.05

    def test_the_sizes_told_beforehand(self, bits):
        model = load(bits=bits, quantize_head=True)
        size = shape(model.config).weight_bytes(torch.float32, bits, quantize_head=True)
        tables = 4 * (16 + 256 + 1)  # of NF4, for each linear
        taken = model.get_memory_footprint()
        for linear in model.modules():
            if isinstance(linear, KINDS[4]):
                state = linear.weight.quant_state
                taken += state.absmax.nbytes + state.state2.absmax.nbytes
            elif isinstance(linear, KINDS[8]):
                taken += linear.state.SCB.nbytes if linear.state.SCB is not None else 0
                taken += linear.weight.SCB.nbytes if linear.weight.SCB is not None else 0
        assert size == pytest.approx(taken, abs=tables)


class TestSaved:
    def test_a_quantised_folder_loads_as_it_is(self, bits, saved, capsys):
        folder, wanted = saved
        model = load(folder)
        assert torch.equal(logits(model), wanted)
        assert isinstance(model.get_submodule(LINEAR), KINDS[bits])
        assert (
            f"note: the int{bits} weights of {folder.name} stay packed" in capsys.readouterr().err
        )

    def test_a_folder_with_a_head_in_8_bits_loads_as_it_is(self, bits, tmp_path):
        model = load(bits=bits, quantize_head=True)
        model.save_pretrained(tmp_path)
        again = load(tmp_path)
        assert again.lm_head.weight is again.transformer.word_embeddings.weight
        assert again.lm_head.weight.dtype == torch.int8
        assert torch.equal(logits(again), logits(model))

    def test_a_dequantised_folder_is_a_plain_model(self, bits, saved, tmp_path):
        model = load(saved[0]).dequantize()
        assert type(model.get_submodule(LINEAR)) is nn.Linear
        assert off(logits(model), saved[1]) < (
            0.05 if bits == 8 else 1e-5
        )  # LLM.int8 rounds inputs
        model.save_pretrained(tmp_path)
        assert torch.equal(logits(load(tmp_path)), logits(model))

    def test_a_quantised_folder_computes_in_the_type_that_is_asked_for(self, saved):
        model = load_base_model(str(saved[0]), dtype=torch.bfloat16, device="cpu")
        assert logits(model).dtype == torch.bfloat16

    @pytest.mark.parametrize(
        ("damage", "message"),
        [
            (lambda t: t.pop(f"{LINEAR}.bias"), rf"missing {LINEAR}\.bias"),
            (lambda t: t.pop(f"{LINEAR}.weight"), rf"missing {LINEAR}\.weight"),
            (lambda t: cut(t, f"{LINEAR}.weight"), rf"misshapen {LINEAR}\.weight"),
            (lambda t: drop_scales(t), r"extra .*(mistyped|misshapen) "),
        ],
    )
    def test_a_damaged_folder_is_refused_in_one_line(self, saved, damage, message, tmp_path):
        folder = shutil.copytree(saved[0], tmp_path / "damaged")
        tensors = load_file(folder / "model.safetensors")
        damage(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(UserError, match=message) as caught:
            load(folder)
        assert "\n" not in str(caught.value)


def cut(tensors, name):
    tensors[name] = tensors[name][:-1].clone()


def drop_scales(tensors):
    for key in ("SCB", "weight.quant_state.bitsandbytes__nf4"):
        tensors.pop(f"{LINEAR}.{key}", None)
    tensors["another"] = torch.ones(1)


@pytest.fixture(scope="module", params=[(8, False), (4, False), (4, True), (None, True)])
def trainable(request):
    """A base with an adapter that has an effect, its rows, and both passes over them."""
    model = attach_lora(
        load(bits=request.param[0], quantize_head=request.param[1]),
        rank=4, dropout=0.0, targets="all",
    )  # fmt: skip
    torch.manual_seed(1)
    randomise_adapter(model, std=0.05)
    accelerator, rows = Accelerator(cpu=True), random_rows(model.config, 8)
    fast = PackedPass(accelerator, PackedModel(model, PACKED, compiled=False), rows, 0.0, None)
    return model, fast, PaddedPass(accelerator, model, rows)


class TestTraining:
    def test_packed_pass_equals_padded_pass(self, trainable):
        model, fast, plain = trainable
        weights = [weight for weight in model.parameters() if weight.requires_grad]
        assert {weight.dtype for weight in weights} == {torch.float32}
        assert len(weights) == 4 * 2 * model.config.num_layers
        result = check_agreement(fast, plain, np.arange(8), weights, torch.float32)
        assert max(result) < 1e-5
        for _, grads in (fast.gradients(np.arange(8), weights), plain.gradients([1, 2], weights)):
            assert all(grad.isfinite().all() and grad.abs().max() > 0 for grad in grads)

    def test_no_weight_is_kept_as_floats(self, trainable):
        """From the forward pass to the backward one; activations are of another size."""
        model, fast, _ = trainable
        sizes = {linear.in_features * linear.out_features for linear in linears(model)}
        saved = []

        def keep(tensor):
            saved.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            fast.model.loss(fast.model.to_tensors(fast.pack(np.arange(3))))
        assert saved
        assert not [t for t in saved if t.is_floating_point() and t.numel() in sizes]


def linears(model):
    """Those that are quantised."""
    kinds = (IntegerLinear, *KINDS.values())
    return [module for module in model.modules() if isinstance(module, kinds)]


def test_what_the_check_leaves_out_is_llm_int8s_rounding_of_inputs(monkeypatch):
    monkeypatch.setattr(quantised, "_PIECE", 100)  # no linear here has the usual number of outputs
    model = load(bits=8)
    exact = logits(load(bits=8).dequantize())
    rounded = logits(model)
    with quantised.unrounded_inputs(model):
        assert off(logits(model), exact) < 1e-5
    assert off(rounded, exact) > 1e-4
    assert torch.equal(logits(model), rounded), "it is back"


def test_a_product_with_unrounded_inputs_has_the_gradient_of_its_weights(monkeypatch):
    monkeypatch.setattr(quantised, "_PIECE", 100)
    model = load(bits=8)
    linear, dense = model.get_submodule(LINEAR), load(bits=8).dequantize().get_submodule(LINEAR)
    x, grad = torch.randn(2, 3, linear.in_features), torch.randn(2, 3, linear.out_features)
    gradients = []
    with quantised.unrounded_inputs(model):
        for product in (linear, dense):
            x_leaf = x.clone().requires_grad_()
            product(x_leaf).backward(grad)
            gradients.append(x_leaf.grad)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(("kind", "embeddings"), [(8, False), (4, True)])
def test_a_published_folder_is_requantised(write_quantised, tmp_path, kind, embeddings, capsys):
    folder = write_quantised(GLM_TINY, tmp_path / "published", kind, embeddings)
    model = load(folder, bits=4)
    assert "weights of published are requantised to NF4" in capsys.readouterr().err
    assert isinstance(model.get_submodule(LINEAR), KINDS[4])
    assert type(model.lm_head) is nn.Linear
    assert model.lm_head.weight is model.transformer.word_embeddings.weight
    assert not model.config.quantization_bit
    reference = load(folder)
    quantise_layers(reference, 4)
    assert off(logits(model), logits(reference)) < 1e-5


# Memory of loading


_PEAK = """
import sys, threading, time, torch
from glmtune.models.loading import load_base_model
from glmtune.models.resolve import GLM_TINY

def anonymous():
    with open("/proc/self/status") as status:
        return 1024 * int(next(line for line in status if line.startswith("RssAnon")).split()[1])

folder, bits = sys.argv[1], int(sys.argv[2])
load_base_model(GLM_TINY, dtype=torch.bfloat16, bits=bits)  # what the libraries take
before, peak, done = anonymous(), 0, threading.Event()

def watch():
    global peak
    while not done.wait(0.001):
        peak = max(peak, anonymous())

thread = threading.Thread(target=watch)
thread.start()
model = load_base_model(folder, dtype=torch.bfloat16, bits=bits, quantize_head=True)
done.set()
thread.join()
print(peak - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
@pytest.mark.parametrize(("bits", "form"), [(4, "bin"), (8, "safetensors")])
def test_loading_holds_the_quantised_weights_and_one_more(bits, form, tmp_path):
    """In a process of its own: never a shard, let alone the model, as floats."""
    if bits == 4 and Version(bnb.__version__) < Version("0.50"):
        pytest.skip("this bitsandbytes takes 128 bytes a value to round a tensor on a CPU")
    config = ChatGLMConfig(
        vocab_size=4096, hidden_size=256, num_layers=24, num_attention_heads=4,
        inner_hidden_size=1024, bos_token_id=3572, eos_token_id=3573,
    )  # fmt: skip
    folder = tmp_path / "base"
    write_random_model(folder, config, num_shards=3)
    if form == "safetensors":
        model = load_base_model(str(folder), dtype=torch.float16)
        shutil.rmtree(folder)
        model.save_pretrained(folder, max_shard_size="10MB")
    # Without the variable the C library keeps freed blocks, more or less by chance.
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _PEAK, str(folder), str(bits)],
        capture_output=True, text=True, check=True, timeout=300,
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"},
    )  # fmt: skip
    in_the_end = shape(config).weight_bytes(torch.bfloat16, bits, quantize_head=True)
    rounding_one = 24 * config.inner_hidden_size * config.hidden_size  # bytes a value
    # Within what is left, a third of the model as floats, there is no room for a shard of them.
    assert int(done.stdout) < in_the_end + rounding_one + 10 * 2**20


# Refused settings


class TestRefused:
    def test_bitsandbytes_is_not_installed(self, monkeypatch):
        monkeypatch.setattr(quantised, "find_spec", lambda name: None)
        with pytest.raises(UserError, match=r"bit 4: needs bitsandbytes, .*pip install"):
            load(bits=4)

    def test_bitsandbytes_is_too_old(self, monkeypatch):
        monkeypatch.setattr(quantised, "version", lambda name: "0.46.1")
        with pytest.raises(UserError, match=r"bitsandbytes 0\.46\.1 is too old.*pip install"):
            load(bits=8)

    @pytest.mark.parametrize(("bits", "card", "needed"), [(8, (7, 0), "7.5"), (4, (5, 2), "6.0")])
    def test_the_card_is_too_old(self, monkeypatch, bits, card, needed):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: card)
        monkeypatch.setattr(quantised, "device_name", lambda device: "an old card")
        with pytest.raises(UserError, match=f"an old card is of .*, and {needed} is needed"):
            quantised.check_quantising(f"quantization_bit {bits}", bits, "cuda")

    def test_bits_for_a_folder_that_has_some(self, saved, bits):
        with pytest.raises(UserError, match=rf"quantization_bit 4: .* is in {bits} bits already"):
            load(saved[0], bits=4)

    def test_a_head_in_8_bits_on_published_integers(self, write_quantised, tmp_path):
        folder = write_quantised(GLM_TINY, tmp_path / "published", 8)
        with pytest.raises(UserError, match="quantize_head true: published is in 8 bits already"):
            load(folder, keep_integers=True, quantize_head=True)

    @pytest.mark.parametrize(
        ("settings", "method"),
        [
            ({"quant_method": "gptq", "bits": 4}, "gptq"),
            ({"bits": 4}, "without quant_method"),
            ({"quant_method": "bitsandbytes"}, "bitsandbytes"),
            (
                {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "q4"},
                "bitsandbytes' q4",
            ),
            (
                {"quant_method": "bitsandbytes", "load_in_8bit": True,
                 "llm_int8_has_fp16_weight": True},
                "bitsandbytes' llm_int8_has_fp16_weight",
            ),
        ],
    )  # fmt: skip
    def test_a_kind_of_quantisation_that_is_not_supported(self, saved, settings, method, tmp_path):
        folder = shutil.copytree(saved[0], tmp_path / "other")
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"] = settings
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(
            UserError, match=rf"quantization_config \({method}\) is not a supported"
        ) as caught:
            load(folder)
        assert "\n" not in str(caught.value)
