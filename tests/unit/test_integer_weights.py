"""Folders of packed integers: loaded, computed with, dequantised, saved and refused."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM

import glmtune.models  # noqa: F401
from glmtune.errors import UserError
from glmtune.models.integer_weights import IntegerEmbedding, IntegerLinear, IntegerModule
from glmtune.models.loading import load_base_model

KINDS = {"int8": (8, False), "int4": (4, False), "int4-qe": (4, True), "int8-qe": (8, True)}
PAD = 3
IDS = torch.tensor([[5, 17, 900, 1001, 1004, 42, 7], [PAD, PAD, 8, 1001, 1004, 11, 1005]])
QKV = "transformer.layers.1.attention.query_key_value"
EMBEDDING, HEAD = "transformer.word_embeddings", "lm_head"


@pytest.fixture(scope="module")
def folders(tiny_folder, write_quantised, tmp_path_factory):
    place = tmp_path_factory.mktemp("packed")
    return {kind: write_quantised(tiny_folder, place / kind, *KINDS[kind]) for kind in KINDS}


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def folder(folders, kind):
    return folders[kind]


def load(folder, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def read(folder):
    return torch.load(folder / "pytorch_model.bin", weights_only=True)


def by_hand(weight, scale, bits):
    """A packed weight in float64, by arithmetic other than the package's."""
    if bits == 4:
        byte = weight.view(torch.uint8).int()
        half = torch.stack((byte // 16, byte % 16), dim=2).flatten(1)
        weight = half - 16 * (half > 7)
    return weight.double() * scale.double()[:, None]


@torch.no_grad()
def logits(model):
    return model(IDS).logits[IDS != PAD]


@torch.no_grad()
def test_a_packed_model_computes_with_what_its_integers_stand_for(kind, folder, tiny_folder):
    bits, embeddings = KINDS[kind]
    tensors, reference, num_packed = read(folder), load(tiny_folder).double(), 0
    for name, module in reference.named_modules():
        if f"{name}.weight_scale" in tensors:
            num_packed += 1
            pair = (tensors[f"{name}.weight"], tensors[f"{name}.weight_scale"])
            module.weight = nn.Parameter(by_hand(*pair, bits))
    assert num_packed == 4 * 4 + 2 * embeddings
    model, expected = load(folder), logits(reference).float()
    assert sum(isinstance(module, IntegerModule) for module in model.modules()) == num_packed
    assert (logits(model) - expected).abs().max() < 1e-5
    assert (logits(model.dequantize()) - expected).abs().max() < 1e-5
    assert (logits(reference) - logits(load(tiny_folder))).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_and_dequantised_give_the_same_bits(folder, dtype):
    model = load(folder, dtype)
    packed = logits(model)
    assert packed.dtype == model.dtype == dtype
    assert torch.equal(logits(model.dequantize()), packed)


def test_integers_and_scales_keep_their_types_and_little_memory(folders):
    sizes = {}
    for kind, folder in folders.items():
        model = load(folder)
        assert {buffer.dtype for buffer in model.buffers()} == {torch.float16}
        sizes[kind] = sum(p.nbytes for p in model.parameters() if p.dtype == torch.int8)
    in_layers, in_embedding = 4 * 12 * 64 * 64, 1024 * 64
    assert sizes == {
        "int8": in_layers,
        "int4": in_layers // 2,
        "int8-qe": in_layers + in_embedding,
        "int4-qe": (in_layers + in_embedding) // 2,
    }


@pytest.mark.parametrize("edit", [lambda tensors: None, lambda tensors: drop(tensors, HEAD)])
def test_a_packed_head_is_the_embedding(folders, edit, tmp_path):
    """Kept once in memory, whether the folder holds it once or twice."""
    folder = shutil.copytree(folders["int4-qe"], tmp_path / "head")
    change(edit)(folder)
    model, told = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(told.values()), "nothing is reported missing"
    head, embedding = model.lm_head, model.transformer.word_embeddings
    assert isinstance(head, IntegerLinear)
    assert isinstance(embedding, IntegerEmbedding)
    assert head.weight is embedding.weight
    assert head.weight_scale is embedding.weight_scale
    assert torch.equal(logits(model), logits(load(folders["int4-qe"])))
    model.dequantize()
    assert model.lm_head.weight is model.transformer.word_embeddings.weight


def drop(tensors, name):
    for key in ("weight", "weight_scale"):
        del tensors[f"{name}.{key}"]


def test_a_packed_head_of_its_own_stays_so(folders, tmp_path):
    folder = shutil.copytree(folders["int4-qe"], tmp_path / "own-head")
    change(lambda t: t.update({f"{HEAD}.weight_scale": 2 * t[f"{HEAD}.weight_scale"]}))(folder)
    doubled = logits(load(folder))
    torch.testing.assert_close(doubled, 2 * logits(load(folders["int4-qe"])))
    torch.testing.assert_close(logits(load(folder).dequantize()), doubled)


def test_save_and_load_packed(kind, folder, tmp_path):
    model = load(folder)
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    tied = again.lm_head.weight is again.transformer.word_embeddings.weight
    assert tied is KINDS[kind][1], "the tiny model has a head of its own"
    assert again.config.quantization_bit == KINDS[kind][0]
    assert torch.equal(logits(again), logits(model))


def test_a_dequantised_model_is_a_plain_one(folder, tiny_folder, tmp_path):
    model = load(folder, torch.float16).dequantize()
    model.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    assert not settings.get("quantization_bit")
    assert not settings.get("quantization_embeddings")
    plain = load(tmp_path)
    assert not list(plain.buffers())
    assert [name for name, _ in plain.named_parameters()] == [
        n for n, _ in model.named_parameters()
    ]
    assert torch.equal(logits(plain), logits(model.float()))
    assert torch.equal(logits(plain.dequantize()), logits(plain)), "nothing is left to do"


@pytest.mark.parametrize(
    "keep_integers, done", [(True, "stay packed"), (False, "are dequantised to float32")]
)
def test_a_line_says_what_becomes_of_integer_weights(folders, keep_integers, done, capsys):
    model = load_base_model(str(folders["int4"]), dtype=torch.float32, keep_integers=keep_integers)
    assert any(isinstance(module, IntegerModule) for module in model.modules()) is keep_integers
    assert f"note: the int4 weights of int4 {done}\n" in capsys.readouterr().err


def test_a_packed_model_generates_what_its_floats_do(folders):
    model = load(folders["int4-qe"])
    made = model.generate(IDS[:1, :5], max_new_tokens=5, do_sample=False)
    assert made.shape == (1, 10)
    assert torch.equal(made, model.dequantize().generate(IDS[:1, :5], max_new_tokens=5))


def test_an_adapter_learns_on_packed_weights_as_on_floats(folder):
    def gradients(model):
        torch.manual_seed(0)
        settings = LoraConfig(r=2, target_modules=["query_key_value", "dense"])
        tuned = get_peft_model(model, settings)
        tuned(IDS, labels=IDS.where(torch.arange(IDS.shape[1]) > 4, -100)).loss.backward()
        return {n: p.grad for n, p in tuned.named_parameters() if p.requires_grad}

    packed, plain = gradients(load(folder)), gradients(load(folder).dequantize())
    assert len(packed) == 2 * 2 * 4
    for name, gradient in packed.items():
        assert torch.equal(gradient, plain[name])
    assert max(gradient.abs().max() for gradient in packed.values()) > 0


# Refused folders


def change(edit):
    def apply(folder):
        tensors = read(folder)
        edit(tensors)
        torch.save(tensors, folder / "pytorch_model.bin")

    return apply


def retype(name, dtype):
    return change(lambda tensors: tensors.update({name: tensors[name].to(dtype)}))


def reconfigure(**settings):
    def apply(folder):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | settings))

    return apply


@pytest.mark.parametrize(
    "kind, damage, message",
    [
        (
            "int8",
            change(lambda tensors: tensors.pop(f"{QKV}.weight_scale")),
            rf"missing {QKV}\.weight_scale;",
        ),
        (
            "int8",
            change(lambda tensors: tensors.update({f"{QKV}.weight_scale": torch.ones(3).half()})),
            rf"misshapen {QKV}\.weight_scale \(3,\) instead of \(192,\);",
        ),
        (
            "int4",
            retype(f"{QKV}.weight_scale", torch.float32),
            rf"mistyped {QKV}\.weight_scale float32 instead of float16;",
        ),
        (
            "int4",
            retype(f"{QKV}.weight_scale", torch.int32),
            rf"mistyped {QKV}\.weight_scale int32 instead of float16;",
        ),
        (
            "int8",
            retype(f"{QKV}.weight", torch.float16),
            rf"mistyped {QKV}\.weight float16 instead of int8;",
        ),
        (
            "int4",
            retype(f"{EMBEDDING}.weight", torch.int8),
            rf"mistyped {EMBEDDING}\.weight int8 instead of float32;",
        ),
        (
            "int8",
            reconfigure(quantization_bit=4),
            r"misshapen .* \(192, 64\) instead of \(192, 32\)",
        ),
        (
            "int4",
            reconfigure(quantization_bit=8),
            r"misshapen .* \(192, 32\) instead of \(192, 64\)",
        ),
        ("int4", reconfigure(quantization_bit=0), r"extra .*weight_scale.* misshapen .*weight "),
        ("int8", reconfigure(quantization_bit=None), r"extra .*weight_scale.* mistyped .*weight "),
        (
            "int4-qe",
            reconfigure(quantization_embeddings=False),
            rf"extra .*{EMBEDDING}\.weight_scale",
        ),
        ("int4", reconfigure(quantization_embeddings=True), rf"missing {EMBEDDING}\.weight_scale"),
        ("int4", reconfigure(quantization_bit=5), "quantization_bit 5 is not known"),
        (
            "int4",
            reconfigure(quantization_config={"quant_method": "awq"}),
            r"\(awq\) is not a supported",
        ),
    ],
)
@pytest.mark.parametrize("form", ["bin", "safetensors"])
def test_folders_that_do_not_fit_are_refused_in_one_line(
    folders, kind, damage, message, form, tmp_path
):
    folder = shutil.copytree(folders[kind], tmp_path / "damaged")
    damage(folder)
    if form == "safetensors":
        tensors = {name: tensor.clone() for name, tensor in read(folder).items()}
        save_file(tensors, folder / "model.safetensors")
        (folder / "pytorch_model.bin").unlink()
    with pytest.raises(UserError, match=message) as caught:
        load(folder)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=message):
        load_base_model(str(folder))
