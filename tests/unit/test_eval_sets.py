"""`--eval_dataset_path`: folders of rows that are only evaluated on, and asked by `compare`."""

import json
from pathlib import Path

import numpy as np
import pytest
from toys import QUESTIONS

from glmtune.cli import main
from glmtune.data.eval_sets import name_folders, with_eval_sets
from glmtune.errors import UserError
from glmtune.models.resolve import GLM_TINY
from glmtune.training import loop

OTHERS = [(f"Where is house {i}?", f"House {i} is by the lake.") for i in range(9)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Token rows to train on, and two sets of others, one of which repeats a question."""
    place = tmp_path_factory.mktemp("sets")
    sets = {"rows": QUESTIONS, "lake": OTHERS, "seen": [QUESTIONS[3], *OTHERS[:4]]}
    for name, pairs in sets.items():
        records = [{"instruction": asked, "output": answer} for asked, answer in pairs]
        (place / f"{name}.json").write_text(json.dumps(records), encoding="utf-8")
        paths = ["--jsonl_path", str(place / f"{name}.json"), "--save_path", str(place / name)]
        assert main(["tokenize", *paths, "--base", GLM_TINY]) == 0
    return place


@pytest.fixture
def train(folders, toy_run, tmp_path, no_curve):
    """Train for two steps; gives the losses and the records of evaluations."""

    def run(name="run", **settings):
        told = toy_run(
            **{"dataset_path": folders / "rows", "output_dir": tmp_path / name, "max_steps": 2}
            | settings
        )
        history = loop.train(told).log_history
        losses = [record["loss"] for record in history if "loss" in record]
        return losses, [record for record in history if "eval_loss" in record]

    return run


def test_rows_of_their_own_are_evaluated_on_and_never_trained_on(train, folders):
    losses, none = train("without")
    assert none == []
    both = (f"far={folders / 'lake'}", str(folders / "seen"))
    with_sets, (record,) = train("with", eval_dataset_path=both)
    assert with_sets == losses, "the rows of a step and their order stay the same"
    _, (alone,) = train("alone", eval_dataset_path=both[:1])
    assert alone["eval_loss"] == pytest.approx(record["eval_far_loss"], rel=1e-6)
    assert "eval_far_loss" not in alone, "it would say the same again"
    assert record["eval_far_loss"] != record["eval_seen_loss"]
    low, high = sorted((record["eval_far_loss"], record["eval_seen_loss"]))
    assert low < record["eval_loss"] < high


def test_they_stand_beside_rows_that_are_held_out(train, folders):
    losses, (own,) = train("own", eval_ratio=0.25)
    also = {"eval_ratio": 0.25, "eval_dataset_path": (str(folders / "lake"),)}
    with_sets, (record,) = train("both", **also)
    assert with_sets == losses
    assert record["eval_held_out_loss"] == pytest.approx(own["eval_loss"], rel=1e-6)
    assert record["eval_lake_loss"] != record["eval_held_out_loss"]


def test_a_question_that_is_trained_on_as_well_is_told(train, folders, capsys):
    train(eval_dataset_path=(str(folders / "seen"),))
    told = f"{folders / 'seen'}: 1 of its 5 rows ask nearly what rows of dataset_path ask"
    assert told in capsys.readouterr().err
    train("other", eval_dataset_path=(str(folders / "lake"),))
    assert "ask nearly" not in capsys.readouterr().err


def test_compare_asks_them_by_default_and_judges_each_set(train, folders, tmp_path, capsys):
    also = {"learning_rate": 1e-2, "lora_target": ("all",)}
    both = (str(folders / "lake"), f"more={folders / 'seen'}")
    train(eval_dataset_path=both, max_steps=4, **also)
    line = f"compare --adapter {tmp_path / 'run'} --max_new_tokens 4 --use_cpu true"
    assert main([*line.split(), "--general_set", "false"]) == 0
    path = tmp_path / "run" / "compare" / "compare.json"
    found = json.loads(path.read_text(encoding="utf-8"))
    assert found["languages"]["all"]["n"] == 9 + 5
    assert {name: of["n"] for name, of in found["sets"].items()} == {"lake": 9, "more": 5}
    chrf = {name: of["metrics"]["chrf"]["tuned"] for name, of in found["sets"].items()}
    mean = (9 * chrf["lake"] + 5 * chrf["more"]) / 14
    assert mean == pytest.approx(found["languages"]["all"]["metrics"]["chrf"]["tuned"])
    assert "more: No verdict: 5 rows have a reference" in capsys.readouterr().out
    questions = path.with_name("compare.jsonl").read_text(encoding="utf-8")
    assert "Where is house 8?" in questions


def test_a_resumed_run_has_the_same_sets(train, folders, tmp_path):
    train(eval_dataset_path=(str(folders / "lake"),), save_steps=1)
    other = {"eval_dataset_path": (str(folders / "seen"),)}
    with pytest.raises(UserError, match="data sha256"):
        train(**other, resume_from_checkpoint=str(tmp_path / "run"))


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ("{0}/none", "no such folder"),
        ("a={0}/lake,a={0}/seen", "a is the name of"),
        ("held_out={0}/lake", "give it another: held_out_2="),
    ],
)
def test_what_cannot_be_evaluated_on_is_refused_in_one_line(value, told, folders, tmp_path, capsys):
    line = f"train --dataset_path {folders}/rows --output_dir {tmp_path}/new --base {GLM_TINY}"
    assert main([*line.split(), "--eval_dataset_path", value.format(folders)]) == 2
    err = capsys.readouterr().err
    assert told in err
    assert err.count("\n") == 1
    assert not Path(tmp_path, "new").exists()


def test_a_folder_has_its_own_name_or_a_given_one():
    assert name_folders(["b=x/y", "x/rows", "./d/e=f"]) == {
        "b": "x/y",
        "rows": "x/rows",
        "e=f": "./d/e=f",
    }


def test_rows_with_labels_stand_beside_rows_without(make_rows):
    rows, other = make_rows([(3, 4), (2, 5)]), make_rows([(4, 2)], seed=1)
    labels = np.where(other.is_supervised_T, other.ids_T, -100)
    marked = type(other)(
        other.ids_T, other.starts_R1, other.prompt_lengths_R, other.rule, labels_T=labels
    )
    for one, two in ((rows, other), (rows, marked), (marked, rows)):
        joined = with_eval_sets(one, {"x": two})
        assert (joined.num_own, len(joined)) == (len(one), len(one) + len(two))
        assert joined.eval_sets["x"].tolist() == list(range(len(one), len(joined)))
        ids = [np.asarray(rows.ids_T).tolist() for rows in (joined, one, two)]
        assert ids[0] == ids[1] + ids[2]
        assert joined.num_labels_R.tolist() == [*one.num_labels_R, *two.num_labels_R]
        trained_on, held_out = joined.split(0.0, 1)
        assert trained_on.tolist() == list(range(len(one)))
        assert held_out.tolist() == joined.eval_sets["x"].tolist()
    assert with_eval_sets(rows, {}) is rows
