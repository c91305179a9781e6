"""What is known about an adapter from its run: the rows it was trained on, and their template."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from glmtune.config.reading import read_config
from glmtune.config.settings import TrainSettings
from glmtune.data.dataset import DataCard, RowTokenizer, load_dataset
from glmtune.data.eval_sets import load_eval_sets, with_eval_sets
from glmtune.data.split import GROUPS
from glmtune.data.token_rows import TokenRows
from glmtune.errors import UserError, note
from glmtune.run_files import RECIPE_FILE, STATE_FILE, WEIGHTS_FILE, find_around
from glmtune.training.saving.manifest import read_identity


class RunRows(NamedTuple):
    """The rows of a run, and the numbers of those that it held out."""

    rows: TokenRows
    held_out: np.ndarray
    card: DataCard | None = None
    """Where the rows come from, if that is known."""

    @property
    def trained_on(self) -> np.ndarray:
        """The numbers of the rows that were trained on."""
        is_trained_on = np.ones(len(self.rows), bool)
        is_trained_on[self.held_out] = False
        return np.flatnonzero(is_trained_on)


def read_rows(adapter: Path, tokenizer: RowTokenizer) -> RunRows | None:
    """The rows of the run that an adapter came from; None where there is no recipe beside it.

    Args:
        adapter: the adapter's folder.
        tokenizer: of the base model.

    Raises:
        UserError: the run's data are missing or have changed.
    """
    recipe = next(iter(find_around(adapter, RECIPE_FILE)), None)
    if recipe is None:
        return None
    run = read_config(TrainSettings, str(recipe), {})
    rule, identity = tokenizer.row_rule, _identity(adapter)
    table, card = load_dataset(run.dataset_path, rule)
    rows = TokenRows.from_table(table, rule, card.num_kept_of_sets)
    folders = run.eval_dataset_path or ()
    rows = with_eval_sets(rows, load_eval_sets(folders, rule, tokenizer))
    digest = identity.get("data sha256")
    if digest is not None and digest != rows.digest()[:16]:
        raise UserError(f"{run.dataset_path}: holds other rows than the run was trained on")
    if GROUPS in identity:
        rows = rows.grouped(tokenizer.decode_batch, card.source_rows())
    return RunRows(rows, rows.split(run.eval_ratio, run.seed)[1], card)


def find_rows(adapter: Path, tokenizer: RowTokenizer) -> RunRows | None:
    """Like `read_rows`, but None also where a note says why the rows are not available."""
    try:
        return read_rows(adapter, tokenizer)
    except UserError as error:
        note(f"the run's rows are not available ({error})")
        return None


def same_held_out(one: Path, other: Path) -> bool:
    """Whether two adapters come from runs that held the same rows out, as far as is recorded."""
    names = ("data sha256", "eval_ratio", "seed", GROUPS)
    of_one, of_other = (
        [_identity(adapter).get(name) for name in names] for adapter in (one, other)
    )
    return of_one == of_other and of_one[0] is not None


def is_of_2023(adapter: Path) -> bool:
    """Whether an adapter has the format of the 2023 scripts."""
    return not (adapter / WEIGHTS_FILE).is_file()


def find_template(adapter: Path) -> str | None:
    """The template of the rows behind an adapter, as the data card has it; None if unknown."""
    template = _identity(adapter).get("template")
    return template if isinstance(template, str) else None


def _identity(adapter: Path) -> dict[str, object]:
    """The identity that the checkpoint or the run records; empty without one."""
    for state in find_around(adapter, STATE_FILE):
        try:
            return read_identity(state.parent)
        except UserError:  # from another program, or damaged: no obstacle to answering
            continue
    return {}
