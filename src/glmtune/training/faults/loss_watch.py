"""What stops a run early: a loss that explodes or stays at 0, weights that never get a gradient."""

import math
import sys
from collections.abc import Sequence
from statistics import median
from typing import NamedTuple

from glmtune.errors import UserError
from glmtune.runlog import RunLog
from glmtune.training.run import Run
from glmtune.training.saving.run_folder import what_is_kept
from glmtune.training.saving.save import save
from glmtune.training.state import TrainingState

READINGS_IN_A_ROW = 3
READINGS_BEFORE = 20
EXPLODED = 3.0


class Course(NamedTuple):
    """A finding about a run's losses."""

    words: str
    stops: bool
    is_spoilt: bool
    """Whether the weights are worse than earlier ones."""


def judge_course(losses: Sequence[float]) -> Course | None:
    """Say whether the loss explodes or is exactly 0; three readings in a row stop the run.

    It explodes if it is more than three times the median of the (at most 20) readings before, and
    above the first one, which is the base's own loss: the adapter is then worse than none.

    Args:
        losses: all readings so far, means over `logging_steps` steps.
    """
    usual: list[float] = []
    fault, in_a_row, middle = "", 0, math.inf
    for loss in losses:
        before = fault
        middle = median(usual[-READINGS_BEFORE:]) if usual else math.inf
        exploded = loss > max(EXPLODED * middle, losses[0])
        fault = "zero" if loss == 0 else "exploded" if exploded else ""
        in_a_row = in_a_row + 1 if fault == before else 1
        if not fault:
            usual.append(loss)
    if not fault:
        return None
    stops = in_a_row >= READINGS_IN_A_ROW
    if fault == "zero":
        words = (
            "the loss is exactly 0: either the rows are memorised, or none of their tokens is "
            "supervised; train on more rows or for fewer steps"
        )
        return Course(words, stops, is_spoilt=False)
    words = (
        f"the loss explodes: {losses[-1]:.4g}, after {middle:.4g} usually and {losses[0]:.4g} at "
        "first; lower learning_rate or lengthen warmup_steps"
    )
    return Course(words, stops, is_spoilt=True)


def check_course(run: Run, state: TrainingState, log: RunLog) -> None:
    """After a reading of the loss: report what is wrong, and stop the run if it persists.

    Raises:
        UserError: the loss explodes or stays at 0, or no trainable weight had a gradient.
    """
    step, is_main = state.global_step, run.accelerator.is_main_process
    if unmoved := state.watch.unmoved():
        names = [name for name, weight in state.model.named_parameters() if weight.requires_grad]
        words = (
            f"step {step}: the gradient was exactly 0 in all of the first steps for {len(unmoved)} "
            f"of {len(names)} weights, first {names[unmoved[0]]}: they learn nothing"
        )
        if len(unmoved) == len(names):
            raise UserError(f"{words}; look at the rows' answers and, in float16, set bf16 true")
        if is_main:
            print(f"warning: {words}; leave their linears out of lora_target", file=sys.stderr)
    losses = [record["loss"] for record in log.history if record.get("loss") is not None]
    if (course := judge_course(losses)) is None:
        return
    if course.stops:
        if not course.is_spoilt:
            save(run, state, log)
        raise UserError(f"step {step}: {course.words}; {what_is_kept(run, state)}")
    if is_main:
        print(f"warning: step {step}: {course.words}", file=sys.stderr)
