"""Old names of settings are read without a note: commands and run folders have them."""

import pytest

from glmtune.config.reading import read_config, shared_setting
from glmtune.config.settings import SETTINGS
from glmtune.errors import UserError

# Required settings of a verb.
NEEDED = {
    "infer": {"data_path": "a.json"}, "compare": {"data_path": "a.json"}, "chat": {}, "check": {},
    "merge": {"save_path": "out"}, "doctor": {}, "replay": {"bundle": "crash-1"},
    "train": {"dataset_path": "rows", "output_dir": "run"},
}  # fmt: skip
WITH_ADAPTER = ("infer", "compare", "chat", "check", "merge")


@pytest.mark.parametrize("verb", NEEDED)
def test_a_flag_of_before_is_the_one_of_today(verb, capsys):
    old, new = {"chatglm_path": "base"}, {"base": "base"}
    if verb in WITH_ADAPTER:
        old, new = old | {"model_path": "output"}, new | {"adapter": "output"}
    read = read_config(SETTINGS[verb], None, NEEDED[verb] | old)
    assert read == read_config(SETTINGS[verb], None, NEEDED[verb] | new)
    assert read.base == "base"
    assert capsys.readouterr().err == ""


def test_a_recipe_of_before_is_read_and_one_of_today_is_written(tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    sections = "infer:\n  data_path: a.json\n  model_path: output\n"
    recipe.write_text(f"chatglm_path: folder\n{sections}")
    read = read_config(SETTINGS["infer"], str(recipe), {})
    assert (read.base, read.adapter) == ("folder", "output")
    assert shared_setting(str(recipe), "base") == "folder"
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "flags", [{"base": "a", "chatglm_path": "b"}, {"chatglm_path": "a", "base": "a"}]
)
def test_both_names_at_once_are_refused(flags):
    with pytest.raises(UserError, match=r"--.* and --.* are one setting; keep one"):
        read_config(SETTINGS["chat"], None, flags)


def test_the_source_of_a_mistake_is_the_name_that_was_given():
    with pytest.raises(UserError, match=r"--model_path .*the base is --base FOLDER"):
        read_config(SETTINGS["replay"], None, {"bundle": "crash-1", "model_path": "output"})


def test_every_verb_with_a_base_or_an_adapter_calls_it_so():
    for verb, settings in SETTINGS.items():
        names = settings.model_fields.keys()
        assert not names & {"chatglm_path", "model_path", "base_model", "lora_path"}, verb
