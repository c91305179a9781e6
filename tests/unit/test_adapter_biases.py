"""Adapters with trained biases."""

import shutil
from pathlib import Path

import pytest
import torch
from adapter_files import WEIGHTS, edit_config, edit_weights, fails
from peft import PeftModel
from safetensors.torch import load_file

from glmtune.adapters import (
    convert_adapter,
    load_adapter,
    merge,
    merge_adapter,
    read_adapter,
    save_adapter,
    verify_saved,
)
from glmtune.config.settings import MergeSettings
from glmtune.generation import Decoder, EncodedPrompt, GenerationSettings
from glmtune.models.loading import load_base_model


def biased(folder: Path, tiny_base, kind: str) -> dict[str, torch.Tensor]:
    """Turn an adapter into one that has biases, as PEFT 0.2 wrote them; returns these by module."""
    adapted = {"query_key_value"}
    biases = {
        name: torch.randn_like(parameter) / 4
        for name, parameter in tiny_base.named_parameters()
        if name.endswith(".bias") and (kind == "all" or name.split(".")[-2] in adapted)
    }
    edit_weights(
        folder, lambda tensors: tensors | {f"base_model.model.{n}": b for n, b in biases.items()}
    )
    edit_config(folder, bias=kind)
    return biases


@pytest.mark.parametrize("kind", ["lora_only", "all", "none"])
@pytest.mark.parametrize("form", ["todays_adapter", "fused_adapter"])
def test_biases_are_in_effect_wherever_the_adapter_is(
    tiny_folder, tmp_path, request, tiny_base, kind, form, capsys
):
    """By hand, in our own loader, in plain PEFT and merged: the same logits, none the base's."""
    folder = request.getfixturevalue(form)
    bare = merge.probe(load_base_model(str(tiny_folder), dtype=torch.float32))
    without = merge.probe(load_adapter(tiny_base, folder))

    def fresh():
        return load_base_model(str(tiny_folder), dtype=torch.float32)

    torch.manual_seed(0)
    biases = biased(folder, fresh(), kind)
    plain = shutil.copytree(folder, tmp_path / "plain")
    edit_weights(plain, lambda t: {k: v for k, v in t.items() if not k.endswith(".bias")})
    edit_config(plain, bias="none")

    def by_hand():
        model = fresh()
        for name, bias in biases.items():
            model.get_parameter(name).data.copy_(bias)
        return load_adapter(model, plain)

    expected = merge.probe(by_hand())
    assert (expected - without).abs().max() > 1e-2

    ours = load_adapter(fresh(), folder)
    torch.testing.assert_close(merge.probe(ours), expected)
    with ours.disable_adapter():
        torch.testing.assert_close(merge.probe(ours), bare)
    torch.testing.assert_close(merge.probe(ours), expected)

    # With both sides, biases are read once, and equal ones are stored once.
    prompt = [
        EncodedPrompt(
            [5, 6, 7, 8, tiny_base.config.gmask_token_id, tiny_base.config.bos_token_id], 1
        )
    ]

    def ids(decoder):
        return [more[0] for more in decoder.stream(prompt, GenerationSettings(max_new_tokens=9))]

    for bits in (16, 8):
        tuned = Decoder(ours, [], bits=bits)
        with ours.disable_adapter():
            beside = Decoder(ours, [], bits=bits, beside=tuned)
        assert ids(beside) == ids(Decoder(fresh(), [], bits=bits))
        assert ids(tuned) == ids(Decoder(by_hand(), [], bits=bits))

    convert_adapter(folder, tmp_path / "new")
    with_peft = PeftModel.from_pretrained(fresh(), tmp_path / "new").eval()
    torch.testing.assert_close(merge.probe(with_peft), expected)
    again = load_adapter(fresh(), tmp_path / "new")
    torch.testing.assert_close(merge.probe(again), expected)
    save_adapter(again, tmp_path / "saved", "chatglm-6b")
    assert verify_saved(again, tmp_path / "saved") == 0
    assert (
        load_file(tmp_path / "saved" / WEIGHTS).keys()
        == load_file(tmp_path / "new" / WEIGHTS).keys()
    )

    config = MergeSettings(
        base=str(tiny_folder),
        adapter=str(tmp_path / "new"),
        save_path=str(tmp_path / "m"),
    )
    merge_adapter(config)
    merged = load_base_model(str(tmp_path / "m"), dtype=torch.float32)
    torch.testing.assert_close(merge.probe(merged), expected, atol=1e-4, rtol=1e-4)


def test_biases_on_a_quantised_base_are_refused(
    tiny_folder, tmp_path, todays_adapter, write_quantised
):
    folder = write_quantised(tiny_folder, tmp_path / "int8", 8)
    biased(todays_adapter, load_base_model(str(tiny_folder), dtype=torch.float32), "lora_only")
    tiny_base = load_base_model(str(folder), dtype=torch.float32, keep_integers=True)
    with fails("a quantised base has no place for; .*glmtune merge"):
        load_adapter(tiny_base, todays_adapter)
    merge_adapter(
        MergeSettings(
            base=str(folder),
            adapter=str(todays_adapter),
            save_path=str(tmp_path / "merged"),
        )
    )


def test_biases_that_a_file_lost_are_told(todays_adapter, capsys):
    """An adapter of `bias: "lora_only"` as current PEFT writes it."""
    edit_config(todays_adapter, bias="lora_only")
    adapter = read_adapter(todays_adapter)
    assert "trained with bias 'lora_only', but holds no bias" in adapter.notices[0]
    assert adapter.config.bias == "none"
