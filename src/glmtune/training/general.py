"""The general set while a run trains: before the first step, and at every evaluation."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from glmtune.config.settings import TrainSettings
from glmtune.errors import note
from glmtune.general.items import AUTO, LANGUAGES, NUM_CHOICES, find_general
from glmtune.general.scores import GeneralRows, GeneralScores
from glmtune.models.likelihood import PACK_LENGTH, packed_layers
from glmtune.runlog import RunLog
from glmtune.training.interrupt import CutShort, undone_when_cut_short
from glmtune.training.processes import deal, memory_of_all
from glmtune.training.run import Run
from glmtune.training.state import TrainingState

MOST_SHARE = 0.1
"""Share of a run's work up to which the general set is scored unasked."""
FORWARD_SHARE = 1 / 3
"""The forward pass is a third of the work of a step: the backward pass takes twice as long."""
KEY, SET_KEY = "general", "general_set"


def general_rows(
    settings: TrainSettings, run: Run, base: str, tokenizer: Any, max_positions: int
) -> GeneralRows | None:
    """The general set that a run scores; None for none, and a note where it would cost too much.

    Unless the settings say so, it is scored by a run that evaluates, and while that is no more than
    `MOST_SHARE` of the run's work.

    Raises:
        UserError: a file of the user's cannot be used, see `find_general` and `GeneralRows.of`.
    """
    wish = settings.general_set
    if wish == AUTO and not len(run.eval_rows):
        return None
    general = find_general(True if wish == AUTO else wish, base)
    if general is None:
        return None
    rows = GeneralRows.of(general, tokenizer, max_positions)
    if wish != AUTO:
        return rows
    num_times = 2 + (run.max_steps - 1) // run.eval_steps
    share = rows.num_tokens * num_times * FORWARD_SHARE / _trained_tokens(run)
    if share > MOST_SHARE:
        if run.accelerator.is_main_process:
            long = f"{share:,.0f} times" if share >= 2 else f"{100 * share:.0f} %"
            note(
                f"general set: not scored while training: {num_times:,} times {rows.num_tokens:,} "
                f"tokens would take about {long} as long as the steps; --general_set true scores "
                "it all the same, and compare scores it in any case"
            )
        return None
    return rows


def _trained_tokens(run: Run) -> float:
    """Tokens of all steps."""
    return run.plan.epoch(run.max_steps) * float(run.rows.lengths_R[run.plan.row_ids].sum())


def is_general_due(run: Run, step: int, history: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the general set is to be scored after this step, 0 included, and has not been yet."""
    # Called every step: the search of records comes last.
    if run.general is None or (step and not run.is_evaluated(step)):
        return False
    return not any(KEY in r and r["step"] == step for r in reversed(history))


def log_general(
    run: Run, state: TrainingState, log: RunLog, wants_stop: Callable[[], bool]
) -> GeneralScores:
    """Score the general set and log it.

    Raises:
        CutShort: a process was asked to stop before the end; or memory is too small.
    """
    assert run.general is not None, "it is due"
    started = time.monotonic()
    with undone_when_cut_short(state):
        scores = score(run, state, wants_stop)
    record: dict[str, float | str] = {KEY: float(scores.accuracy_N.mean())}
    for language in LANGUAGES:
        is_in_N = scores.is_in(language)
        if is_in_N.any():
            record[f"{KEY}_{language}"] = float(scores.accuracy_N[is_in_N].mean())
    record[f"{KEY}_log_prob"] = float(scores.log_prob_N.mean())
    record[f"{KEY}_seconds"] = time.monotonic() - started
    record |= {SET_KEY: run.general.general.digest, "epoch": run.plan.epoch(state.global_step)}
    log.log(state.global_step, record)
    return scores


def score(
    run: Run, state: TrainingState, wants_stop: Callable[[], bool] = lambda: False
) -> GeneralScores:
    """Score the model as it is now, without dropout; the items are divided among the processes.

    Packs are no longer than those that the run trains on, so that memory suffices.

    Raises:
        CutShort: a process was asked to stop before the end; then all raise it.
    """
    general, accelerator = run.general, run.accelerator
    assert general is not None, "there is a set"
    packed = packed_layers(state.model)
    if packed is None:  # a DoRA adapter that is continued: each process scores every item
        state.model.eval()
        return general.score(state.model)
    heaviest = int(run.rows.lengths_R[run.heaviest_part()].sum())
    sums_NC = np.zeros((len(general.general.items), NUM_CHOICES))
    is_cut = False
    parts = general.parts(min(PACK_LENGTH, heaviest))
    with memory_of_all(accelerator, in_step=run.is_sharded):
        for number, counts in deal(parts, accelerator, run.is_sharded):
            if is_cut := not run.is_sharded and wants_stop():
                break
            found = general.sums(packed, parts[number])
            if counts:
                sums_NC[parts[number]] = found
    flat = torch.tensor([*sums_NC.ravel(), float(is_cut)], dtype=torch.float64)
    *sums, num_cut = accelerator.reduce(flat.to(accelerator.device), reduction="sum").tolist()
    if num_cut:
        raise CutShort
    return general.scores(np.array(sums).reshape(-1, NUM_CHOICES))


def of_this_set(run: Run, history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A resumed run's records, without scores of another general set; a note says where some go."""
    if run.general is None:
        return history
    kept = [
        r
        for r in history
        if r.get(SET_KEY, run.general.general.digest) == run.general.general.digest
    ]
    if len(kept) < len(history) and run.accelerator.is_main_process:
        note(
            "general set: another one than this run began with, so its earlier scores are left out "
            "of the log"
        )
    return kept
