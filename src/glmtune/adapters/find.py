"""Find an adapter by file names alone, so that a wrong path is reported at once."""

from pathlib import Path

from glmtune.config.reading import read_config
from glmtune.config.settings import TrainSettings
from glmtune.errors import UserError, reason_of
from glmtune.models.folders import fetch
from glmtune.models.hubs import is_hub_id, open_folder, try_to_load_from_cache
from glmtune.run_files import (
    ADAPTER_CONFIG_FILE,
    RECIPE_FILE,
    WEIGHTS_FILE,
    WEIGHTS_FILE_2023,
    find_around,
    newest_checkpoint,
)

_WEIGHTS_FILES = (WEIGHTS_FILE, WEIGHTS_FILE_2023)


def find_adapter(folder: str | Path) -> Path:
    """The folder that holds the adapter: `folder` itself, else its newest `checkpoint-N`.

    A folder of a hub's cache is resolved to its snapshot; a hub id is looked up there, or
    downloaded.

    Raises:
        UserError: there is no such folder, or no adapter in it; the message lists what is there.
    """
    name, folder = str(folder), Path(folder).expanduser()
    if folder.is_dir():
        folder = open_folder(folder, holds=_WEIGHTS_FILES)
        if find_weights(folder):
            return folder
        place = newest_checkpoint(folder) or folder
        if find_weights(place):
            return place
        # Answers of an adapter from a hub go into a folder of its name.
        cached = try_to_load_from_cache(name, ADAPTER_CONFIG_FILE) if is_hub_id(name) else None
        if isinstance(cached, str):
            return Path(cached).parent
        found = ", ".join(sorted(entry.name for entry in place.iterdir())[:12]) or "nothing"
        raise UserError(
            f"{place}: no adapter here, wanted {WEIGHTS_FILE} or {WEIGHTS_FILE_2023}, found "
            f"{found}; pass a folder that holds one"
        )
    if folder.exists():
        raise UserError(
            f"{folder}: is a file: pass the folder it lies in (an adapter is a folder with "
            f"{WEIGHTS_FILE})"
        )
    fault = "no such folder"
    if is_hub_id(name):
        try:
            return find_adapter(fetch(name, (ADAPTER_CONFIG_FILE, *_WEIGHTS_FILES)))
        except UserError:
            raise
        except Exception as error:  # hub clients raise many kinds of exceptions
            reason = reason_of(error)
            fault = f"no such folder, and the hub does not give it ({reason[:200]})"
    raise UserError(f"{folder}: {fault} (an adapter is a folder with {WEIGHTS_FILE})")


def find_weights(folder: Path) -> Path | None:
    """The weights file of an adapter folder: today's, that of 2023, or another that holds LoRA.

    Raises:
        UserError: several other files hold LoRA.
    """
    files = (folder / name for name in _WEIGHTS_FILES)
    if found := next((file for file in files if file.is_file()), None):
        return found
    others = [folder / "pytorch_model.bin", *sorted(folder.glob("*.pt"))]
    with_lora = [file for file in others if file.is_file() and _has_lora(file)]
    if len(with_lora) > 1:
        names = ", ".join(file.name for file in with_lora)
        raise UserError(f"{folder}: {names} all hold LoRA weights; leave one of them there")
    return with_lora[0] if with_lora else None


def _has_lora(path: Path) -> bool:
    from glmtune.models.weights import load_bin  # which imports torch

    try:
        return any(".lora_A." in key for key in load_bin(path, device="meta"))
    except UserError:  # an optimiser's state, for example
        return False


def refuse_existing(folder: str | Path) -> None:
    """Raise a UserError where a result would overwrite existing files."""
    folder = Path(folder)
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise UserError(f"{folder}: is there already and not empty; name a new folder or remove it")


def check_held_out(adapter: Path) -> None:
    """Make sure that the run an adapter came from held rows out.

    Raises:
        UserError: it did not, its recipe cannot be read, or there is no recipe beside the adapter.
    """
    fix = "name a file of rows with --data_path"
    recipe = next(iter(find_around(adapter, RECIPE_FILE)), None)
    if recipe is None:
        raise UserError(f"{adapter}: no {RECIPE_FILE} says which rows its run held out; {fix}")
    run = read_config(TrainSettings, str(recipe), {})
    if not run.eval_ratio and not run.eval_dataset_path:
        raise UserError(
            f"{recipe}: eval_ratio 0, so the run held no row out; {fix}, or train with "
            "--eval_ratio 0.05"
        )
