"""The end of `glmtune tune`: the page, and the verdict that is printed."""

import os
import shlex
import sys
import webbrowser
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from glmtune.data.files import new_file, read_json_object
from glmtune.errors import note, program
from glmtune.evaluation.document import Panel, escape
from glmtune.evaluation.page import html
from glmtune.evaluation.report import Comparison, Text
from glmtune.run_files import TUNE_PAGE, TUNE_RUN
from glmtune.runlog import print_pairs
from glmtune.training.saving.manifest import read_trainer_state
from glmtune.tune.sections import (
    CHECK_FILE,
    MERGED_FOLDER,
    QUESTIONS_FILE,
    VERBS_FILE,
    Sections,
)

TITLE = Text("微调前后，逐条对照", "Before and after tuning, side by side")
VERDICT = Text("体检结论", "Check-up")
HELD_OUT_LOSS = Text("留出数据的损失", "Loss on the rows held out")

History = Sequence[Mapping[str, Any]]


def held_out_loss(history: History) -> float | None:
    """The last loss on rows held out that a run logged."""
    losses = [record["eval_loss"] for record in history if "eval_loss" in record]
    return losses[-1] if losses else None


def write_page(comparison: Comparison, sections: Sections) -> None:
    """Write the comparison's page, with the check-up's verdict and the loss on rows held out.

    Raises:
        UserError: the verdict or the losses cannot be read, or the page cannot be written.
    """
    found = read_json_object(sections.path(CHECK_FILE))
    panels = [Panel(VERDICT, f"<p>{escape(found['verdict'])}</p>")]
    if (loss := held_out_loss(_history(sections))) is not None:
        panels.append(Panel(HELD_OUT_LOSS, f"<p>{loss:.4f}</p>"))
    page = html(comparison, command="glmtune tune", title=TITLE, panels=panels)
    with new_file(sections.path(TUNE_PAGE)) as file:
        file.write(page)


def tell_verdict(sections: Sections) -> bool:
    """Print the result and the next commands; return whether the check-up is fine.

    Raises:
        UserError: the verdict or the losses cannot be read.
    """
    found = read_json_object(sections.path(CHECK_FILE))
    loss = held_out_loss(_history(sections))
    told = {
        "page": str(Path(sections.path(TUNE_PAGE)).absolute()),
        "check": found["verdict"],
        "held-out loss": "no row was held out" if loss is None else f"{loss:.4f}",
    }
    run, questions, merged, recipe = (
        shlex.quote(sections.path(name))
        for name in (TUNE_RUN, QUESTIONS_FILE, MERGED_FOLDER, VERBS_FILE)
    )
    commands = {
        "talk to it": f"chat --adapter {run}",
        "let it answer": f"infer --data_path {questions} --adapter {run}",
        "one plain model": f"merge --adapter {run} --save_path {merged}",
        "a stage again": f"check {recipe}",
    }
    print()
    print_pairs(f"The result of {sections.given.data_path}", told)
    print()
    print_pairs("Next", {name: f"{program()} {line}" for name, line in commands.items()})
    return bool(found["is_fine"])


def show_page(sections: Sections) -> None:
    """Open the page in a browser, if `open_page` or a terminal with a desktop asks for it."""
    wanted = sections.given.open_page
    if wanted is None:
        wanted = sys.stdout.isatty() and _has_desktop()
    if wanted and not webbrowser.open(Path(sections.path(TUNE_PAGE)).absolute().as_uri()):
        note("no browser was found to open the page")


def _has_desktop() -> bool:
    """Whether a browser would open in a window; one inside the terminal would hide the verdict."""
    if sys.platform in ("win32", "darwin"):
        return "SSH_CONNECTION" not in os.environ
    return bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


def _history(sections: Sections) -> History:
    """The records that the run logged."""
    return read_trainer_state(Path(sections.path(TUNE_RUN)))["log_history"]
