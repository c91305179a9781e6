"""The check-up of an adapter: figures computed again, verdicts, three sources of rows."""

import json
import math
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from toys import ToyTokenizer, draw_rows, save_rows

from glmtune.adapters import attach_lora, load_adapter, save_adapter
from glmtune.cli import main
from glmtune.config.reading import write_recipe
from glmtune.config.settings import TrainSettings
from glmtune.data.token_rows import TokenRows
from glmtune.errors import UserError
from glmtune.evaluation import answers, checkup
from glmtune.evaluation.checkup import Answers, Checkup, Divergence, LayerChange, repeated_share
from glmtune.evaluation.probes import held_out_probes
from glmtune.models.likelihood import Probe
from glmtune.models.loading import load_base_model

PROBES = [Probe([5, 6, 7, 1001, 1004], [8, 9, 1005]), Probe([40, 1001, 1004], [41, 1005])]


@pytest.fixture
def tuned(tiny_folder):
    base = load_base_model(str(tiny_folder), dtype=torch.float32)
    return load_adapter(base, tiny_folder / "adapter_peft_0_2_plain")


def test_the_norm_is_that_of_the_whole_update(tuned):
    changes = checkup.measure_layers(tuned)
    assert len(changes) == 8  # query_key_value and dense of four layers
    for change in changes:
        linear = tuned.get_base_model().get_submodule(change.module)
        update = linear.get_delta_weight("default")
        assert change.norm == pytest.approx(update.norm().item(), rel=1e-4)
        weight = linear.base_layer.weight.norm().item()
        assert change.relative == pytest.approx(update.norm().item() / weight, rel=1e-4)


def test_packed_weights_have_a_norm_too(tiny_folder, write_quantised, tmp_path, tuned):
    folder = write_quantised(tiny_folder, tmp_path / "int8", 8)
    packed = load_base_model(str(folder), dtype=torch.float32, keep_integers=True)
    changes = checkup.measure_layers(load_adapter(packed, tiny_folder / "adapter_peft_0_2_plain"))
    for found, exact in zip(changes, checkup.measure_layers(tuned), strict=True):
        assert found.relative == pytest.approx(exact.relative, rel=0.02)


@pytest.mark.parametrize("bits, tolerance", [(8, 0.02), (4, 0.05)])
def test_weights_of_bitsandbytes_have_a_norm_too(tiny_folder, tuned, bits, tolerance):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    quantised = load_base_model(str(tiny_folder), dtype=torch.float32, bits=bits)
    adapted = load_adapter(quantised, tiny_folder / "adapter_peft_0_2_plain")
    changes = checkup.measure_layers(adapted)
    for found, exact in zip(changes, checkup.measure_layers(tuned), strict=True):
        assert found.relative == pytest.approx(exact.relative, rel=tolerance)


@pytest.mark.parametrize("computes, place", [(False, "cpu"), (True, "cuda")])
def test_a_model_that_computes_is_on_the_device_whatever_its_decoder_rounds(
    monkeypatch, tiny_folder, computes, place
):
    """A model in CPU memory for a decoder with 8 or 4 bits is not."""
    asked = []

    def load(base, *, device, **_):
        asked.append(device.type)
        raise UserError("seen")

    monkeypatch.setattr(answers, "load_base_model", load)
    monkeypatch.setattr(answers, "load_tokenizer", lambda base: SimpleNamespace())
    cuda = torch.device("cuda")
    subject = answers.ModelChoice(str(tiny_folder), None, cuda, torch.bfloat16, True, None, False)
    with pytest.raises(UserError, match="seen"):
        subject.load(computes)
    assert asked == [place]


def test_divergence_is_the_sum_over_the_answers_tokens(tuned):
    with torch.no_grad():
        numbers = []
        for prompt, answer in PROBES:
            ids = torch.tensor([prompt + answer])
            with tuned.disable_adapter():
                base = tuned(ids).logits[0].log_softmax(-1)
            own = tuned(ids).logits[0].log_softmax(-1)
            for place, token in enumerate(answer, start=len(prompt) - 1):
                p, q = own[place], base[place]
                numbers.append((
                    (p.exp() * (p - q)).sum(), p.argmax() != q.argmax(), -q[token], -p[token],
                ))  # fmt: skip
        wanted = torch.tensor(numbers).mean(0).tolist()
    found = checkup.measure_divergence(tuned, PROBES)
    assert [found.kl, found.other_tokens, found.base_loss, found.tuned_loss] == pytest.approx(
        wanted, rel=1e-2
    )
    assert found.kl > 1e-5


@pytest.mark.parametrize(
    ("ids", "share"),
    [([], 0), ([1, 2, 3], 0), ([1, 2, 3, 4, 5], 0), ([1] * 8, 0.8), ([1, 2, 3, 4] * 2, 0.2)],
)
def test_repeated_share_of_an_answer(ids, share):
    assert repeated_share(ids) == pytest.approx(share)


def found(kl=0.5, other=0.1, base_loss=2.0, tuned_loss=1.0, relative=0.1, **rest):
    return Checkup(
        [LayerChange("transformer.layers.0.mlp.dense", 1.0, relative)],
        16,
        Divergence(kl, other, base_loss, tuned_loss),
        **{"tuned": Answers(1.0, 0.0), "of_task": True} | rest,
    )


@pytest.mark.parametrize(
    ("checked", "words"),
    [
        (found(), "fine"),
        (found(relative=None), "fine"),
        (Checkup([], 0, None), "changes nothing"),
        (found(kl=1e-4, other=0), "changes nothing"),
        (found(kl=1e-4, other=0.01), "fine"),
        (
            found(relative=1.5),
            r"too much: in transformer\.layers\.0\.mlp\.dense it adds 1\.5 times",
        ),
        (found(relative=math.nan), "too much: in transformer"),
        (found(tuned_loss=2.6), r"too much: it makes these answers less likely: loss 2\.60"),
        (found(tuned_loss=math.nan), "less likely"),
        (found(tuned_loss=2.6, of_task=False), "fine"),  # questions that it was not trained for
        (found(tuned=Answers(0.25, 0)), "too much: only 25% of its answers come to an end"),
        (found(tuned=Answers(0.25, 0), base=Answers(0.25, 0)), "fine"),  # as the base does
        (found(tuned=Answers(1, 0.4)), r"too much: it repeats itself \(40% of 4-grams\)"),
        (found(tuned=Answers(1, 0.4), base=Answers(1, 0.5)), "fine"),
    ],
)
def test_verdict_of_each_kind_of_change(checked, words):
    assert checked.is_fine == (words == "fine")
    assert re.search(words, checked.verdict)


def test_rows_held_out_are_spread_and_have_answers(word_tokenizer):
    lengths = np.array([5, 4, 6, 5, 7])
    rows = TokenRows(
        np.arange(lengths.sum()),
        np.concatenate(([0], lengths.cumsum())),
        np.array([3, 4, 3, 3, 3]),
        word_tokenizer.row_rule,
    )
    asked = held_out_probes(rows, np.array([0, 1, 3, 4]), 2)
    assert [probe.prompt_ids[0] for probe in asked.probes] == [0, 20]
    assert asked.probes[0].answer_ids == [3, 4]
    assert held_out_probes(rows, np.array([1]), 2) is None
    assert held_out_probes(rows, np.array([], dtype=int), 2) is None


@pytest.fixture
def checking(tiny_folder, word_tokenizer, monkeypatch, tmp_path):
    """A command line that checks the adapter of 2023 on the tiny model."""
    monkeypatch.setattr("glmtune.evaluation.answers.load_tokenizer", lambda base: word_tokenizer)
    adapter = shutil.copytree(tiny_folder / "adapter_peft_0_2_plain", tmp_path / "run")
    options = {"base": tiny_folder, "use_cpu": "true", "max_new_tokens": 6}
    return ["check", str(adapter), *(f"--{name}={value}" for name, value in options.items())]


def test_check_of_an_adapter_of_2023(checking, tmp_path, capsys):
    code = main([*checking, "--json_path", str(tmp_path / "found.json")])
    told = json.loads((tmp_path / "found.json").read_text())
    out = capsys.readouterr().out
    assert "8 of 16 linears" in out
    assert "8 questions that come with glmtune" in out
    assert "not trained for these, so this decides nothing" in out
    assert told["verdict"] in out
    assert code == (0 if told["is_fine"] else 1)
    assert len(told["layers"]) == 8
    assert told["tuned"].keys() == told["base"].keys() == {"stopped", "repetition"}


def test_check_on_records_of_the_users_own(checking, records_file, capsys):
    main([*checking, f"--data_path={records_file}", "--limit=2"])
    assert f"2 records of {records_file}" in capsys.readouterr().out


def test_check_on_rows_that_the_run_held_out(checking, tmp_path, capsys):
    rows = save_rows(draw_rows([(1, 2)] * 20, ToyTokenizer), tmp_path / "rows")
    recipe = TrainSettings(dataset_path=rows, output_dir="x", eval_ratio=0.25)
    write_recipe(recipe, str(tmp_path / "run" / "recipe.yaml"))
    main(checking)
    assert "5 rows that the run held out" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "rows")
    main(checking)
    told = capsys.readouterr()
    assert "8 questions that come with glmtune" in told.out
    assert "note: the run's rows are not available" in told.err


def test_an_adapter_that_is_zero_changes_nothing(checking, tiny_folder, tmp_path, capsys):
    model = attach_lora(load_base_model(str(tiny_folder)), rank=4)
    save_adapter(model, tmp_path / "fresh", "tiny")
    assert main(["check", str(tmp_path / "fresh"), *checking[2:]]) == 1
    assert "verdict  changes nothing: train for more steps" in capsys.readouterr().out


def test_an_adapter_that_was_blown_up(checking, tiny_folder, tmp_path, capsys):
    model = load_adapter(load_base_model(str(tiny_folder)), tiny_folder / "adapter_peft_0_2_plain")
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight *= 1000
    save_adapter(model, tmp_path / "blown", "tiny")
    assert main(["check", str(tmp_path / "blown"), *checking[2:]]) == 1
    assert "changes too much: in transformer.layers.0" in capsys.readouterr().out


def test_what_fails_after_a_run_fails_nothing(tuned, word_tokenizer, monkeypatch, capsys):
    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    monkeypatch.setattr(checkup, "measure_divergence", full)
    rows = TokenRows(np.arange(2), np.array([0, 2]), np.array([2]), word_tokenizer.row_rule)
    checkup.check_after_training(tuned, word_tokenizer, rows, np.array([], dtype=int))
    told = capsys.readouterr()
    assert "note: no check-up (CUDA out of memory.); `glmtune check` makes it" in told.err
    assert told.out == ""
