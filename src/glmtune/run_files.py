"""The names of a run's files, and where a checkpoint or its run's files are.

A run folder holds `checkpoint-N/` folders and, beside them, the adapter of the last step with the
recipe, the metrics and the curve. A checkpoint is an adapter's folder with what is needed to
resume.
"""

import re
from pathlib import Path

from glmtune.errors import UserError

RECIPE_FILE = "recipe.yaml"
METRICS_FILE = "metrics.jsonl"
CRASH_FILE = "crash.json"
PLOT_FILE = "training_loss.png"
TENSORBOARD_FOLDER = "runs"
LEDGER_FILE = "ledger.json"
"""The rows that stand out by their loss before and after, see evaluation/ledger.py."""
DIAL_FILE, DIAL_PLOT_FILE = "dial.json", "dial.png"
"""What each scale of the adapter gains and costs, see evaluation/dial.py."""
EXPORT_RECORD = "export.json"
"""In the folder of an export: what it holds, and how it was opened again."""
EVALUATIONS_FILE = "held_out.jsonl"
"""The loss of each held-out row, and the general questions that are right, at each evaluation."""
STATUS_FILE = "status.json"
"""That a run trains, and afterwards how it ended, see training/saving/status.py."""
SAMPLES_FILE = "samples.jsonl"
"""Answers to a few held-out questions at each evaluation, see training/samples.py."""
BEST_NAME, BEST_FILE = "best", "best.json"
"""A link to the best checkpoint, and why it is the best."""

# Files of every adapter: PEFT's names, today's and those of 2023.
ADAPTER_CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
WEIGHTS_FILE_2023 = "adapter_model.bin"

# Files of checkpoints only, except the state, which is also written beside the checkpoints.
STATE_FILE = "trainer_state.json"
OPTIMIZER_FILE = "optimizer.pt"
SCHEDULER_FILE = "scheduler.pt"
SCALER_FILE = "scaler.pt"
RANDOM_FILES = "rng_state_*.pth"
"""Pattern of random state files, one for each process; see `random_file`."""
MANIFEST_FILE = "manifest.json"

FILES_BESIDE = (
    RECIPE_FILE, METRICS_FILE, STATE_FILE, WEIGHTS_FILE, ADAPTER_CONFIG_FILE, PLOT_FILE,
    STATUS_FILE, EVALUATIONS_FILE, SAMPLES_FILE, BEST_NAME, BEST_FILE, DIAL_FILE, DIAL_PLOT_FILE,
    LEDGER_FILE,
)  # fmt: skip
"""Files of a run in its folder, beside the checkpoints."""

COMPARE_FOLDER, COMPARE_PAGE = "compare", "compare.html"
"""A comparison, beside the adapter or in the folder of `tune`."""
JOURNAL_FILE, TUNE_PAGE, TUNE_RUN = "stages.json", "tune.html", "run"
"""The folder of `tune`: which stages are whole, the page of its result, its run folder."""

CHECKPOINT_PREFIX = "checkpoint-"


def random_file(rank: int) -> str:
    """The name of the file that holds the random state of process `rank`."""
    return RANDOM_FILES.replace("*", str(rank))


def num_random_files(checkpoint: Path) -> int:
    """How many processes have saved a checkpoint."""
    return len(list(checkpoint.glob(RANDOM_FILES)))


def checkpoint_name(step: int) -> str:
    """The name of the folder that holds the checkpoint of a step."""
    return f"{CHECKPOINT_PREFIX}{step}"


def step_in(name: str) -> int | None:
    """The N of a name that is `checkpoint-N`; None for any other name."""
    match = re.fullmatch(rf"{CHECKPOINT_PREFIX}(\d+)", name)
    return int(match[1]) if match else None


def saved_steps(folder: Path) -> list[int]:
    """The N of each folder `checkpoint-N` in a run folder, in ascending order."""
    steps = (step_in(entry.name) for entry in folder.iterdir() if entry.is_dir())
    return sorted(step for step in steps if step is not None)


def newest_checkpoint(folder: Path) -> Path | None:
    """The `checkpoint-N` of the largest N in a run folder, whole or not; None without any."""
    steps = saved_steps(folder)
    return folder / checkpoint_name(steps[-1]) if steps else None


def run_folder_of(checkpoint: Path) -> Path:
    """The run folder of a checkpoint, also if the path is a link to the checkpoint."""
    return checkpoint.resolve().parent


def find_around(adapter: Path, name: str) -> list[Path]:
    """The files of a name that belong to an adapter: its folder's, then its run folder's.

    Any adapter may be a checkpoint under another name, so the parent folder is always searched.
    """
    folders = (adapter, run_folder_of(adapter))
    return [folder / name for folder in folders if (folder / name).is_file()]


def check_bundle(folder: Path) -> None:
    """Raise UserError where a folder is not what a stopped run left of its last step."""
    if not (folder / CRASH_FILE).is_file():
        raise UserError(f"{folder}: has no {CRASH_FILE}; name a crash-N folder of a run")


def find_run(path: str | Path) -> Path:
    """The run folder that is meant: itself, that of a checkpoint, or that of a `tune` folder.

    Raises:
        UserError: there is nothing, or it holds other things than a run.
    """
    folder = Path(path)
    if not folder.exists():
        raise UserError(
            f"--run: {folder} does not exist; name the output_dir of a run, or make the folder "
            f"first (mkdir {folder}) and the page waits for the run"
        )
    if not folder.is_dir():
        raise UserError(f"--run: {folder} is a file; name the output_dir of a run")
    if is_run(around := run_around(folder)):
        return around
    if (folder / JOURNAL_FILE).is_file() or is_run(folder / TUNE_RUN):
        return folder / TUNE_RUN
    if any(not entry.name.startswith(".") for entry in folder.iterdir()):
        raise UserError(
            f"--run: {folder} holds no run (there is no {METRICS_FILE}); name the output_dir of "
            "`train` or the --out of `tune`"
        )
    return folder


def run_around(folder: Path) -> Path:
    """The run folder of a checkpoint; any other folder itself."""
    return run_folder_of(folder) if step_in(folder.resolve().name) is not None else folder


def is_run(folder: Path) -> bool:
    """Whether a folder has the records of a run."""
    records = METRICS_FILE, STATE_FILE, STATUS_FILE, RECIPE_FILE
    return any((folder / name).is_file() for name in records)
