"""`layout` and the two switches that it replaces, in flags, recipes and old run folders."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from glmtune.bench.rows import random_rows
from glmtune.config.reading import read_config
from glmtune.config.settings import SETTINGS, TrainSettings
from glmtune.errors import UserError
from glmtune.hardware import Card
from glmtune.models.chatglm.configuration import ChatGLMConfig
from glmtune.training import first_step, loop, passes
from glmtune.training.planning.advice import find_remedies
from glmtune.training.planning.forecast import forecast

LAYOUTS = ("padded", "exact", "packed")
# The layout for each pair of the old switches; None: not given.
OLD_SWITCHES = {
    ("true", None): "packed",
    ("true", "false"): "packed",
    ("false", None): "exact",
    ("false", "true"): "exact",
    (None, "true"): "exact",
    ("false", "false"): "padded",
    (None, "false"): "auto",
}


def switches(packing, exact_batch):
    given = {"packing": packing, "exact_batch": exact_batch}
    return {name: value for name, value in given.items() if value is not None}


@pytest.mark.parametrize("pair", OLD_SWITCHES)
@pytest.mark.parametrize("verb", ["train", "plan", "bench train"])
def test_the_old_switches_are_read_as_a_layout_with_a_note(verb, pair, tmp_path, capsys):
    paths = {"dataset_path": "rows", "output_dir": "run"} if verb == "train" else {}
    given = switches(*pair)
    by_flags = read_config(SETTINGS[verb], None, given | paths)
    told = capsys.readouterr().err
    assert by_flags.layout == OLD_SWITCHES[pair]
    assert all(f"note: {name} {value} is " in told for name, value in given.items())
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("".join(f"{name}: {value}\n" for name, value in (given | paths).items()))
    assert read_config(SETTINGS[verb], str(recipe), {}) == by_flags


@pytest.mark.parametrize(
    "lines",
    [
        "packing: true\nlayout: padded\n",
        "packing: false\nlayout: packed\n",
        "exact_batch: true\nlayout: auto\n",
        "packing: true\nexact_batch: true\n",
        "packing: false\nexact_batch: false\nlayout: exact\n",
    ],
)
def test_what_contradicts_is_refused_in_one_line(lines, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(lines)
    with pytest.raises(UserError, match=r"recipe.yaml:\d: .* are one setting; keep one") as caught:
        read_config(TrainSettings, str(recipe), {})
    assert "\n" not in str(caught.value)


def test_a_flag_overrides_the_switches_of_a_recipe(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("dataset_path: r\noutput_dir: o\npacking: true\nexact_batch: false\n")
    assert read_config(TrainSettings, str(recipe), {"layout": "padded"}).layout == "padded"


@pytest.fixture
def quick(toy_run, monkeypatch):
    """Settings of a short run that may be made longer; no curve is drawn."""
    monkeypatch.setattr("glmtune.runlog.RunLog.plot_loss", lambda *_: None)
    return lambda **settings: toy_run(lr_scheduler_type="constant", **settings)


def write_as_before(recipe: Path, layout: str) -> None:
    """Rewrite a run's recipe with the two old switches."""
    settings = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    assert settings.pop("layout") == layout
    settings |= {"packing": layout == "packed", "exact_batch": layout == "exact"}
    settings |= {"remove_unused_columns": False}
    recipe.write_text(yaml.safe_dump(settings), encoding="utf-8")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_run_folder_with_the_old_switches_is_resumed(layout, quick, tmp_path, capsys):
    length = {"tokens_per_step": 64} if layout == "packed" else {}
    unbroken = loop.train(quick(layout=layout, output_dir=str(tmp_path / "unbroken"), **length))
    loop.train(quick(layout=layout, max_steps=2, **length))
    recipe = tmp_path / "run" / "recipe.yaml"
    write_as_before(recipe, layout)
    flags = {"resume_from_checkpoint": "true", "max_steps": "4"}
    resumed = loop.train(read_config(TrainSettings, str(recipe), flags))
    told = capsys.readouterr().err
    assert f"is layout {layout} here" in told
    assert "remove_unused_columns has no effect here" in told
    assert "differs" not in told
    assert [r["loss"] for r in resumed.log_history] == [r["loss"] for r in unbroken.log_history]
    assert yaml.safe_load(recipe.read_text(encoding="utf-8"))["layout"] == layout


def test_the_advice_of_the_check_before_the_first_step_works(quick, tmp_path, monkeypatch):
    """Also if the run's own recipe is used, which contains a pack length."""
    packed = quick(layout="packed", tokens_per_step=64)
    with monkeypatch.context() as patch:
        patch.setattr(first_step, "TOLERANCES", dict.fromkeys(first_step.TOLERANCES, (0, 0)))
        with pytest.raises(UserError, match="set layout padded and tokens_per_step none"):
            loop.train(packed)
    flags = {"layout": "padded", "tokens_per_step": "none", "overwrite_output_dir": "true"}
    recipe = str(tmp_path / "run" / "recipe.yaml")
    assert loop.train(read_config(TrainSettings, recipe, flags)).global_step == 4


def test_the_advice_after_a_fault_of_the_fast_pass_works(quick, tmp_path, monkeypatch):
    run_pass = passes.PackedPass.run
    loop.train(quick(layout="packed", tokens_per_step=64, max_steps=1))
    recipe = str(tmp_path / "run" / "recipe.yaml")
    flags = {"resume_from_checkpoint": "true", "max_steps": "3"}
    with monkeypatch.context() as patch:
        patch.setattr(passes.PackedPass, "run", lambda *args: run_pass(*args) * math.inf)
        advice = r"set layout padded and tokens_per_step none \(and resume_anyway true to resume\)"
        with pytest.raises(UserError, match=advice):
            loop.train(read_config(TrainSettings, recipe, flags))
    flags |= {"layout": "padded", "tokens_per_step": "none", "resume_anyway": "true"}
    assert loop.train(read_config(TrainSettings, recipe, flags)).global_step == 3


def test_a_padded_run_too_large_for_a_card_is_told_to_lie_end_to_end():
    rows, config = random_rows(ChatGLMConfig(), 500), ChatGLMConfig()
    settings = TrainSettings(
        dataset_path="rows", output_dir="run", layout="padded", gradient_checkpointing=False
    )

    def forecaster(card):
        return lambda changed: forecast(changed, config, torch.bfloat16, card, rows)

    card = Card.named("A10")
    gib = 0.99 * forecaster(card)(settings).needed_gib
    remedies = find_remedies(settings, forecaster(replace(card, gib=gib, free_gib=gib)))
    assert remedies[0].settings == {"layout": "exact"}
    assert str(remedies[0]).startswith("layout exact would take ")
