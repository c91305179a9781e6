"""What the folder of a run says about its adapter."""

import json
import os

import pytest
from pages import DIAL, LEDGER

from glmtune.data.dataset import DataCard, SetCard
from glmtune.data.lengths import LengthStats
from glmtune.evaluation.run_facts import RunFacts
from glmtune.run_files import DIAL_FILE, LEDGER_FILE, RECIPE_FILE, STATE_FILE, WEIGHTS_FILE

# 10 steps of 100 tokens at 50 tokens a second, then 30 steps at 100.
HISTORY = [
    {"step": 10, "loss": 2.0, "tokens_per_second": 50.0, "memory_gib": 1.5},
    {"step": 10, "eval_loss": 1.9},
    {"step": 40, "loss": 1.0, "tokens_per_second": 100.0, "memory_gib": 2.25},
]


@pytest.fixture
def run(tmp_path):
    """A run folder with its rows beside it."""
    rows, folder = tmp_path / "rows", tmp_path / "run"
    rows.mkdir()
    folder.mkdir()
    sets = (
        SetCard("/home/me/law.jsonl", "0", None, 9, 9, 9, 900, 1, False, {"zh": 8, "en": 1}),
        SetCard("more.jsonl", "0", None, 3, 3, 3, 300, 1, False, {"zh": 3}),
    )
    DataCard(12, 1200, 400, LengthStats(1, 2, 3, 4), {}, sets=sets).write(rows)
    (folder / RECIPE_FILE).write_text(
        f"base: glm-tiny\ndataset_path: {rows}\noutput_dir: {folder}\neval_ratio: 0.25\n"
        "lora_rank: 6\nlora_alpha: 12\nlearning_rate: 0.003\nseed: 9\n"
    )
    state = {"global_step": 40, "num_input_tokens_seen": 4000, "log_history": HISTORY}
    state["stateful_callbacks"] = {"glmtune": {}}
    (folder / STATE_FILE).write_text(json.dumps(state))
    return folder


def told(facts):
    return {name.en: str(value) for name, value in facts.items()}


def test_a_run_tells_what_was_trained_on_what_and_what_it_took(run):
    found = RunFacts.of(run)
    assert found.history == HISTORY
    trained = told(found.trained)
    for words in (
        "12 rows",
        "zh 11, en 1",
        "1,200 tokens",
        "25% held out",
        "law.jsonl, more.jsonl",
    ):
        assert words in trained["Trained on"]
    assert "/home/me" not in trained["Trained on"], "paths of a machine are nobody's business"
    assert trained["Trained with"] == "LoRA rank 6, alpha 12, rate 0.003, seed 9"
    assert found.seconds == pytest.approx(10 * 100 / 50 + 30 * 100 / 100)
    cost = told(found.cost)["Training"]
    assert cost.endswith("about 00:50, 40 steps, 4,000 tokens, at most 2.2 GiB")


def test_a_checkpoint_has_the_facts_of_its_run(run):
    (run / "checkpoint-40").mkdir()
    assert RunFacts.of(run / "checkpoint-40") == RunFacts.of(run)


def test_rows_that_are_gone_are_known_by_name(run):
    (run.parent / "rows" / "glmtune_data.json").unlink()
    assert told(RunFacts.of(run).trained)["Trained on"] == "rows"


def test_what_is_damaged_is_told_and_left_out(run, capsys):
    (run / STATE_FILE).write_text('{"global_step": 3}')
    found = RunFacts.of(run)
    assert found.cost == {}
    assert found.seconds is None
    assert "Trained with" in told(found.trained)
    assert "the page has less about the run" in capsys.readouterr().err
    (run / RECIPE_FILE).unlink()
    assert RunFacts.of(run) is None


def test_a_dial_from_before_a_training_is_left_out(run, capsys):
    for name in (DIAL_FILE, WEIGHTS_FILE):
        (run / name).write_text(json.dumps(DIAL))
    trained_at = (run / WEIGHTS_FILE).stat().st_mtime
    for made_at, is_shown in ((trained_at + 1, True), (trained_at - 1, True), (0, False)):
        os.utime(run / DIAL_FILE, (made_at, made_at))
        assert (RunFacts.of(run).dial is not None) == is_shown
    assert "is older than the adapter and left out" in capsys.readouterr().err


def test_dial_and_ledger_are_those_of_the_adapter_itself(run):
    (run / "checkpoint-40").mkdir()
    for name, content in ((DIAL_FILE, DIAL), (LEDGER_FILE, LEDGER)):
        (run / name).write_text(json.dumps(content))
    found = RunFacts.of(run)
    assert found.dial.gains() == [(0.0, 0.0), (0.5, 0.5), (0.75, 0.75), (1.0, 1.0)]
    assert found.dial.general()[-1] == (1.0, 96.0)
    assert len(found.ledger.rows) == len(LEDGER["rows"])
    of_checkpoint = RunFacts.of(run / "checkpoint-40")
    assert (of_checkpoint.dial, of_checkpoint.ledger) == (None, None)


@pytest.mark.parametrize(
    "content, told", [("{", ""), ('{"measure": "chrf"}', "recommended: Field required")]
)
def test_a_damaged_dial_is_told_and_left_out(run, capsys, content, told):
    (run / DIAL_FILE).write_text(content)
    assert RunFacts.of(run).dial is None
    error = capsys.readouterr().err
    assert "the page has less about the run" in error
    assert f"{run}/{DIAL_FILE}" in error
    assert told in error


def test_an_adapter_without_a_run_has_no_facts(tmp_path):
    (tmp_path / "adapter").mkdir()
    assert RunFacts.of(tmp_path / "adapter") is None
