"""The folder that `glmtune demo` writes, and the checks before it does."""

import shutil
from pathlib import Path

from glmtune.tune.folder import check_folder, usable_folder

NUM_BYTES = 64 * 2**20
"""Upper bound of what a demo writes: mostly adapter and optimiser state."""

ABOUT_FILE = "ABOUT.txt"
ABOUT = """\
Written by `glmtune demo`, which starts anew in this folder and then replaces what it wrote.

demo.html        the page: base and tuned answers, the loss curve, the score
train.json       alpaca records to train on      -> glmtune convert
train.jsonl      rows of context and target      -> glmtune tokenize
train/           token rows                      -> glmtune train
run/             the adapter, metrics, the recipe as run
questions.json   held-out questions              -> glmtune adapters dial, into run/
                                                 -> glmtune compare, into run/compare/
"""
WRITTEN = (
    "demo.html", "train.json", "train.jsonl", "train", "run", "questions.json", ABOUT_FILE,
)  # fmt: skip


def claim_folder(out: Path) -> None:
    """Create the folder, or empty one that a demo made; nothing changes before all checks.

    Raises:
        UserError: it holds other things, cannot be written, or its disk has too little space.
    """
    with usable_folder(out):
        about = out / ABOUT_FILE
        is_ours = about.is_file() and about.read_text(encoding="utf-8") == ABOUT
        entries = check_folder(out, is_ours, WRITTEN, NUM_BYTES, "demo")
        out.mkdir(parents=True, exist_ok=True)
        about.write_text(ABOUT, encoding="utf-8")
        for name in entries - {ABOUT_FILE}:
            path = out / name
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
