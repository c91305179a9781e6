"""What identifies a checkpoint: its files with sizes and hashes, its step, its recipe and data.

`manifest.json` is written last. A folder whose files match its manifest is as it was saved;
otherwise `find_fault` describes what is wrong.
"""

import hashlib
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from glmtune import __version__
from glmtune.data.files import read_json_object, sha256_of
from glmtune.errors import UserError
from glmtune.run_files import (
    ADAPTER_CONFIG_FILE,
    MANIFEST_FILE,
    OPTIMIZER_FILE,
    SCHEDULER_FILE,
    STATE_FILE,
    WEIGHTS_FILE,
    WEIGHTS_FILE_2023,
    step_in,
)

BEGINNING = "adapter continued"
"""The name, in a run's identity, of the adapter whose weights it began with."""
TORCH_FILES = (OPTIMIZER_FILE, SCHEDULER_FILE)
_NEEDED = (WEIGHTS_FILE, ADAPTER_CONFIG_FILE, *TORCH_FILES, STATE_FILE)
# Our part of trainer_state.json: transformers reserves a place for state of callbacks.
_OURS = ("stateful_callbacks", "glmtune")
_UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError)


def write_manifest(folder: Path, step: int, identity: Mapping[str, Any]) -> None:
    """Write the manifest of a folder that is about to become a checkpoint. Raises OSError.

    Args:
        folder: holds all files but this one.
        step: step of the checkpoint.
        identity: every setting and fact that changes the run's numbers.
    """
    files = sorted(path for path in folder.iterdir() if path.is_file())
    recipe = json.dumps(identity, sort_keys=True).encode()
    content = {
        "glmtune_version": __version__,
        "step": step,
        "recipe_sha256": hashlib.sha256(recipe).hexdigest(),
        "data_sha256": identity["data sha256"],
        "files": {
            path.name: {"size": path.stat().st_size, "sha256": sha256_of(path)} for path in files
        },
    }
    text = json.dumps(content, indent=2) + "\n"
    (folder / MANIFEST_FILE).write_text(text, encoding="utf-8")


def has_manifest(checkpoint: Path) -> bool:
    """Whether a checkpoint can be verified; those of earlier versions cannot."""
    return (checkpoint / MANIFEST_FILE).is_file()


def read_trainer_state(checkpoint: Path) -> dict[str, Any]:
    """The content of a checkpoint's `trainer_state.json`.

    Raises:
        UserError: it is damaged, or not one of ours.
    """
    content = read_json_object(checkpoint / STATE_FILE)
    place, name = _OURS
    ours, history = content.get(place), content.get("log_history")
    numbers = [content.get("global_step"), content.get("num_input_tokens_seen")]
    records = history if isinstance(history, list) else [None]
    if (
        not all(type(number) is int and number >= 0 for number in numbers)
        or not (isinstance(ours, dict) and isinstance(ours.get(name), dict))
        or not all(
            isinstance(record, dict) and type(record.get("step")) is int for record in records
        )
    ):
        raise UserError(
            f"{checkpoint / STATE_FILE}: is damaged, or of another program; resume from another "
            "checkpoint"
        )
    return content


def our_part(identity: Mapping[str, Any]) -> dict[str, Any]:
    """The place in `trainer_state.json` of what identifies a checkpoint's run."""
    place, name = _OURS
    return {place: {name: dict(identity)}}


def read_identity(checkpoint: Path) -> dict[str, Any]:
    """What identifies a checkpoint's run: the settings and facts that change its numbers."""
    place, name = _OURS
    return read_trainer_state(checkpoint)[place][name]


def find_fault(checkpoint: Path) -> str | None:
    """Say why a checkpoint cannot be resumed from, or None when it is whole.

    Every file is compared with the size and the hash in the manifest. Without a manifest, as in
    checkpoints of glmtune 0.1, only the form of the files is checked.
    """
    if _is_of_trainer(checkpoint):
        return (
            "it is a checkpoint of another program (transformers' Trainer), whose training cannot "
            "be resumed; only its adapter can be used"
        )
    for name in _NEEDED:
        if not (checkpoint / name).is_file():
            kind = "without weights, " if name == WEIGHTS_FILE else ""
            return f"{kind}{name} is missing"
    return _differs(checkpoint) if has_manifest(checkpoint) else _looks_damaged(checkpoint)


def _is_of_trainer(checkpoint: Path) -> bool:
    try:
        others = _OURS[1] not in read_json_object(checkpoint / STATE_FILE).get(_OURS[0], {})
    except _UNREADABLE:
        return False
    by_trainer = ("training_args.bin", WEIGHTS_FILE_2023, "rng_state.pth")
    return others and any((checkpoint / name).is_file() for name in by_trainer)


def _differs(checkpoint: Path) -> str | None:
    try:
        content = read_json_object(checkpoint / MANIFEST_FILE)
        step = content["step"]
        files = {name: (file["size"], file["sha256"]) for name, file in content["files"].items()}
        if not all(type(number) is int for number in (step, *(size for size, _ in files.values()))):
            raise TypeError
        there = {path.name for path in checkpoint.iterdir() if path.is_file()}
    except _UNREADABLE:
        return f"{MANIFEST_FILE} is damaged"
    if unlisted := [name for name in _NEEDED if name not in files]:
        return f"{MANIFEST_FILE} does not list {unlisted[0]}"
    for name, (size, sha256) in files.items():
        path = checkpoint / name
        if path.name != name:
            return f"{MANIFEST_FILE} names {name!r}, which is no file of this folder"
        if name not in there:
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} is damaged: {path.stat().st_size:,} bytes, not {size:,} as saved"
        if sha256_of(path) != sha256:
            return f"{name} is damaged: its sha256 is not the one saved"
    if step_in(checkpoint.name) not in (None, step):
        return f"it holds step {step}"
    return None


def _looks_damaged(checkpoint: Path) -> str | None:
    try:
        with safe_open(checkpoint / WEIGHTS_FILE, framework="pt"):
            pass
    except (SafetensorError, OSError):
        return f"{WEIGHTS_FILE} is damaged"
    for name in TORCH_FILES:
        if not zipfile.is_zipfile(checkpoint / name):  # a zip's directory is at its end
            return f"{name} is damaged"
    try:
        read_trainer_state(checkpoint)
    except UserError:
        return f"{STATE_FILE} is damaged, or of another program"
    return None
