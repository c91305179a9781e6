"""The folder that `glmtune demo` writes, and whether it may."""

import shutil
from pathlib import Path

from glmtune.disk import check_room
from glmtune.errors import UserError

NUM_BYTES = 64 * 2**20
"""More than a demo ever writes: mostly the adapter, with its optimiser's state."""

ABOUT_FILE = "ABOUT.txt"
ABOUT = """\
Written by `glmtune demo`, which starts anew in this folder and then replaces what it wrote.

demo.html        the page: base and tuned answers, the loss curve, the score
train.json       alpaca records to train on      -> glmtune convert
train.jsonl      rows of context and target      -> glmtune tokenize
train/           token rows                      -> glmtune train
run/             the adapter, metrics, the recipe as run
questions.json   held-out questions              -> glmtune compare, into run/compare/
"""
WRITTEN = (
    "demo.html", "train.json", "train.jsonl", "train", "run", "questions.json", ABOUT_FILE,
)  # fmt: skip


def claim_folder(out: Path) -> None:
    """Make the folder, or empty one that a demo made; every check comes before the first change.

    Raises:
        UserError: it holds other things, cannot be written, or its disk has too little space.
    """
    try:
        entries = {entry.name for entry in out.iterdir()} if out.exists() else set()
        about = out / ABOUT_FILE
        is_ours = about.is_file() and about.read_text(encoding="utf-8") == ABOUT
        if others := sorted(entries - {*WRITTEN} if is_ours else entries):
            raise UserError(
                f"--out: {out} holds other things ({others[0]}); name a new folder, or one that "
                "`glmtune demo` made"
            )
        fix = "free some, or let --out name a folder on another disk"
        check_room(out, NUM_BYTES, "the demo takes at most", fix)
        out.mkdir(parents=True, exist_ok=True)
        about.write_text(ABOUT, encoding="utf-8")
        for name in entries - {ABOUT_FILE}:
            path = out / name
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"--out: {out} cannot be used ({reason}); name a folder that can be written"
        ) from error
