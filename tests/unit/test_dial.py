"""Scales of an adapter: scored on one loaded model, recommended, and written."""

import contextlib
import io
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import peft
import pytest
import torch
from adapter_files import edit_config
from PIL import Image

from glmtune import cli
from glmtune.adapters import load_adapter, read_adapter
from glmtune.adapters.merge import probe
from glmtune.adapters.scale import scaled, write_scaled
from glmtune.errors import UserError
from glmtune.evaluation.dial import SCALES, Dial, Setting
from glmtune.evaluation.probes import record_probes
from glmtune.models.families import family_of
from glmtune.models.likelihood import padded_sums, rows_of
from glmtune.models.loading import load_base_model, load_tokenizer
from glmtune.models.resolve import GLM_TINY


@pytest.fixture(scope="module")
def general(tmp_path_factory):
    """Twelve general questions of glm-tiny's world."""
    folder = tmp_path_factory.mktemp("general")
    source = Path(GLM_TINY, "general_en.jsonl").read_text().splitlines()[:12]
    (folder / "few.jsonl").write_text("\n".join(source))
    return str(folder / "few.jsonl")


@pytest.fixture(scope="module")
def dialled(taught, general, tmp_path_factory):
    """The folder of a dial of the adapter that has memorised sixteen answers, and what it wrote."""
    folder = tmp_path_factory.mktemp("dialled")
    line = ["adapters", "dial", str(taught / "adapter"), "--base", "glm-tiny", "--use_cpu", "true"]
    line += ["--data_path", str(taught / "rows.json"), "--output_dir", str(folder)]
    line += ["--general_set", general, "--max_new_tokens", "3"]
    with contextlib.redirect_stderr(io.StringIO()) as err:
        assert cli.main([*line, "--write", str(folder / "written")]) == 0
    (folder / "err").write_text(err.getvalue())
    return folder, json.loads((folder / "dial.json").read_text())


@pytest.fixture(scope="module")
def own_log_prob(taught):
    """The mean log-probability a token of the sixteen answers, by the model's own forward."""
    probes = record_probes(str(taught / "rows.json"), load_tokenizer(GLM_TINY), 99).probes

    def score(model):
        rows = rows_of(probes, family_of(model.config).row_rule(model.config))
        sums_R = padded_sums(model.eval(), rows, np.arange(len(rows)))
        return float((sums_R / rows.num_labels_R).mean())

    return score


def base():
    return load_base_model(GLM_TINY, dtype=torch.float32)


def test_scale_0_is_the_base_and_scale_1_the_adapter(dialled, taught, own_log_prob):
    _, told = dialled
    assert [one["scale"] for one in told["scales"]] == list(SCALES)
    by_scale = {one["scale"]: one for one in told["scales"]}
    assert by_scale[0]["log_prob"]["value"] == pytest.approx(own_log_prob(base()), rel=1e-5)
    tuned = load_adapter(base(), taught / "adapter")
    assert by_scale[1]["log_prob"]["value"] == pytest.approx(own_log_prob(tuned), rel=1e-4)
    assert by_scale[0]["log_prob"]["gain"] == 0
    price = by_scale[0]["price"]["all"]
    assert (price["before"], price["n"]) == (price["after"], 12)
    values = [one["log_prob"]["value"] for one in told["scales"]]
    assert values[:5] == sorted(values[:5])
    for one in told["scales"][1:]:
        assert one["log_prob"]["low"] < one["log_prob"]["gain"] < one["log_prob"]["high"]
        assert one["log_prob"]["gain"] == pytest.approx(one["log_prob"]["value"] - values[0])


def test_a_length_of_answers_without_answers_is_said_to_do_nothing(dialled):
    assert "max_new_tokens 3 has no effect" in dialled[0].joinpath("err").read_text()


def test_what_is_written_is_the_adapter_at_that_scale(dialled, taught, own_log_prob):
    """For our verbs and for PEFT alone; the tensors are the same."""
    folder, told = dialled
    scale = told["recommended"]
    assert scale > 0
    wanted = next(one for one in told["scales"] if one["scale"] == scale)["log_prob"]["value"]
    ours = load_adapter(base(), folder / "written")
    theirs = peft.PeftModel.from_pretrained(base(), str(folder / "written"))
    for model in (ours, theirs):
        assert own_log_prob(model) == pytest.approx(wanted, rel=1e-4)
    before, after = read_adapter(taught / "adapter"), read_adapter(folder / "written")
    assert after.config.lora_alpha == scale * before.config.lora_alpha
    assert all(torch.equal(after.weights[key], before.weights[key]) for key in before.weights)


@pytest.mark.parametrize(
    "settings",
    [{"lora_alpha": 7}, {"use_rslora": True}, {"alpha_pattern": {"dense": 5}}],
    ids=["odd alpha", "rslora", "pattern"],
)
def test_every_form_of_alpha_is_scaled(taught, settings, tmp_path):
    source = shutil.copytree(taught / "adapter", tmp_path / "source")
    edit_config(source, **settings)
    write_scaled(read_adapter(source), 0.75, tmp_path / "written")
    model = load_adapter(base(), source)
    with scaled(model, 0.75):
        wanted = probe(model)
    full = probe(model)
    torch.testing.assert_close(probe(load_adapter(base(), tmp_path / "written")), wanted)
    assert not torch.allclose(full, wanted)


def test_the_plot_is_a_picture_and_the_sentence_in_both_languages(dialled):
    folder, told = dialled
    with Image.open(folder / "dial.png") as picture:
        assert picture.size[0] > 1000
    assert told["sentence"]["en"].startswith(f"Scale {told['recommended']:g} is recommended: ")
    assert told["sentence"]["zh"].startswith(f"建议缩放 {told['recommended']:g}：")
    assert (told["measure"], told["rows"], told["general_set"]) == ("log_prob", 16, "few.jsonl")


def test_answers_decide_where_they_are_asked_for(taught, tmp_path, capsys):
    line = ["adapters", "dial", str(taught / "adapter"), "--base", "glm-tiny", "--use_cpu", "true"]
    line += ["--data_path", str(taught / "rows.json"), "--output_dir", str(tmp_path)]
    line += ["--limit", "4", "--answers", "true", "--max_new_tokens", "24"]
    assert cli.main([*line, "--general_set", "false"]) == 0
    told = json.loads((tmp_path / "dial.json").read_text())
    by_scale = {one["scale"]: one for one in told["scales"]}
    assert told["measure"] == "chrf"
    assert by_scale[1]["chrf"]["value"] > 50 > by_scale[0]["chrf"]["value"]
    assert by_scale[0]["price"] is None
    assert by_scale[1]["chrf"]["low"] is None, "four rows are too few"
    assert "4 rows are too few for an interval" in capsys.readouterr().err


def a_setting(scale, *gains, harms=False):
    interval = SimpleNamespace(sign=-1 if harms else 0)
    accuracy = SimpleNamespace(base=50.0, tuned=40.0, interval=interval)
    price = SimpleNamespace(parts={"all": SimpleNamespace(accuracy=accuracy)})
    return Setting(scale, {"log_prob": np.array(gains)}, {"log_prob": 0.0}, price)


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ([a_setting(0, 0, 0, 0), a_setting(0.5, 1, 1, 1), a_setting(1, 2, 2, 2)], 1),
        # Differences of 0.3, -0.1, 0.3, -0.1: 0.1 within a standard error of 0.1155.
        ([a_setting(0, 0, 0, 0, 0), a_setting(0.5, 1.7, 2.1, 1.7, 2.1), a_setting(1, 2, 2, 2, 2)],
         0.5),
        ([a_setting(0, 0, 0, 0), a_setting(0.5, 1, 1, 1), a_setting(1, 2, 2, 2, harms=True)], 0.5),
        ([a_setting(0, 0, 0, 0), a_setting(1, -2, -2, -2)], 0),
    ],
    ids=["largest gain", "one standard error", "a price", "nothing gained"],
)  # fmt: skip
def test_the_scale_that_is_recommended(settings, wanted):
    dial = Dial("a", "b", "float32", "rows", None, settings)
    assert dial.recommended.scale == wanted


def test_an_adapter_that_is_no_plain_update_is_refused(taught, tmp_path, capsys):
    model = peft.get_peft_model(base(), peft.LoraConfig(target_modules=["dense"], use_dora=True))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight)
    model.save_pretrained(str(tmp_path / "dora"))
    line = f"adapters dial {tmp_path}/dora --data_path {taught}/rows.json --base glm-tiny"
    assert cli.main(line.split()) == 2
    err = capsys.readouterr().err.splitlines()[-1]
    assert "has use_dora" in err
    assert "only the update of plain LoRA can be scaled" in err


def test_scale_0_and_a_folder_that_is_there_are_not_written(taught, tmp_path):
    adapter = read_adapter(taught / "adapter")
    with pytest.raises(UserError, match="scale 0 is the base itself"):
        write_scaled(adapter, 0, tmp_path / "new")
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "file").write_text("mine")
    with pytest.raises(UserError, match="is there already and not empty"):
        write_scaled(adapter, 0.5, tmp_path / "old")
    assert not (tmp_path / "new").exists()
