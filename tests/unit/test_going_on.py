"""`train --adapter`: a run that goes on from an adapter, whoever trained it."""

import json
import shutil
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from adapter_files import edit_weights
from toys import adapter_weights, losses, randomise_adapter, records

from glmtune import cli
from glmtune.adapters import load_adapter, save_adapter
from glmtune.config.reading import read_config
from glmtune.config.settings import SETTINGS, PlanSettings, TrainSettings
from glmtune.data.dataset import load_dataset
from glmtune.data.token_rows import TokenRows
from glmtune.errors import UserError
from glmtune.models.families import family_of
from glmtune.models.likelihood import padded_sums
from glmtune.models.loading import load_base_model
from glmtune.models.resolve import GLM_TINY
from glmtune.training import loop
from glmtune.training.planning.preview import plan

pytestmark = pytest.mark.usefixtures("no_curve")


@pytest.fixture
def own_loss(toy_rows):
    """A function: the loss of all toy rows with the adapter of a folder, by the model's forward."""

    def loss(folder):
        model = load_adapter(load_base_model(GLM_TINY, dtype=torch.float32), folder)
        rule = family_of(model.config).row_rule(model.config)
        rows = TokenRows.from_table(load_dataset(toy_rows, rule)[0], rule)
        sums_R = padded_sums(model, rows, np.arange(len(rows)))
        return -sums_R.sum() / rows.num_labels_R.sum()

    return loss


@pytest.fixture
def all_rows_at_once(toy_run):
    """Settings of a run whose steps take every row, so that its first loss is that of all rows."""
    return lambda **settings: toy_run(
        **{"per_device_train_batch_size": 23, "gradient_accumulation_steps": 1, "max_steps": 1}
        | {"lora_dropout": 0.0}
        | settings
    )


def write_with_peft(folder, **settings):
    """An adapter as PEFT alone makes it, with settings of its own."""
    torch.manual_seed(3)
    defaults = {"task_type": "CAUSAL_LM", "r": 4, "target_modules": ["query_key_value"]}
    model = peft.get_peft_model(
        load_base_model(GLM_TINY, dtype=torch.float32), peft.LoraConfig(**defaults | settings)
    )
    randomise_adapter(model, std=0.2).save_pretrained(str(folder))
    return str(folder)


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_the_first_loss_is_that_of_the_adapter(
    all_rows_at_once, own_loss, strange_adapter, layout, tmp_path
):
    packed = {"tokens_per_step": 1024} if layout == "packed" else {}
    settings = all_rows_at_once(adapter=strange_adapter, layout=layout, **packed)
    wanted = own_loss(strange_adapter)
    assert losses(loop.train(settings))[0] == pytest.approx(wanted, rel=1e-5)
    new = loop.train(all_rows_at_once(layout=layout, output_dir=str(tmp_path / "new"), **packed))
    assert abs(losses(new)[0] - wanted) > 0.01


@pytest.mark.parametrize(
    "how",
    [
        {"use_rslora": True, "lora_alpha": 6},
        {"lora_alpha": 2.5, "rank_pattern": {"dense": 2}, "alpha_pattern": {"dense": 7},
         "target_modules": ["dense", "query_key_value"]},
        {"layers_to_transform": [1], "lora_alpha": 16},
        {"use_dora": True, "lora_alpha": 8},
    ],
    ids=["rslora", "patterns", "one layer", "dora"],
)  # fmt: skip
def test_an_adapter_that_peft_wrote_goes_on_and_keeps_its_form(
    all_rows_at_once, own_loss, how, tmp_path
):
    folder = write_with_peft(tmp_path / "theirs", **how)
    wanted = own_loss(folder)
    settings = all_rows_at_once(adapter=folder, max_steps=2)
    first, second = losses(loop.train(settings))
    assert first == pytest.approx(wanted, rel=1e-5)
    assert second < first
    theirs, ours = (
        json.loads((tmp_path / name / "adapter_config.json").read_text())
        for name in ("theirs", "run")
    )
    for name in ("r", "lora_alpha", *how):
        assert ours.get(name, theirs[name]) == theirs[name]
    assert adapter_weights(tmp_path / "run").keys() == adapter_weights(tmp_path / "theirs").keys()
    assert own_loss(tmp_path / "run") < wanted


def test_a_dora_adapter_is_evaluated_by_its_own_modules(toy_run, tmp_path):
    folder = write_with_peft(tmp_path / "theirs", use_dora=True)
    lines = Path(GLM_TINY, "general_en.jsonl").read_text().splitlines()[:8]
    (tmp_path / "few.jsonl").write_text("\n".join(lines))
    settings = {"adapter": folder, "eval_ratio": 0.3, "general_set": str(tmp_path / "few.jsonl")}
    history = loop.train(toy_run(**settings, max_steps=1)).log_history
    assert [record["step"] for record in history if "general" in record] == [0, 1]
    assert len([record for record in history if "eval_loss" in record]) == 1


def test_a_dora_adapter_is_refused_where_rows_lie_end_to_end(all_rows_at_once, tmp_path):
    folder = write_with_peft(tmp_path / "theirs", use_dora=True)
    with pytest.raises(UserError, match=r"is a DoRA adapter.*set layout padded"):
        loop.train(all_rows_at_once(adapter=folder, layout="exact"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("how", "what"),
    [
        ({"bias": "lora_only"}, "has bias"),
        ({"lora_bias": True}, "has lora_bias"),
        ({"init_lora_weights": "olora"}, "has init_lora_weights 'olora'"),
    ],
)
def test_what_is_no_update_of_a_linear_is_refused(all_rows_at_once, how, what, tmp_path):
    folder = write_with_peft(tmp_path / "theirs", **how)
    with pytest.raises(UserError, match=f"{what}.* and only plain LoRA and DoRA are trained"):
        loop.train(all_rows_at_once(adapter=folder))


def test_linears_outside_the_layers_are_refused(all_rows_at_once, tmp_path):
    folder = write_with_peft(tmp_path / "theirs", target_modules=["dense", "lm_head"])
    edit_weights(
        tmp_path / "theirs", lambda found: {k: t for k, t in found.items() if ".lora_" in k}
    )
    with pytest.raises(UserError, match="adapts lm_head as well"):
        loop.train(all_rows_at_once(adapter=folder))


def test_a_resumed_run_is_the_unbroken_run(toy_run, strange_adapter, tmp_path, capsys):
    mine = shutil.copytree(strange_adapter, tmp_path / "mine")
    settings = {"adapter": str(mine), "save_steps": 2, "lr_scheduler_type": "cosine"}
    unbroken = loop.train(toy_run(output_dir=str(tmp_path / "unbroken"), **settings))
    recipe = str(tmp_path / "unbroken" / "recipe.yaml")
    flags = {"output_dir": str(tmp_path / "run")}
    flags["resume_from_checkpoint"] = str(tmp_path / "unbroken" / "checkpoint-2")
    again = read_config(TrainSettings, recipe, flags)
    assert again.adapter == str(mine)

    def is_same(resumed):
        assert records(resumed) == records(unbroken)
        ours, theirs = adapter_weights(tmp_path / "run"), adapter_weights(tmp_path / "unbroken")
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
        shutil.rmtree(tmp_path / "run")

    is_same(loop.train(again))
    shutil.move(mine, tmp_path / "elsewhere")
    capsys.readouterr()
    is_same(loop.train(again))
    assert f"adapter: {mine} is no longer there" in capsys.readouterr().err
    model = load_adapter(load_base_model(GLM_TINY, dtype=torch.float32), strange_adapter)
    save_adapter(randomise_adapter(model, std=0.1), mine, "glm-tiny")
    with pytest.raises(UserError, match=r"another recipe: adapter continued \w{16} \(now \w{16}"):
        loop.train(again)
    with pytest.raises(UserError, match=r"adapter continued \w{16} \(now not set\)"):
        loop.train(again.model_copy(update={"adapter": None}))


def test_a_run_that_began_with_a_new_adapter_does_not_resume_with_another(toy_run, strange_adapter):
    loop.train(toy_run(max_steps=1))
    with pytest.raises(UserError, match=r"adapter continued not set \(now \w{16}\)"):
        loop.train(toy_run(max_steps=2, adapter=strange_adapter, resume_from_checkpoint="true"))


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"lora_rank": 4}, "lora_rank 4: the adapter .* has 8, .* leave lora_rank out"),
        ({"lora_alpha": 16}, "lora_alpha 16: the adapter .* has 32"),
        ({"lora_target": ("dense",)}, "lora_target dense: the adapter .* has query_key_value"),
    ],
)
def test_another_rank_alpha_or_target_is_refused(toy_run, strange_adapter, given, told, tmp_path):
    with pytest.raises(UserError, match=told):
        loop.train(toy_run(adapter=strange_adapter, **given))
    assert not (tmp_path / "run").exists()


def test_the_same_rank_alpha_and_target_are_taken(toy_run, strange_adapter, tmp_path):
    same = {"lora_rank": 8, "lora_alpha": 32, "lora_target": ("query_key_value",)}
    loop.train(toy_run(adapter=strange_adapter, max_steps=1, **same))
    loop.train(
        toy_run(adapter=str(tmp_path / "run"), max_steps=1, output_dir=str(tmp_path / "next"))
    )
    recipe = read_config(TrainSettings, str(tmp_path / "next" / "recipe.yaml"), {})
    assert (recipe.lora_rank, recipe.lora_alpha, recipe.lora_target) == tuple(same.values())
    assert "lora_alpha: 32\n" in (tmp_path / "next" / "recipe.yaml").read_text()


def test_an_adapter_of_another_base_is_refused(toy_run, todays_adapter, tmp_path):
    with pytest.raises(UserError, match="belongs to a base of another hidden size"):
        loop.train(toy_run(adapter=str(todays_adapter)))
    assert not (tmp_path / "run").exists()


def test_an_adapter_without_effect_is_refused(toy_run, strange_adapter, tmp_path):
    model = load_adapter(load_base_model(GLM_TINY, dtype=torch.float32), strange_adapter)
    save_adapter(randomise_adapter(model, std=0.0), tmp_path / "nothing", "glm-tiny")
    with pytest.raises(UserError, match="this adapter changes nothing"):
        loop.train(toy_run(adapter=str(tmp_path / "nothing")))


@pytest.mark.parametrize("place", ["run", "run/checkpoint-3"])
def test_a_run_does_not_overwrite_the_adapter_it_goes_on_from(toy_run, place, tmp_path):
    with pytest.raises(ValueError, match="output_dir is where the adapter lies"):
        toy_run(adapter=str(tmp_path / place), overwrite_output_dir=True)


def test_a_plan_takes_rank_and_linears_of_the_adapter(toy_rows, tmp_path):
    folder = write_with_peft(tmp_path / "theirs", r=2, target_modules=["dense"])
    settings = {"base": GLM_TINY, "use_cpu": True, "dataset_path": toy_rows}
    found = [
        plan(PlanSettings(**settings, **more))["adapter_gib"]
        for more in ({"adapter": folder}, {"lora_rank": 2, "lora_target": ("dense",)}, {})
    ]
    assert found[0] == found[1] < found[2]


def test_an_adapter_beside_the_sections_is_not_the_one_to_go_on_from(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("adapter: out\ntrain: {dataset_path: rows, output_dir: out}\ninfer: {}\n")
    assert read_config(SETTINGS["train"], str(path), {}).adapter is None
    assert read_config(SETTINGS["infer"], str(path), {"data_path": "a.json"}).adapter == "out"
    path.write_text("train: {dataset_path: rows, output_dir: out, adapter: old}\n")
    for verb in ("train", "plan"):
        assert read_config(SETTINGS[verb], str(path), {}).adapter == "old"


@pytest.mark.parametrize("word", ["lora", "qlora"])
def test_the_kinds_of_adapters_of_axolotl_are_no_folders(word, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = {"dataset_path": "rows", "output_dir": "out", "adapter": word}
    read = read_config(SETTINGS["train"], None, flags)
    assert read.adapter is None
    assert read.quantization_bit == ("4" if word == "qlora" else None)
    assert "note: adapter " in capsys.readouterr().err
    (tmp_path / word).mkdir()
    assert read_config(SETTINGS["train"], None, flags).adapter == word


def test_an_adapter_that_is_not_there_is_told_at_once(toy_rows, capsys):
    line = ["train", "--dataset_path", toy_rows, "--output_dir", "new", "--adapter", "./no"]
    assert cli.main([*line, "--base", "glm-tiny"]) == 2
    assert "no: no such folder" in capsys.readouterr().err


def test_a_recipe_that_is_checked_names_its_adapter(toy_rows, strange_adapter, tmp_path, capsys):
    path = tmp_path / "recipe.yaml"
    begin = f"train:\n  base: glm-tiny\n  dataset_path: {toy_rows}\n  output_dir: {tmp_path}/new\n"
    path.write_text(f"{begin}  adapter: {strange_adapter}\n  lora_rank: 4\n  use_cpu: true\n")
    assert cli.main(["doctor", str(path)]) == 1
    assert "lora_rank 4: the adapter" in capsys.readouterr().out


def test_nothing_left_names_what_goes_on(toy_run, tmp_path, capsys):
    """The advice of the error, followed, trains."""
    loop.train(toy_run(max_steps=2))
    settings = toy_run(max_steps=2, resume_from_checkpoint="true")
    with pytest.raises(UserError, match="nothing is left to train") as error:
        loop.train(settings)
    _, _, advice = str(error.value).partition("a new schedule, ")
    name, adapter, other, _ = advice.partition(";")[0].split()
    assert (name, other) == ("--adapter", "--output_dir")
    new = replace_settings(settings, adapter=adapter, output_dir=str(tmp_path / "NEW"))
    assert loop.train(new).global_step == 2


def replace_settings(settings, **changes):
    return TrainSettings(**settings.model_dump() | {"resume_from_checkpoint": None} | changes)
