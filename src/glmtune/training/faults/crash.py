"""`crash-N/`: all that is needed to compute again step N, which stopped a run; whole or absent.

crash.json         what was not finite, where first, the rows with their places in the source, the
                   settings of device and layout, versions
step.safetensors   the rows' token ids, and the random state of each process before the step
adapter_*          the adapter before the step, as PEFT writes it
optimizer.pt       the optimiser before the step, where it is not large
recipe.yaml        the settings
"""

import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from glmtune import __version__
from glmtune.adapters import save_adapter
from glmtune.config.reading import write_recipe
from glmtune.data.dataset import CARD_FILE, DataCard
from glmtune.data.files import new_folder, read_json_object, write_json
from glmtune.data.row_rule import RowRule
from glmtune.data.token_rows import TokenRows
from glmtune.errors import UserError
from glmtune.hardware import device_name
from glmtune.models.packed import base_of
from glmtune.models.torch_files import write_torch_file
from glmtune.run_files import CRASH_FILE, OPTIMIZER_FILE, RECIPE_FILE, check_bundle
from glmtune.training.faults.first_nonfinite import Culprit, Outcome, PassOfStep, compute_again
from glmtune.training.first_step import TO_REFERENCE
from glmtune.training.passes import PaddedPass
from glmtune.training.plan import pass_seed
from glmtune.training.processes import on_main
from glmtune.training.run import Run
from glmtune.training.saving.run_folder import what_is_kept
from glmtune.training.state import TrainingState
from glmtune.training.watch import Fault, NotFiniteError, RandomState

STEP_FILE = "step.safetensors"
LARGEST_OPTIMISER = 256 * 2**20
_LIBRARIES = ("torch", "transformers", "peft", "accelerate")


@dataclass(frozen=True)
class Bundle:
    """The content of `crash-N/`, read back."""

    folder: Path
    told: dict[str, Any]
    """crash.json."""
    rows_by: Callable[[RowRule], TokenRows]
    """The rows of the step, by the rule of the base model's family."""
    passes: list[PassOfStep]
    random_states: list[RandomState]
    outcome: Outcome
    """The result of the step when the run computed it again by the reference path."""


@contextmanager
def bundle_on_fault(run: Run, state: TrainingState) -> Iterator[None]:
    """If a step is refused because a number is not finite, write a bundle and say what to do.

    Called by all processes, all of which see the fault.

    Raises:
        UserError: instead of NotFiniteError.
    """
    try:
        yield
    except NotFiniteError as error:
        fault = error.fault
        random_states = gather_object([fault.random_state])
        passes = _passes_of(run, fault.step)
        again = partial(_again, run, state, fault, passes, random_states)
        outcome = again() if run.is_sharded else None  # which no process could do alone
        told = on_main(
            run.accelerator,
            lambda: _leave_bundle(run, state, fault, passes, random_states, outcome or again()),
        )
        raise UserError(f"step {fault.step + 1}: {fault.words}{told}") from error


def _passes_of(run: Run, step: int) -> list[PassOfStep]:
    num_processes = run.accelerator.num_processes
    return [
        PassOfStep(number % num_processes, pass_seed(run.settings.seed, step, number), part)
        for number, part in enumerate(run.plan.parts(step, num_processes))
        if len(part)
    ]


def _num_labels(run: Run, passes: Sequence[PassOfStep]) -> int:
    return int(run.rows.num_labels_R[np.concatenate([one.row_ids for one in passes])].sum())


def _again(
    run: Run,
    state: TrainingState,
    fault: Fault,
    passes: Sequence[PassOfStep],
    random_states: Sequence[RandomState],
) -> Outcome:
    """Compute the step once more, looking for the first number that is not finite."""
    if run.accelerator.is_main_process:
        told = f"step {fault.step + 1}: {fault.words}; looking for where it comes from"
        print(f"\n{told}", flush=True)
    plain = PaddedPass(run.accelerator, state.model, run.rows, run.forecast.recompute)
    num_labels, at_once = _num_labels(run, passes), run.layout == "padded"
    return compute_again(plain, state.weights, passes, num_labels, random_states, at_once)


def _leave_bundle(
    run: Run,
    state: TrainingState,
    fault: Fault,
    passes: Sequence[PassOfStep],
    random_states: Sequence[RandomState],
    outcome: Outcome,
) -> str:
    """Write the bundle; return the rest of the message about the fault."""
    folder = Path(run.settings.output_dir, f"crash-{fault.step + 1}")
    base = base_of(state.model)
    told = {
        "step": fault.step + 1,
        "what": fault.what,
        "loss": str(fault.loss),
        "grad_norm": str(fault.grad_norm),
        "largest_weight": str(fault.largest_weight),
        "again": {
            "loss": str(outcome.loss),
            "grad_norm": str(outcome.grad_norm),
            "culprit": asdict(outcome.culprit) if outcome.culprit else None,
        },
        "num_labels": _num_labels(run, passes),
        "scale": None if state.scaler is None else state.scaler.get_scale(),
        "layout": run.layout,
        "base": run.base_name,
        "dataset": run.settings.dataset_path,
        "surroundings": surroundings(run.accelerator.device, run.dtype),
        "rows": _places(run, passes),
    }
    settings = run.settings.model_copy(
        update={"base": base.name_or_path or None, "resume_from_checkpoint": None}
    )
    with new_folder(str(folder)) as draft:
        write_json(told, draft / CRASH_FILE)
        # Serialise in memory first: safetensors reports a full disk as an error of its own type.
        (draft / STEP_FILE).write_bytes(save(_step_tensors(run.rows, passes, random_states)))
        save_adapter(state.model, draft, run.base_name)
        moments = state.optimizer.state_dict()
        if _num_bytes(moments) <= LARGEST_OPTIMISER:
            write_torch_file(moments, draft / OPTIMIZER_FILE)
        write_recipe(settings, str(draft / RECIPE_FILE))
    return (
        f"{_locate(run, outcome)}; {_advise(run, fault, outcome)}; {what_is_kept(run, state)}; "
        f"`glmtune replay {folder}` computes the step again"
    )


def surroundings(device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """What may make the same step give another result elsewhere."""
    return {
        "device": device_name(device) if device.type == "cuda" else f"CPU {platform.machine()}",
        "dtype": str(dtype).removeprefix("torch."),
        **versions(),
    }


def versions() -> dict[str, str]:
    """Versions of Python, of glmtune and of the libraries that compute."""
    return {
        "python": platform.python_version(),
        "glmtune": __version__,
        **{name: version(name) for name in _LIBRARIES},
    }


def read_bundle(folder: Path) -> Bundle:
    """Read the bundle of a run.

    Raises:
        UserError: the folder is no bundle, or is damaged.
    """
    check_bundle(folder)
    try:
        told = read_json_object(folder / CRASH_FILE)
        tensors = load_file(folder / STEP_FILE)
        arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
        names = "ids_T", "starts_R1", "prompt_lengths_R"
        ids_T, starts_R1, prompts_R = (arrays[name] for name in names)
        labels_T = arrays.get("labels_T")
        places = np.arange(len(prompts_R))
        passes = [
            PassOfStep(int(rank), int(seed), places[arrays["pass_R"] == number])
            for number, (rank, seed) in enumerate(arrays["rank_and_seed_P2"])
        ]
        random_states = [
            RandomState(tensors[f"cpu_{rank}"], tensors.get(f"cuda_{rank}"))
            for rank in range(sum(name.startswith("cpu_") for name in tensors))
        ]
        again = told["again"]
        culprit = Culprit(**again["culprit"]) if again["culprit"] else None
        outcome = Outcome(float(again["loss"]), float(again["grad_norm"]), culprit)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise UserError(f"{folder}: is damaged ({error}); take the run's crash-N anew") from error

    def rows_by(rule: RowRule) -> TokenRows:
        return TokenRows(ids_T, starts_R1, prompts_R, rule, labels_T)

    return Bundle(folder, told, rows_by, passes, random_states, outcome)


def _step_tensors(
    rows: TokenRows, passes: Sequence[PassOfStep], random_states: Sequence[RandomState]
) -> dict[str, Tensor]:
    row_ids = np.concatenate([p.row_ids for p in passes])
    taken = rows.take(row_ids)
    arrays = {
        "ids_T": np.asarray(taken.ids_T, dtype=np.int32),
        "starts_R1": taken.starts_R1.astype(np.int64),
        "prompt_lengths_R": taken.prompt_lengths_R.astype(np.int64),
        "pass_R": np.repeat(np.arange(len(passes)), [len(p.row_ids) for p in passes]),
        "rank_and_seed_P2": np.array([(p.rank, p.seed) for p in passes], dtype=np.int64),
    }
    if taken.labels_T is not None:
        arrays["labels_T"] = np.asarray(taken.labels_T)
    tensors = {name: torch.from_numpy(np.ascontiguousarray(a)) for name, a in arrays.items()}
    for rank, random_state in enumerate(random_states):
        tensors[f"cpu_{rank}"] = random_state.cpu
        if random_state.cuda is not None:
            tensors[f"cuda_{rank}"] = random_state.cuda
    return tensors


def _places(run: Run, passes: Sequence[PassOfStep]) -> list[dict[str, Any]]:
    """For each row of the step, its number in the data set and its place in the source file."""
    file = Path(run.settings.dataset_path) / CARD_FILE
    card = DataCard.read(file) if file.is_file() else None
    sources = card.source_rows() if card else None
    places = []
    for number, step_pass in enumerate(passes):
        for row in map(int, step_pass.row_ids):
            length = int(run.rows.lengths_R[row])
            place: dict[str, Any] = {"pass": number + 1, "row": row + 1, "tokens": length}
            if card is not None and sources is not None:
                name, source_row = str(card.source), int(sources[row])
                line = f":{source_row}" if card.row_is_line else ""
                place |= {"source": f"{name}{line} (row {source_row})"}
            places.append(place)
    return places


def _num_bytes(state: dict[str, Any]) -> int:
    slots = (slot for of_weight in state["state"].values() for slot in of_weight.values())
    return sum(slot.nbytes for slot in slots if isinstance(slot, Tensor))


def _locate(run: Run, outcome: Outcome) -> str:
    if outcome.culprit is not None:
        return f", first the {outcome.culprit}"
    if run.layout == "padded":
        return ", which it is not when computed again"
    return f", which it is not by the reference path: the fault is in the pass ({run.layout})"


def _advise(run: Run, fault: Fault, outcome: Outcome) -> str:
    settings, culprit = run.settings, outcome.culprit
    if culprit is None:
        if run.layout == "padded":
            return "the device may be at fault: run `glmtune replay` on another"
        return f"{TO_REFERENCE} (and resume_anyway true to resume), and please report this"
    if culprit.way == "forward" and culprit.detail.endswith("not finite"):
        if "lora_" not in culprit.name:
            return f"the base model {run.base_name} is damaged: download it again"
        return "the adapter is damaged: resume from an earlier checkpoint"
    fp16 = "leave fp16 out, " if run.dtype == torch.float16 else ""
    return f"{fp16}lower learning_rate ({settings.learning_rate}) or lengthen warmup_steps"
