"""Checkpoints of a run folder, and the run folder of a checkpoint."""

from pathlib import Path

import pytest

from glmtune.run_files import (
    RANDOM_FILES,
    RECIPE_FILE,
    checkpoint_name,
    find_around,
    newest_checkpoint,
    random_file,
    saved_steps,
    step_in,
)


@pytest.fixture
def run(tmp_path):
    for name in ("checkpoint-9", "checkpoint-100", "checkpoint-best", "x-checkpoint-200"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-300").write_text("a file, no folder")
    return tmp_path


@pytest.mark.parametrize(
    "name, step",
    [("checkpoint-0", 0), ("checkpoint-12", 12), ("checkpoint-", None), ("checkpoint-1a", None)],
)
def test_step_in_name(name, step):
    assert step_in(name) == step
    assert step is None or checkpoint_name(step) == name


def test_steps_ascend_as_numbers(run):
    assert saved_steps(run) == [9, 100]
    assert newest_checkpoint(run) == run / "checkpoint-100"


def test_no_checkpoint_is_newest_in_an_empty_folder(tmp_path):
    assert newest_checkpoint(tmp_path) is None


def test_random_file_of_each_process_matches_the_pattern(tmp_path):
    (tmp_path / random_file(12)).touch()
    assert [path.name for path in tmp_path.glob(RANDOM_FILES)] == ["rng_state_12.pth"]


def test_own_file_comes_before_that_of_the_run(run):
    checkpoint = run / "checkpoint-9"
    assert find_around(checkpoint, RECIPE_FILE) == []
    (run / RECIPE_FILE).touch()
    assert find_around(checkpoint, RECIPE_FILE) == [run / RECIPE_FILE]
    (checkpoint / RECIPE_FILE).touch()
    assert find_around(checkpoint, RECIPE_FILE) == [checkpoint / RECIPE_FILE, run / RECIPE_FILE]


def test_run_is_found_from_inside_a_checkpoint_and_through_a_link(run, monkeypatch):
    (run / RECIPE_FILE).touch()
    monkeypatch.chdir(run / "checkpoint-9")
    assert find_around(Path(), RECIPE_FILE) == [run / RECIPE_FILE]
    (run / "elsewhere").mkdir()
    link = run / "elsewhere" / "adapter"
    link.symlink_to(run / "checkpoint-100")
    assert find_around(link, RECIPE_FILE) == [run / RECIPE_FILE]
