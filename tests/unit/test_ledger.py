"""The ledger: the loss of every training row before and after, and the rows that stand out."""

import json

import numpy as np
import pytest
import torch

from glmtune import cli
from glmtune.adapters import load_adapter
from glmtune.config.settings import TokenizeSettings, TrainSettings
from glmtune.data.dataset import load_dataset
from glmtune.data.token_rows import TokenRows
from glmtune.data.tokenizing import tokenize
from glmtune.evaluation.ledger import Levels, Losses, contradictions, find_rows_of
from glmtune.evaluation.source_run import RunRows
from glmtune.models.base_files import load_row_tokenizer
from glmtune.models.families import family_of
from glmtune.models.likelihood import padded_sums
from glmtune.models.loading import load_base_model
from glmtune.models.resolve import GLM_TINY
from glmtune.training import loop

NAMES = "cat dog fox owl bear wolf hare crow seal goat frog swan mole duck"
PLACES = "barn house wood tree cave hill field nest sea yard pond lake hole shed"
RECORDS = [
    {"instruction": f"Where does the {name} live?", "output": f"The {name} lives in a {place}."}
    for name, place in zip(NAMES.split(" "), PLACES.split(" "), strict=True)
]
RECORDS += [{"instruction": "猫住在哪里？", "output": "谷仓。"}]
RECORDS += [
    {"instruction": "Who is left out?", "output": ""}
]  # no row: later numbers are the file's
RECORDS += [{"instruction": "Who is the smallest of them?", "output": "The \x1b[31mmole."}]
RECORDS += [{"instruction": "who is the smallest of them", "output": "The elephant, I would say."}]
NUM_FILE, NUM_KEPT = len(RECORDS), len(RECORDS) - 1


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run that memorises a few rows; gives its folder."""
    folder = tmp_path_factory.mktemp("ledger")
    records = folder / "rows.json"
    records.write_text(json.dumps(RECORDS, ensure_ascii=False))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("glmtune.runlog.RunLog.plot_loss", lambda *_: None)
        settings = TokenizeSettings(
            jsonl_path=str(records), save_path=str(folder / "tokens"), base=GLM_TINY,
            on_bad_row="skip",
        )  # fmt: skip
        tokenize(settings, load_row_tokenizer(GLM_TINY), "glm-tiny")
        loop.train(
            TrainSettings(
                dataset_path=str(folder / "tokens"), output_dir=str(folder / "run"), base=GLM_TINY,
                max_steps=25, learning_rate=1e-2, per_device_train_batch_size=8, use_cpu=True,
                report_to="none", lora_target=("all",), lora_dropout=0, general_set=False,
            )
        )  # fmt: skip
    return folder / "run"


@pytest.fixture(scope="module")
def told(run):
    line = ["ledger", str(run), "--use_cpu", "true", "--limit", "3"]
    assert cli.main(line) == 0
    return json.loads((run / "ledger.json").read_text())


def test_the_losses_are_those_of_the_models_own_forward(run, told):
    rule = family_of(load_base_model(GLM_TINY, dtype=torch.float32).config).row_rule
    model = load_adapter(load_base_model(GLM_TINY, dtype=torch.float32), run)
    table, card = load_dataset(str(run.parent / "tokens"))
    rows = TokenRows.from_table(table, rule(model.config))
    numbers = card.source_rows()
    after = -padded_sums(model, rows, np.arange(len(rows))) / rows.num_labels_R
    with model.disable_adapter():
        before = -padded_sums(model, rows, np.arange(len(rows))) / rows.num_labels_R
    assert told["counts"]["trained_on"] == NUM_KEPT
    assert told["trained_on"]["before"] == pytest.approx(before.mean(), rel=1e-5)
    assert told["trained_on"]["after"] == pytest.approx(after.mean(), rel=1e-3)
    assert told["rows"]
    for row in told["rows"]:
        place = numbers.tolist().index(row["row"])
        assert row["before"] == pytest.approx(before[place], rel=1e-5)
        assert row["after"] == pytest.approx(after[place], rel=1e-3)


def test_contradictions_have_the_rows_of_the_users_file(told):
    found = [row for row in told["rows"] if row["kind"] == "contradiction"]
    assert [row["row"] for row in found] == [NUM_FILE - 1, NUM_FILE]
    assert told["source"] == "rows.json"
    assert found[1]["question"] == "who is the smallest of them"
    assert found[1]["answer"] == "The elephant, I would say."
    assert told["counts"]["contradiction"] == 2


def test_a_terminal_sees_no_escape(run, told, capsys):
    assert cli.main(["ledger", str(run), "--use_cpu", "true"]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "near-equal questions, different answers (row of rows.json" in out
    capsys.readouterr()
    assert cli.main(["ledger", str(run), "--use_cpu", "true", "--limit", "0"]) == 0
    assert "(row of rows.json" not in capsys.readouterr().out


def test_the_file_may_be_named(run, tmp_path):
    path = tmp_path / "mine.json"
    assert cli.main(["ledger", str(run), "--use_cpu", "true", "--json_path", str(path)]) == 0
    assert set(json.loads(path.read_text())["rows"][0]) == {
        "row", "question", "answer", "before", "after", "kind"
    }  # fmt: skip


def test_an_adapter_of_no_run_is_refused(strange_adapter, capsys):
    assert cli.main(["ledger", strange_adapter, "--base", "glm-tiny", "--use_cpu", "true"]) == 2
    assert "no recipe.yaml says which rows it was trained on" in capsys.readouterr().err


class NoTexts:
    """Texts of which each is another."""

    def question(self, row):
        return f"question {row} of all, number {row}"

    answer = question


def listed(before, after, held_out=8):
    """The rows of each kind, of losses of which the last are of held-out rows."""
    num = len(before)
    losses = Losses(np.array(before, float), np.array(after, float))
    run = RunRows(range(num), np.arange(num - held_out, num))
    levels = Levels.of(losses, run)
    trained_on = np.arange(num - held_out)
    return {
        kind: rows for kind, rows in find_rows_of(losses, levels, trained_on, NoTexts()) if rows
    }


HELD_OUT = [3.0] * 8, [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7]


@pytest.mark.parametrize(
    ("before", "after", "kinds"),
    [
        (3.0, 1.0, {}),  # like the others
        (3.0, 1.8, {"not_learnt": [0]}),  # harder than nine tenths, and more than half is left
        (5.0, 1.8, {}),  # hard, but most of its loss is gone
        (1.8, 1.8, {"not_learnt": [0]}),
        (1.5, 1.5, {}),  # nothing was to be learnt here that others have learnt
        (3.0, 0.4, {"memorised": [0]}),
        (3.0, 0.6, {}),  # more than half of what the easiest held-out rows have
        (0.9, 0.4, {}),  # was easy before
        (1.0, 1.09, {}),
        (1.0, 1.11, {"worse": [0]}),
        (2.0, 3.0, {"worse": [0]}),  # and not in two lists
    ],
)
def test_where_a_row_is_listed(before, after, kinds):
    assert listed([before, *HELD_OUT[0]], [after, *HELD_OUT[1]]) == kinds


def test_rows_that_stand_out_most_come_first():
    before, after = [3.0, 3.0, 1.0, 1.0], [0.4, 0.1, 1.5, 2.0]
    found = listed([*before, *HELD_OUT[0]], [*after, *HELD_OUT[1]])
    assert found == {"memorised": [1, 0], "worse": [3, 2]}


def test_with_few_held_out_rows_none_is_memorised():
    assert listed([3.0, *HELD_OUT[0][:7]], [0.01, *HELD_OUT[1][:7]], held_out=7) == {}


def test_rows_that_cannot_be_scored_are_in_no_list():
    assert listed([np.nan, *HELD_OUT[0]], [np.nan, *HELD_OUT[1]]) == {}


def test_equal_answers_contradict_nothing(make_rows):
    class Pairs:
        pairs = (("Who is it?", "Ann."), ("who is it", "ann"), ("What is it?", "A cat."))

        def question(self, row):
            return self.pairs[row][0]

        def answer(self, row):
            return self.pairs[row][1]

    assert list(contradictions(np.arange(3), Pairs())) == []
    Pairs.pairs = (*Pairs.pairs, ("Who is it ?", "Nobody that I know of."))
    assert list(contradictions(np.arange(4), Pairs())) == [0, 1, 3]
