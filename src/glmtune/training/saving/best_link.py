"""`best` in a run folder: a link to the best checkpoint, and best.json, which says why."""

import os
import shutil
from pathlib import Path

from glmtune.data.files import write_json
from glmtune.drafts import replacing_folder, write_errors
from glmtune.run_files import (
    ADAPTER_CONFIG_FILE,
    BEST_FILE,
    BEST_NAME,
    STATE_FILE,
    WEIGHTS_FILE,
    checkpoint_name,
    saved_steps,
)
from glmtune.training.best import Best, Evaluation, choose_best

_COPIED = (ADAPTER_CONFIG_FILE, WEIGHTS_FILE, STATE_FILE)


def mark_best(output_dir: Path, evaluations: list[Evaluation]) -> Best | None:
    """Let `best` lead to the best checkpoint of a run folder.

    Where the file system has no links it is a folder with a copy of the adapter.

    Args:
        output_dir: the run folder.
        evaluations: of the run so far; those of steps without a checkpoint there do not count.

    Returns:
        The best; None where no checkpoint was evaluated.

    Raises:
        UserError: the folder cannot be written.
    """
    saved = set(saved_steps(output_dir))
    best = choose_best(one for one in evaluations if one.step in saved)
    if best is None:
        return None
    with write_errors(output_dir / BEST_NAME):
        _lead_to(output_dir, checkpoint_name(best.step))
    write_json(best.as_json(), output_dir / BEST_FILE)
    return best


def _lead_to(output_dir: Path, checkpoint: str) -> None:
    link, draft = output_dir / BEST_NAME, output_dir / f".{BEST_NAME}.{os.getpid()}.tmp"
    if link.is_symlink() and os.readlink(link) == checkpoint:
        return
    try:
        draft.unlink(missing_ok=True)
        draft.symlink_to(checkpoint, target_is_directory=True)
    except (OSError, NotImplementedError):
        if link.is_symlink():
            link.unlink()
        with replacing_folder(link) as folder:
            for name in _COPIED:
                shutil.copyfile(output_dir / checkpoint / name, folder / name)
        return
    if link.is_dir() and not link.is_symlink():
        shutil.rmtree(link)
    os.replace(draft, link)
