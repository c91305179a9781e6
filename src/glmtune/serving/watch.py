"""What a run's files say about it, now: for a page that follows it. No model and no torch.

A training process holds its folder and keeps `status.json`; runs of earlier versions have neither,
and are judged by what they saved.
"""

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from glmtune.data.files import read_json_object
from glmtune.errors import UserError, program, visible
from glmtune.locks import is_held
from glmtune.run_files import (
    BEST_FILE,
    CRASH_FILE,
    METRICS_FILE,
    RECIPE_FILE,
    SAMPLES_FILE,
    STATE_FILE,
    STATUS_FILE,
    find_run,
    newest_checkpoint,
    saved_steps,
)
from glmtune.runlog import format_seconds
from glmtune.serving.run_sentences import Condition, sentence
from glmtune.training.saving.status import RunStatus

Record = Mapping[str, Any]

MOST_POINTS = 800
"""How many a curve has: a long run is drawn by means of neighbouring readings."""
MOST_SAMPLES = 20
MINUTES_OF_LOADING = 10
"""A run whose recipe is older and that has logged nothing is no longer being prepared."""
_SHOWN = (
    "loss", "eval_loss", "general", "general_zh", "general_en", "learning_rate",
    "tokens_per_second", "memory_gib", "epoch",
)  # fmt: skip


class Sample(NamedTuple):
    """A held-out question and its answers, as they changed."""

    question: str
    expected: str
    answers: list[tuple[int, str]]
    """Step and answer, in the order of the steps."""


@dataclass
class RunWatch:
    """A run folder, read again where its files have changed."""

    folder: Path
    _known: dict[str, tuple[tuple[int, int, int], Any]] = field(default_factory=dict)

    @classmethod
    def of(cls, path: str | Path) -> "RunWatch":
        """Watch the run that is meant. Raises UserError as `find_run` does."""
        return cls(find_run(path))

    # --- the files ---

    def _read(self, name: str, read: Any) -> Any:
        """The content of a file, read only where it has changed; None where there is none."""
        file = self.folder / name
        try:
            found = file.stat()
        except OSError:
            self._known.pop(name, None)
            return None
        mark = (found.st_ino, found.st_size, found.st_mtime_ns)
        known = self._known.get(name)
        if known is None or known[0] != mark:
            try:
                known = mark, read(file)
            except (OSError, UserError, ValidationError, ValueError):
                return None  # damaged, or being written: looked at again
            self._known[name] = known
        return known[1]

    @property
    def history(self) -> list[Record]:
        """What the run logged so far; a line that is only half written is left for later."""
        return self._read(METRICS_FILE, _read_metrics) or []

    @property
    def status(self) -> RunStatus | None:
        """What the training process says; None for a run of an earlier version."""
        return self._read(STATUS_FILE, lambda file: RunStatus(**read_json_object(file)))

    @property
    def samples(self) -> list[Sample]:
        """Answers to a few held-out questions; empty where the run makes none."""
        return self._read(SAMPLES_FILE, _read_samples) or []

    def _max_steps(self) -> int | None:
        if self.status:
            return self.status.max_steps
        state = self._read(STATE_FILE, read_json_object) or {}
        found = state.get("max_steps")
        return found if isinstance(found, int) and found > 0 else None

    def _age(self, name: str) -> float | None:
        """Seconds since a file was written."""
        try:
            return time.time() - (self.folder / name).stat().st_mtime
        except OSError:
            return None

    # --- what they say ---

    def condition(self) -> Condition:
        """What has become of the run, by its files and by whether its process is there."""
        status = self.status
        last = self.history[-1]["step"] if self.history else 0
        saved = saved_steps(self.folder) if self.folder.is_dir() else []
        known = Condition("waiting", last, self._max_steps(), saved[-1] if saved else None)
        is_held_now = is_held(self.folder)
        has_begun = status is not None and status.state == "training"
        # A system without locks does not say whether the process is there.
        if is_held_now or (is_held_now is None and has_begun):
            return known._replace(state="training", seconds_left=self._seconds_left(last))
        if self._is_being_prepared():
            return known._replace(state="preparing")
        if status is None:
            return self._condition_of_old(known)
        if status.state == "training":
            return known._replace(state="killed")
        return known._replace(
            state=status.state, step=max(status.step, last), reason=visible(status.reason)
        )

    def _is_being_prepared(self) -> bool:
        """Whether a recipe was written lately, and nothing since: data and model are loaded."""
        recipe = self._age(RECIPE_FILE)
        others = map(self._age, (STATUS_FILE, METRICS_FILE))
        newest = min([60 * MINUTES_OF_LOADING, *(age for age in others if age is not None)])
        return recipe is not None and recipe < newest

    def _condition_of_old(self, known: Condition) -> Condition:
        if not self.history and known.saved is None:
            return known
        crashes = [path.parent.name for path in self.folder.glob(f"crash-*/{CRASH_FILE}")]
        if crashes:
            reason = f"a number is not finite: see {crashes[-1]}"
            return known._replace(state="failed", reason=reason)
        is_done = known.max_steps is not None and known.step >= known.max_steps
        return known._replace(state="done" if is_done else "stopped")

    def _seconds_left(self, step: int) -> float | None:
        status = self.status
        if status is None or step <= status.first_step:
            return None
        age = self._age(METRICS_FILE)
        if age is None:
            return None
        taken = time.time() - age - status.began
        return max(0.0, taken / (step - status.first_step) * (status.max_steps - step) - age)

    def version(self) -> str:
        """Changes when what is drawn does."""
        marks = []
        for name in (METRICS_FILE, SAMPLES_FILE, BEST_FILE):
            try:
                found = (self.folder / name).stat()
            except OSError:
                continue
            marks.append(f"{found.st_ino:x}-{found.st_size:x}-{found.st_mtime_ns:x}")
        return ".".join(marks)

    def numbers(self) -> dict[str, Any]:
        """The newest reading of each number, and the first of those that are compared."""
        history = self.history
        newest = {
            name: next((r[name] for r in reversed(history) if r.get(name) is not None), None)
            for name in _SHOWN
        }
        first = {
            name: next((r[name] for r in history if r.get(name) is not None), None)
            for name in ("loss", "eval_loss", "general")
        }
        memory = [r["memory_gib"] for r in history if r.get("memory_gib") is not None]
        return newest | {"memory_gib": max(memory, default=None), "first": first}

    def as_json(self) -> dict[str, Any]:
        """All but the plots."""
        condition = self.condition()
        best = self._read(BEST_FILE, read_json_object) or {}
        reason = best.get("reason")
        told = reason if isinstance(reason, dict) and {"zh", "en"} <= reason.keys() else None
        return {
            "name": visible(self.folder.resolve().name),
            "state": condition.state,
            "sentence": sentence(condition)._asdict(),
            "step": condition.step,
            "max_steps": condition.max_steps,
            "left": None
            if condition.seconds_left is None
            else format_seconds(condition.seconds_left),
            "numbers": self.numbers(),
            "age": self._age(METRICS_FILE),
            "resume": self._resume(condition),
            "best": told and {key: visible(str(told[key])) for key in ("zh", "en")},
            "best_name": visible(str(best.get("checkpoint", ""))),
        }

    def _resume(self, condition: Condition) -> str | None:
        """The command that resumes a run which has ended before its last step."""
        import shlex

        if condition.state not in ("stopped", "killed", "failed"):
            return None
        if newest_checkpoint(self.folder) is None:
            return None
        recipe = shlex.quote(str(self.folder / RECIPE_FILE))
        return f"{program()} train {recipe} --resume_from_checkpoint true"


def thinned(history: Sequence[Record], most: int = MOST_POINTS) -> list[Record]:
    """Records of a long run, of which neighbours' losses become one, their mean."""
    with_loss = [r for r in history if r.get("loss") is not None]
    size = math.ceil(len(with_loss) / most)
    if size < 2:
        return list(history)
    others = [r for r in history if r.get("loss") is None]
    means = []
    for start in range(0, len(with_loss), size):
        part = with_loss[start : start + size]
        names = {name for r in part for name, value in r.items() if isinstance(value, int | float)}
        mean = {
            name: sum(values) / len(values)
            for name in names - {"step"}
            if (values := [r[name] for r in part if r.get(name) is not None])
        }
        means.append(mean | {"step": part[-1]["step"]})
    return sorted([*means, *others], key=lambda r: r["step"])


def _read_metrics(file: Path) -> list[Record]:
    """The records, with their numbers alone."""
    found: list[Record] = []
    for content in _lines(file):
        step = content.get("step")
        if type(step) is not int:
            continue
        numbers = {
            name: value
            for name, value in content.items()
            if type(value) in (int, float) and math.isfinite(value)
        }
        found.append(numbers)
    return found


def _read_samples(file: Path) -> list[Sample]:
    by_question: dict[tuple[str, str], dict[int, str]] = {}
    for content in _lines(file):
        step, answers = content.get("step"), content.get("answers")
        if type(step) is not int or not isinstance(answers, list):
            continue
        for of in answers[:MOST_SAMPLES]:
            if isinstance(of, dict):
                question, expected, answer = (
                    visible(str(of.get(name, ""))) for name in ("question", "expected", "answer")
                )
                by_question.setdefault((question, expected), {})[step] = answer
    return [Sample(*asked, sorted(of.items())) for asked, of in by_question.items()]


def _lines(file: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines, without what is no whole object."""
    found = []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            content = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(content, dict):
            found.append(content)
    return found
