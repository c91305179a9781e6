"""What a run prints before the first step and after the last."""

import shlex
import time
from typing import Any

import numpy as np

from glmtune.errors import program
from glmtune.hardware import device_name, memory_gib, total_memory_gib
from glmtune.models.packed import base_of
from glmtune.models.precision import has_integer_tables
from glmtune.models.shape import bits_of
from glmtune.run_files import BEST_NAME, PLOT_FILE, checkpoint_name
from glmtune.runlog import format_seconds, print_pairs
from glmtune.training.plan import PackPlan
from glmtune.training.planning.advice import advise, recompute_words
from glmtune.training.planning.power import describe_power
from glmtune.training.run import Run
from glmtune.training.saving.run_folder import resume_command
from glmtune.training.state import TrainingState


class Pace:
    """Real tokens and seconds since this object was made."""

    def __init__(self, state: TrainingState):
        self._state, self._tokens_before, self._started = state, state.num_tokens, time.monotonic()

    @property
    def tokens(self) -> int:
        """Tokens trained on, padding not counted."""
        return self._state.num_tokens - self._tokens_before

    @property
    def seconds(self) -> float:
        """Elapsed time."""
        return time.monotonic() - self._started

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second; correct for a device only right after waiting for it."""
        return self.tokens / max(self.seconds, 1e-9)


def print_banner(run: Run, state: TrainingState) -> None:
    """Print what is about to be trained, and on which data."""
    settings, device = run.settings, run.accelerator.device
    model = state.model
    trainable, total = model.get_nb_trainable_parameters()
    num_train, num_eval = len(run.plan.row_ids), len(run.eval_rows)
    special = ", frozen linears in float8" if settings.base_dtype == "fp8" else ""
    base_config = base_of(model).config
    if bits := bits_of(base_config):
        special = f", frozen linears in {bits} bits"
    if has_integer_tables(base_config):
        special += ", embedding and head in 8"
    done = f", {state.global_step:,} of them done" if state.global_step else ""
    print_pairs(
        f"LoRA of rank {run.forecast.setup.rank} on {', '.join(run.forecast.setup.targets)} of "
        f"{run.base_name}",
        {
            "rows": f"{num_train:,} to train on, {num_eval:,} held out, "
            f"{run.rows.lengths_R.mean():.0f} tokens each",
            **_describe_split(run),
            "verdict": describe_power(num_eval),
            "steps": f"{run.max_steps:,}, which is {run.plan.epoch(run.max_steps):.4g} epoch(s) of "
            f"{run.plan.steps_in(0):,}{done}",
            **describe_step(run),
            **_describe_gradients(run, state),
            "trainable": f"{trainable:,} of {total:,} parameters ({trainable / total:.3%})",
            "device": f"{device_name(device)}, {total_memory_gib(device):.0f} GiB, "
            f"{run.identity['dtype']}{special}",
            "recompute": recompute_words(run.forecast),
            "run folder": settings.output_dir,
        },
    )


def _describe_split(run: Run) -> dict[str, str]:
    """How many rows are held out of each set, and which rows stay together; empty for neither."""
    rows, told = run.rows, []
    if not len(run.eval_rows):
        return {}
    if rows.sets_R is not None and rows.sets_R[-1] > 0:
        nums = np.bincount(rows.sets_R[run.eval_rows], minlength=rows.sets_R[-1] + 1)
        told.append(f"{', '.join(f'{num:,}' for num in nums)} rows of the sets in their order")
    sizes = np.zeros(1) if rows.groups_R is None else np.bincount(rows.groups_R)
    if num_grouped := int(sizes[sizes > 1].sum()):
        told.append(
            f"{num_grouped:,} rows are nearly the same as others; each of their "
            f"{np.count_nonzero(sizes > 1):,} groups is on one side"
        )
    return {"held out": "; ".join(told)} if told else {}


def _describe_gradients(run: Run, state: TrainingState) -> dict[str, str]:
    """What processes send each other; empty for one alone."""
    sums = state.gradients
    if not sums.num_buckets:
        return {}
    early = sums.num_buckets > 1 and not run.forecast.setup.captured
    when = ", all but the last while its last pass still computes" if early else ""
    return {
        "gradients": f"the adapter's alone cross between processes: {sums.num_bytes / 1e6:,.2f} MB "
        f"a step of each, in {sums.num_buckets} message(s){when}"
    }


def describe_step(run: Run) -> dict[str, str]:
    """What a step is made of."""
    settings, plan = run.settings, run.plan
    num_processes = run.accelerator.num_processes
    passes_of_each = settings.passes_of_all(num_processes) // num_processes
    passes = f"{passes_of_each} pass(es) x {num_processes} process(es)"
    if isinstance(plan, PackPlan):
        rows = len(plan.row_ids) / plan.steps_in(0)
        return {
            "tokens a step": f"{plan.step_size:,} = packs of {plan.pack_length:,} x {passes}",
            "rows a step": f"about {rows:,.0f}; --layout exact would take "
            f"{settings.per_device_train_batch_size} a pass, as per_device_train_batch_size says",
        }
    how = "padded to the longest" if run.layout == "padded" else "end to end"
    if run.layout == "exact" and settings.layout == "auto":
        how += "; --layout packed would take as many as fit into a pack"
    size = settings.per_device_train_batch_size
    return {"rows a step": f"{plan.step_size:,} = {size} a pass x {passes}, {how}"}


def print_summary(
    run: Run,
    state: TrainingState,
    history: list[dict[str, Any]],
    since_start: Pace,
    is_done: bool,
) -> None:
    """Print the outcome of the run, where it is saved, and what to do next."""
    folder = shlex.quote(run.settings.output_dir)
    how = "Done: all" if is_done else f"Stopped after step {state.global_step:,} of"
    early = state.evaluations.why_no_better(run.settings.early_stopping)
    if is_done and state.global_step < run.max_steps:
        how = f"Done: ended early after {state.global_step:,} of"
    pairs = {
        "trained on": f"{since_start.tokens:,} tokens in {format_seconds(since_start.seconds)}, "
        f"{since_start.tokens_per_second:,.0f} a second, "
        f"at most {memory_gib(run.accelerator.device):.1f} GiB",
    }
    for key, name in (("loss", "loss"), ("eval_loss", "evaluation loss")):
        if values := [record[key] for record in history if key in record]:
            pairs[name] = f"{values[0]:.4f} at first, {values[-1]:.4f} at last"
    if scores := [record["general"] for record in history if "general" in record]:
        right = f"{scores[0]:.1f} % right at first, {scores[-1]:.1f} % at last"
        pairs["general questions"] = (
            f"{right} ({run.general.general.name})" if run.general else right
        )
    if early and is_done:
        pairs["why early"] = early
    pairs["adapter"] = f"{run.settings.output_dir} (the curve: {PLOT_FILE})"
    if state.best:
        reason = state.best.reason()["en"]
        pairs["best"] = f"{run.settings.output_dir}/{BEST_NAME}: {checkpoint_name(state.best.step)}"
        pairs["why best"] = reason
    if not is_done and state.last_good:
        pairs["resume with"] = resume_command(run, state.last_good, program())
    pairs["answer with"] = f"{program()} infer --data_path RECORDS.json --adapter {folder}"
    print_pairs(f"{how} {run.max_steps:,} steps", pairs)


def memory_advice(run: Run, evaluating: bool = False) -> str:
    """Explain that the device's memory is too small, and which settings need less of it.

    Args:
        run: the run, for its settings.
        evaluating: whether memory was too small for an evaluation.
    """
    if evaluating and not isinstance(run.plan, PackPlan):
        return (
            "the device's memory is too small for an evaluation: halve per_device_eval_batch_size "
            f"({run.settings.per_device_eval_batch_size})"
        )
    return f"the device's memory is too small for this: {advise(run.settings, run.forecaster)}"
